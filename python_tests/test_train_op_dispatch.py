"""The training op as PyTorch sees it: autograd, torch.compile, autocast, random bits, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import (
    SHAPES,
    cast,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    relative_error,
    same_bits,
)
from train_calls import philox
from train_op_checks import (
    TOKEN_MAP,
    cotangents,
    make_train_case,
    op_arguments,
    run_op,
    soft_gates,
    truth_of,
)

import c2c_ext
from c2c_ext import reference
from c2c_ext.training_op import ARGUMENTS, fuse_training, saved_bytes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"weighting": False, "depth": 4}])
def test_opcheck(changes, recompute):
    fuser, base, sharer = make_train_case(torch.float32, **changes)
    for t in flat(base) + flat(sharer):
        t.requires_grad_()
    gate = torch.rand(4, 1, 2, 5).requires_grad_()
    arguments = op_arguments(
        fuser,
        base,
        sharer,
        gate,
        TOKEN_MAP,
        dropout=0.1,
        seed=3,
        row_seeds=torch.tensor([5, 6]),
        recompute=recompute,
    )
    torch.library.opcheck(torch.ops.c2c.fuse.default, arguments)
    with torch.no_grad():
        _, saved = torch.ops.c2c.fuse(*arguments)
    weighted = fuser.config.weighting
    needed = [True] * 13 + [weighted] * 5
    backward = (cotangents(base), *arguments, saved, needed)
    torch.library.opcheck(
        torch.ops.c2c.fuse_backward.default,
        backward,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_saved_bytes_are_what_is_saved():
    for changes in ({}, {"weighting": False}, {"depth": 6, "kinds": ("key",)}):
        fuser, base, sharer = make_train_case(torch.float32, **changes)
        inputs = {t.data_ptr() for t in (*flat(base), *flat(sharer), *fuser.parameters())}
        for recompute, expected in (
            (False, 10 * saved_bytes(fuser.config, torch.float32)),
            (True, 0),
        ):
            seen = {}

            def pack(t, seen=seen, inputs=inputs):
                if t.data_ptr() not in inputs:
                    seen[t.data_ptr()] = t.nbytes
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                fuse_training(base, sharer, fuser, recompute=recompute)
            gates = 4 * len(fuser.groups[0].gate_logit)
            assert sum(seen.values()) == expected + gates


def test_gradient_of_a_gradient_is_refused():
    fuser, base, sharer = make_train_case()
    leaf = base[0][0].requires_grad_()
    out = fuse_training(base, sharer, fuser, token_map=TOKEN_MAP)
    (grad,) = torch.autograd.grad(out[0][0].square().sum(), leaf, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="gradient of a gradient cannot be computed"):
        grad.sum().backward()


def test_second_backward_needs_retain_graph():
    fuser, base, sharer = make_train_case()
    out = fuse_training(base, sharer, fuser, token_map=TOKEN_MAP)[0][0].sum()
    out.backward(retain_graph=True)
    first = fuser.groups[0].in_weight.grad.clone()
    out.backward()
    assert torch.equal(fuser.groups[0].in_weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_input_changed_before_backward_is_refused():
    fuser, base, sharer = make_train_case()
    out = fuse_training(base, sharer, fuser, token_map=TOKEN_MAP)[0][0].sum()
    with torch.no_grad():
        fuser.groups[0].in_weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_no_grad_and_inference_mode_record_nothing():
    fuser, base, sharer = make_train_case()
    expected = flat(fuse_training(base, sharer, fuser, token_map=TOKEN_MAP))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = flat(fuse_training(base, sharer, fuser, token_map=TOKEN_MAP))
        assert not any(t.requires_grad for t in out)
        assert all(same_bits(a, b.detach()) for a, b in zip(out, expected, strict=True))


# ---- torch.compile, autocast ---------------------------------------------------------------------


def training_step(fuser, base, sharer, noise, seed, row_seeds=None):
    gates = torch.sigmoid(fuser.groups[0].gate_logit.view(2, 2, 1, 1, 1) + noise)
    fused = fuse_training(
        base,
        sharer,
        fuser,
        token_map=TOKEN_MAP,
        gates=gates,
        dropout=0.2,
        seed=seed,
        row_seeds=row_seeds,
    )
    return sum(t.float().square().mean() for pair in fused for t in pair)


@pytest.mark.parametrize(
    ("dtype", "by_row"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16-rows"],
)
def test_compiled_training_step_equals_eager(dtype, by_row):
    torch._dynamo.reset()
    fuser, base, sharer = make_train_case(dtype)
    compiled_fuser = copy.deepcopy(fuser)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(training_step, fullgraph=True, backend=graphs)
    for seed in (5, 6, 7, 8):
        noise = torch.randn(2, 2, 2, 2, 5, generator=torch.Generator().manual_seed(seed))
        results = []
        for run, own in ((training_step, fuser), (step, compiled_fuser)):
            own.zero_grad()
            rows = torch.tensor([seed, -seed]) if by_row else None
            loss = run(own, base, sharer, noise, seed, rows)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in own.parameters())])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert graphs.frame_count <= 2  # not one per seed


def test_compiled_fuse_with_gradients_equals_eager():
    torch._dynamo.reset()
    fuser, base, sharer = make_train_case(torch.float32)

    def loss(fuser, base, sharer):
        fused = c2c_ext.fuse(base, sharer, fuser, token_map=TOKEN_MAP.clamp(max=5))
        return sum(t.square().mean() for pair in fused for t in pair)

    compiled_fuser = copy.deepcopy(fuser)
    loss(fuser, base, sharer).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(
        compiled_fuser, base, sharer
    ).backward()
    for p, q in zip(fuser.parameters(), compiled_fuser.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize("caches", ["same", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_runs_in_its_dtype_with_float32_parameters(dtype, caches):
    fuser, base, sharer = make_train_case(dtype)
    expected = run_op(fuser, base, sharer, token_map=TOKEN_MAP)
    if caches == "float32":
        base, sharer = cast(base, torch.float32), cast(sharer, torch.float32)
    with torch.autocast("cpu", dtype):
        ours = run_op(fuser, base, sharer, token_map=TOKEN_MAP)
    for name, t in ours.items():
        if name.startswith(("out", "base", "sharer")):
            assert t.dtype == base[0][0].dtype
            t = t.to(dtype)
        assert same_bits(t, expected[name]), name
    assert ours["groups.0.in_weight"].dtype == torch.float32


# ---- the same bits -------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_whatever_the_threads_and_with_recompute(dtype, threads):
    # Products of more than one block, and sums that a product could split among threads.
    fuser, base, sharer = make_train_case(
        dtype, tokens=301, sharer_tokens=301, hidden_size=520, intermediate_size=96
    )
    gates = soft_gates(base)
    runs = []
    for count, recompute in ((1, False), (2, False), (3, True), (1, True)):
        threads(count)
        runs.append(
            run_op(fuser, base, sharer, gates=gates, dropout=0.1, seed=5, recompute=recompute)
        )
    for other in runs[1:]:
        assert all(same_bits(other[name], t) for name, t in runs[0].items())


@pytest.mark.parametrize(("seed", "offset"), [(3, 0), (-7, 1 << 40)])
@pytest.mark.parametrize("hidden", [16, 13])
def test_dropout_equals_reference_with_the_same_mask(hidden, seed, offset, monkeypatch):
    fuser, base, sharer = make_train_case(hidden_size=hidden, depth=4)
    p, streams, rows, blocks = 0.4, 4, 10, 4
    groups = -(-hidden // 4)
    count = blocks * streams * rows * groups
    words = philox(seed % (1 << 64), offset, np.arange(count, dtype=np.uint64))
    words = words.reshape(blocks, streams, rows, -1)
    kept = torch.from_numpy((words[..., :hidden] >= int(p * 2**32)).astype(np.float64))
    assert abs(kept.mean().item() - (1 - p)) < 0.05
    # The reference goes stream by stream: shared block, projection's blocks, weighting's.
    masks = [kept[b, g].view(2, 5, hidden) for g in range(streams) for b in range(blocks)]
    drawn = iter(masks)

    def dropout(x, probability):
        assert probability == p
        return x * next(drawn).to(x.dtype) / (1 - p)

    with monkeypatch.context() as patch:
        patch.setattr(reference.F, "dropout", dropout)
        truth = truth_of(fuser, base, sharer, token_map=TOKEN_MAP, dropout=p)
    assert next(drawn, None) is None
    keywords = {"token_map": TOKEN_MAP, "dropout": p, "seed": seed, "offset": offset}
    for recompute in (False, True):
        ours = run_op(fuser, base, sharer, recompute=recompute, **keywords)
        for name in truth:
            assert relative_error(ours[name], truth[name]) <= 1e-12, name


def test_seed_and_offset_choose_the_mask():
    fuser, base, sharer = make_train_case(torch.float32)

    def run(seed, offset):
        return run_op(fuser, base, sharer, dropout=0.5, seed=seed, offset=offset)

    first = run(1, 0)
    assert all(same_bits(t, first[name]) for name, t in run(1, 0).items())
    for other in (run(2, 0), run(1, 1)):
        assert max_abs(other["out[0]"] - first["out[0]"]) > 0.01
    plain = run_op(fuser, base, sharer)
    mean = torch.stack([run(seed, 0)["out[0]"] for seed in range(400)]).mean(0)
    change = (plain["out[0]"] - base[0][0]).abs().mean()
    assert (mean - plain["out[0]"]).abs().mean() < 0.2 * change


def test_row_seeds_make_a_rows_mask_its_own():
    """Neither the other rows nor tokens in front of a row's own change what it drops."""
    config = make_config(**SHAPES["groups"])  # groups of streams draw apart, too
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, 3, 5, 5, torch.float64)
    keywords = {"dropout": 0.4, "offset": 1}

    def part(pairs, row, first):
        return [tuple(t[row : row + 1, :, first:] for t in pair) for pair in pairs]

    seeds = torch.tensor([7, -(2**62), 7])
    whole = fuse_training(base, sharer, fuser, row_seeds=seeds, **keywords)
    for row in range(3):
        for first in (0, 2):
            own = fuse_training(
                part(base, row, first),
                part(sharer, row, first),
                fuser,
                row_seeds=seeds[row : row + 1],
                seed=99,  # not used then
                **keywords,
            )
            for ours, expected in zip(flat(own), flat(part(whole, row, first)), strict=True):
                assert relative_error(ours, expected) <= 1e-12
    other = fuse_training(base, sharer, fuser, row_seeds=torch.tensor([8, 1, 7]), **keywords)
    pairs = list(zip(flat(whole), flat(other), strict=True))
    changed = [[not same_bits(a[i], b[i]) for i in range(3)] for a, b in pairs]
    assert all(row == [True, True, False] for row in changed)


def test_shape_groups_draw_apart(monkeypatch):
    fuser = make_fuser(make_config(**SHAPES["groups"]))
    base, sharer = make_caches(fuser.config, 1, 5, 5)
    op, offsets = torch.ops.c2c.fuse, []

    def fuse(*arguments):
        offsets.append(arguments[ARGUMENTS.index("offset")])
        return op(*arguments)

    monkeypatch.setattr(torch.ops.c2c, "fuse", fuse)
    fuse_training(base, sharer, fuser, dropout=0.5, offset=8)
    assert len(fuser.groups) > 1 and offsets == [8 + i for i in range(len(fuser.groups))]

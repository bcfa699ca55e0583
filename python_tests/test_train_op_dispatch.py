"""The training op as PyTorch sees it: autograd, torch.compile, autocast, random bits, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import (
    cast,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    relative_error,
    same_bits,
)
from train_op_checks import (
    TOKEN_MAP,
    cotangents,
    run_op,
    run_with_gradients,
    soft_gates,
    truth_of,
)
from variants import UNCOMPILED

import c2c_ext
from c2c_ext import reference
from c2c_ext.training_op import ARGUMENTS, PARAMETERS, fuse_training, op_missing, saved_bytes


def make_case(dtype=torch.float64, device="cpu", tokens=5, sharer_tokens=6, **changes):
    config = make_config(**changes)
    fuser = make_fuser(config, device=device)
    if dtype == torch.float64:
        fuser = fuser.double()
    return fuser, *make_caches(config, 2, tokens, sharer_tokens, dtype, device)


def op_arguments(fuser, base, sharer, gate=None, token_map=None, **changes):
    """The op's arguments for the fuser's only shape group."""
    (group,) = fuser.groups
    sources = [sharer[layer] for layer in fuser.config.layer_map]
    values = {
        "base": flat(base),
        "sharer": flat(sources),
        "token_map": token_map,
        "gate": gate,
        **{name: getattr(group, name, None) for name in PARAMETERS},
        "activation": fuser.config.activation,
        "integration": fuser.config.integration,
        "reads_receiver": fuser.config.reads == "both",
        "dropout": 0.0,
        "seed": 0,
        "offset": 0,
        "recompute": False,
        **changes,
    }
    assert tuple(values) == ARGUMENTS
    return tuple(values.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"weighting": False, "depth": 4}])
def test_opcheck(changes, recompute):
    fuser, base, sharer = make_case(torch.float32, **changes)
    for t in flat(base) + flat(sharer):
        t.requires_grad_()
    gate = torch.rand(4, 1, 2, 5).requires_grad_()
    arguments = op_arguments(
        fuser, base, sharer, gate, TOKEN_MAP, dropout=0.1, seed=3, recompute=recompute
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
        fuser, base, sharer = make_case(torch.float32, **changes)
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
    fuser, base, sharer = make_case()
    leaf = base[0][0].requires_grad_()
    out = fuse_training(base, sharer, fuser, token_map=TOKEN_MAP)
    (grad,) = torch.autograd.grad(out[0][0].square().sum(), leaf, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(RuntimeError, match="gradient of a gradient cannot be computed"):
        grad.sum().backward()


def test_second_backward_needs_retain_graph():
    fuser, base, sharer = make_case()
    out = fuse_training(base, sharer, fuser, token_map=TOKEN_MAP)[0][0].sum()
    out.backward(retain_graph=True)
    first = fuser.groups[0].in_weight.grad.clone()
    out.backward()
    assert torch.equal(fuser.groups[0].in_weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


def test_input_changed_before_backward_is_refused():
    fuser, base, sharer = make_case()
    out = fuse_training(base, sharer, fuser, token_map=TOKEN_MAP)[0][0].sum()
    with torch.no_grad():
        fuser.groups[0].in_weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_no_grad_and_inference_mode_record_nothing():
    fuser, base, sharer = make_case()
    expected = flat(fuse_training(base, sharer, fuser, token_map=TOKEN_MAP))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = flat(fuse_training(base, sharer, fuser, token_map=TOKEN_MAP))
        assert not any(t.requires_grad for t in out)
        assert all(same_bits(a, b.detach()) for a, b in zip(out, expected, strict=True))


# ---- torch.compile, autocast ---------------------------------------------------------------------


def training_step(fuser, base, sharer, noise, seed):
    gates = torch.sigmoid(fuser.groups[0].gate_logit.view(2, 2, 1, 1, 1) + noise)
    fused = fuse_training(
        base, sharer, fuser, token_map=TOKEN_MAP, gates=gates, dropout=0.2, seed=seed
    )
    return sum(t.float().square().mean() for pair in fused for t in pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_compiled_training_step_equals_eager(dtype):
    torch._dynamo.reset()
    fuser, base, sharer = make_case(dtype)
    compiled_fuser = copy.deepcopy(fuser)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(training_step, fullgraph=True, backend=graphs)
    for seed in (5, 6, 7, 8):
        noise = torch.randn(2, 2, 2, 2, 5, generator=torch.Generator().manual_seed(seed))
        results = []
        for run, own in ((training_step, fuser), (step, compiled_fuser)):
            own.zero_grad()
            loss = run(own, base, sharer, noise, seed)
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in own.parameters())])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert graphs.frame_count <= 2  # not one per seed


def test_compiled_fuse_with_gradients_equals_eager():
    torch._dynamo.reset()
    fuser, base, sharer = make_case(torch.float32)

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
    fuser, base, sharer = make_case(dtype)
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
    fuser, base, sharer = make_case(
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


def philox(seed: int, offset: int, groups: np.ndarray) -> np.ndarray:
    """Philox4x32-10 words ``[groups, 4]``: key = seed, counter = [group, offset]."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    groups = groups.astype(np.uint64)
    c = [groups & low, groups >> shift]
    c += [np.full_like(groups, offset) & low, np.full_like(groups, offset) >> shift]
    key = [np.uint64(seed) & low, np.uint64(seed) >> shift]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> shift) ^ c[1] ^ key[0], b & low, (a >> shift) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=-1).astype(np.uint32)


def test_philox_known_answers():
    # Random123's kat_vectors: counter and key zero, and all ones.
    words = philox(0, 0, np.array([0]))[0]
    assert [hex(w) for w in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = (1 << 64) - 1
    words = philox(ones, ones, np.array([ones], dtype=np.uint64))[0]
    assert [hex(w) for w in words] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


@pytest.mark.parametrize(("seed", "offset"), [(3, 0), (-7, 1 << 40)])
@pytest.mark.parametrize("hidden", [16, 13])
def test_dropout_equals_reference_with_the_same_mask(hidden, seed, offset, monkeypatch):
    fuser, base, sharer = make_case(hidden_size=hidden, depth=4)
    p, streams, rows, blocks = 0.4, 4, 10, 4
    groups = -(-hidden // 4)
    count = blocks * streams * rows * groups
    words = philox(seed % (1 << 64), offset, np.arange(count)).reshape(blocks, streams, rows, -1)
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
    fuser, base, sharer = make_case(torch.float32)

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


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("base", lambda v: [], "base must have at least one entry"),
        ("base", lambda v: [v[0].int(), *v[1:]], r"base\[0\] must be float64, float32"),
        ("base", lambda v: [*v[:3], v[3].float()], r"base\[3\] must have the dtype of base\[0\]"),
        ("base", lambda v: [*v[:3], v[3][:, :, :4]], r"base\[3\] dim 2 must equal 5 .* got 4"),
        ("sharer", lambda v: v[:3], "sharer must have 4 entries .* got 3"),
        ("sharer", lambda v: [*v[:3], v[3][0]], r"sharer\[3\] must have 4 dimensions, got 3"),
        ("sharer", lambda v: [t[:, :, :4] for t in v], r"sharer\[0\] dim 2 \(tokens\) must be at "),
        ("token_map", lambda v: TOKEN_MAP.int(), "token_map must be int64"),
        ("token_map", lambda v: TOKEN_MAP[:, :4], "token_map dim 1 must equal 5 .* got 4"),
        ("token_map", lambda v: TOKEN_MAP[None], r"token_map must be \[N\] or \[B, N\], got 3"),
        ("gate", lambda v: torch.ones(4, 1, 1, 1), "gate must be float64 for float64 caches"),
        ("gate", lambda v: torch.ones(3, 1, 1, 1).double(), "gate dim 0 must equal 4 .* got 3"),
        ("gate", lambda v: torch.ones(4, 1, 3, 1).double(), "gate dim 2 must be 1 or 2 .* got 3"),
        ("in_weight", lambda v: v[:, :, 1:], "in_weight dim 2 must equal 20 .* got 19"),
        ("in_weight", lambda v: v.int(), "in_weight must be float64, float32, .* got another"),
        ("in_bias", lambda v: v[0], "in_bias must have 2 dimensions, got 1"),
        ("proj_w1", lambda v: v[:, :0], r"proj_w1 dim 1 \(blocks\) must be in 1..1024, got 0"),
        ("proj_w2", lambda v: v[..., 1:], "proj_w2 dim 3 must equal 24 .* got 23"),
        ("weight_w1", lambda v: None, "weight_w1 must be given if and only if weight_norm is"),
        ("head_bias", lambda v: v[:, :1], "head_bias dim 1 must equal 2 .* got 1"),
        ("activation", lambda v: "tanh", "activation must be gelu, relu or silu, got tanh"),
        ("integration", lambda v: "sum", "integration must be residual, .* got sum"),
        ("reads_receiver", lambda v: False, "in_weight dim 2 must equal 4 .* got 20"),
        ("dropout", lambda v: 1.0, r"dropout must be in \[0, 1\), got 1"),
        ("dropout", lambda v: float("nan"), r"dropout must be in \[0, 1\), got nan"),
    ],
)
def test_bad_arguments_are_refused(argument, change, message):
    fuser, base, sharer = make_case()
    arguments = dict(zip(ARGUMENTS, op_arguments(fuser, base, sharer), strict=True))
    arguments[argument] = change(arguments[argument])
    with torch.no_grad(), pytest.raises(RuntimeError, match="c2c_ext.fuse: " + message):
        torch.ops.c2c.fuse(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": lambda v: v[:2]}, "grad_out must have 4 entries .* got 2"),
        ({"grad_out": lambda v: [v[0].mT, *v[1:]]}, r"grad_out\[0\] dim 2 must equal 5"),
        ({"grad_out": lambda v: [v[0].float(), *v[1:]]}, r"grad_out\[0\] must have the dtype"),
        ({"saved": lambda v: v[1:]}, "saved must have 8 entries, as forward returned, got 7"),
        ({"saved": lambda v: [v[0][:, 1:], *v[1:]]}, r"saved\[0\] dim 1 must equal 10 .* got 9"),
        ({"saved": lambda v: [v[0].mT.contiguous().mT, *v[1:]]}, r"saved\[0\] must be contiguous"),
        ({"needed": lambda v: v[1:]}, "needed must have 18 entries, got 17"),
        ({"needed": lambda v: [True] * 18}, "needed must not want gate without one"),
    ],
)
def test_bad_backward_arguments_are_refused(change, message):
    fuser, base, sharer = make_case()
    arguments = op_arguments(fuser, base, sharer)
    with torch.no_grad():
        _, saved = torch.ops.c2c.fuse(*arguments)
    parts = {"grad_out": flat(base), "saved": saved, "needed": [False] * 18}
    for name, function in change.items():
        parts[name] = function(parts[name])
    with torch.no_grad(), pytest.raises(RuntimeError, match="c2c_ext.fuse: " + message):
        torch.ops.c2c.fuse_backward(parts["grad_out"], *arguments, parts["saved"], parts["needed"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"gates": [(torch.ones(()), torch.ones(()))]}, "one pair per receiver layer .* got 1"),
        ({"gates": torch.ones(2, 2, 1, 1)}, r"gates must be \[2, 2, 1\|B, 1\|Ht, 1\|N\]"),
        ({"gates": [(torch.ones(5), torch.ones(()))] * 2}, r"gates\[0\] key must be broadcastable"),
    ],
)
def test_bad_gates_are_refused(keywords, message):
    fuser, base, sharer = make_case()
    with pytest.raises(ValueError, match=message):
        fuse_training(base, sharer, fuser, token_map=TOKEN_MAP, **keywords)


def test_bad_calls_are_refused():
    fuser, base, sharer = make_case()
    with pytest.raises(ValueError, match="base_pairs must have 2 layers, got 1"):
        fuse_training(base[:1], sharer, fuser)
    with pytest.raises(ValueError, match="sharer_pairs must have 3 layers, got 1"):
        fuse_training(base, sharer[:1], fuser)
    gateless, *caches = make_case(gate=False)
    with pytest.raises(ValueError, match="gates must not be given for a fuser without gates"):
        fuse_training(*caches, gateless, gates=soft_gates(caches[0]))


@pytest.mark.parametrize("name", UNCOMPILED)
def test_variants_without_kernels_are_named_and_fuse_by_reference(name):
    fuser, base, sharer = make_case(tokens=5, sharer_tokens=5, **UNCOMPILED[name])
    assert "has no compiled kernels" in op_missing(fuser, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"training op cannot run: projection=.* has no"):
        fuse_training(base, sharer, fuser)

    def fuse(base, sharer, fuser, gates):
        return c2c_ext.fuse(base, sharer, fuser)

    ours = run_with_gradients(fuse, fuser, base, sharer)
    for name, t in truth_of(fuser, base, sharer).items():
        assert relative_error(ours[name], t) <= 1e-13, name


def test_op_missing_elsewhere():
    fuser, _, _ = make_case()
    assert op_missing(fuser, torch.device("cpu")) is None
    assert "no kernels for meta" in op_missing(fuser, torch.device("meta"))

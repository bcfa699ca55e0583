"""The CUDA training op and its backward with their kernels run by the CPU."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import emulated
import golden_data
import pytest
import torch
import train_calls
from conftest import flat, relative_error, same_bits
from golden_data import KINDS, TRAIN_FILES
from train_calls import (
    INPUTS,
    Step,
    assert_same_bits,
    assert_step,
    made,
    through_reference,
)
from variants import COMPILED

from c2c_ext import reference

ORDERS = ["forward", "reverse"]  # of the emulated threads
MAP = [[8, -1, 0, 3, 3, 1, 2], [-1, 1, 2, 7, -1, 3, 9]]
# Odd sizes, rows that are not aligned, streams of two shapes, sharers that several layers read.
SHAPES = {
    "even": {},
    "deeper": {"depth": 4},
    "deepest": {"depth": 5},
    "primes": {
        "receiver": [(3, 7)],
        "sharer": [(5, 11), (5, 11)],
        "layer_map": [1],
        "hidden_size": 23,
        "intermediate_size": 37,
        "depth": 4,
    },
    "ones": {
        "receiver": [(1, 1)],
        "sharer": [(1, 1)],
        "layer_map": [0],
        "hidden_size": 1,
        "intermediate_size": 1,
    },
    "groups": {
        "receiver": [(2, 8), (1, 20), (2, 8)],
        "sharer": [(1, 4), (3, 6)],
        "layer_map": [1, 0, 1],
    },
}


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("C2C_EXT_CUDA_PATH", "C2C_EMULATE_SCRATCH", "C2C_EMULATE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch) -> str:
    monkeypatch.setenv("C2C_EMULATE_ORDER", request.param)
    return request.param


def run(step: Step, **keywords):
    emulated.load()
    return train_calls.through_op(torch.ops.c2c_emulated, step, **keywords)


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "j"), golden_data.cases(TRAIN_FILES))
def test_golden_training_equals_truth(name, j, recompute):
    file = golden_data.load(name)
    case, meta = file.case(j), file.meta["cases"][j]
    fuser = golden_data.build_fuser(file, j, torch.float64)
    logits = fuser.groups[0].gate_logit.detach().clone().requires_grad_()
    base, sharer, above = (
        [tuple(case[f"{side}_{kind}"].double() for kind in KINDS)]
        for side in ("target", "source", "cot")
    )
    if meta["mode"] == "eval":
        gate = (logits > 0).double()[:, None, None, None]
    else:
        gate = torch.stack(
            [
                reference.soft_gate(logits[i], case[f"u_{kind}"], meta["gate_temperature"])
                for i, kind in enumerate(KINDS)
            ]
        ).squeeze(-1)
    step = Step(fuser, base, sharer, above, gates=[gate.detach()])
    fused, gradients = run(step, recompute=recompute)
    for kind, out in zip(KINDS, fused[0], strict=True):
        assert relative_error(out, case[f"out_{kind}"]) <= 1e-10, kind
    if meta["mode"] != "eval":
        gate.backward(gradients["gate.0"])
    checked = 0
    for parameter in file.weights():
        if parameter == "gate_temperature":
            continue
        attribute, index = golden_data.place(parameter)
        ours = logits.grad if attribute == "gate_logit" else gradients[f"{attribute}.0"]
        if parameter in meta["params_without_grad"]:
            assert attribute == "gate_logit" or not ours[index].any(), parameter
        else:
            truth = case[f"grad.{parameter}"]
            assert relative_error(ours[index], truth) <= 1e-10, parameter
        checked += 1
    assert checked == 2 * (13 + 3 * (fuser.config.depth - 2))
    for side, ours in (("source", "sharer"), ("target", "base")):
        for i, kind in enumerate(KINDS):
            truth = case[f"grad_in.{side}_{kind}"]
            assert relative_error(gradients[f"{ours}.0.{i}"], truth) <= 1e-10, (side, kind)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5)])
def test_numbers_equal_autograd(shape, batch, tokens, order):
    step = made(torch.float64, batch, tokens, tokens + 2, gates="bhn", **SHAPES[shape])
    assert_step(step, run(step))


@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "ones"])
def test_numbers_in_every_dtype(shape, dtype):
    """With tokens enough that the largest of the roundings is no lottery."""
    step = made(dtype, 2, 40, 42, gates="bhn", **SHAPES[shape])
    assert_step(step, run(step))


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_variants_equal_autograd(changes, depth, activation):
    changes = {"depth": depth, **changes, "activation": activation}
    step = made(gates="hn", **changes)
    step.token_map = torch.tensor([1, -1, 4, 1, 0])
    assert_step(step, run(step))


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
def test_variants_in_every_dtype(changes, dtype):
    """But relu, whose slope jumps: one rounding may change a gradient by any amount."""
    step = made(dtype, 2, 40, gates="h", **{**changes, "activation": "silu"})
    assert_step(step, run(step))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_of_the_caches_dtype(dtype):
    step = made(dtype, 2, 30, gates="h", depth=4)
    step.fuser.to(dtype)
    ours = run(step)
    assert_step(step, ours)
    assert all(t.dtype == dtype for name, t in ours[1].items() if not name.startswith("gate"))


@pytest.mark.parametrize("hidden", [300, 1031])
def test_rows_of_several_warps(hidden, dtype, order):
    """Wide enough for every thread of a block to have columns, and for more than one pass."""
    shape = {"receiver": [(6, 40)], "sharer": [(3, 88)], "layer_map": [0]}
    step = made(dtype, 2, 3, gates="h", hidden_size=hidden, intermediate_size=640, **shape)
    step.dropout, step.seed = 0.0, 1
    assert_step(step, run(step))


@pytest.mark.parametrize("tokens", [127, 128, 129, 300])
def test_sums_over_many_rows(tokens, dtype):
    """Column sums split rows into parts of 128."""
    small = {"receiver": [(2, 8)], "sharer": [(1, 4)], "layer_map": [0]}
    step = made(dtype, 1, tokens, gates="", hidden_size=24, intermediate_size=24, **small)
    assert_step(step, run(step))


@pytest.mark.parametrize("shape", ["", "b", "h", "n", "bh", "bn", "hn", "bhn"])
@pytest.mark.parametrize("integration", ["residual", "interpolation", "replacement"])
def test_gate_of_any_shape(shape, integration):
    step = made(batch=3, tokens=13, gates=shape, integration=integration)
    assert_step(step, run(step))


def test_gate_of_any_layout():
    step = made(gates="bhn")
    (gate,) = step.gates
    expected = run(step)
    step.gates = [gate.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)]
    assert not step.gates[0].is_contiguous()
    assert_same_bits(run(step), expected)
    step.gates = [gate[:, :1, :, :1].expand_as(gate)]
    assert_step(step, run(step))


@pytest.mark.parametrize("integration", ["residual", "interpolation", "replacement"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_cpus_op(integration, dropout, recompute):
    step = made(batch=2, tokens=7, sharer_tokens=9, gates="bhn", integration=integration, depth=4)
    step.token_map, step.dropout, step.seed = torch.tensor(MAP), dropout, 11
    step.row_seeds = torch.tensor([3, -(2**40)]) if recompute else None
    step.gates[0][0] = 0
    step.gates[0][1:, 0, 1, ::2] = 0
    ours = run(step, recompute=recompute)
    theirs = train_calls.through_op(torch.ops.c2c, step, recompute=recompute)
    for x, t in zip(flat(ours[0]), flat(theirs[0]), strict=True):
        assert relative_error(x, t) <= 1e-13
    for name, t in theirs[1].items():
        assert relative_error(ours[1][name], t) <= 1e-12, name
    assert not all(map(same_bits, ours[1].values(), theirs[1].values()))  # two ops, not one


@pytest.mark.parametrize("integration", ["residual", "interpolation", "replacement"])
def test_closed_gates_keep_every_bit(integration, dtype):
    """Of the token and of its gradient; nothing else is learned but about the gate."""
    step = made(dtype, gates="", integration=integration)
    step.gates[0].fill_(0)
    for t in flat(step.base):
        t[0, 0, 0, 0] = -0.0
    expected = through_reference(step.in_float64())[1]["gate.0"]
    fused, gradients = run(step)
    assert all(map(same_bits, flat(fused), flat(step.base)))
    above = [gradients[f"base.{i}.{kind}"] for i in range(2) for kind in range(2)]
    assert all(map(same_bits, above, flat(step.cotangents)))
    for name, gradient in gradients.items():
        if name.startswith("gate"):
            assert relative_error(gradient, expected) <= 100 * torch.finfo(dtype).eps
        elif not name.startswith("base"):
            assert not gradient.any(), name


# ---- caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 2])
def test_token_map(batches, dtype, order):
    """Repeated tokens, tokens that nobody reads, tokens that stay."""
    step = made(dtype, batches, 7, 9, gates="n", layer_map=(0, 0))
    step.token_map = torch.tensor(MAP[:batches])
    for t in flat(step.cotangents):
        t[0, :, 1, 0] = -0.0  # of a token that stays: not even 0.0 is added
    fused, gradients = ours = run(step)
    assert_step(step, ours)
    for i, row in enumerate(MAP[:batches]):
        for n, source in enumerate(row):
            if 0 <= source < 9:
                continue
            for layer, kind in itertools.product(range(2), range(2)):
                above = step.cotangents[layer][kind]
                sent_back = gradients[f"base.{layer}.{kind}"]
                assert same_bits(fused[layer][kind][i, :, n], step.base[layer][kind][i, :, n])
                assert same_bits(sent_back[i, :, n], above[i, :, n])
        for unread in set(range(9)) - set(row):
            assert not gradients["sharer.0.0"][i, :, unread].any()


LONG = [(300, 40), (40, 300), (129, 128), (9, 129), (1, 1)]


@pytest.mark.parametrize(("tokens", "sharer_tokens"), LONG)
def test_long_token_maps(tokens, sharer_tokens, order):
    """More tokens than a block of the kernel that lists the readers of a token has threads."""
    small = {"receiver": [(1, 2)], "sharer": [(1, 3)], "layer_map": [0]}
    sizes = {"hidden_size": 4, "intermediate_size": 4}
    step = made(torch.float64, 2, tokens, sharer_tokens, **small, **sizes)
    generator = torch.Generator().manual_seed(tokens)
    step.token_map = torch.randint(-3, sharer_tokens + 3, (2, tokens), generator=generator)
    assert_step(step, run(step))


def test_map_of_far_values_and_any_layout():
    step = made(tokens=6, sharer_tokens=4)
    wild = torch.tensor([[-(2**63), 2**63 - 1, 2**31, 2**32, 2, 4], [3, -1, 0, 0, 2**40, 1]])
    step.token_map = wild
    expected = run(step)
    assert_step(step, expected)
    step.token_map = wild.t().contiguous().t()
    assert_same_bits(run(step), expected)
    row = wild[1].repeat_interleave(2)[::2]
    step.token_map = row.expand(2, 6)
    assert step.token_map.stride() == (0, 2)
    by_batch = run(step)
    step.token_map = row
    assert_same_bits(run(step), by_batch)


def test_map_to_an_empty_sharer():
    step = made(sharer_tokens=0)
    step.token_map = torch.zeros(5, dtype=torch.int64)
    fused, gradients = run(step)
    assert all(map(same_bits, flat(fused), flat(step.base)))
    assert all(gradients[f"sharer.{i}.0"].shape[2] == 0 for i in (0, 2))
    for name in ("in_weight.0", "out_bias.0", "head_weight.0", "proj_norm.0"):
        assert not gradients[name].any(), name


def layouts(t: torch.Tensor):
    """The same numbers in other places: transposed, every other element, misaligned."""
    yield t.transpose(1, 2).contiguous().transpose(1, 2)
    yield t.repeat_interleave(2, -1)[..., ::2]
    padded = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    yield padded.copy_(t.flatten()).view(t.shape)
    yield t.flip(0).contiguous().flip(0).permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def test_caches_and_gradients_of_any_layout(dtype):
    step = made(dtype, 2, 30, 31, gates="h")
    for which in ("base", "sharer", "cotangents"):
        pairs = getattr(step, which)
        for i in range(4):
            other = [tuple(list(layouts(t))[i] for t in pair) for pair in pairs]
            assert_step(step, run(dataclasses.replace(step, **{which: other})))


def test_expanded_gradients():
    """As sum() and its like send them back: without memory of their own."""
    step = made(gates="h")
    step.cotangents = [tuple(torch.ones(()).double().expand_as(t) for t in p) for p in step.base]
    assert step.cotangents[0][0].stride() == (0, 0, 0, 0)
    assert_step(step, run(step))


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_empty_is_accepted(batch, tokens, with_map, recompute):
    step = made(batch=batch, tokens=tokens, sharer_tokens=4, gates="h")
    step.token_map = torch.zeros(batch, tokens, dtype=torch.int64) if with_map else None
    fused, gradients = run(step, recompute=recompute)
    assert [t.shape for t in flat(fused)] == [t.shape for t in flat(step.base)]
    truth = through_reference(step)[1]
    for name, gradient in gradients.items():
        assert gradient.shape == truth[name].shape and not gradient.any(), name


# ---- what is computed, kept and repeated --------------------------------------------------------


def test_recompute_gives_the_same_bits(dtype):
    step = made(dtype, 2, 5, gates="hn", depth=4)
    step.dropout, step.seed = 0.2, 3
    assert_same_bits(run(step, recompute=True), run(step))


@pytest.mark.parametrize("wanted", [*INPUTS, (), ("base", "gate"), ("weight_norm", "in_bias")])
def test_only_wanted_gradients_are_returned(wanted):
    step = made(gates="h", depth=4)
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    _, gradients = run(step, wanted=wanted)
    expected = run(step)
    assert {name.partition(".")[0] for name in gradients} == set(wanted)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[1][name]) <= 1e-13, name


@pytest.mark.parametrize("scratch", [1, 20000, 40000])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_of_streams_give_the_same_numbers(scratch, recompute, monkeypatch):
    step = made(gates="h", receiver=[(2, 8)] * 3, sharer=[(1, 4)] * 3, layer_map=[0, 2, 1])
    step.token_map, step.dropout = torch.tensor([1, -1, 4, 1, 0]), 0.2
    expected = run(step)
    monkeypatch.setenv("C2C_EMULATE_SCRATCH", str(scratch))
    ours = run(step, recompute=recompute)
    for x, t in zip(flat(ours[0]), flat(expected[0]), strict=True):
        assert relative_error(x, t) <= 1e-13
    for name, t in expected[1].items():
        assert relative_error(ours[1][name], t) <= 1e-13, name


def test_more_streams_than_one_launch_takes():
    layers = 70  # 140 streams, of which one launch takes 128
    small = {"hidden_size": 4, "intermediate_size": 4}
    step = made(
        tokens=2,
        gates="h",
        receiver=[(1, 2)] * layers,
        sharer=[(1, 2)] * 2,
        layer_map=[i % 2 for i in range(layers)],
        **small,
    )
    assert_step(step, run(step))


def test_same_bits_in_both_thread_orders(dtype, monkeypatch):
    step = made(dtype, 2, 4, gates="", hidden_size=300, intermediate_size=96)
    step.token_map, step.dropout = torch.tensor([1, -1, 1, 0]), 0.1
    runs = []
    for order in (*ORDERS, *ORDERS):
        monkeypatch.setenv("C2C_EMULATE_ORDER", order)
        runs.append(run(step))
    for other in runs[1:]:
        assert_same_bits(other, runs[0])


def test_inputs_are_not_written():
    step = made(gates="h", depth=4)
    step.token_map = torch.tensor([1, -1, 4, 1, 0])
    before = copy.deepcopy(step)
    run(step)
    for which in ("base", "sharer", "cotangents"):
        assert all(map(same_bits, flat(getattr(step, which)), flat(getattr(before, which))))
    assert same_bits(step.gates[0], before.gates[0])
    pairs = zip(step.fuser.parameters(), before.fuser.parameters(), strict=True)
    assert all(same_bits(a.detach(), b.detach()) for a, b in pairs)


def test_bad_numbers_stay_in_their_token():
    """NaN in a token that stays reaches nothing but that token."""
    step = made()
    step.token_map = torch.tensor([1, -1, 4, 1, 0])
    expected = run(step)
    for pairs in (step.base, step.cotangents):
        for t in flat(pairs):
            t[:, :, 1] = torch.nan
    fused, gradients = run(step)
    for t, e in zip(flat(fused), flat(expected[0]), strict=True):
        assert t[:, :, 1].isnan().all()
        t[:, :, 1] = e[:, :, 1]
        assert same_bits(t, e)
    for name, gradient in gradients.items():
        if name.startswith("base"):
            assert gradient[:, :, 1].isnan().all()
            gradient[:, :, 1] = expected[1][name][:, :, 1]
        assert same_bits(gradient, expected[1][name]), name


def test_schema_is_that_of_the_op():
    emulated.load()
    for name in ("fuse", "fuse_backward"):
        schema = str(getattr(torch.ops.c2c_emulated, name).default._schema)
        theirs = str(getattr(torch.ops.c2c, name).default._schema)
        assert schema == theirs.replace("c2c::", "c2c_emulated::")

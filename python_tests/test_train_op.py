"""The training op: outputs and gradients equal the reference's, in every variant and dtype."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import (
    SHAPES,
    assert_as_good_as_plain,
    cast,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    relative_error,
    same_bits,
    set_gates,
)
from torch.profiler import ProfilerActivity, profile
from train_op_checks import (
    TOKEN_MAP,
    by_kind,
    cotangents,
    plain_results,
    run_op,
    soft_gates,
    truth_of,
)
from variants import COMPILED

from c2c_ext import reference
from c2c_ext.training_op import fuse_training

CASES = {**SHAPES, **COMPILED}
# relu's slope jumps where a rounding carries a pre-activation across zero.
SMOOTH = ["even", "deepest", "groups", "silu"]
SMOOTH += [name for name, fields in COMPILED.items() if fields.get("activation") != "relu"]


def make_case(name="even", dtype=torch.float64, device="cpu", sharer_tokens=6, tokens=5, **changes):
    config = make_config(**{**CASES[name], **changes})
    fuser = make_fuser(config, device=device)
    if dtype == torch.float64:
        fuser = fuser.double()
    return fuser, *make_caches(config, 2, tokens, sharer_tokens, dtype, device)


def assert_equal_results(ours, truth, bound=1e-12, but=()):
    assert ours.keys() == truth.keys()
    for name in truth:
        if name not in but:
            assert relative_error(ours[name], truth[name]) <= bound, name


@pytest.mark.parametrize("per", ["token", "head", "stream"])
@pytest.mark.parametrize("name", CASES)
def test_float64_equals_reference(name, per, device):
    fuser, base, sharer = make_case(name, device=device)
    gates = soft_gates(base, per) if fuser.config.gate else None
    keywords = {"gates": gates, "token_map": TOKEN_MAP.to(device)}
    truth = truth_of(fuser, base, sharer, **keywords)
    assert_equal_results(run_op(fuser, base, sharer, **keywords), truth)
    assert max(max_abs(t) for name, t in truth.items() if "sharer" in name) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_float32_as_good_as_plain(name, device):
    fuser, base, sharer = make_case(name, torch.float32, device, 5)
    gates = soft_gates(base) if fuser.config.gate else None
    truth = truth_of(fuser, base, sharer, gates)
    plain = plain_results(fuser, base, sharer, gates)
    for key, t in run_op(fuser, base, sharer, gates=gates).items():
        assert_as_good_as_plain(t, [p[key] for p in plain], truth[key], key)


@pytest.mark.parametrize("params", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", SMOOTH)
def test_half_precision_as_good_as_plain(name, dtype, params, device):
    # Many channels and tokens: the largest of a few rounding errors is a lottery.
    fuser, base, sharer = make_case(
        name, dtype, device, 40, 40, hidden_size=64, intermediate_size=48
    )
    seen = copy.deepcopy(fuser).to(dtype)  # what products in this dtype see of the parameters
    if params == "same":
        fuser = seen
    gates = soft_gates(base) if fuser.config.gate else None
    if gates is not None:  # values that every dtype has
        gates = cast(cast(gates, dtype), torch.float32)
    truth = by_kind(truth_of(seen, base, sharer, gates))
    plain = [by_kind(draw) for draw in plain_results(fuser, base, sharer, gates)]
    ours = run_op(fuser, base, sharer, gates=gates)
    for key, p in fuser.named_parameters():
        assert ours[key].dtype == p.dtype
    for key, t in by_kind(ours).items():
        # What was computed in half precision, and is compared so, can be stored in float32.
        assert_as_good_as_plain(t.to(dtype), [p[key].to(dtype) for p in plain], truth[key], key)


def test_real_heads_as_good_as_plain(device):
    config = make_config([(8, 128)], [(2, 64)], [0], hidden_size=96, intermediate_size=80)
    fuser = make_fuser(config, device=device)
    base, sharer = make_caches(config, 2, 67, dtype=torch.float32, device=device)
    truth, plain = truth_of(fuser, base, sharer), plain_results(fuser, base, sharer)
    for key, t in run_op(fuser, base, sharer).items():
        assert_as_good_as_plain(t, [p[key] for p in plain], truth[key], key)


# ---- gates --------------------------------------------------------------------------------------


def test_gates_as_one_tensor_equal_pairs(device):
    fuser, base, sharer = make_case(device=device)
    pairs = [
        (torch.rand(2, 2, 5, 1, dtype=torch.float64), torch.rand(2, 2, 5, 1, dtype=torch.float64))
        for _ in base
    ]
    pairs = [(key.to(device), value.to(device)) for key, value in pairs]
    expected = run_op(fuser, base, sharer, gates=pairs)
    tensor = torch.stack([torch.stack(pair) for pair in pairs]).squeeze(-1).requires_grad_()
    out = fuse_training(base, [(k[:, :, :5], v[:, :, :5]) for k, v in sharer], fuser, gates=tensor)
    for i, t in enumerate(flat(out)):
        assert same_bits(t.detach(), expected[f"out[{i}]"])
    torch.autograd.backward(flat(out), cotangents(out))
    for i in range(4):
        assert relative_error(tensor.grad[i // 2, i % 2], expected[f"gates[{i}]"][..., 0]) <= 1e-13


def test_hard_gates_take_no_gradient_and_closed_streams_keep_their_bits(device):
    fuser, base, sharer = make_case(device=device)
    set_gates(fuser, {(0, "value"): 0.0, (1, "key"): -1.0})
    truth = truth_of(fuser, base, sharer, token_map=TOKEN_MAP.to(device))
    ours = run_op(fuser, base, sharer, token_map=TOKEN_MAP.to(device))
    assert_equal_results(ours, truth)
    assert not ours["groups.0.gate_logit"].any()
    for i in (1, 2):
        assert same_bits(ours[f"out[{i}]"], flat(base)[i])
        assert not ours["groups.0.in_weight"][i].any()
        assert torch.equal(ours[f"base[{i}]"], cotangents(base)[i])


def test_gate_that_underflows_closes_and_still_has_a_gradient(device):
    fuser, base, sharer = make_case(device=device)
    gates = soft_gates(base, "stream")
    gates[0] = (torch.zeros_like(gates[0][0]), gates[0][1])
    ours = run_op(fuser, base, sharer, gates=gates, token_map=TOKEN_MAP.to(device))
    assert_equal_results(ours, truth_of(fuser, base, sharer, gates, token_map=TOKEN_MAP.to(device)))
    assert same_bits(ours["out[0]"], base[0][0]) and ours["gates[0]"] != 0


# ---- layouts, sizes, subsets --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "none"])
def test_any_layout_of_grad_outputs(layout, device):
    fuser, base, sharer = make_case(device=device)
    make = {
        "expanded": lambda t: torch.full((), 0.5, dtype=t.dtype, device=device).expand(t.shape),
        "transposed": lambda t: torch.randn_like(t.mT).mT,
        "strided": lambda t: torch.randn(*t.shape, 2, dtype=t.dtype, device=device)[..., 0],
        "none": lambda t: None,
    }[layout]
    torch.manual_seed(0)
    grads = [make(t) for t in flat(base)]
    grads[3] = torch.ones_like(base[1][1])  # one at least
    results = []
    for run in (reference.fuse, fuse_training):
        mine = copy.deepcopy(fuser)
        leaf = base[1][1].clone().requires_grad_()
        out = run([base[0], (base[1][0], leaf)], sharer, mine, token_map=TOKEN_MAP.to(device))
        wanted = [(t, g) for t, g in zip(flat(out), grads, strict=True) if g is not None]
        torch.autograd.backward(*map(list, zip(*wanted, strict=True)))
        results.append({"leaf": leaf.grad} | {n: p.grad for n, p in mine.named_parameters()})
        results[-1].pop("groups.0.gate_logit")
    assert_equal_results(results[1], results[0])


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_layout_of_caches(layout, device):
    fuser, base, sharer = make_case(device=device)
    change = {
        "transposed": lambda t: t.mT.contiguous().mT,
        "strided": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[layout]
    moved = [[tuple(map(change, pair)) for pair in pairs] for pairs in (base, sharer)]
    plain = [[tuple(t.contiguous() for t in pair) for pair in pairs] for pairs in moved]
    expected = run_op(fuser, *plain, token_map=TOKEN_MAP.to(device))
    ours = run_op(fuser, *moved, token_map=TOKEN_MAP.to(device))
    assert all(same_bits(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("batch", "tokens", "sharer_tokens"), [(2, 0, 3), (0, 5, 5), (2, 0, 0), (1, 4, 0)]
)
def test_empty(batch, tokens, sharer_tokens, device):
    fuser, _, _ = make_case(device=device)
    base, sharer = make_caches(fuser.config, batch, tokens, sharer_tokens, torch.float64, device)
    token_map = torch.full((tokens,), 7, device=device) if sharer_tokens < tokens else None
    ours = run_op(fuser, base, sharer, gates=soft_gates(base, "stream"), token_map=token_map)
    for i, t in enumerate(flat(base)):
        assert same_bits(ours[f"out[{i}]"], t)
        assert torch.equal(ours[f"base[{i}]"], cotangents(base)[i])
    for name, t in ours.items():
        if not name.startswith(("out", "base")):
            assert not t.any(), name


GROUPS = {
    "shared": ["shared_w1"],
    "norms": ["shared_norm", "proj_norm", "weight_norm"],
    "biases": ["in_bias", "out_bias", "head_bias"],
    "outputs": ["out_weight", "head_weight"],
    "weighting": ["weight_w2"],
    "weighting norm": ["weight_norm"],
    "projection": ["proj_w1"],
    "projection end": ["proj_w2"],
    "input": ["in_weight"],
    "gate": ["gate"],
    "base": ["base"],
    "sharer": ["sharer"],
    "sharer and head": ["sharer", "head_bias"],
}


@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("wanted", GROUPS)
def test_only_needed_gradients_are_computed(wanted, depth, device, monkeypatch):
    fuser, base, sharer = make_case(device=device, depth=depth)
    gates = soft_gates(base)
    truth = truth_of(fuser, base, sharer, gates, token_map=TOKEN_MAP.to(device))
    names = GROUPS[wanted]
    leaves = {}
    for side, pairs in (("base", base), ("sharer", sharer), ("gate", gates)):
        if side in names:
            label = "gates" if side == "gate" else side
            leaves |= {f"{label}[{i}]": t.requires_grad_() for i, t in enumerate(flat(pairs))}
    for name, p in fuser.named_parameters():
        if p.requires_grad_(name.rpartition(".")[2] in names).requires_grad:
            leaves[name] = p
    returned = []
    inner = torch.ops.c2c.fuse_backward

    def backward(*args):
        returned.extend(inner(*args))
        return returned

    monkeypatch.setattr(torch.ops.c2c, "fuse_backward", backward)
    out = fuse_training(base, sharer, fuser, gates=gates, token_map=TOKEN_MAP.to(device))
    grads = torch.autograd.grad(
        flat(out), list(leaves.values()), cotangents(out), allow_unused=True, materialize_grads=True
    )
    for name, ours in zip(leaves, grads, strict=True):
        assert relative_error(ours, truth[name]) <= 1e-12, name
    streams = 4
    per_name = {"base": streams, "sharer": streams}
    assert len(returned) == sum(per_name.get(name, 1) for name in names)


def test_chunks_equal_reference(one_thread):
    # Many scratch elements a row and cheap products: more than one chunk of streams.
    config = make_config([(1, 8)] * 3, [(1, 8)], [0] * 3, hidden_size=8, intermediate_size=4096)
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, 1, 101, dtype=torch.float64)
    truth = truth_of(fuser, base, sharer)
    for recompute in (False, True):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            ours = run_op(fuser, base, sharer, recompute=recompute)
        assert_equal_results(ours, truth)
        folds = [e for e in recorded.events() if e.name == "aten::mul" and inside(e, "c2c::fuse")]
        assert len(folds) >= 2 * 3  # chunks x maps behind a norm


def inside(event, name):
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event is not None


def test_master_weights_get_gradients_wider_than_the_caches(device):
    fuser, base, sharer = make_case(dtype=torch.bfloat16, device=device, sharer_tokens=5)
    ours = run_op(fuser, base, sharer)
    for name, p in fuser.named_parameters():
        assert ours[name].dtype == p.dtype == torch.float32
    truth = truth_of(copy.deepcopy(fuser).to(torch.bfloat16), base, sharer)
    ours64 = run_op(fuser.double(), *(cast(x, torch.float64) for x in (base, sharer)))
    assert ours64["groups.0.in_weight"].dtype == torch.float64
    assert relative_error(ours["groups.0.in_weight"], truth["groups.0.in_weight"]) < 0.05


def test_float32_parameters_with_float64_caches(device):
    fuser, base, sharer = make_case(device=device)
    narrow = copy.deepcopy(fuser).float()
    ours = run_op(narrow, base, sharer, token_map=TOKEN_MAP.to(device))
    truth = truth_of(narrow, base, sharer, token_map=TOKEN_MAP.to(device))
    for name, t in ours.items():
        assert relative_error(t, truth[name]) <= (1e-6 if t.dtype == torch.float32 else 1e-12), name


def test_gradcheck_of_parameters_and_caches():
    config = make_config(
        [(2, 3)],
        [(1, 2)],
        [0],
        hidden_size=5,
        intermediate_size=7,
        depth=4,
        integration="replacement",
    )
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, 2, 5, 6, torch.float64)
    gates = soft_gates(base)
    leaves = [t.requires_grad_() for t in flat(base) + flat(sharer) + flat(gates)]
    weights = [p for name, p in fuser.named_parameters() if not name.endswith("gate_logit")]

    def function(*_):
        return flat(
            fuse_training(
                base, sharer, fuser, gates=gates, token_map=TOKEN_MAP, dropout=0.3, seed=3
            )
        )

    assert torch.autograd.gradcheck(function, [*leaves, *weights])

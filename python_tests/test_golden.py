"""The compiled op and the plain reference against data made by the published research code."""

from __future__ import annotations

from collections.abc import Callable

import golden_data
import pytest
import torch
from conftest import (
    KVPairs,
    assert_as_good_as_plain,
    clone,
    max_abs,
    plain_draws,
    relative_error,
    run_op,
    run_reference,
    same_bits,
)
from golden_data import EVAL_FILES, KINDS, REAL_FILE, TRAIN_FILES
from torch import Tensor

from c2c_ext import reference
from c2c_ext.training_op import fuse_training

REAL_EVAL_CASES = [
    j for j, c in enumerate(golden_data.load(REAL_FILE).meta["cases"]) if c["mode"] == "eval"
]
REAL_TRAIN_CASE = len(REAL_EVAL_CASES)


def caches(case: dict[str, Tensor], dtype: torch.dtype) -> tuple[KVPairs, KVPairs]:
    """(receiver, sharer) of a case."""
    target, source = (
        [tuple(case[f"{side}_{kind}"].to(dtype) for kind in KINDS)] for side in ("target", "source")
    )
    return target, source


@pytest.mark.parametrize("through", [run_op, run_reference], ids=["op", "reference"])
@pytest.mark.parametrize(("name", "j"), golden_data.cases(EVAL_FILES))
def test_eval_float64_equals_truth(name, j, through):
    file = golden_data.load(name)
    case = file.case(j)
    base, sharer = caches(case, torch.float64)
    fused = through(golden_data.build_fuser(file, j, torch.float64), base, sharer)
    for kind, ours, before in zip(KINDS, fused[0], base[0], strict=True):
        truth = case[f"out_{kind}_f64"]
        assert relative_error(ours, truth) <= 1e-13, kind
        is_open = case[f"{kind}_gate_logit"].item() > 0
        change = max_abs(ours - before)
        assert change == pytest.approx(file.meta["cases"][j][f"max_abs_{kind}_change"], rel=1e-3)
        assert (change > 1e-2) == is_open, kind


@pytest.mark.parametrize(("name", "j"), golden_data.cases(EVAL_FILES))
def test_eval_float32_as_good_as_plain(name, j):
    file = golden_data.load(name)
    case = file.case(j)
    base, sharer = caches(case, torch.float32)
    fuser = golden_data.build_fuser(file, j, torch.float32)
    fused, draws = run_op(fuser, base, sharer), plain_draws(fuser, base, sharer)
    for i, kind in enumerate(KINDS):
        truth = case[f"out_{kind}_f64"]
        plain = [*draws[i], case[f"out_{kind}"]]  # the published code is plain PyTorch too
        assert_as_good_as_plain(fused[0][i], plain, truth, kind)
        assert_as_good_as_plain(draws[i][0], plain[1:], truth, f"reference, {kind}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_closed_gates_leave_every_bit(dtype):
    closed = 0
    for name, j in golden_data.cases(EVAL_FILES):
        file = golden_data.load(name)
        case = file.case(j)
        if min(case[f"{kind}_gate_logit"].item() for kind in KINDS) > 0:
            continue
        base, sharer = caches(case, dtype)
        base = clone(base)  # not the file's own tensors, which other tests read
        for t in base[0]:
            t[..., 0, 0] = -0.0
            t[..., -1, -1] = torch.nan
        fused = run_op(golden_data.build_fuser(file, j, torch.float32), base, sharer)
        for i, kind in enumerate(KINDS):
            is_closed = case[f"{kind}_gate_logit"].item() <= 0
            assert same_bits(fused[0][i], base[0][i]) == is_closed, (name, j, kind)
            closed += is_closed
    assert closed >= 10


@pytest.mark.parametrize("j", REAL_EVAL_CASES)
def test_real_shape_float64_equals_truth(j):
    file = golden_data.load(REAL_FILE)
    case = file.case(j)
    base, sharer = caches(case, torch.float64)
    fuser = golden_data.build_fuser(file, j, torch.float64)
    fused, by_reference = run_op(fuser, base, sharer), run_reference(fuser, base, sharer)
    for i, kind in enumerate(KINDS):
        assert relative_error(fused[0][i], case[f"out_{kind}_f64"]) <= 1e-13, kind
        assert relative_error(by_reference[0][i], case[f"out_{kind}_f64"]) <= 1e-13, kind


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [(torch.float32, "f32"), (torch.bfloat16, "bf16run")],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("j", REAL_EVAL_CASES)
def test_real_shape_as_good_as_plain(j, dtype, suffix):
    file = golden_data.load(REAL_FILE)
    case = file.case(j)
    base, sharer = caches(case, dtype)
    fuser = golden_data.build_fuser(file, j, dtype)
    fused, draws = run_op(fuser, base, sharer), plain_draws(fuser, base, sharer)
    for i, kind in enumerate(KINDS):
        truth = case[f"out_{kind}_f64"]
        plain = [*draws[i], case[f"out_{kind}_{suffix}"]]
        assert_as_good_as_plain(fused[0][i], plain, truth, kind)
        is_open = file.meta["cases"][j][f"{kind}_gate_logit"] > 0
        assert (max_abs(fused[0][i] - base[0][i]) > 1.0) == is_open


BOTH_PATHS = pytest.mark.parametrize(
    "run", [reference.fuse, fuse_training], ids=["reference", "op"]
)


def run_training_case(name: str, j: int, run: Callable):
    """Outputs and gradients of a training case in float64; ``run`` is called as reference.fuse."""
    file = golden_data.load(name)
    case, meta = file.case(j), file.meta["cases"][j]
    fuser = golden_data.build_fuser(file, j, torch.float64)
    base, sharer = caches(case, torch.float64)
    inputs = {}
    for side, pairs in (("source", sharer), ("target", base)):
        for kind, t in zip(KINDS, pairs[0], strict=True):
            inputs[f"{side}_{kind}"] = t.clone().requires_grad_()
    base = [(inputs["target_key"], inputs["target_value"])]
    sharer = [(inputs["source_key"], inputs["source_value"])]
    gates = None
    if meta["mode"] != "eval":
        logits = fuser.groups[0].gate_logit
        gates = [
            tuple(
                reference.soft_gate(logits[i], case[f"u_{kind}"], meta["gate_temperature"])
                for i, kind in enumerate(KINDS)
            )
        ]
    fused = run(base, sharer, fuser, gates=gates)[0]
    cotangents = [case[f"cot_{kind}"].double() for kind in KINDS]
    sum((out * c).sum() for out, c in zip(fused, cotangents, strict=True)).backward()
    return case, meta, fuser, inputs, fused


def gradient(fuser, name: str) -> Tensor | None:
    """Gradient of the parameter with this published name."""
    attribute, index = golden_data.place(name)
    whole = getattr(fuser.groups[0], attribute).grad
    return None if whole is None else whole[index]


@BOTH_PATHS
@pytest.mark.parametrize(("name", "j"), golden_data.cases(TRAIN_FILES))
def test_training_gradients(name, j, run):
    case, meta, fuser, inputs, fused = run_training_case(name, j, run)
    for kind, out in zip(KINDS, fused, strict=True):
        assert relative_error(out.detach(), case[f"out_{kind}"]) <= 1e-10, kind
    checked = 0
    for parameter in golden_data.load(name).weights():
        if parameter == "gate_temperature":
            continue
        ours = gradient(fuser, parameter)
        if parameter in meta["params_without_grad"]:
            assert ours is None or not ours.any(), parameter
        else:
            assert relative_error(ours, case[f"grad.{parameter}"]) <= 1e-10, parameter
        checked += 1
    assert checked == 2 * (13 + 3 * (fuser.config.depth - 2))
    for tensor, ours in inputs.items():
        assert relative_error(ours.grad, case[f"grad_in.{tensor}"]) <= 1e-10, tensor
    for i, kind in enumerate(KINDS):
        if meta["mode"] == "eval" and meta[f"{kind}_gate_logit"] <= 0:
            assert torch.equal(inputs[f"target_{kind}"].grad, case[f"cot_{kind}"])
            assert not fuser.groups[0].in_weight.grad[i].any()


@pytest.mark.parametrize(("name", "j"), golden_data.cases(TRAIN_FILES))
def test_noise_is_drawn_key_first(name, j):
    case, meta = golden_data.load(name).case(j), golden_data.load(name).meta["cases"][j]
    if meta["mode"] == "eval":
        assert meta["rng_seed"] is None and "u_key" not in case
        return
    torch.manual_seed(meta["rng_seed"])
    for kind in KINDS:
        stored = case[f"u_{kind}"]
        drawn = torch.rand(stored.shape, dtype=torch.float64)
        same = drawn == stored
        if meta["mode"] == "train":
            assert same.all()
        else:  # some entries were replaced by the edges of [0, 1)
            edges = torch.tensor([0.0, 2**-24, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
            assert (same | torch.isin(stored, edges)).all() and not same.all()


@BOTH_PATHS
def test_real_shape_training_gradients(run):
    case, meta, fuser, inputs, fused = run_training_case(REAL_FILE, REAL_TRAIN_CASE, run)
    for kind, out in zip(KINDS, fused, strict=True):
        assert relative_error(out.detach(), case[f"out_{kind}"]) <= 1e-10, kind

    def check_rounded(ours: Tensor, stored: Tensor, scale: float, what: str) -> None:
        assert stored.dtype == torch.float32
        error = (ours - stored.double()).abs()
        assert (error <= 2**-24 * ours.abs() + 1e-10 * scale).all(), what

    whole = [name.removeprefix("grad.") for name in case if name.startswith("grad.")]
    for name in whole:
        assert relative_error(gradient(fuser, name), case[f"grad.{name}"]) <= 1e-10, name
    for name, listed in meta["matrix_grads"].items():
        ours = gradient(fuser, name)
        scale = max_abs(ours)
        check_rounded(ours[listed["rows"]], case[f"grad_rows.{name}"], scale, name)
        check_rounded(ours[:, listed["cols"]], case[f"grad_cols.{name}"], scale, name)
        norm = torch.linalg.matrix_norm(ours).item()
        assert norm == pytest.approx(listed["frob"], rel=1e-10), name
        assert ours.sum().item() == pytest.approx(listed["sum"], abs=1e-10 * norm), name
    assert len(whole) + len(meta["matrix_grads"]) == 2 * (13 + 3)
    for name, tensor in inputs.items():
        check_rounded(tensor.grad, case[f"grad_in.{name}"], max_abs(tensor.grad), name)

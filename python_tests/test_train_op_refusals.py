"""What the training op refuses, each with one sentence that names the argument and the rule."""

from __future__ import annotations

import pytest
import torch
from conftest import flat, relative_error
from train_op_checks import (
    TOKEN_MAP,
    make_train_case,
    op_arguments,
    run_with_gradients,
    soft_gates,
    truth_of,
)
from variants import UNCOMPILED

import c2c_ext
from c2c_ext.training_op import ARGUMENTS, fuse_training, op_missing


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
        ("row_seeds", lambda v: torch.ones(2), "row_seeds must be int64, got float32"),
        ("row_seeds", lambda v: torch.ones(3).long(), "row_seeds dim 0 must equal 2 .* got 3"),
        ("row_seeds", lambda v: torch.ones(2, 1).long(), "row_seeds must have 1 dimensions, got 2"),
        ("dropout", lambda v: 1.0, r"dropout must be in \[0, 1\), got 1"),
        ("dropout", lambda v: float("nan"), r"dropout must be in \[0, 1\), got nan"),
    ],
)
def test_bad_arguments_are_refused(argument, change, message):
    fuser, base, sharer = make_train_case()
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
    fuser, base, sharer = make_train_case()
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
    fuser, base, sharer = make_train_case()
    with pytest.raises(ValueError, match=message):
        fuse_training(base, sharer, fuser, token_map=TOKEN_MAP, **keywords)


def test_bad_calls_are_refused():
    fuser, base, sharer = make_train_case()
    with pytest.raises(ValueError, match="base_pairs must have 2 layers, got 1"):
        fuse_training(base[:1], sharer, fuser)
    with pytest.raises(ValueError, match="sharer_pairs must have 3 layers, got 1"):
        fuse_training(base, sharer[:1], fuser)
    gateless, *caches = make_train_case(gate=False)
    with pytest.raises(ValueError, match="gates must not be given for a fuser without gates"):
        fuse_training(*caches, gateless, gates=soft_gates(caches[0]))


@pytest.mark.parametrize("name", UNCOMPILED)
def test_variants_without_kernels_are_named_and_fuse_by_reference(name):
    fuser, base, sharer = make_train_case(tokens=5, sharer_tokens=5, **UNCOMPILED[name])
    assert "has no compiled kernels" in op_missing(fuser, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"training op cannot run: projection=.* has no"):
        fuse_training(base, sharer, fuser)

    def fuse(base, sharer, fuser, gates):
        return c2c_ext.fuse(base, sharer, fuser)

    ours = run_with_gradients(fuse, fuser, base, sharer)
    for name, t in truth_of(fuser, base, sharer).items():
        assert relative_error(ours[name], t) <= 1e-13, name


def test_op_missing_elsewhere():
    fuser, _, _ = make_train_case()
    assert op_missing(fuser, torch.device("cpu")) is None
    assert "no kernels for meta" in op_missing(fuser, torch.device("meta"))

"""The packed form: what folds, what is dropped, and when it is built anew."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import (
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    relative_error,
    run_op,
    run_reference,
    same_bits,
    set_gates,
)
from torch import nn

from c2c_ext import Fuser
from c2c_ext.packed import VECTORS, PackedFuser, pack_fuser

CPU = torch.device("cpu")
# (heads, head dim) of the receiver against hidden_size 16: the last map folds up to 16.
FOLDED, UNFOLDED = (2, 8), (2, 9)


def pack(fuser: Fuser, dtype: torch.dtype = torch.float32) -> PackedFuser:
    return fuser.packed(dtype, CPU)


@pytest.mark.parametrize("shape", [FOLDED, UNFOLDED, (1, 3)], ids=str)
@pytest.mark.parametrize("depth", [3, 4, 5, 6])
def test_folding_is_exact(depth, shape):
    config = make_config([shape] * 2, depth=depth)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, 7, dtype=torch.float64)
    fused, expected = run_op(fuser, base, sharer), run_reference(fuser, base, sharer)
    for x, e, b in zip(*map(flat, (fused, expected, base)), strict=True):
        assert relative_error(x, e) <= 1e-12
        assert max_abs(x - b) > 0.1
    (group,) = pack(fuser, torch.float64).groups
    folded = shape != UNFOLDED
    assert len(group.deep_w1) == depth - 3
    assert len(group.deep_w2) == depth - 3 + (not folded)
    assert group.out_weight.shape[2] == (24 + 16 if folded else 16)


def test_more_than_ten_blocks_stay_in_order():
    config = make_config(depth=14)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, dtype=torch.float64)
    fused, expected = run_op(fuser, base, sharer), run_reference(fuser, base, sharer)
    assert all(
        relative_error(x, e) <= 1e-12 for x, e in zip(*map(flat, (fused, expected)), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matrices_have_the_caches_dtype_and_vectors_that_of_sums(dtype):
    packed = pack(make_fuser(), dtype)
    (group,) = packed.groups
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in vars(group).items():
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype == (sums if name in VECTORS else dtype)
    assert all(t.is_contiguous() for group in packed.groups for t in group.tensors())
    assert packed.nbytes == sum(t.nbytes for group in packed.groups for t in group.tensors())


def test_folded_in_float64_and_rounded_once():
    fuser = make_fuser()
    exact, rounded = pack(fuser, torch.float64), pack(fuser, torch.float32)
    for e, r in zip(exact.groups[0].tensors(), rounded.groups[0].tensors(), strict=True):
        assert same_bits(e.float(), r)


def test_closed_streams_are_dropped():
    config = make_config([(2, 8), (1, 20), (2, 8)], [(1, 4), (3, 6)], [0, 1, 0])
    fuser = make_fuser(config)
    set_gates(fuser, {(0, "key"): 0.0, (1, "key"): -1.0, (1, "value"): -1.0, (2, "value"): 1e-30})
    (group,) = pack(fuser).groups
    assert (group.layers, group.sources, group.num_keys) == ([2, 0, 2], [0, 0, 0], 1)
    assert all(t.shape[0] == 3 for t in group.tensors())
    assert fuser.open_streams() == [(0, "value"), (2, "key"), (2, "value")]
    set_gates(fuser, {}, default=-1.0)
    assert pack(fuser).groups == []
    assert fuser.open_streams() == []


# ---- built anew --------------------------------------------------------------------------------


def write_under_no_grad(fuser: Fuser) -> None:
    with torch.no_grad():
        fuser.groups[0].in_bias[0, 0] += 1.0


def write_a_row_of_a_view(fuser: Fuser) -> None:
    with torch.no_grad():
        fuser.stream(1, "value").shared.w1[0].zero_()


def optimizer_step(fuser: Fuser, optimizer: type[torch.optim.Optimizer], **options) -> None:
    trained = optimizer(fuser.parameters(), lr=0.1, **options)
    sum(p.sum() for p in fuser.parameters()).backward()
    trained.step()
    trained.zero_grad()


def sgd_step(fuser: Fuser) -> None:
    optimizer_step(fuser, torch.optim.SGD)


def foreach_adam_step(fuser: Fuser) -> None:
    optimizer_step(fuser, torch.optim.AdamW, foreach=True)


def fused_adam_step(fuser: Fuser) -> None:
    optimizer_step(fuser, torch.optim.AdamW, fused=True)


def fused_sgd_step(fuser: Fuser) -> None:
    optimizer_step(fuser, torch.optim.SGD, fused=True)


def unfreeze_and_step(fuser: Fuser) -> None:
    fuser.requires_grad_(False)
    pack(fuser)  # watches nothing
    fuser.requires_grad_(True)
    fused_sgd_step(fuser)


def move_away_and_back(fuser: Fuser) -> None:
    fuser.to("meta")
    fuser.to_empty(device="cpu")
    load_a_state_dict(fuser)


def load_a_state_dict(fuser: Fuser) -> None:
    fuser.load_state_dict(make_fuser(fuser.config, seed=3).state_dict())


def assign_a_state_dict(fuser: Fuser) -> None:
    fuser.load_state_dict(make_fuser(fuser.config, seed=3).state_dict(), assign=True)


def cast_to_bfloat16(fuser: Fuser) -> None:
    fuser.to(torch.bfloat16)


def cast_to_double(fuser: Fuser) -> None:
    fuser.double()


def cast_one_group(fuser: Fuser) -> None:
    fuser.groups[0].bfloat16()


def cast_as_a_part(fuser: Fuser) -> None:
    nn.ModuleList([fuser]).bfloat16()


def replace_a_parameter(fuser: Fuser) -> None:
    group = fuser.groups[0]
    group.out_bias = nn.Parameter(group.out_bias + 1.0)


def flip_a_gate(fuser: Fuser) -> None:
    with torch.no_grad():
        fuser.groups[0].gate_logit[1] = -1.0


def fill_the_gates(fuser: Fuser) -> None:
    with torch.no_grad():
        fuser.groups[0].gate_logit.fill_(0.0)


def initialise_anew(fuser: Fuser) -> None:
    fuser.groups[0].reset_parameters(1.0)


WRITES = [
    write_under_no_grad,
    write_a_row_of_a_view,
    sgd_step,
    foreach_adam_step,
    fused_adam_step,
    fused_sgd_step,
    unfreeze_and_step,
    move_away_and_back,
    load_a_state_dict,
    assign_a_state_dict,
    cast_to_bfloat16,
    cast_to_double,
    cast_one_group,
    cast_as_a_part,
    replace_a_parameter,
    flip_a_gate,
    fill_the_gates,
    initialise_anew,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_write_is_followed_by_a_new_form(write):
    fuser = make_fuser()
    before = pack(fuser)
    write(fuser)
    after = pack(fuser)
    assert after is not before
    fresh = pack_fuser(fuser, torch.float32, CPU)
    assert len(after.groups) == len(fresh.groups)
    for group, expected in zip(after.groups, fresh.groups, strict=True):
        assert all(map(same_bits, group.tensors(), expected.tensors()))
    if write is not cast_to_double:  # whose numbers are the same
        assert not all(
            map(same_bits, before.groups[0].tensors(), after.groups[0].tensors())
            if after.groups and len(before.groups[0].layers) == len(after.groups[0].layers)
            else [False]
        )
    assert pack(fuser) is after


def test_step_on_other_parameters_keeps_the_form():
    fuser = make_fuser()
    before = pack(fuser)
    optimizer_step(make_fuser(), torch.optim.AdamW, fused=True)
    assert pack(fuser) is before


@pytest.mark.parametrize("looked_at_in_between", [False, True])
def test_fused_step_is_seen_whenever_the_form_was_built(looked_at_in_between):
    fuser = make_fuser()
    trained = torch.optim.SGD(fuser.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        before = pack(fuser).groups[0].in_bias.clone()
        sum(p.sum() for p in fuser.parameters()).backward()
        if looked_at_in_between:  # with the gradient pending
            assert same_bits(pack(fuser).groups[0].in_bias, before)
        trained.step()
        stepped = pack(fuser).groups[0].in_bias
        assert torch.allclose(stepped, before - 0.1)
        trained.zero_grad()
        assert same_bits(pack(fuser).groups[0].in_bias, stepped)
    assert pack(fuser) is pack(fuser)


def test_freezing_between_two_dtypes_hides_no_step():
    fuser = make_fuser()
    before = pack(fuser, torch.float32).groups[0].in_bias
    fuser.requires_grad_(False)
    pack(fuser, torch.float64)
    fuser.requires_grad_(True)
    fused_sgd_step(fuser)
    assert torch.allclose(pack(fuser, torch.float32).groups[0].in_bias, before - 0.1)


def test_freezing_and_unfreezing_hides_no_step():
    fuser = make_fuser()
    before = pack(fuser).groups[0].in_bias
    fuser.requires_grad_(False).requires_grad_(True)
    fused_sgd_step(fuser)
    assert torch.allclose(pack(fuser).groups[0].in_bias, before - 0.1)


def test_new_configuration_is_seen():
    fuser = make_fuser()
    before = pack(fuser)
    fuser.config = dataclasses.replace(fuser.config, activation="relu")
    assert pack(fuser) is not before
    assert pack(fuser).activation == "relu"


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 17},
        {"depth": 4},
        {"receiver": [(4, 4), (4, 4)]},
        {"sharer": [(2, 2), (2, 2), (2, 2)]},  # the same parameter shapes
        {"receiver": [(2, 8)], "layer_map": [0]},
    ],
)
def test_configuration_of_other_shapes_is_refused(changes):
    fuser = make_fuser()
    before = fuser.config
    with pytest.raises(ValueError, match="config must ask for the parameters' shapes"):
        fuser.config = make_config(**changes)
    with pytest.raises(TypeError, match="config must be a FuserConfig, got dict"):
        fuser.config = {}
    assert fuser.config is before


def test_swapped_parameters_are_seen():
    fuser = make_fuser()
    pack(fuser)
    torch.utils.swap_tensors(fuser.groups[0].in_bias, nn.Parameter(torch.ones(4, 16)))
    assert (pack(fuser).groups[0].in_bias == 1.0).all()


def test_replacing_again_and_again_is_seen():
    fuser = make_fuser()
    group = fuser.groups[0]
    for i in range(100):
        before = pack(fuser)
        for _ in range(3):  # a freed parameter's id and memory are given out again
            group.in_bias = nn.Parameter(torch.full_like(group.in_bias, float(i)))
        after = pack(fuser)
        assert after is not before
        assert (after.groups[0].in_bias == i).all()


def test_nothing_written_keeps_the_form():
    fuser = make_fuser()
    forms = {dtype: pack(fuser, dtype) for dtype in (torch.float32, torch.float64)}
    assert forms[torch.float32] is not forms[torch.float64]
    base, sharer = make_caches(fuser.config)
    run_op(fuser, base, sharer)
    run_reference(fuser, base, sharer)
    fuser.eval().train().requires_grad_(False)
    fuser.state_dict()
    copy.deepcopy(fuser)
    with torch.inference_mode():
        assert pack(fuser) is forms[torch.float32]
    for dtype, form in forms.items():
        assert pack(fuser, dtype) is form


def test_fuser_without_numbers_is_refused():
    with pytest.raises(ValueError, match=r"its groups\.0\.in_weight is on the meta device"):
        pack(make_fuser().to("meta"))


def test_writes_through_data_need_repack():
    fuser = make_fuser()
    before = pack(fuser)
    fuser.groups[0].in_bias.data.fill_(5.0)
    assert pack(fuser) is before
    fuser.repack()
    assert (pack(fuser).groups[0].in_bias == 5.0).all()


def test_form_built_in_inference_mode_works_outside():
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    with torch.inference_mode():
        packed = pack(fuser)
    assert not any(t.is_inference() or t.requires_grad for t in packed.groups[0].tensors())
    assert pack(fuser) is packed
    fused, expected = run_op(fuser, base, sharer), run_reference(fuser, base, sharer)
    assert all(max_abs(x - e) < 1e-5 for x, e in zip(*map(flat, (fused, expected)), strict=True))


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    expected = run_op(make_fuser(), base, sharer)
    assert all(map(same_bits, flat(run_op(fuser, base, sharer)), flat(expected)))


@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, copy.copy, lambda fuser: pickle.loads(pickle.dumps(fuser))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_carry_no_packed_form(twin_of):
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    expected = run_op(fuser, base, sharer)
    packed = pack(fuser)
    twin = twin_of(fuser)
    assert pack(twin) is not packed
    assert pack(fuser) is packed
    # Not to the byte: addresses in it have more or fewer digits.
    sizes = [len(pickle.dumps(one)) for one in (fuser, make_fuser())]
    assert abs(sizes[0] - sizes[1]) < 200 < sizes[1] // 10
    assert twin.config == fuser.config
    assert all(map(same_bits, flat(run_op(twin, base, sharer)), flat(expected)))


def test_deepcopy_is_independent():
    fuser = make_fuser()
    twin = copy.deepcopy(fuser)
    packed = pack(fuser)
    fill_the_gates(twin)
    assert pack(twin).groups == []
    assert pack(fuser) is packed

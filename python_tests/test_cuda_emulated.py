"""The CUDA op with its kernels run by the CPU: numbers, golden data, variants, layouts, refusals.

Most tests are those of the CPU's op, called with `emulated.run_op` in place of `conftest.run_op`.
"""

from __future__ import annotations

import re

import emulated
import golden_data
import pytest
import test_golden
import test_op
import test_variants
import torch
from conftest import (
    SHAPES,
    assert_fused,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    relative_error,
    run_op,
    same_bits,
)
from golden_data import EVAL_FILES, KINDS
from test_golden import (
    test_closed_gates_leave_every_bit,
    test_eval_float32_as_good_as_plain,
    test_real_shape_as_good_as_plain,
)
from test_op import (
    poisoned_memory,
    test_accumulate_adds_the_update,
    test_any_layout,
    test_bad_numbers_stay_in_their_token,
    test_empty_is_accepted,
    test_every_half_pattern_survives,
    test_every_size_may_be_one,
    test_expanded_sharer,
    test_in_place_equals_out_of_place,
    test_interleaved_keys_and_values_are_accepted,
    test_kept_tokens_keep_every_bit,
    test_map_to_empty_sharer_copies,
    test_memory_that_nobody_wrote_is_not_read,
    test_only_open_streams_are_written,
    test_rounding_to_half_is_to_nearest_even,
    test_sharer_may_be_other_tokens_of_the_same_buffer,
    test_token_map,
    test_token_map_strided_and_expanded,
    test_two_updates_accumulate_to_their_sum,
)
from test_variants import (
    test_accumulate_adds_what_the_variant_changes,
    test_every_combination_runs_in_the_op,
)
from torch.profiler import ProfilerActivity, profile
from variants import COMPILED

from c2c_ext import estimate, ops
from c2c_ext.estimate import Workload

__all__ = [
    "poisoned_memory",
    "test_accumulate_adds_the_update",
    "test_accumulate_adds_what_the_variant_changes",
    "test_any_layout",
    "test_bad_numbers_stay_in_their_token",
    "test_closed_gates_leave_every_bit",
    "test_empty_is_accepted",
    "test_eval_float32_as_good_as_plain",
    "test_every_combination_runs_in_the_op",
    "test_every_half_pattern_survives",
    "test_every_size_may_be_one",
    "test_expanded_sharer",
    "test_in_place_equals_out_of_place",
    "test_interleaved_keys_and_values_are_accepted",
    "test_kept_tokens_keep_every_bit",
    "test_map_to_empty_sharer_copies",
    "test_memory_that_nobody_wrote_is_not_read",
    "test_only_open_streams_are_written",
    "test_real_shape_as_good_as_plain",
    "test_rounding_to_half_is_to_nearest_even",
    "test_sharer_may_be_other_tokens_of_the_same_buffer",
    "test_token_map",
    "test_token_map_strided_and_expanded",
    "test_two_updates_accumulate_to_their_sum",
]

ORDERS = ["forward", "reverse"]  # of the emulated threads


@pytest.fixture(autouse=True)
def through_the_emulated_kernels(monkeypatch):
    for module in (test_golden, test_op, test_variants):
        monkeypatch.setattr(module, "run_op", emulated.run_op)
    for name in ("C2C_EXT_CUDA_PATH", "C2C_EMULATE_SCRATCH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch) -> str:
    monkeypatch.setenv("C2C_EMULATE_ORDER", request.param)
    return request.param


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 5), (3, 13)])
def test_numbers_equal_reference(shape, batch, tokens, dtype, order):
    config = make_config(**SHAPES[shape])
    fuser = make_fuser(config)
    base, sharer = make_caches(config, batch, tokens, tokens + 2, dtype)
    ours = emulated.run_op(fuser, base, sharer)
    assert_fused(fuser, base, sharer, ours, differs=False)
    assert max(max_abs(x - b) for x, b in zip(flat(ours), flat(base), strict=True)) > 0.1


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize(
    "shape", [{}, test_variants.GROUPS, {"depth": 5, "hidden_size": 12}], ids=str
)
def test_variants_match_the_reference(changes, shape, dtype):
    """With tokens enough that the largest of the roundings to bfloat16 is no lottery."""
    fuser = make_fuser(make_config(**shape, **changes))
    base, sharer = make_caches(fuser.config, 2, 40, dtype=dtype)
    fused = emulated.run_op(fuser, base, sharer)
    test_variants.fused_kinds_differ(fuser, base, fused)
    assert_fused(fuser, base, sharer, fused, differs=False)


@pytest.mark.parametrize("hidden", [300, 1031])
@pytest.mark.parametrize("depth", [3, 4])
def test_rows_of_several_warps(hidden, depth, dtype, order):
    """Wide enough for every thread of a block to have columns, and for more than one pass."""
    config = make_config(
        [(6, 40)], [(3, 88)], [0], hidden_size=hidden, intermediate_size=640, depth=depth
    )
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, 3, dtype=dtype)
    assert_fused(fuser, base, sharer, emulated.run_op(fuser, base, sharer))


@pytest.mark.parametrize("heads", [5, 8, 17])
def test_more_heads_than_one_pass_takes(heads, dtype, order):
    config = make_config([(heads, 8)], [(2, 8)], [0], hidden_size=heads * 8)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 3, dtype=dtype)
    assert_fused(fuser, base, sharer, emulated.run_op(fuser, base, sharer))


@pytest.mark.parametrize(("name", "j"), golden_data.cases(EVAL_FILES))
def test_golden_float64_equals_truth(name, j):
    file = golden_data.load(name)
    case = file.case(j)
    base, sharer = test_golden.caches(case, torch.float64)
    fused = emulated.run_op(golden_data.build_fuser(file, j, torch.float64), base, sharer)
    for kind, ours, before in zip(KINDS, fused[0], base[0], strict=True):
        assert relative_error(ours, case[f"out_{kind}_f64"]) <= 1e-13, kind
        assert (max_abs(ours - before) > 1e-2) == (case[f"{kind}_gate_logit"].item() > 0)


@pytest.mark.parametrize("name", ["eval_s_2x16_4x16_h64_L3.safetensors"])
def test_golden_half_precision(name, dtype, order):
    file = golden_data.load(name)
    base, sharer = test_golden.caches(file.case(0), dtype)
    fuser = golden_data.build_fuser(file, 0, dtype)
    ours = emulated.run_op(fuser, base, sharer)
    assert_fused(fuser, base, sharer, ours, differs=False)


@pytest.mark.parametrize(
    "shape",
    [{}, {"receiver": [(3, 5)] * 2, "hidden_size": 23, "intermediate_size": 15}],
    ids=["even", "one less than vectors"],
)
def test_normalised_before_the_product_where_float16_would_overflow(shape):
    """1 / rms comes first: z of a few thousand times weights of a few hundred is beyond 65504."""
    fuser = make_fuser(make_config(**shape))
    with torch.no_grad():
        group = fuser.groups[0]
        group.in_bias.fill_(4000.0)
        group.shared_w1.mul_(200.0)
        group.shared_w2.mul_(0.01)
    base, sharer = make_caches(fuser.config, dtype=torch.float16)
    ours = emulated.run_op(fuser, base, sharer)
    assert all(t.isfinite().all() for t in flat(ours))
    assert_fused(fuser, base, sharer, ours, differs=False)


# ---- chunks, determinism ------------------------------------------------------------------------


def rows_in_chunks(monkeypatch, fuser, base, sharer, token_map, scratch):
    monkeypatch.setenv("C2C_EMULATE_SCRATCH", str(scratch))
    return emulated.run_op(fuser, base, sharer, token_map)


@pytest.mark.parametrize("scratch", [1, 2000, 5000, 20000])
def test_chunks_give_the_same_numbers(scratch, dtype, monkeypatch):
    """From one row of one stream at a time to some streams at a time; the products' sums may be
    ordered by the number of rows."""
    fuser = make_fuser(make_config([(2, 8)] * 3, [(1, 4)] * 3, [0, 2, 1]))
    base, sharer = make_caches(fuser.config, 2, 7, 9, dtype)
    token_map = torch.tensor([[0, 8, -1, 3, 3, 1, 2], [-1, 1, 2, 7, -1, 0, 9]])
    ours = rows_in_chunks(monkeypatch, fuser, base, sharer, token_map, scratch)
    assert_fused(fuser, base, sharer, ours, token_map)


def test_more_streams_than_one_launch_takes():
    layers = 70  # 140 streams, of which one launch takes 128
    config = make_config([(1, 2)] * layers, [(1, 2)] * 2, [i % 2 for i in range(layers)])
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 2, dtype=torch.float64)
    ours = emulated.run_op(fuser, base, sharer)
    assert_fused(fuser, base, sharer, ours, differs=False)
    assert not any(map(same_bits, flat(ours), flat(base)))


def scratch_of(fuser, base, sharer) -> int:
    """Bytes of the largest tensor that the op allocates, seen by the profiler."""
    calls = list(emulated.calls(fuser, base, base, sharer))
    emulated.load()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for arguments in calls:
            torch.ops.c2c_emulated.fuse_(*arguments.values())
    return max(e.cpu_memory_usage for e in record.events() if e.name == "aten::empty")


@pytest.mark.parametrize("limit", [None, 3000, 9000])
@pytest.mark.parametrize("shape", [*SHAPES, *COMPILED])
def test_scratch_is_what_the_estimate_says(shape, limit, dtype, monkeypatch):
    config = make_config(**{**SHAPES, **COMPILED}[shape])
    fuser, work = make_fuser(config), Workload(2, 5, dtype)
    base, sharer = make_caches(config, 2, 5, dtype=dtype)
    monkeypatch.setattr(ops, "CUDA_MISSING", None)
    if limit is not None:
        if len(config.shape_groups()) > 1:
            return  # what the caches add to the limit differs by group
        monkeypatch.setenv("C2C_EMULATE_SCRATCH", str(limit))
        layers = range(len(config.layer_map))
        fused = sum(base[i][KINDS.index(kind)].nbytes for i in layers for kind in config.kinds)
        monkeypatch.setattr(estimate, "SCRATCH_BYTES_ON_GPU", limit - fused)
    estimated = estimate.scratch_bytes(config, work, torch.device("cuda"), fuser.open_streams())
    assert estimated == scratch_of(fuser, base, sharer)


def test_same_bits_in_both_thread_orders(dtype, monkeypatch):
    config = make_config(hidden_size=300, intermediate_size=96)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, 4, None, dtype)
    runs = []
    for order in (*ORDERS, *ORDERS):
        monkeypatch.setenv("C2C_EMULATE_ORDER", order)
        runs.append(flat(emulated.run_op(fuser, base, sharer)))
    assert all(same_bits(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


# ---- refusals -----------------------------------------------------------------------------------


def call_with(changes: dict[str, object]) -> None:
    """Calls the emulated op with some arguments changed, and checks that nothing is written."""
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    out = clone(base)
    (arguments,) = emulated.calls(fuser, out, base, sharer)
    emulated.load()
    try:
        torch.ops.c2c_emulated.fuse_(*{**arguments, **changes}.values())
    finally:
        assert all(map(same_bits, flat(out), flat(base)))


def panels() -> torch.Tensor:
    """A matrix as the CPU's op wants it."""
    return make_fuser().packed(torch.float32, torch.device("cpu")).groups[0].w1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": panels}, "w1 must have 3 dimensions, got 5"),
        (
            {"in_weight": lambda: torch.zeros(4, 16, 21)},
            "in_weight dim 2 (packed weight) must equal 20 (the shape group's other weights), "
            "got 21",
        ),
        (
            {"out_weight": lambda: torch.zeros(4, 40, 16).transpose(1, 2)},
            "out_weight must be contiguous",
        ),
        ({"activation": lambda: "tanh"}, "activation must be gelu, relu or silu, got tanh"),
        (
            {"integration": lambda: "sum"},
            "integration must be residual, interpolation or replacement, got sum",
        ),
        ({"inner": lambda: 0}, "inner must be in 1..16777216, got 0"),
        (
            {"token_map": lambda: torch.zeros(6, dtype=torch.int64)},
            "token_map dim 0 (tokens) must equal 5 (the receiver's tokens), got 6",
        ),
    ],
)
def test_arguments_are_refused(changes, message):
    with pytest.raises(RuntimeError, match=re.escape("c2c_ext.fuse: " + message)):
        call_with({name: make() for name, make in changes.items()})


def test_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", "fastest")
    message = "C2C_EXT_CUDA_PATH must be plain, fused, hopper or auto, got fastest"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call_with({})


@pytest.mark.parametrize("path", ["plain", "auto", ""])
def test_path_may_be_named(path, monkeypatch):
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    expected = emulated.run_op(fuser, base, sharer)
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", path)
    assert all(map(same_bits, flat(emulated.run_op(fuser, base, sharer)), flat(expected)))


def test_the_emulated_op_is_not_the_cpus():
    """The tests above call what they say: the two ops round at different places."""
    config = make_config(hidden_size=300, intermediate_size=300)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, 9)
    ours, theirs = emulated.run_op(fuser, base, sharer), run_op(fuser, base, sharer)
    assert not all(map(same_bits, flat(ours), flat(theirs)))
    schema = str(torch.ops.c2c_emulated.fuse_.default._schema)
    assert schema == str(torch.ops.c2c.fuse_.default._schema).replace("c2c::", "c2c_emulated::")

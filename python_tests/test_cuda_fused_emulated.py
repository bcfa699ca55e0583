"""The fused tensor-core path of the CUDA op (C2C_EXT_CUDA_PATH=fused), run by the CPU.

Half-precision caches only, as the path has no others. Many tests are those of the CPU's op, called
with `emulated.run_op` in place of `conftest.run_op`.
"""

from __future__ import annotations

import emulated
import golden_data
import pytest
import test_golden
import test_op
import test_variants
import torch
from conftest import (
    SHAPES,
    KVPairs,
    assert_fused,
    cast,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    run_reference,
    same_bits,
)
from golden_data import EVAL_FILES
from test_cuda_emulated import (
    test_chunks_give_the_same_numbers,
    test_golden_half_precision,
    test_more_heads_than_one_pass_takes,
    test_normalised_before_the_product_where_float16_would_overflow,
    test_numbers_equal_reference,
    test_rows_of_several_warps,
    test_same_bits_in_both_thread_orders,
)
from test_op import (
    poisoned_memory,
    test_accumulate_adds_the_update,
    test_any_layout,
    test_bad_numbers_stay_in_their_token,
    test_empty_is_accepted,
    test_every_half_pattern_survives,
    test_expanded_sharer,
    test_in_place_equals_out_of_place,
    test_interleaved_keys_and_values_are_accepted,
    test_kept_tokens_keep_every_bit,
    test_map_to_empty_sharer_copies,
    test_memory_that_nobody_wrote_is_not_read,
    test_only_open_streams_are_written,
    test_token_map,
)
from test_variants import test_compiled_variants_match_the_reference
from torch import Tensor

__all__ = [
    "poisoned_memory",
    "test_accumulate_adds_the_update",
    "test_any_layout",
    "test_bad_numbers_stay_in_their_token",
    "test_chunks_give_the_same_numbers",
    "test_compiled_variants_match_the_reference",
    "test_empty_is_accepted",
    "test_every_half_pattern_survives",
    "test_expanded_sharer",
    "test_golden_half_precision",
    "test_in_place_equals_out_of_place",
    "test_interleaved_keys_and_values_are_accepted",
    "test_kept_tokens_keep_every_bit",
    "test_map_to_empty_sharer_copies",
    "test_memory_that_nobody_wrote_is_not_read",
    "test_more_heads_than_one_pass_takes",
    "test_normalised_before_the_product_where_float16_would_overflow",
    "test_numbers_equal_reference",
    "test_only_open_streams_are_written",
    "test_rows_of_several_warps",
    "test_same_bits_in_both_thread_orders",
    "test_token_map",
]

HALVES = [torch.bfloat16, torch.float16]
# Every size a multiple of 8, so that everything is copied 16 bytes at a time; more columns than one
# tile has, and more inputs than all stages of any tile hold together.
ALIGNED = {
    "receiver": [(2, 40)],
    "sharer": [(3, 24)],
    "layer_map": [0],
    "hidden_size": 136,
    "intermediate_size": 392,
}
# (batch, tokens): the last row of a tile and the first of the next, for all of fused_gemm.cu, and
# all rows of a tile but one.
ROWS = [(1, 1), (3, 5), (1, 16), (1, 17), (2, 16), (3, 11), (1, 64), (5, 13), (2, 64), (3, 43)]
ROWS += [(4, 48), (1, 193)]


@pytest.fixture(autouse=True)
def through_the_fused_kernels(monkeypatch):
    for module in (test_golden, test_op, test_variants):
        monkeypatch.setattr(module, "run_op", emulated.run_op)
    monkeypatch.delenv("C2C_EMULATE_SCRATCH", raising=False)
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", "fused")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture(params=HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["forward", "reverse"])
def order(request, monkeypatch) -> str:
    monkeypatch.setenv("C2C_EMULATE_ORDER", request.param)
    return request.param


def on_path(path: str, monkeypatch, *arguments: object) -> KVPairs:
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", path)
    return emulated.run_op(*arguments)


@pytest.mark.parametrize(("batch", "tokens"), ROWS)
def test_every_tile_equals_reference(batch, tokens, dtype, order):
    config = make_config(**ALIGNED)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, batch, tokens, tokens + 3, dtype)
    ours = emulated.run_op(fuser, base, sharer)
    assert_fused(fuser, base, sharer, ours, differs=tokens > 1)


@pytest.mark.parametrize("changes", [{"depth": 5}, {"hidden_size": 72, "depth": 4}], ids=str)
@pytest.mark.parametrize("tokens", [5, 70])
def test_deep_and_unfolded_equal_reference(changes, tokens, dtype):
    config = make_config(**{**ALIGNED, **changes})  # 72 < 2 * 40: the last W2 is not folded
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, tokens, dtype=dtype)
    assert_fused(fuser, base, sharer, emulated.run_op(fuser, base, sharer))


def odd_sizes() -> dict[str, dict]:
    """`ALIGNED` with one size at a time no multiple of 8."""
    return {
        "hidden": {"hidden_size": 133},
        "inner": {"intermediate_size": 389},
        "sharer heads": {"sharer": [(5, 11)]},
        "receiver heads": {"receiver": [(3, 28)]},
        "receiver alone odd": {"receiver": [(2, 41)]},
    }


@pytest.mark.parametrize("name", odd_sizes())
@pytest.mark.parametrize("tokens", [3, 66])
def test_one_odd_size_equals_reference(name, tokens, dtype):
    config = make_config(**{**ALIGNED, **odd_sizes()[name]})
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, tokens, dtype=dtype)
    assert_fused(fuser, base, sharer, emulated.run_op(fuser, base, sharer))


def test_a_hidden_size_that_ends_in_the_middle_of_a_tile(dtype, order):
    """Half of the tile's columns, which is one whole part of a row's sum of squares."""
    config = make_config([(2, 8)], [(1, 4)], [0], hidden_size=64)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 35, dtype=dtype)  # a tile of 64 x 128
    assert_fused(fuser, base, sharer, emulated.run_op(fuser, base, sharer))


def test_every_size_may_be_one(dtype):
    config = make_config([(1, 1)], [(1, 1)], [0], hidden_size=1, intermediate_size=1)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, 3, dtype=dtype)
    assert_fused(fuser, base, sharer, emulated.run_op(fuser, base, sharer), differs=False)


def shifted(t: Tensor) -> Tensor:
    """The same strides, one element behind an aligned address."""
    memory = torch.full((t.numel() + 8,), 7.0, dtype=t.dtype)
    assert memory.data_ptr() % 16 == 0
    view = memory[1 : 1 + t.numel()].view(t.shape)
    view.copy_(t)
    return view


@pytest.mark.parametrize("which", ["base", "sharer", "out", "in place"])
def test_unaligned_caches_give_the_same_bits(which, dtype):
    config = make_config(**ALIGNED)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 2, 9, dtype=dtype)
    expected = emulated.run_op(fuser, base, sharer)
    views = {"base": base, "sharer": sharer, "out": clone(base)}
    moved = [tuple(map(shifted, pair)) for pair in views["base" if which == "in place" else which]]
    if which == "in place":
        views["base"] = views["out"] = moved
    else:
        views[which] = moved
    fused = emulated.run_op(fuser, views["base"], views["sharer"], out=views["out"])
    assert all(map(same_bits, flat(fused), flat(expected)))


@pytest.mark.parametrize("name", [*SHAPES, "aligned"])
def test_bits_do_not_depend_on_the_other_tokens(name, dtype):
    """Whichever tile their number calls for."""
    config = make_config(**{**SHAPES, "aligned": ALIGNED}[name])
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 200, dtype=dtype)
    together = emulated.run_op(fuser, base, sharer)
    for start, end in [(0, 1), (7, 23), (30, 60), (100, 164), (90, 200), (20, 200)]:
        window = [clone([(k[:, :, start:end], v[:, :, start:end])])[0] for k, v in base]
        read = [(k[:, :, start:end], v[:, :, start:end]) for k, v in sharer]
        for x, y in zip(flat(emulated.run_op(fuser, window, read)), flat(together), strict=True):
            assert same_bits(x, y[:, :, start:end])


@pytest.mark.parametrize("in_place", [False, True], ids=["out", "in place"])
def test_token_map_over_several_tiles(in_place, dtype, order):
    config = make_config(**ALIGNED)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 3, 70, 41, dtype)
    generator = torch.Generator().manual_seed(3)
    token_map = torch.randint(-12, 53, (3, 70), generator=generator)
    kept = (token_map < 0) | (token_map >= 41)
    out = clone(base) if in_place else [tuple(torch.full_like(t, 7.0) for t in p) for p in base]
    before = out if in_place else base
    emulated.run_op(fuser, before, sharer, token_map, out=out)
    assert_fused(fuser, base, sharer, out, token_map)
    for x, b in zip(flat(out), flat(base), strict=True):
        unmoved = (x == b).all(3).all(1)
        assert torch.equal(unmoved, kept)


@pytest.mark.parametrize(("name", "j"), golden_data.cases(EVAL_FILES))
def test_golden_as_good_as_plain(name, j, dtype):
    file = golden_data.load(name)
    base, sharer = test_golden.caches(file.case(j), dtype)
    fuser = golden_data.build_fuser(file, j, dtype)
    ours = emulated.run_op(fuser, base, sharer)
    assert_fused(fuser, base, sharer, ours, differs=False)


@pytest.mark.parametrize("j", test_golden.REAL_EVAL_CASES)
def test_golden_real_shape_as_good_as_plain(j):
    test_golden.test_real_shape_as_good_as_plain(j, torch.bfloat16, "bf16run")


def test_fused_kernels_run_where_they_were_asked_for(dtype, monkeypatch):
    """The two paths round at other places."""
    config = make_config(**ALIGNED)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 40, dtype=dtype)
    fused, plain = (
        flat(on_path(path, monkeypatch, fuser, base, sharer)) for path in ("fused", "plain")
    )
    assert not any(map(same_bits, fused, plain))
    truth = flat(run_reference(fuser, cast(base, torch.float64), cast(sharer, torch.float64)))
    assert all(max_abs(x - t) < 0.1 * max_abs(t) for x, t in zip(fused, truth, strict=True))


def test_as_many_streams_as_one_launch_takes_are_fused(monkeypatch):
    layers = 64  # 128 streams
    config = make_config(
        [(1, 24)] * layers, [(1, 8)], [0] * layers, hidden_size=72, intermediate_size=72
    )
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 8, dtype=torch.bfloat16)
    fused, plain = (
        flat(on_path(path, monkeypatch, fuser, base, sharer)) for path in ("fused", "plain")
    )
    assert not any(map(same_bits, fused, plain))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_wider_caches_take_the_plain_path(wide, monkeypatch):
    config = make_config(**ALIGNED)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 5, dtype=wide)
    runs = [on_path(path, monkeypatch, fuser, base, sharer) for path in ("fused", "plain")]
    assert all(map(same_bits, *map(flat, runs)))
    assert_fused(fuser, base, sharer, runs[0])

"""torch.ops.c2c.fuse_: numbers, token maps, conversions and layouts."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    SHAPES,
    KVPairs,
    arguments_of,
    assert_as_good_as_plain,
    assert_fused,
    cast,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    plain_draws,
    relative_error,
    run_op,
    run_reference,
    same_bits,
    set_gates,
)
from torch import Tensor

from c2c_ext import Fuser


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 13), (2, 5), (3, 67)])
def test_numbers_equal_reference(shape, batch, tokens, dtype, device):
    config = make_config(**SHAPES[shape])
    fuser = make_fuser(config, device=device)
    base, sharer = make_caches(config, batch, tokens, tokens + 2, dtype, device)
    assert_fused(fuser, base, sharer, run_op(fuser, base, sharer))


@pytest.mark.parametrize("shape", SHAPES)
def test_token_by_token_equals_reference(shape, dtype, device):
    config = make_config(**SHAPES[shape])
    fuser = make_fuser(config, device=device)
    base, sharer = make_caches(config, 1, 32, dtype=dtype, device=device)
    calls = []
    for n in range(32):
        one, other = (
            [(key[:, :, n : n + 1], value[:, :, n : n + 1]) for key, value in pairs]
            for pairs in (base, sharer)
        )
        calls.append(flat(run_op(fuser, one, other)))
    joined = [torch.cat(tensors, dim=2) for tensors in zip(*calls, strict=True)]
    assert_fused(fuser, base, sharer, list(zip(joined[::2], joined[1::2], strict=True)))


@pytest.fixture
def poisoned_memory():
    """Every uninitialised tensor, the op's scratch among them, holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_that_nobody_wrote_is_not_read(poisoned_memory, shape, dtype, device):
    config = make_config(**SHAPES[shape])
    base, sharer = make_caches(config, 1, 5, 5, dtype, device)
    fused = run_op(make_fuser(config, device=device), base, sharer)
    assert all(t.isfinite().all() for t in flat(fused))


def test_every_size_may_be_one(device):
    config = make_config([(1, 1)], [(1, 1)], [0], hidden_size=1, intermediate_size=1)
    fuser = make_fuser(config, device=device)
    base, sharer = make_caches(config, 1, 1, dtype=torch.float64, device=device)
    assert_fused(fuser, base, sharer, run_op(fuser, base, sharer), differs=False)


@pytest.mark.parametrize(("batch", "tokens", "sharer_tokens"), [(0, 5, 5), (2, 0, 5), (0, 0, 0)])
def test_empty_is_accepted(batch, tokens, sharer_tokens, dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, batch, tokens, sharer_tokens, dtype, device)
    fused = run_op(fuser, base, sharer)
    assert [t.shape for t in flat(fused)] == [t.shape for t in flat(base)]


def test_no_stream_does_nothing(device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, device=device)
    out = clone(base)
    arguments = list(arguments_of(fuser, out, base, sharer).values())
    arguments[7], arguments[8], arguments[9] = [], [], 0
    torch.ops.c2c.fuse_(*arguments)
    assert all(map(same_bits, flat(out), flat(base)))


def test_only_open_streams_are_written(dtype, device):
    fuser = make_fuser(device=device)
    closed = {(0, "key"): 0.0, (1, "value"): -1.0}
    set_gates(fuser, closed)
    base, sharer = make_caches(fuser.config, dtype=dtype, device=device)
    out = [tuple(torch.full_like(t, 7.0) for t in pair) for pair in base]
    run_op(fuser, base, sharer, out=out)
    written_or_base = [
        tuple(
            b if (layer, kind) in closed else o
            for kind, o, b in zip(("key", "value"), *pairs, strict=True)
        )
        for layer, pairs in enumerate(zip(out, base, strict=True))
    ]
    assert_fused(fuser, base, sharer, written_or_base, differs=False)
    for layer, pair in enumerate(out):
        for kind, t in zip(("key", "value"), pair, strict=True):
            assert (t == 7.0).all() == ((layer, kind) in closed)


@pytest.mark.parametrize("batched", [False, True], ids=["[N]", "[B, N]"])
@pytest.mark.parametrize("in_place", [False, True], ids=["out", "in place"])
def test_token_map(batched, in_place, dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 9, 6, dtype, device)
    maps = [[5, -1, 0, 0, 6, 3, 2**40, -(2**40), 1], [-1, -1, 5, 4, 3, 2, 1, 0, 7]]
    token_map = torch.tensor(maps if batched else maps[0], device=device)
    out = clone(base) if in_place else [tuple(torch.full_like(t, 7.0) for t in p) for p in base]
    before = out if in_place else base
    run_op(fuser, before, sharer, token_map, out=out)
    assert_fused(fuser, base, sharer, out, token_map)
    kept = ((token_map < 0) | (token_map >= 6)).expand(2, 9)
    for x, b in zip(flat(out), flat(base), strict=True):
        unmoved = (x == b).flatten(3).all(3).all(1)
        assert torch.equal(unmoved, kept)


def test_token_map_strided_and_expanded(device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 5, 6, device=device)
    wide = torch.tensor([[5, 9, -1, 9, 2, 9, 2, 9, 0, 9]], device=device)
    strided = wide[0, ::2]
    expected = run_op(fuser, base, sharer, strided.contiguous())
    for token_map in (strided, wide[:, ::2].expand(2, 5), wide.t().expand(10, 2)[::2].t()):
        fused = run_op(fuser, base, sharer, token_map)
        assert all(map(torch.equal, flat(fused), flat(expected)))


def test_map_to_empty_sharer_copies(dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 3, 0, dtype, device)
    out = [tuple(torch.full_like(t, 7.0) for t in pair) for pair in base]
    run_op(fuser, base, sharer, torch.tensor([0, -1, 5], device=device), out=out)
    assert all(map(same_bits, flat(out), flat(base)))


def test_kept_tokens_keep_every_bit(device):
    fuser = make_fuser(device=device)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        special = patterns.view(dtype).reshape(1, 2, -1, 8).to(device)
        base = [(special, special.flip(2)), (special.flip(1), special.flip(3))]
        sharer = make_caches(fuser.config, 1, 1, 1, dtype, device)[1]
        token_map = torch.full((special.shape[2],), -1, device=device)
        out = [tuple(torch.zeros_like(t) for t in pair) for pair in base]
        run_op(fuser, base, sharer, token_map, out=out)
        assert all(map(same_bits, flat(out), flat(base)))


def test_accumulate_adds_the_update(dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 6, 4, dtype, device)
    token_map = torch.tensor([3, -1, 2, 1, 0, 0], device=device)
    start = cast(make_caches(fuser.config, 2, 6, 4)[0], torch.float64)
    start = [(3 * value, -2 * key) for key, value in start]
    start = [tuple(t.to(device, dtype) for t in pair) for pair in start]
    ours = run_op(fuser, base, sharer, token_map, out=clone(start), accumulate=True)
    wide = [cast(x, torch.float64) for x in (base, sharer, start)]
    fused = run_reference(fuser, wide[0], wide[1], token_map)
    draws = plain_draws(fuser, base, sharer, token_map)
    for x, plain, was, clean, fully, wide_clean, wide_was in zip(
        *(flat(ours), draws, flat(start), flat(base), flat(fused), flat(wide[0]), flat(wide[2])),
        strict=True,
    ):
        truth = wide_was + (fully - wide_clean)
        if dtype == torch.float64:
            assert relative_error(x, truth) <= 1e-13
        else:
            assert_as_good_as_plain(x, [was + (p - clean) for p in plain], truth)
        assert torch.equal(x[:, :, 1], was[:, :, 1])
        assert max_abs(x - was) > 0.1


def test_two_updates_accumulate_to_their_sum(device):
    fusers = [make_fuser(seed=seed, device=device) for seed in (0, 1)]
    base, sharer = make_caches(fusers[0].config, dtype=torch.float64, device=device)
    out = clone(base)
    for fuser in fusers:
        run_op(fuser, base, sharer, out=out, accumulate=True)
    first, second = (run_reference(fuser, base, sharer) for fuser in fusers)
    for x, b, f, s in zip(*map(flat, (out, base, first, second)), strict=True):
        assert relative_error(x, f + s - b) <= 1e-13
        assert max_abs(x - f) > 0.1


def test_same_input_gives_same_bits(dtype, device):
    config = make_config(hidden_size=64, intermediate_size=96)
    fuser = make_fuser(config, device=device)
    base, sharer = make_caches(config, 2, 129, None, dtype, device)
    first = run_op(fuser, base, sharer)
    for _ in range(3):
        assert all(map(same_bits, flat(run_op(fuser, base, sharer)), flat(first)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["base", "sharer"])
def test_bad_numbers_stay_in_their_token(where, bad, dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 7, None, dtype, device)
    clean = run_op(fuser, base, sharer)
    for t in flat(base if where == "base" else sharer):
        t[1, 0, 3, 1] = bad
    fused = run_op(fuser, base, sharer)
    for x, c in zip(flat(fused), flat(clean), strict=True):
        assert not x[1, :, 3].isfinite().all()
        x[1, :, 3] = c[1, :, 3]
        assert same_bits(x, c)


# ---- conversions --------------------------------------------------------------------------------


def constant_update(values: Tensor) -> Fuser:
    """A one-layer fuser whose projection is ``values`` with weight exactly 1, whatever it reads."""
    config = make_config([(1, values.numel())], [(1, 1)], [0], hidden_size=1, intermediate_size=1)
    fuser = make_fuser(config)
    with torch.no_grad():
        group = fuser.groups[0]
        for parameter in (group.out_weight, group.head_weight):
            parameter.zero_()
        group.head_bias.fill_(200.0)
        group.out_bias.copy_(values)
    return fuser


def assert_same_number(ours: Tensor, expected: Tensor) -> None:
    """Bit for bit, but any NaN for NaN."""
    assert torch.equal(ours.isnan(), expected.isnan())
    assert same_bits(
        ours.nan_to_num(0.0, torch.inf, -torch.inf), expected.nan_to_num(0.0, torch.inf, -torch.inf)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_pattern_survives(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    fuser = constant_update(torch.zeros(patterns.numel()))
    base, sharer = make_caches(fuser.config, 1, 1, dtype=dtype)
    base = [tuple(torch.zeros_like(t) for t in pair) for pair in base]
    out = [(patterns.reshape(1, 1, 1, -1).clone(), patterns.reshape(1, 1, 1, -1).clone())]
    run_op(fuser, base, sharer, out=out, accumulate=True)
    for t in out[0]:
        assert_same_number(t.flatten(), patterns + 0.0)  # -0.0 + 0.0 is 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_is_to_nearest_even(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[patterns.isfinite()].float().sort().values.unique()
    middle = (numbers[1:].double() + numbers[:-1].double()).div(2).float()
    torch.manual_seed(0)
    arbitrary = torch.randint(-(2**31), 2**31, (2**17,)).to(torch.int32).view(torch.float32)
    edges = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.4028235e38, torch.inf, 2**-25])
    infinity = torch.tensor(torch.inf)
    values = torch.cat(
        [
            *(numbers, middle, middle.nextafter(infinity), middle.nextafter(-infinity)),
            *(edges, -edges, arbitrary, arbitrary.half().float()),
        ]
    )
    for part in values.split(2**17):
        fuser = constant_update(part)
        base, sharer = make_caches(fuser.config, 1, 1, dtype=dtype)
        base = [tuple(torch.zeros_like(t) for t in pair) for pair in base]
        fused = run_op(fuser, base, sharer)
        for t in fused[0]:
            assert_same_number(t.flatten(), (part + 0.0).to(dtype))


# ---- layouts ------------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    """[B, H, N, D] over memory laid out as [B, N, H, D]."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(t: Tensor) -> Tensor:
    """The stride of D is not 1."""
    return t.transpose(2, 3).contiguous().transpose(2, 3)


def every_other_channel(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, 7.0)], dim=-1).flatten(3)[..., ::2]


def middle_of_longer(t: Tensor) -> Tensor:
    edge = torch.full_like(t[:, :, :1], 7.0).expand(-1, -1, 3, -1)
    return torch.cat([edge, t, edge], dim=2)[:, :, 3 : 3 + t.shape[2]]


def batch_last(t: Tensor) -> Tensor:
    return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


LAYOUTS = [transposed, channels_first, every_other_channel, middle_of_longer, batch_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("which", ["base", "sharer", "out", "in place"])
def test_any_layout(which, layout, dtype, device):
    fuser = make_fuser(make_config(sharer=[(3, 4)] * 3), device=device)
    base, sharer = make_caches(fuser.config, 2, 5, 7, dtype, device)
    expected = run_op(fuser, base, sharer)

    def lay_out(pairs: KVPairs) -> KVPairs:
        laid_out = [(layout(key), layout(value)) for key, value in pairs]
        assert not any(t.is_contiguous() for t in flat(laid_out))
        return laid_out

    views = {"base": base, "sharer": sharer, "out": clone(base)}
    if which == "in place":
        views["base"] = views["out"] = lay_out(base)
    else:
        views[which] = lay_out(views[which])
    around = [t._base.clone() if t._base is not None else t.clone() for t in flat(views["out"])]
    fused = run_op(fuser, views["base"], views["sharer"], out=views["out"])
    assert all(map(same_bits, flat(fused), flat(expected)))
    # Nothing but the view itself was written.
    for t, before in zip(flat(fused), around, strict=True):
        if t._base is not None:
            assert (t._base == 7.0).sum() == (before == 7.0).sum()


def test_expanded_sharer(dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 3, 5, None, dtype, device)
    one = [(key[:1, :, :1], value[:1, :, :1]) for key, value in sharer]
    views = [tuple(t.expand(3, -1, 5, -1) for t in pair) for pair in one]
    fused = run_op(fuser, base, views)
    assert all(map(same_bits, flat(fused), flat(run_op(fuser, base, clone(views)))))
    assert_fused(fuser, base, views, fused)


def test_in_place_equals_out_of_place(dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 3, 17, None, dtype, device)
    expected = run_op(fuser, base, sharer, out=[tuple(map(torch.empty_like, p)) for p in base])
    in_place = clone(base)
    run_op(fuser, in_place, sharer, out=in_place)
    assert all(map(same_bits, flat(in_place), flat(expected)))


def test_interleaved_keys_and_values_are_accepted(dtype, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 5, None, dtype, device)
    expected = run_op(fuser, base, sharer)
    by_channel = [torch.cat([key, value], dim=3) for key, value in base]
    by_head = [torch.stack([key, value], dim=2).flatten(1, 2) for key, value in base]
    by_parity = [torch.stack([key, value], dim=4).flatten(3) for key, value in base]
    for views in (
        [(t[..., :8], t[..., 8:]) for t in by_channel],
        [(t[:, ::2], t[:, 1::2]) for t in by_head],
        [(t[..., ::2], t[..., 1::2]) for t in by_parity],
    ):
        assert all(map(torch.equal, flat(views), flat(base)))
        run_op(fuser, views, sharer, out=views)
        assert all(map(same_bits, flat(views), flat(expected)))


def test_sharer_may_be_other_tokens_of_the_same_buffer(device):
    config = make_config([(2, 8)] * 2, [(2, 8)] * 2, [0, 1])
    fuser = make_fuser(config, device=device)
    buffer, _ = make_caches(config, 2, 10, device=device)
    base = [(key[:, :, 5:], value[:, :, 5:]) for key, value in buffer]
    sharer = [(key[:, :, :5], value[:, :, :5]) for key, value in buffer]
    expected = run_op(fuser, base, sharer)
    run_op(fuser, base, sharer, out=base)
    assert all(map(same_bits, flat(base), flat(expected)))

"""c2c_ext.fuse: kinds of cache, shared storage, positions, token maps, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    DTYPES,
    KVPairs,
    assert_fused,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    run_op,
    run_reference,
    same_bits,
    set_gates,
)
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

import c2c_ext
from c2c_ext import Fuser, reference

STATIC_LENGTH = 11


def dynamic_cache(pairs: KVPairs, config: Any = None) -> DynamicCache:
    cache = DynamicCache() if config is None else DynamicCache(config=config)
    return filled(cache, pairs)


def static_cache(pairs: KVPairs) -> StaticCache:
    """A StaticCache with room for more tokens than it holds."""
    return filled(StaticCache(config=model_config(pairs), max_cache_len=STATIC_LENGTH), pairs)


def model_config(pairs: KVPairs, kind: type = LlamaConfig, **changes: object) -> Any:
    _, heads, _, dim = pairs[0][0].shape
    return kind(
        num_hidden_layers=len(pairs),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim,
        hidden_size=heads * dim,
        **changes,
    )


def filled(cache: Any, pairs: KVPairs) -> Any:
    positions = {"cache_position": torch.arange(pairs[0][0].shape[2])}
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.clone(), value.clone(), layer, positions)
    return cache


def held(cache: Any) -> KVPairs:
    """The tokens that a cache holds, read without c2c_ext."""
    if isinstance(cache, DynamicCache | StaticCache):
        length = int(cache.get_seq_length())
        return [(x.keys[:, :, :length], x.values[:, :, :length]) for x in cache.layers]
    return list(cache)


KINDS: dict[str, Callable[[KVPairs], Any]] = {
    "list": clone,
    "tuple": lambda pairs: tuple(clone(pairs)),
    "lists of lists": lambda pairs: [list(pair) for pair in clone(pairs)],
    "DynamicCache": dynamic_cache,
    "StaticCache": static_cache,
}


@pytest.fixture
def fuser() -> Fuser:
    return make_fuser()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("sharer_kind", KINDS)
@pytest.mark.parametrize("receiver_kind", KINDS)
def test_kinds_of_cache(receiver_kind, sharer_kind, inplace, fuser):
    base, sharer_pairs = make_caches(fuser.config, 2, 5)
    expected = run_op(fuser, base, sharer_pairs)
    receiver, sharer = KINDS[receiver_kind](base), KINDS[sharer_kind](sharer_pairs)
    storages = [t.data_ptr() for t in flat(held(receiver))]
    with torch.no_grad():
        fused = c2c_ext.fuse(receiver, sharer, fuser, inplace=inplace)
    assert type(fused) is type(receiver)
    assert all(map(same_bits, flat(held(fused)), flat(expected)))
    assert all(map(same_bits, flat(held(sharer)), flat(sharer_pairs)))
    if inplace:
        assert fused is receiver
        assert [t.data_ptr() for t in flat(held(fused))] == storages
    else:
        assert all(map(same_bits, flat(held(receiver)), flat(base)))
        shared = storages + [t.data_ptr() for t in flat(held(sharer))]
        assert not set(shared) & {t.data_ptr() for t in flat(held(fused))}
    if receiver_kind.endswith("Cache"):
        assert int(fused.get_seq_length()) == 5


@pytest.mark.parametrize("grad", [False, True])
def test_views_with_a_pending_negation(grad, fuser):
    """As conj().imag has it; found by fuzzing: torch refused to let the op write to them."""
    base, sharer = make_caches(fuser.config, 2, 5)
    expected = run_op(fuser, base, sharer)
    negated = [
        [tuple(torch._neg_view(t.neg()) for t in pair) for pair in pairs]
        for pairs in (base, sharer)
    ]
    with torch.set_grad_enabled(grad):
        fused = c2c_ext.fuse(*negated, fuser)
    assert not any(t.is_neg() for t in flat(fused))
    for ours, truth in zip(flat(fused), flat(expected), strict=True):
        assert grad or same_bits(ours, truth)
        assert max_abs(ours - truth) < 1e-5
    zeros = [tuple(torch._efficientzerotensor(t.shape) for t in pair) for pair in base]
    for unwritable in (negated[0], zeros):
        message = r"receiver_keys\[0\] cannot be written to, as inplace=True would"
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            c2c_ext.fuse(unwritable, sharer, fuser, inplace=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_fused_cache_continues_apart_from_its_source(kind, grad, fuser):
    base, sharer = make_caches(fuser.config, 2, 5)
    receiver = KINDS[kind](base)
    with torch.set_grad_enabled(grad):
        fused = c2c_ext.fuse(receiver, sharer, fuser)
    new = make_caches(fuser.config, 2, 1)[0]
    for layer, (key, value) in enumerate(new):
        fused.update(key, value, layer, {"cache_position": torch.tensor([5])})
    assert int(fused.get_seq_length()) == 6
    assert int(receiver.get_seq_length()) == 5
    assert all(map(same_bits, flat(held(receiver)), flat(base)))
    for ours, pair in zip(held(fused), new, strict=True):
        assert all(torch.equal(x[:, :, 5:], t) for x, t in zip(ours, pair, strict=True))
    for layer in receiver.layers:
        if kind == "StaticCache":
            assert layer.keys.shape[2] == STATIC_LENGTH and not layer.keys[:, :, 5:].any()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("start", "end"), [(0, None), (2, None), (0, 3), (2, 5), (3, 4), (4, 4)])
@pytest.mark.parametrize("kind", ["list", "StaticCache"])
def test_start_end_and_map(kind, start, end, inplace, mapped, fuser):
    base, sharer = make_caches(fuser.config, 2, 7, 9)
    stop = 7 if end is None else end
    token_map = None
    if mapped:
        token_map = torch.tensor([[8, -1, 0, 3, 3, 1, 7], [-1, 2, -1, 4, 5, 6, 0]])[:, start:stop]
    window = [(k[:, :, start:stop].clone(), v[:, :, start:stop].clone()) for k, v in base]
    source = sharer if mapped else [(k[:, :, start:stop], v[:, :, start:stop]) for k, v in sharer]
    expected = run_op(fuser, window, source, token_map)
    receiver = KINDS[kind](base)
    with torch.no_grad():
        fused = c2c_ext.fuse(
            receiver, sharer, fuser, start=start, end=end, token_map=token_map, inplace=inplace
        )
        by_reference = run_reference(fuser, window, source, token_map)
    assert (fused is receiver) == inplace
    for x, e, b, r in zip(*map(flat, (held(fused), expected, base, by_reference)), strict=True):
        assert same_bits(x[:, :, start:stop], e)
        assert same_bits(x[:, :, :start], b[:, :, :start])
        assert same_bits(x[:, :, stop:], b[:, :, stop:])
        assert max_abs(e - r) < 1e-5
        assert start == stop or max_abs(e - b[:, :, start:stop]) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_the_caches(dtype, fuser):
    base, sharer = make_caches(fuser.config, 2, 5, dtype=dtype)
    with torch.no_grad():
        fused = c2c_ext.fuse(base, sharer, fuser)
    assert all(t.dtype == dtype for t in flat(fused))
    assert_fused(fuser, base, sharer, fused)


def test_layers_of_different_shapes():
    config = make_config([(2, 8), (1, 20), (2, 8)], [(1, 4), (3, 6)], [1, 0, 0])
    fuser = make_fuser(config)
    assert len(fuser.groups) == 3
    base, sharer = make_caches(config, dtype=torch.float64)
    with torch.no_grad():
        fused = c2c_ext.fuse(dynamic_cache(base), dynamic_cache(sharer), fuser)
    for x, e in zip(flat(held(fused)), flat(run_reference(fuser, base, sharer)), strict=True):
        assert max_abs(x - e) < 1e-13


def test_sliding_window_that_dropped_tokens_is_refused(fuser):
    base, sharer = make_caches(fuser.config, 1, 5)
    for pairs, position in ((base, 0), (sharer, 1)):
        config = model_config(pairs, MistralConfig, sliding_window=4)
        caches = [base, sharer]
        caches[position] = dynamic_cache(pairs, config)
        with torch.no_grad(), pytest.raises(ValueError, match="holds only the last 3 of 5 tokens"):
            c2c_ext.fuse(*caches, fuser)
    # A window that has not filled up holds every token.
    config = model_config(base, MistralConfig, sliding_window=8)
    with torch.no_grad():
        fused = c2c_ext.fuse(dynamic_cache(base, config), sharer, fuser)
    assert all(map(same_bits, flat(held(fused)), flat(run_op(fuser, base, sharer))))


def test_closed_gates_leave_every_bit(fuser):
    set_gates(fuser, {}, default=0.0)
    base, sharer = make_caches(fuser.config)
    base[0][0][0, 0, 0] = -0.0
    with torch.no_grad():
        fused = c2c_ext.fuse(base, sharer, fuser)
    assert all(map(same_bits, flat(fused), flat(base)))
    assert not {t.data_ptr() for t in flat(fused)} & {t.data_ptr() for t in flat(base)}


# ---- gradients ----------------------------------------------------------------------------------


def test_gradcheck():
    config = make_config([(2, 3)], [(1, 2)], [0], hidden_size=4, intermediate_size=5, depth=4)
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, 2, 3, 2, dtype=torch.float64)
    token_map = torch.tensor([[1, -1], [0, 1]])
    leaves = [t.requires_grad_() for t in flat(base) + flat(sharer)]
    weights = [p for name, p in fuser.named_parameters() if not name.endswith("gate_logit")]

    def function(*_: Tensor) -> list[Tensor]:  # reads the very tensors that gradcheck varies
        return flat(c2c_ext.fuse(base, sharer, fuser, start=1, token_map=token_map))

    assert torch.autograd.gradcheck(function, [*leaves, *weights])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_caches_and_weights(kind, fuser):
    base, sharer = make_caches(fuser.config, 2, 5)
    leaf = base[1][0].requires_grad_()
    receiver = KINDS[kind](base)
    fused = c2c_ext.fuse(receiver, sharer, fuser, start=2)
    assert type(fused) is type(receiver)
    out = held(fused)
    with torch.no_grad():
        expected = held(c2c_ext.fuse(receiver, sharer, fuser, start=2))
    assert all(max_abs(x - e) < 1e-5 for x, e in zip(flat(out), flat(expected), strict=True))
    sum(t.sum() for t in flat(out)).backward()
    if kind != "StaticCache":  # whose update() copies into a buffer
        assert torch.equal(leaf.grad[:, :, :2], torch.ones_like(leaf)[:, :, :2])
        assert not torch.equal(leaf.grad[:, :, 2:], torch.ones_like(leaf)[:, :, 2:])
    for name, parameter in fuser.named_parameters():
        if name.endswith("gate_logit"):
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad.flatten(1).any(dim=1).all(), name


def test_no_gradient_where_none_is_wanted(fuser):
    base, sharer = make_caches(fuser.config)
    fuser.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(c2c_ext.fuse(base, sharer, fuser)))
    fuser.requires_grad_(True)
    assert all(t.requires_grad for t in flat(c2c_ext.fuse(base, sharer, fuser)))
    with torch.no_grad():
        assert not any(t.requires_grad for t in flat(c2c_ext.fuse(base, sharer, fuser)))


@pytest.mark.parametrize("needs", ["fuser", "receiver", "sharer"])
def test_inplace_is_refused_where_gradients_are_wanted(needs, fuser):
    base, sharer = make_caches(fuser.config)
    fuser.requires_grad_(needs == "fuser")
    if needs != "fuser":
        {"receiver": base, "sharer": sharer}[needs][1][1].requires_grad_()
    with pytest.raises(ValueError, match="inplace=True records no gradient"):
        c2c_ext.fuse(base, sharer, fuser, inplace=True)


def test_inplace_is_seen_by_autograd(fuser):
    base, sharer = make_caches(fuser.config)
    versions = [t._version for t in flat(base)]
    scale = torch.ones(1, requires_grad=True)
    products = [(t * scale).sum() for t in flat(base)]
    with torch.no_grad():
        c2c_ext.fuse(base, sharer, fuser, inplace=True)
    assert all(t._version > v for t, v in zip(flat(base), versions, strict=True))
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_inference_mode(fuser):
    expected = run_op(fuser, *make_caches(fuser.config))
    with torch.inference_mode():
        for inplace in (False, True):
            base, sharer = make_caches(fuser.config)
            fused = c2c_ext.fuse(base, sharer, fuser, inplace=inplace)
            assert all(map(same_bits, flat(fused), flat(expected)))


def test_overlapping_views_are_refused_in_place_only(fuser):
    base, sharer = make_caches(fuser.config)
    same = [(key, key) for key, _ in base]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="must not overlap"):
            c2c_ext.fuse(same, sharer, fuser, inplace=True)
        fused = c2c_ext.fuse(same, sharer, fuser)
    assert all(map(same_bits, flat(fused), flat(run_op(fuser, clone(same), sharer))))


@pytest.mark.parametrize("expanded", ["receiver", "sharer"])
def test_expanded_caches_fuse_out_of_place(expanded, fuser):
    base, sharer = make_caches(fuser.config, 3)
    caches = {"receiver": base, "sharer": sharer}
    rows = [(k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)) for k, v in caches[expanded]]
    caches[expanded] = rows
    expected = run_op(fuser, clone(caches["receiver"]), clone(caches["sharer"]))
    with torch.no_grad():
        fused = c2c_ext.fuse(caches["receiver"], caches["sharer"], fuser)
    assert all(map(same_bits, flat(fused), flat(expected)))


def test_caches_survive_copying(fuser):
    base, sharer = make_caches(fuser.config)
    receiver = dynamic_cache(base)
    with torch.no_grad():
        fused = copy.deepcopy(c2c_ext.fuse(receiver, sharer, fuser))
    assert all(map(same_bits, flat(held(fused)), flat(run_op(fuser, base, sharer))))


def test_forward_mode_takes_the_differentiable_path():
    fuser = make_fuser().double().requires_grad_(False)
    base, sharer = make_caches(fuser.config, dtype=torch.float64)

    def total(key):
        return c2c_ext.fuse(base, [(key, sharer[0][1]), *sharer[1:]], fuser)[0][0].square().sum()

    key, tangent = sharer[0][0], torch.randn_like(sharer[0][0])
    step = 1e-6
    expected = (total(key + step * tangent) - total(key - step * tangent)) / (2 * step)
    assert expected.abs() > 1e-3
    _, by_func = torch.func.jvp(total, (key,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(key, tangent)
        by_dual = torch.autograd.forward_ad.unpack_dual(total(dual)).tangent
    by_grad = (torch.func.grad(total)(key) * tangent).sum()
    for derivative in (by_func, by_dual, by_grad):
        torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_open_gate_is_open(dtype, grad):
    fuser = make_fuser()
    set_gates(fuser, {(0, "key"): 1e-30, (0, "value"): 0.0}, default=-1.0)
    base, sharer = make_caches(fuser.config, dtype=dtype)
    with torch.set_grad_enabled(grad):
        fused = c2c_ext.fuse(base, sharer, fuser)
    changed = [not same_bits(x.detach(), b) for x, b in zip(flat(fused), flat(base), strict=True)]
    assert changed == [True, False, False, False]


def test_closed_stream_keeps_its_bits_with_gradients():
    fuser = make_fuser()
    set_gates(fuser, {}, default=-1.0)
    with torch.no_grad():
        fuser.groups[0].out_bias.fill_(float("inf"))
    base, sharer = make_caches(fuser.config)
    base[0][0].fill_(-0.0)
    fused = c2c_ext.fuse(base, sharer, fuser)
    assert fused[0][0].requires_grad
    assert all(same_bits(x.detach(), b) for x, b in zip(flat(fused), flat(base), strict=True))


def test_dropout_is_where_the_reference_puts_it():
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    sharer = [(key[:, :, :5], value[:, :, :5]) for key, value in sharer]

    def fused(p, seed):
        torch.manual_seed(seed)
        return reference.fuse(base, sharer, fuser, dropout=p)[0][0]

    assert torch.equal(fused(0.0, 0), fused(0.0, 1))
    assert torch.equal(fused(0.5, 0), fused(0.5, 0))
    assert not torch.allclose(fused(0.5, 0), fused(0.5, 1))
    mean = torch.stack([fused(0.1, seed) for seed in range(400)]).mean(0)
    change = (fused(0.0, 0) - base[0][0]).abs().mean()
    assert (mean - fused(0.0, 0)).abs().mean() < 0.1 * change


def test_transform_with_inplace_is_refused():
    fuser = make_fuser().requires_grad_(False)
    base, sharer = make_caches(fuser.config)
    with (
        torch.autograd.forward_ad.dual_level(),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"cannot be used inside forward-mode AD or a torch\.func"),
    ):
        c2c_ext.fuse(base, sharer, fuser, inplace=True)

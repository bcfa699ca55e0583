"""c2c_ext.fuse with several sharers: parallel and sequential, maps, gradients, refusals."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import (
    KVPairs,
    assert_as_good_as_plain,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    make_kv,
    max_abs,
    plain_draws,
    relative_error,
    run_op,
    run_reference,
    same_bits,
    set_gates,
)
from torch import Tensor
from transformers import DynamicCache

import c2c_ext
from c2c_ext import Fuser

FUSIONS = ["parallel", "sequential"]
# The receiver is make_config's own; three sharers of different depths and widths.
CONFIGS = (
    {},
    {"sharer": [(3, 6)], "layer_map": [0, 0]},
    {"sharer": [(1, 20), (2, 8)], "layer_map": [1, 0], "depth": 4},
)


def fusers(count: int = 3, **changes: object) -> list[Fuser]:
    return [make_fuser(make_config(**{**CONFIGS[k], **changes}), seed=k) for k in range(count)]


def caches(
    several: list[Fuser], tokens: int = 5, dtype: torch.dtype = torch.float64, lengths=None
) -> tuple[KVPairs, list[KVPairs]]:
    base, _ = make_caches(several[0].config, 2, tokens, dtype=dtype)
    lengths = lengths or [tokens] * len(several)
    sharers = [
        make_kv(f.config.sharer.layers, 2, n, dtype, seed=10 + k)
        for k, (f, n) in enumerate(zip(several, lengths, strict=True))
    ]
    return base, sharers


def expected(
    base: KVPairs, sharers: list[KVPairs], several: list[Fuser], fusion: str, maps=None
) -> KVPairs:
    """Written out with the reference: one fusion at a time."""
    maps = maps or [None] * len(several)
    total = base
    for sharer, fuser, token_map in zip(sharers, several, maps, strict=True):
        if fusion == "sequential":
            total = run_reference(fuser, total, sharer, token_map)
        else:
            out = run_reference(fuser, base, sharer, token_map)
            total = [
                tuple(t + (o - b) for t, o, b in zip(*triple, strict=True))
                for triple in zip(total, out, base, strict=True)
            ]
    return total


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_lists_fuse_every_sharer(fusion, kind, inplace):
    several = fusers()
    base, sharers = caches(several)
    truth = expected(base, sharers, several, fusion)
    other = expected(base, sharers, several, "parallel" if fusion != "parallel" else "sequential")
    before = clone(base)
    with torch.no_grad():
        fused = c2c_ext.fuse(base, kind(sharers), kind(several), fusion=fusion, inplace=inplace)
    for x, t, o, b in zip(flat(fused), flat(truth), flat(other), flat(before), strict=True):
        assert relative_error(x, t) <= 1e-13
        assert max_abs(x - o) > 1e-3 and max_abs(x - b) > 0.1
    assert (fused is base) == inplace
    if not inplace:
        assert all(map(same_bits, flat(base), flat(before)))
        assert not {t.data_ptr() for t in flat(fused)} & {t.data_ptr() for t in flat(base)}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_half_precision_is_as_good_as_plain(fusion, dtype):
    several = fusers(2)
    base, sharers = caches(several, dtype=torch.float64)
    base = [(k.to(dtype), v.to(dtype)) for k, v in base]
    sharers = [[(k.to(dtype), v.to(dtype)) for k, v in s] for s in sharers]
    with torch.no_grad():
        fused = c2c_ext.fuse(base, sharers, several, fusion=fusion)
    if dtype == torch.float64:
        return  # the truth itself: test_lists_fuse_every_sharer
    wide = [[(k.double(), v.double()) for k, v in s] for s in (base, *sharers)]
    truth = flat(expected(wide[0], wide[1:], several, fusion))
    if fusion == "sequential":
        middle = run_reference(several[0], base, sharers[0])
        draws = plain_draws(several[1], middle, sharers[1])
    else:
        firsts = plain_draws(several[0], base, sharers[0])
        seconds = plain_draws(several[1], base, sharers[1])
        draws = [
            tuple(a + (c - b) for a, c in zip(*pair, strict=True))
            for *pair, b in zip(firsts, seconds, flat(base), strict=True)
        ]
    for i, (x, p, t) in enumerate(zip(flat(fused), draws, truth, strict=True)):
        assert_as_good_as_plain(x, p, t, f"tensor {i}")


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_list_of_one_is_the_single_call(fusion):
    several = fusers(1)
    base, sharers = caches(several, dtype=torch.float32)
    with torch.no_grad():
        fused = c2c_ext.fuse(base, sharers, several, fusion=fusion)
        single = c2c_ext.fuse(base, sharers[0], several[0], fusion=fusion)
    assert all(map(same_bits, flat(fused), flat(single)))
    assert all(map(same_bits, flat(fused), flat(run_op(several[0], base, sharers[0]))))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_ranges_and_a_map_for_every_sharer(fusion, inplace):
    several = fusers()
    base, sharers = caches(several, 6, lengths=[6, 9, 2])
    start, end = 1, 5
    maps = [None, torch.tensor([[8, -1, 0, 3], [-1, -1, -1, -1]]), torch.tensor([-1, 1, 1, -1])]
    part = [(k[:, :, start:end].clone(), v[:, :, start:end].clone()) for k, v in base]
    views = [[(k[:, :, start:end], v[:, :, start:end]) for k, v in sharers[0]], *sharers[1:]]
    truth = expected(part, views, several, fusion, maps)
    before = clone(base)
    with torch.no_grad():
        fused = c2c_ext.fuse(
            base, sharers, several, fusion=fusion, start=start, end=end, token_map=maps,
            inplace=inplace,
        )  # fmt: skip
    for x, t, b in zip(flat(fused), flat(truth), flat(before), strict=True):
        assert relative_error(x[:, :, start:end], t) <= 1e-13
        assert same_bits(x[:, :, :start], b[:, :, :start])
        assert same_bits(x[:, :, end:], b[:, :, end:])


def test_one_map_serves_all_sharers():
    several = fusers(2)
    base, sharers = caches(several)
    one = torch.tensor([-1, 4, 2, -1, 0])
    with torch.no_grad():
        fused = c2c_ext.fuse(base, sharers, several, token_map=one)
        listed = c2c_ext.fuse(base, sharers, several, token_map=[one, one])
        whole = c2c_ext.fuse(base, sharers, several)
    assert all(map(same_bits, flat(fused), flat(listed)))
    assert not any(map(torch.equal, flat(fused), flat(whole)))


VARIANTS = {"compiled": {}, "uncompiled": {"projection": "transformer"}}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("second", VARIANTS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_no_sharer_touches_keeps_its_bits(fusion, second, grad):
    """Rows and streams left alone by all, negative zeros and infinities included."""
    several = [make_fuser(), make_fuser(make_config(**VARIANTS[second]), seed=1)]
    for fuser in several:
        set_gates(fuser, {(1, "key"): -1.0, (1, "value"): 0.0})
    base, sharers = caches(several, dtype=torch.float32)
    base[1][0][0, 0, 0] = -0.0
    base[1][1][0, 0, 0] = torch.inf
    base[0][0][1, 0, 0] = -0.0
    base[0][1][1, 0, 1] = -torch.inf
    rows = torch.tensor([[0, 1, 2, 3, 4], [-1] * 5])
    with torch.set_grad_enabled(grad):
        fused = c2c_ext.fuse(base, sharers, several, fusion=fusion, token_map=rows)
    for layer, (pair, clean) in enumerate(zip(fused, base, strict=True)):
        for x, b in zip(pair, clean, strict=True):
            assert same_bits(x.detach()[1], b[1])
            assert same_bits(x.detach()[0], b[0]) == (layer == 1)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_variants_without_kernels_mix_with_compiled_ones(fusion):
    several = [
        make_fuser(),
        make_fuser(make_config(**VARIANTS["uncompiled"]), seed=1),
        make_fuser(seed=2),
    ]
    base, sharers = caches(several)
    truth = expected(base, sharers, several, fusion)
    before = clone(base)
    with torch.no_grad():
        for inplace in (False, True):
            fused = c2c_ext.fuse(base, sharers, several, fusion=fusion, inplace=inplace)
            for x, t in zip(flat(fused), flat(truth), strict=True):
                assert relative_error(x, t) <= 1e-13
            assert inplace or all(map(same_bits, flat(base), flat(before)))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradcheck(fusion):
    small = {"receiver": [(2, 3)], "sharer": [(1, 2)], "layer_map": [0]}
    sizes = {"hidden_size": 4, "intermediate_size": 5}
    several = [make_fuser(make_config(**small, **sizes), seed=k).double() for k in range(2)]
    base, sharers = caches(several, 3)
    token_map = torch.tensor([[1, -1, 0], [0, 1, 2]])
    leaves = [t.requires_grad_() for t in flat(base) + flat(sharers[0]) + flat(sharers[1])]
    weights = [
        p for f in several for name, p in f.named_parameters() if not name.endswith("gate_logit")
    ]

    def function(*_: Tensor) -> list[Tensor]:
        return flat(
            c2c_ext.fuse(base, sharers, several, fusion=fusion, token_map=[None, token_map])
        )

    assert torch.autograd.gradcheck(function, [*leaves, *weights], fast_mode=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_lists_compile_into_one_graph(fusion, inplace):
    torch._dynamo.reset()
    several = fusers(2)
    base, sharers = caches(several, dtype=torch.float32)
    token_map = torch.tensor([3, 2, -1, 0, 0])

    def function(base: KVPairs, *sharers: KVPairs) -> KVPairs:
        return c2c_ext.fuse(
            base, list(sharers), several, fusion=fusion, token_map=[None, token_map],
            inplace=inplace,
        )  # fmt: skip

    with torch.no_grad():
        eager = c2c_ext.fuse(base, sharers, several, fusion=fusion, token_map=[None, token_map])
        ours = torch.compile(function, fullgraph=True, backend="aot_eager")(base, *sharers)
    assert all(map(same_bits, flat(ours), flat(eager)))


# ---- refusals ------------------------------------------------------------------------------------


def wider(pairs: KVPairs) -> KVPairs:
    return [(k, torch.cat([v, v], 1)) for k, v in pairs]


# (changes to the call's keywords, exception, message); two sharers of 3 and 1 layers.
REFUSED = {
    "one cache for two fusers": (
        lambda c: {"sharer_cache": DynamicCache()},
        TypeError,
        "fuser is a list, so sharer_cache must be a list of as many caches, got DynamicCache",
    ),
    "caches for one fuser": (
        lambda c: {"fuser": c["fuser"][0]},
        TypeError,
        "sharer_cache is a list of caches, so fuser must be a list of as many fusers, got Fuser",
    ),
    "cache objects for one fuser": (
        lambda c: {"fuser": c["fuser"][0], "sharer_cache": [DynamicCache(), DynamicCache()]},
        TypeError,
        "sharer_cache is a list of caches, so fuser must be a list of as many fusers, got Fuser",
    ),
    "maps for one fuser": (
        lambda c: {
            "fuser": c["fuser"][0],
            "sharer_cache": c["sharer_cache"][0],
            "token_map": [None],
        },
        TypeError,
        "token_map must be an int64 tensor, got list; a list of maps goes with lists of sharers",
    ),
    "too few caches": (
        lambda c: {"sharer_cache": c["sharer_cache"][:1]},
        ValueError,
        "sharer_cache must have as many entries as fuser, 2, got 1",
    ),
    "too many maps": (
        lambda c: {"token_map": [None] * 3},
        ValueError,
        "token_map must have as many entries as fuser, 2, got 3",
    ),
    "no sharer": (
        lambda c: {"sharer_cache": [], "fuser": []},
        ValueError,
        "fuser and sharer_cache must hold at least one sharer, got 0",
    ),
    "unknown fusion": (
        lambda c: {"fusion": "both"},
        ValueError,
        "fusion must be one of parallel, sequential, got 'both'",
    ),
    "fusion of another type": (
        lambda c: {"fusion": None},
        ValueError,
        "fusion must be one of parallel, sequential, got None",
    ),
    "no fuser": (
        lambda c: {"fuser": [c["fuser"][0], "fuser"]},
        TypeError,
        "fuser[1] must be a c2c_ext.Fuser, got str",
    ),
    "no cache": (
        lambda c: {"sharer_cache": [c["sharer_cache"][0], None]},
        TypeError,
        "sharer_cache[1] must be a transformers Cache or a sequence of (key, value) tensors",
    ),
    "in another order": (
        lambda c: {"fuser": c["fuser"][::-1]},
        ValueError,
        "sharer_cache[0] must have 1 layers (the fuser[0]'s sharer), got 3",
    ),
    "a fuser for another receiver": (
        lambda c: {
            "fuser": [c["fuser"][0], make_fuser(make_config([(1, 8)] * 2, [(3, 6)], [0] * 2))]
        },
        ValueError,
        "fuser[1]: receiver_keys[0] dim 1 (heads) must equal 1, got 2",
    ),
    "a sharer of another shape": (
        lambda c: {"sharer_cache": [c["sharer_cache"][0], wider(c["sharer_cache"][1])]},
        ValueError,
        "sharer_cache[1]: sharer_values[0] dim 1 (heads) must equal 3, got 6",
    ),
    "too few tokens": (
        lambda c: {
            "sharer_cache": [
                c["sharer_cache"][0],
                [(k[:, :, :3], v[:, :, :3]) for k, v in c["sharer_cache"][1]],
            ]
        },
        ValueError,
        "sharer_cache[1] must hold at least end = 5 tokens without a token_map, got 3",
    ),
    "a map of another length": (
        lambda c: {"token_map": [None, torch.zeros(4, dtype=torch.int64)]},
        ValueError,
        "token_map[1] must have shape [5] or [2, 5] (end - start tokens, batch), got [4]",
    ),
    "a map out of range": (
        lambda c: {"token_map": [None, torch.tensor([0, 0, 5, 0, 0])]},
        ValueError,
        "sharer_cache[1] dim 2 (tokens) must exceed token_map[1]'s maximum 5, got 5",
    ),
    "a map below -1": (
        lambda c: {"token_map": [None, torch.tensor([0, 0, -2, 0, 0])]},
        ValueError,
        "token_map[1]'s minimum must be at least -1, got -2",
    ),
    "no map": (
        lambda c: {"token_map": [None, "map"]},
        TypeError,
        "token_map[1] must be an int64 tensor, got str",
    ),
    "the receiver's own memory": (
        lambda c: {
            "sharer_cache": [c["sharer_cache"][0], c["receiver_cache"]],
            "fuser": [
                c["fuser"][0],
                make_fuser(make_config(sharer=[(2, 8)] * 2, layer_map=[0, 1])),
            ],
        },
        RuntimeError,
        "must not overlap",
    ),
}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", REFUSED)
def test_refusal_writes_nothing(name, fusion):
    changes, error, message = REFUSED[name]
    several = fusers(2)
    base, sharers = caches(several, dtype=torch.float32)
    before = [t.clone() for t in flat(base)]
    call = {"receiver_cache": base, "sharer_cache": sharers, "fuser": several, "fusion": fusion}
    call.update(changes(call))
    with torch.no_grad(), pytest.raises(error, match=re.escape(message)):
        c2c_ext.fuse(**call, inplace=True)
    assert all(map(same_bits, flat(base), before))


@pytest.mark.parametrize("needs", ["fuser", "sharer"])
def test_inplace_is_refused_where_the_second_sharer_needs_gradients(needs):
    several = fusers(2)
    for fuser in several:
        fuser.requires_grad_(False)
    base, sharers = caches(several)
    if needs == "fuser":
        several[1].requires_grad_(True)
    else:
        sharers[1][0][1].requires_grad_()
    with pytest.raises(ValueError, match="inplace=True records no gradient"):
        c2c_ext.fuse(base, sharers, several, inplace=True)
    fused = c2c_ext.fuse(base, sharers, several)
    assert all(t.requires_grad for t in flat(fused))

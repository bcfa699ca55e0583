"""c2c_ext.fuse: every refusal by its message, and that nothing is written then."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from conftest import (
    KVPairs,
    flat,
    make_caches,
    make_config,
    make_fuser,
    same_bits,
    set_gates,
)
from torch import Tensor
from transformers import DynamicCache

import c2c_ext
from c2c_ext import Fuser


def change(pairs: KVPairs, layer: int, kind: int, to: Callable[[Tensor], Tensor]) -> KVPairs:
    """The same caches with one tensor changed."""
    changed = [list(pair) for pair in pairs]
    changed[layer][kind] = to(changed[layer][kind])
    return [(key, value) for key, value in changed]


def one_more(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim=dim)


def receiver_with(layer: int, kind: int, to: Callable[[Tensor], Tensor]) -> Callable:
    return lambda base, sharer: ((change(base, layer, kind, to), sharer), {})


def sharer_with(layer: int, kind: int, to: Callable[[Tensor], Tensor]) -> Callable:
    return lambda base, sharer: ((base, change(sharer, layer, kind, to)), {})


def options(**keywords: object) -> Callable:
    return lambda base, sharer: ((base, sharer), keywords)


LONG = torch.int64
# (call, exception, message); receiver [2, 2, 5, 8] x 2 layers, sharer [2, 1, 5, 4] x 3 layers.
REFUSED = [
    (
        lambda b, s: ((b[:1], s), {}),
        ValueError,
        "receiver_cache must have 2 layers (the fuser's receiver), got 1",
    ),
    (
        lambda b, s: ((b, [*s, s[0]]), {}),
        ValueError,
        "sharer_cache must have 3 layers (the fuser's sharer), got 4",
    ),
    (lambda b, s: ((DynamicCache(), s), {}), ValueError, "receiver_cache must have 2 layers"),
    (
        lambda b, s: ((b[0][0], s), {}),
        TypeError,
        "receiver_cache must be a transformers Cache or a sequence of (key, value) tensors, "
        "got Tensor",
    ),
    (
        lambda b, s: ((b, None), {}),
        TypeError,
        "sharer_cache must be a transformers Cache or a sequence of (key, value) tensors, "
        "got NoneType",
    ),
    (
        lambda b, s: ((b, [s[0], s[1], s[2][0]]), {}),
        TypeError,
        "sharer_cache[2] must be a (key, value) pair of tensors",
    ),
    (
        lambda b, s: (([b[0], (*b[1], b[1][0])], s), {}),
        TypeError,
        "receiver_cache[1] must be a (key, value) pair of tensors",
    ),
    (
        receiver_with(1, 1, lambda t: t[0]),
        ValueError,
        "receiver_cache[1] value must have 4 dimensions [B, H, N, D], got 3",
    ),
    (
        sharer_with(2, 0, lambda t: t[None]),
        ValueError,
        "sharer_cache[2] key must have 4 dimensions [B, H, N, D], got 5",
    ),
    (
        receiver_with(1, 1, one_more(2)),
        ValueError,
        "receiver_cache layer 1 value must hold 5 tokens as layer 0 does, got 6",
    ),
    (
        sharer_with(1, 0, one_more(2)),
        ValueError,
        "sharer_cache layer 1 key must hold 5 tokens as layer 0 does, got 6",
    ),
    (options(start=1.0), TypeError, "start must be an int, got 1.0"),
    (options(end=True), TypeError, "end must be an int, got True"),
    (
        options(start=-1),
        ValueError,
        "start and end must satisfy 0 <= start <= end <= 5 (receiver tokens), got start -1, end 5",
    ),
    (options(start=4, end=3), ValueError, "got start 4, end 3"),
    (options(end=6), ValueError, "got start 0, end 6"),
    (
        lambda b, s: ((b, [(k[:, :, :3], v[:, :, :3]) for k, v in s]), {"start": 1, "end": 4}),
        ValueError,
        "sharer_cache must hold at least end = 4 tokens without a token_map, got 3",
    ),
    (options(token_map=[0, 1, 2, 3, 4]), TypeError, "token_map must be an int64 tensor, got list"),
    (
        options(token_map=torch.zeros(5)),
        TypeError,
        "token_map must be an int64 tensor, got torch.float32",
    ),
    (
        options(token_map=torch.zeros(5, dtype=torch.int32)),
        TypeError,
        "token_map must be an int64 tensor, got torch.int32",
    ),
    (
        options(token_map=torch.zeros(4, dtype=LONG)),
        ValueError,
        "token_map must have shape [5] or [2, 5] (end - start tokens, batch), got [4]",
    ),
    (
        options(token_map=torch.zeros(1, 5, dtype=LONG)),
        ValueError,
        "token_map must have shape [5] or [2, 5] (end - start tokens, batch), got [1, 5]",
    ),
    (
        options(start=2, token_map=torch.zeros(2, 5, dtype=LONG)),
        ValueError,
        "token_map must have shape [3] or [2, 3]",
    ),
    (
        options(token_map=torch.tensor([0, -2, 0, 0, 0])),
        ValueError,
        "token_map's minimum must be at least -1, got -2",
    ),
    (
        options(token_map=torch.tensor([0, 5, 0, 0, 0])),
        ValueError,
        "sharer_cache dim 2 (tokens) must exceed token_map's maximum 5, got 5",
    ),
]
# Found by the compiled op or, where gradients are wanted, before the reference runs.
REFUSED_SHAPES = [
    *(
        (
            receiver_with(1, 1, one_more(dim)),
            f"receiver_values[1] dim {dim} ({what}) must equal {n}",
            n,
        )
        for dim, what, n in ((0, "batch", 2), (1, "heads", 2), (3, "head dim", 8))
    ),
    *(
        (sharer_with(2, 0, one_more(dim)), f"sharer_keys[2] dim {dim} ({what}) must equal {n}", n)
        for dim, what, n in ((0, "batch", 2), (1, "heads", 1), (3, "head dim", 4))
    ),
    (receiver_with(1, 0, torch.Tensor.double), "receiver_keys[1] must ", None),
    (sharer_with(0, 1, torch.Tensor.half), "sharer_values[0] must ", None),
]


@pytest.fixture
def fuser() -> Fuser:
    return make_fuser()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refusal(call, error, message, inplace, fuser):
    base, sharer = make_caches(fuser.config)
    before = [t.clone() for t in flat(base) + flat(sharer)]
    caches, keywords = call(base, sharer)
    expected = "^" + re.escape("c2c_ext.fuse: ") + ".*" + re.escape(message)
    with torch.no_grad(), pytest.raises(error, match=expected):
        c2c_ext.fuse(*caches, fuser, inplace=inplace, **keywords)
    assert all(map(same_bits, flat(base) + flat(sharer), before))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("call", "message", "number"), REFUSED_SHAPES, ids=[m for _, m, _ in REFUSED_SHAPES]
)
def test_shapes_and_dtypes_are_refused(call, message, number, grad, fuser):
    base, sharer = make_caches(fuser.config)
    before = [t.clone() for t in flat(base) + flat(sharer)]
    caches, _ = call(base, sharer)
    got = "" if number is None else f".*, got {number + 1}"
    with (
        torch.set_grad_enabled(grad),
        pytest.raises((ValueError, RuntimeError), match=re.escape(message) + got),
    ):
        c2c_ext.fuse(*caches, fuser, inplace=not grad)
    assert all(map(same_bits, flat(base) + flat(sharer), before))


def test_fuser_of_another_type_is_refused(fuser):
    base, sharer = make_caches(fuser.config)
    with pytest.raises(
        TypeError, match=re.escape("fuser must be a c2c_ext.Fuser, got FuserConfig")
    ):
        c2c_ext.fuse(base, sharer, fuser.config)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("where", ["receiver", "sharer"])
def test_meta_tensors_are_refused(where, grad, fuser):
    base, sharer = make_caches(fuser.config)
    caches = {"receiver": base, "sharer": sharer}
    caches[where] = [(key.to("meta"), value.to("meta")) for key, value in caches[where]]
    message = re.escape(f"{where}_keys[0] must hold numbers, got a tensor on the meta device")
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=message):
        c2c_ext.fuse(caches["receiver"], caches["sharer"], fuser)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("open_gates", [0, 1, 4])
@pytest.mark.parametrize("which", ["receiver", "sharer"])
@pytest.mark.parametrize(
    ("change_tensor", "message"),
    [
        (lambda t: t[:1], "dim 0 (batch) must equal 2, got 1"),
        (lambda t: t.repeat(1, 3, 1, 1), "dim 1 (heads) must equal"),
        (lambda t: t[..., :-1], "dim 3 (head dim) must equal"),
        (lambda t: t.double(), "must be torch.float32 on cpu as receiver_keys[0]"),
        (lambda t: t.int(), "must be one of float64, float32, bfloat16, float16, got torch.int32"),
        (lambda t: t.to(torch.float8_e4m3fn), "must be one of float64"),
        (lambda t: t.to_sparse(), "must be a dense tensor, got layout torch.sparse_coo"),
        (lambda t: t.to("meta"), "must hold numbers, got a tensor on the meta device"),
    ],
)
def test_checks_do_not_depend_on_gates(grad, open_gates, which, change_tensor, message):
    fuser = make_fuser()
    streams = [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    set_gates(fuser, dict.fromkeys(streams[:open_gates], 1.0), default=-1.0)
    base, sharer = make_caches(fuser.config)
    caches = {"receiver": base, "sharer": sharer}
    last = len(caches[which]) - 1  # the sharer's middle layer is read by nobody
    layer = 1 if which == "sharer" else last
    key, value = caches[which][layer]
    caches[which][layer] = (key, change_tensor(value))
    name = re.escape(f"{which}_values[{layer}] {message}")
    with (
        torch.set_grad_enabled(grad),
        pytest.raises((ValueError, TypeError), match=name),
    ):
        c2c_ext.fuse(caches["receiver"], caches["sharer"], fuser)
    assert fuser._packs == {}  # nothing was built for what is refused


def test_absurd_token_counts_are_refused_before_allocation():
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config, 1, 1)
    huge = [(k.expand(-1, -1, 2**33, -1), v.expand(-1, -1, 2**33, -1)) for k, v in base]
    with torch.no_grad(), pytest.raises(ValueError, match=r"dim 2 \(tokens\) must be below"):
        c2c_ext.fuse(huge, sharer, fuser, end=1)


def test_error_in_a_later_shape_group_leaves_the_first_unwritten():
    fuser = make_fuser(make_config([(2, 8), (2, 4)], [(1, 4)] * 2, [0, 1]))
    base, sharer = make_caches(fuser.config)
    before = [t.clone() for t in flat(base)]
    base = change(base, 1, 1, one_more(3))
    with torch.no_grad(), pytest.raises(ValueError, match=re.escape("receiver_values[1] dim 3")):
        c2c_ext.fuse(base, sharer, fuser, inplace=True)
    assert all(map(same_bits, flat(base)[:3], before[:3]))

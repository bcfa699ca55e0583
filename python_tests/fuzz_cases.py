"""Arguments of `c2c_ext.fuse` and of the op as hypothesis strategies: right ones and wild ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import DTYPES, KVPairs, make_config, make_fuser, set_gates
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from c2c_ext import Fuser, FuserConfig
from c2c_ext.model_kv import KVShape

HUGE = (2**31, 2**33, 2**63 - 1, -(2**63), 2**70)
GRAD_MODES = ("no_grad", "inference", "grad")
KINDS = ("list", "tuple", "DynamicCache")
# How a view lies in its storage. The last two have elements in common with themselves.
LAYOUTS = ("contiguous", "tokens first", "offset", "steps", "dim first", "negated", "expanded")


@dataclass(repr=False)
class Case:
    """One call of `c2c_ext.fuse`. Pairs may hold anything once a fault has been put in."""

    fuser: Fuser
    receiver: KVPairs
    sharer: KVPairs
    kinds: tuple[str, str] = ("list", "list")
    keywords: dict[str, Any] = field(default_factory=dict)
    grad_mode: str = "no_grad"
    faults: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"Case({self.fuser!r:.300}\n{described(self.receiver)}\n{described(self.sharer)}\n"
            f"{self.kinds} {described(self.keywords)} {self.grad_mode} {self.faults})"
        )

    def caches(self) -> tuple[Any, Any]:
        """The two arguments, of their kinds, on the very tensors of the pairs."""
        return tuple(map(as_kind, self.kinds, (self.receiver, self.sharer)))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the two caches that has memory."""
        found = []
        for pairs in (self.receiver, self.sharer):
            for pair in pairs:
                found += [t for t in pair if isinstance(t, Tensor)] if pair else []
        return [t for t in found if t.layout == torch.strided and t.device.type == "cpu"]


def described(value: Any) -> str:
    """A repr that does not write out tensors, which may be expanded to any size."""
    if isinstance(value, Tensor):
        stride = value.stride() if value.layout == torch.strided else value.layout
        return f"<{list(value.shape)} {value.dtype} {value.device} {stride}>"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(described, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {described(v)}" for k, v in value.items()) + "}"
    return f"{value!r:.100}"


def as_kind(kind: str, pairs: KVPairs) -> Any:
    """A cache of a kind that holds the tensors themselves."""
    if kind == "DynamicCache":
        cache = DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), layer)
            cache.layers[layer].keys, cache.layers[layer].values = key, value
        return cache
    return tuple(pairs) if kind == "tuple" else list(pairs)


@st.composite
def configs(draw: st.DrawFn) -> FuserConfig:
    """Odd sizes of everything."""
    shape = st.tuples(st.integers(1, 4), st.integers(1, 9))
    sharer = draw(st.lists(shape, min_size=1, max_size=3))
    some = draw(st.lists(shape, min_size=1, max_size=2))
    receiver = draw(st.lists(st.sampled_from(some), min_size=1, max_size=3))
    return make_config(
        receiver,
        sharer,
        [draw(st.integers(0, len(sharer) - 1)) for _ in receiver],
        hidden_size=draw(st.integers(1, 24)),
        intermediate_size=draw(st.integers(1, 24)),
        depth=draw(st.integers(3, 6)),
        activation=draw(st.sampled_from(["gelu", "relu", "silu"])),
    )


@st.composite
def fusers(draw: st.DrawFn) -> Fuser:
    """With any pattern of open and closed gates."""
    config = draw(configs())
    fuser = make_fuser(config, seed=draw(st.integers(0, 99)))
    logits = {}
    for layer in range(len(config.receiver.layers)):
        for kind in ("key", "value"):
            logits[layer, kind] = draw(st.sampled_from([1.0, 1.0, 1e-30, 0.0, -1.0]))
    set_gates(fuser, logits)
    return fuser


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers (of the first row, if expanded) at other places of a larger storage."""
    batch, heads, tokens, dim = values.shape
    if layout == "tokens first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "dim first":
        return values.movedim(3, 0).contiguous().movedim(0, 3)
    if layout == "offset":
        room = torch.zeros(batch, heads + 1, tokens + 3, dim + 2, dtype=values.dtype)
        view = room[:, 1:, 2 : tokens + 2, 1 : dim + 1]
    elif layout == "steps":
        room = torch.zeros(batch, 2 * heads, 3 * tokens, dim, dtype=values.dtype)
        view = room[:, ::2, ::3]
    elif layout == "negated":
        return torch._neg_view(values.neg())
    elif layout == "expanded":
        return values[:1].contiguous().expand(batch, -1, -1, -1)
    else:
        return values.contiguous()
    return view.copy_(values)


@st.composite
def caches(
    draw: st.DrawFn, shapes: tuple[KVShape, ...], batch: int, tokens: int, dtype: torch.dtype
) -> KVPairs:
    """One pair per layer, each tensor laid out in a way of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    layouts = draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4))
    pairs, drawn = [], 0
    for shape in shapes:
        pair = []
        for _ in range(2):
            size = (batch, shape.num_heads, tokens, shape.head_dim)
            values = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
            pair.append(laid_out(values, layouts[drawn % len(layouts)]))
            drawn += 1
        pairs.append(tuple(pair))
    return pairs


@st.composite
def right_cases(draw: st.DrawFn) -> Case:
    """Calls that must succeed."""
    fuser = draw(fusers())
    config = fuser.config
    batch, tokens = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    sharer_tokens = draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(DTYPES))
    # A DynamicCache without rows says that it has no tokens either.
    kinds = st.sampled_from(KINDS if batch else KINDS[:2])
    case = Case(
        fuser,
        draw(caches(config.receiver.layers, batch, tokens, dtype)),
        draw(caches(config.sharer.layers, batch, sharer_tokens, dtype)),
        (draw(kinds), draw(kinds)),
        grad_mode=draw(st.sampled_from(GRAD_MODES)),
    )
    start = draw(st.integers(0, tokens))
    end = draw(st.integers(start, tokens))
    mapped = end > sharer_tokens or draw(st.booleans())
    if start or draw(st.booleans()):
        case.keywords["start"] = start
    else:
        start = 0
    if end < tokens or draw(st.booleans()):
        case.keywords["end"] = end
    if mapped:
        case.keywords["token_map"] = draw(token_maps(batch, end - start, sharer_tokens))
    if case.grad_mode != "grad" and draw(st.booleans()):
        case.keywords["inplace"] = True
        case.receiver = [tuple(map(own_memory, pair)) for pair in case.receiver]
    return case


def own_memory(t: Tensor) -> Tensor:
    """The view itself, or a copy where it could not be written to."""
    t = t.resolve_neg()
    return t.contiguous() if 0 in t.stride() else t


@st.composite
def token_maps(draw: st.DrawFn, batch: int, tokens: int, sharer_tokens: int) -> Tensor:
    """[N] or [B, N], contiguous or not."""
    size = tokens if draw(st.booleans()) else batch * tokens
    values = draw(st.lists(st.integers(-1, sharer_tokens - 1), min_size=size, max_size=size))
    token_map = torch.tensor(values, dtype=torch.int64)
    if size != tokens or draw(st.booleans()):
        if size != batch * tokens:
            return token_map.expand(batch, tokens)
        token_map = token_map.view(batch, tokens)
        return token_map.mT.contiguous().mT if draw(st.booleans()) else token_map
    return token_map


# ---- faults --------------------------------------------------------------------------------------


def odd_tensor(draw: st.DrawFn, t: Tensor) -> Tensor:
    """Another tensor in the place of a tensor of any rank."""
    if t.numel() > 10**6:  # expanded already; a copy would take all memory
        return t
    changes = [
        lambda: t[:0] if t.dim() else t[None],
        lambda: t[None],
        lambda: t.flatten(),
        lambda: t.to(draw(st.sampled_from([torch.int64, torch.int8, torch.bool, *DTYPES]))),
        lambda: t.to(torch.complex64),
        lambda: t.to("meta"),
        lambda: t.detach().to_sparse() if t.dtype.is_floating_point else t,
        lambda: t.mT if t.dim() > 1 else t,
        lambda: t.clone().requires_grad_() if t.dtype.is_floating_point else t,
        lambda: torch._neg_view(t.clone()) if t.dtype.is_floating_point else t,
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda: t.clone().as_strided(t.shape, [1] * t.dim()) if t.numel() else t,
        lambda: torch.nn.Parameter(t.detach()) if t.dtype.is_floating_point else t,
        lambda: torch.full_like(t, float("nan") if t.dtype.is_floating_point else 1),
        lambda: torch.zeros(t.shape, dtype=t.dtype, names=tuple("abcdefgh"[: t.dim()])),
        lambda: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8),
    ]
    if t.dim():
        dim = draw(st.integers(0, t.dim() - 1))
        changes += [
            lambda: t.narrow(dim, 0, t.shape[dim] // 2),
            lambda: torch.cat([t, t], dim=dim),
            lambda: t.narrow(dim, 0, min(1, t.shape[dim])),
            lambda: t.select(dim, 0) if t.shape[dim] else t,
            lambda: t.flip(dim),
            lambda: t.narrow(dim, 0, 1).expand(
                [draw(st.sampled_from([2, 2**31 - 1, 2**31, 2**40])) if d == dim else n
                 for d, n in enumerate(t.shape)]) if t.shape[dim] else t,
        ]  # fmt: skip
    try:
        return draw(st.sampled_from(changes))()
    except (RuntimeError, TypeError, IndexError, ValueError):
        return t  # torch itself does not make such a tensor


def anything() -> st.SearchStrategy[Any]:
    """What is no tensor."""
    return st.sampled_from(
        [None, True, 0, -1, 1.5, float("nan"), "x", b"", (), [], {}, object(), int, *HUGE]
    )


@st.composite
def wild_cases(draw: st.DrawFn) -> Case:
    """A right call with one to three things changed; by luck it can still be right."""
    case = draw(right_cases())
    for _ in range(draw(st.integers(1, 3))):
        fault = draw(st.sampled_from(FAULTS))
        case.faults.append(fault.__name__)
        try:
            fault(draw, case)
        except RuntimeError:  # torch cannot do this to what an earlier fault has made
            case.faults.pop()
    return case


def change_tensor(draw: st.DrawFn, case: Case) -> None:
    side = draw(st.sampled_from(["receiver", "sharer"]))
    pairs = list(getattr(case, side))
    layer, which = draw(st.integers(0, len(pairs) - 1)) if pairs else 0, draw(st.integers(0, 1))
    if not pairs or not isinstance(pairs[layer], tuple) or len(pairs[layer]) != 2:
        return
    pair = list(pairs[layer])
    if isinstance(pair[which], Tensor):
        pair[which] = odd_tensor(draw, pair[which])
        pairs[layer] = tuple(pair)
        setattr(case, side, pairs)


def change_every_tensor(draw: st.DrawFn, case: Case) -> None:
    dtype = draw(st.sampled_from([*DTYPES, torch.int32]))
    device = draw(st.sampled_from(["cpu", "meta"]))
    for side in ("receiver", "sharer"):
        pairs = [tuple(moved(t, device, dtype) for t in pair or ()) for pair in getattr(case, side)]
        setattr(case, side, pairs)


def moved(t: Any, device: str, dtype: torch.dtype) -> Any:
    movable = isinstance(t, Tensor) and not t.is_meta and t.numel() <= 10**6
    return t.detach().to(device, dtype) if movable else t


def change_pair(draw: st.DrawFn, case: Case) -> None:
    side = draw(st.sampled_from(["receiver", "sharer"]))
    case.kinds = ("list", "list")
    pairs = list(getattr(case, side))
    if pairs:
        pairs[draw(st.integers(0, len(pairs) - 1))] = draw(
            st.sampled_from([None, (), [], (None,), (None, None), ("a", 1), (1, 2, 3)])
        )
        setattr(case, side, pairs)


def change_layers(draw: st.DrawFn, case: Case) -> None:
    side = draw(st.sampled_from(["receiver", "sharer"]))
    pairs = list(getattr(case, side))
    setattr(case, side, draw(st.sampled_from([[], pairs[:-1], pairs + pairs, pairs[::-1]])))


def share_memory(draw: st.DrawFn, case: Case) -> None:
    """Some tensor of one place becomes a view of another's storage."""
    tensors = [t for t in case.tensors() if t.dim() == 4 and t.numel() and not t.is_neg()]
    if not tensors:
        return
    source = draw(st.sampled_from(tensors))
    room = source.untyped_storage().nbytes() // source.element_size()

    def view(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.shape != source.shape or t.dtype != source.dtype:
            return t
        strides = draw(st.sampled_from([source.stride(), t.contiguous().stride()]))
        reach = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
        if reach >= room:
            return t
        offset = draw(st.integers(0, room - 1 - reach))
        return source.detach().as_strided(t.shape, strides, offset)

    for side in ("receiver", "sharer"):
        if draw(st.booleans()):
            pairs = [
                tuple(view(t) if draw(st.booleans()) else t for t in pair) if pair else pair
                for pair in getattr(case, side)
            ]
            setattr(case, side, pairs)


def change_range(draw: st.DrawFn, case: Case) -> None:
    name = draw(st.sampled_from(["start", "end"]))
    case.keywords[name] = draw(st.one_of(st.integers(-3, 12), anything()))


def change_token_map(draw: st.DrawFn, case: Case) -> None:
    odd = [None, [0, 1], torch.tensor(3), torch.zeros(0, dtype=torch.int64)]
    old = case.keywords.get("token_map")
    if isinstance(old, Tensor):
        far = st.sampled_from([-2, -(2**63), 2**63 - 1, 2**32, 9])
        if old.numel() and draw(st.booleans()):
            odd = [old.clone().index_put((torch.tensor(0),) * old.dim(), torch.tensor(draw(far)))]
        else:
            odd += [odd_tensor(draw, old)]
    case.keywords["token_map"] = draw(st.sampled_from(odd))


def change_gradients(draw: st.DrawFn, case: Case) -> None:
    case.grad_mode = draw(st.sampled_from(GRAD_MODES))
    case.keywords["inplace"] = draw(st.booleans())
    if isinstance(case.fuser, Fuser):
        case.fuser.requires_grad_(draw(st.booleans()))


def write_in_place(draw: st.DrawFn, case: Case) -> None:
    case.keywords["inplace"] = True


def change_fuser(draw: st.DrawFn, case: Case) -> None:
    case.fuser = draw(st.sampled_from([None, "fuser", torch.nn.Linear(1, 1), make_config()]))


FAULTS = [
    *(change_tensor, change_tensor, share_memory, change_range, change_token_map),
    *(change_every_tensor, change_pair, change_layers, change_gradients, write_in_place),
    change_fuser,
]


# ---- the op --------------------------------------------------------------------------------------


def changed_argument(draw: st.DrawFn, value: Any, others: list[Tensor]) -> Any:
    """Something else for one argument of the op, mostly of its type."""
    if isinstance(value, Tensor):
        shared = [t for t in others if t.numel() >= value.numel() and t.dtype == value.dtype]
        if shared and draw(st.booleans()):  # a view of another argument's memory
            return draw(st.sampled_from(shared)).flatten()[: value.numel()].view(value.shape)
        return odd_tensor(draw, value)
    if isinstance(value, list) and value:
        index = draw(st.integers(0, len(value) - 1))
        one = [*value]
        one[index] = changed_argument(draw, one[index], others)
        return draw(st.sampled_from([one, one, one, value[:-1], value * 2, value[::-1], []]))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.one_of(st.integers(-2, 6), st.sampled_from([2**31, 2**63 - 1, -(2**63)])))
    if isinstance(value, str):
        return draw(st.sampled_from(["relu", "silu", "", "gelu\0", "\u00e9", "x" * 1000]))
    return draw(anything())

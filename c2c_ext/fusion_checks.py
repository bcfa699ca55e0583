"""What c2c_ext.fuse is given, checked before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import KVPairs, is_cache_object, kv_layers
from .fuser import Fuser
from .model_kv import KVShape

FUSIONS = ("parallel", "sequential")
CACHE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 1 << 31  # the op counts tokens in 32 bits


class Source(NamedTuple):
    """One sharer of a call of `fuse`."""

    pairs: KVPairs  # all of its tokens with a map; without one those that the range is fused with
    fuser: Fuser
    token_map: Tensor | None  # int64 [end - start] or [batch, end - start]


def check_fusion(where: str, fusion: Any) -> None:
    """Raises ValueError, in the words of ``where``, unless ``fusion`` is one of `FUSIONS`."""
    if not isinstance(fusion, str) or fusion not in FUSIONS:
        raise ValueError(f"{where}: fusion must be one of {', '.join(FUSIONS)}, got {fusion!r}")


def checked_sources(
    receiver: KVPairs,
    sharer_cache: Any,
    fuser: Any,
    token_map: Any,
    start: int,
    end: int | None,
) -> tuple[list[Source], int]:
    """Every sharer of a call, fit to be fused with ``receiver``, and the end of its range.

    Args:
        receiver: all tokens of the receiver's cache.
        sharer_cache, fuser, token_map, start, end: as `fuse` was given them.

    Raises:
        TypeError, ValueError, RuntimeError: as `fuse`; of a list, the place is named.
    """
    sources = []
    given = _listed(sharer_cache, fuser, token_map)
    length = None
    for place, cache, one, one_map in given:
        if not isinstance(one, Fuser):
            raise TypeError(
                f"c2c_ext.fuse: fuser{place} must be a c2c_ext.Fuser, got {type(one).__name__}"
            )
        sharer, config = kv_layers(cache, f"sharer_cache{place}"), one.config
        _check_layers("receiver_cache", f"fuser{place}", receiver, len(config.receiver.layers))
        _check_layers(
            f"sharer_cache{place}", f"fuser{place}", sharer, len(config.sharer.layers), "sharer"
        )
        first = receiver[0][0]
        where = "c2c_ext.fuse: "
        _check_tensors(
            f"{where}fuser{place}: receiver" if place else f"{where}receiver",
            receiver,
            config.receiver.layers,
            first,
        )
        _check_tensors(
            f"{where}sharer_cache{place}: sharer" if place else f"{where}sharer",
            sharer,
            config.sharer.layers,
            first,
        )
        if length is None:
            length = first.shape[2]
            end = length if end is None else end
            _check_range(start, end, length)
        held = sharer[0][0].shape[2]
        if one_map is not None:
            one_map = _checked_map(place, one_map, end - start, first, held)
        elif held < end:
            raise ValueError(
                f"c2c_ext.fuse: sharer_cache{place} must hold at least end = {end} tokens without "
                f"a token_map, got {held}"
            )
        pairs = sharer if one_map is not None else window(sharer, start, end)
        sources.append(Source(pairs, one, one_map))
    return sources, end


def _listed(sharer_cache: Any, fuser: Any, token_map: Any) -> list[tuple[str, Any, Any, Any]]:
    """(place in the list or "", cache, fuser, map) of every sharer."""
    if not isinstance(fuser, (list, tuple)):
        if _is_list_of_caches(sharer_cache):
            raise TypeError(
                "c2c_ext.fuse: sharer_cache is a list of caches, so fuser must be a list of as "
                f"many fusers, got {type(fuser).__name__}"
            )
        if isinstance(token_map, (list, tuple)) and isinstance(fuser, Fuser):
            raise TypeError(
                "c2c_ext.fuse: token_map must be an int64 tensor, got "
                f"{type(token_map).__name__}; a list of maps goes with lists of sharers"
            )
        return [("", sharer_cache, fuser, token_map)]
    if not isinstance(sharer_cache, (list, tuple)):
        raise TypeError(
            "c2c_ext.fuse: fuser is a list, so sharer_cache must be a list of as many caches, got "
            f"{type(sharer_cache).__name__}"
        )
    if not fuser:
        raise ValueError(
            "c2c_ext.fuse: fuser and sharer_cache must hold at least one sharer, got 0"
        )
    maps = token_map if isinstance(token_map, (list, tuple)) else [token_map] * len(fuser)
    for name, value in (("sharer_cache", sharer_cache), ("token_map", maps)):
        if len(value) != len(fuser):
            raise ValueError(
                f"c2c_ext.fuse: {name} must have as many entries as fuser, {len(fuser)}, got "
                f"{len(value)}"
            )
    return [
        (f"[{k}]", cache, one, one_map)
        for k, (cache, one, one_map) in enumerate(zip(sharer_cache, fuser, maps, strict=True))
    ]


def _is_list_of_caches(cache: Any) -> bool:
    """Whether it is a list of caches where one cache is meant: a layer is a pair of tensors."""
    return (
        isinstance(cache, (list, tuple))
        and len(cache) > 0
        and (
            is_cache_object(cache[0])
            or (
                isinstance(cache[0], (list, tuple))
                and len(cache[0]) > 0
                and isinstance(cache[0][0], (list, tuple))
            )
        )
    )


def window(pairs: KVPairs, start: int, end: int) -> KVPairs:
    """Views of tokens ``start .. end - 1``."""
    if start == 0 and all(key.shape[2] == end for key, _ in pairs):
        return pairs
    return [(key[:, :, start:end], value[:, :, start:end]) for key, value in pairs]


def _check_layers(
    name: str, fuser: str, pairs: KVPairs, expected: int, side: str = "receiver"
) -> None:
    if len(pairs) != expected:
        raise ValueError(
            f"c2c_ext.fuse: {name} must have {expected} layers (the {fuser}'s {side}), "
            f"got {len(pairs)}"
        )
    tokens = pairs[0][0].shape[2]
    for i, pair in enumerate(pairs):
        for which, t in zip(("key", "value"), pair, strict=True):
            if t.shape[2] != tokens:
                raise ValueError(
                    f"c2c_ext.fuse: {name} layer {i} {which} must hold {tokens} tokens as layer 0 "
                    f"does, got {t.shape[2]}"
                )


def _check_range(start: int, end: int, length: int) -> None:
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"c2c_ext.fuse: {name} must be an int, got {value!r}")
    if not 0 <= start <= end <= length:
        raise ValueError(
            f"c2c_ext.fuse: start and end must satisfy 0 <= start <= end <= {length} "
            f"(receiver tokens), got start {start}, end {end}"
        )


def _checked_map(
    place: str, token_map: Any, tokens: int, first: Tensor, sharer_length: int
) -> Tensor:
    if not isinstance(token_map, Tensor) or token_map.dtype != torch.int64:
        got = token_map.dtype if isinstance(token_map, Tensor) else type(token_map).__name__
        raise TypeError(f"c2c_ext.fuse: token_map{place} must be an int64 tensor, got {got}")
    if token_map.layout != torch.strided or token_map.device.type == "meta":
        raise TypeError(
            f"c2c_ext.fuse: token_map{place} must be a dense tensor that holds numbers, got "
            f"{token_map.layout} on {token_map.device}"
        )
    shapes = [(tokens,), (first.shape[0], tokens)]
    if tuple(token_map.shape) not in shapes:
        raise ValueError(
            f"c2c_ext.fuse: token_map{place} must have shape {list(shapes[0])} or "
            f"{list(shapes[1])} (end - start tokens, batch), got {list(token_map.shape)}"
        )
    if (
        token_map.device.type == "cpu"
        and token_map.numel() > 0
        and not torch.compiler.is_compiling()
    ):
        low, high = int(token_map.min()), int(token_map.max())
        if low < -1:
            raise ValueError(
                f"c2c_ext.fuse: token_map{place}'s minimum must be at least -1, got {low}"
            )
        if high >= sharer_length:
            raise ValueError(
                f"c2c_ext.fuse: sharer_cache{place} dim 2 (tokens) must exceed token_map{place}'s "
                f"maximum {high}, got {sharer_length}"
            )
    return token_map.to(first.device)


def named(side: str, pairs: KVPairs) -> Iterator[tuple[str, Tensor]]:
    """The names of messages: receiver_keys[0], receiver_values[0], ..."""
    for i, pair in enumerate(pairs):
        for which, t in zip(("keys", "values"), pair, strict=True):
            yield f"{side}_{which}[{i}]", t


def check_parameters(fuser: Fuser, wanted: bool) -> None:
    """Everything but the packed form computes with parameters, which not every fuser holds."""
    if fuser.inference_only:
        why = (
            "gradients are enabled and a cache requires them, or a transform of torch.func or "
            "forward-mode AD is active: call it under torch.no_grad()"
            if wanted
            else "these caches go through plain PyTorch, which computes with parameters"
        )
        raise ValueError(
            "c2c_ext.fuse: fuser was loaded for inference only (inference_dtype) and holds no "
            f"parameters, but {why}; or load the fuser without inference_dtype"
        )


def check_fuser_device(fuser: Fuser, first: Tensor) -> None:
    """The reference computes with the parameters as they are; only packing moves them."""
    for name, p in fuser.named_parameters():
        if p.device != first.device:
            raise ValueError(
                f"c2c_ext.fuse: fuser must be on {first.device} as the caches are, its {name} is "
                f"on {p.device}"
            )


def _check_tensors(where: str, pairs: KVPairs, shapes: Sequence[KVShape], first: Tensor) -> None:
    """Every tensor of a cache, whichever gates are open and whichever path will run."""
    for i, (pair, shape) in enumerate(zip(pairs, shapes, strict=True)):
        for which, t in zip(("keys", "values"), pair, strict=True):
            batch, heads, tokens, dim = t.shape
            if (
                (batch, heads, dim) == (first.shape[0], shape.num_heads, shape.head_dim)
                and t.dtype == first.dtype
                and t.device == first.device
                and t.dtype in CACHE_DTYPES
                and t.layout == torch.strided
                and t.device.type != "meta"
                and tokens < MAX_TOKENS
            ):
                continue
            name = f"{where}_{which}[{i}]"
            if t.layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
            for axis, meaning, expected in (
                (0, "batch", first.shape[0]),
                (1, "heads", shape.num_heads),
                (3, "head dim", shape.head_dim),
            ):
                if t.shape[axis] != expected:
                    raise ValueError(
                        f"{name} dim {axis} ({meaning}) must equal {expected}, got {t.shape[axis]}"
                    )
            if t.dtype not in CACHE_DTYPES:
                known = ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES)
                raise ValueError(f"{name} must be one of {known}, got {t.dtype}")
            if t.device.type == "meta":
                raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
            if tokens >= MAX_TOKENS:
                raise ValueError(f"{name} dim 2 (tokens) must be below {MAX_TOKENS}, got {tokens}")
            raise ValueError(
                f"{name} must be {first.dtype} on {first.device} as receiver_keys[0], got "
                f"{t.dtype} on {t.device}"
            )

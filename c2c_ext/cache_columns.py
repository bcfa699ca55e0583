"""Where a transformers Cache holds its tokens, column by column, whatever the kind of its layers.

Dynamic layers hold all columns or, where they slide, the newest; static ones have room for more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def held_columns(layer: Any, held: int) -> tuple[int, Tensor, Tensor]:
    """The first column that a layer still holds, and views of its keys and values from there on.

    Args:
        layer: of a cache that was given ``held`` tokens.

    Returns:
        ``first`` and two ``[B, H, held - first, D]``; ``first`` is 0 but for layers that slide.

    Raises:
        ValueError: a layer without plain keys and values, or with fewer of them.
    """
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if hasattr(layer, "_quantize") or not isinstance(keys, Tensor) or keys.dim() != 4:
        raise ValueError(
            f"c2c_ext: past_key_values must hold plain keys and values, a {type(layer).__name__} "
            f"does not show the {held} tokens that it was given"
        )
    kept = min(held, keys.shape[2])
    if kept < held and not getattr(layer, "is_sliding", False):
        raise ValueError(
            f"c2c_ext: past_key_values must hold {held} tokens in every layer that does not slide, "
            f"got {kept} in a {type(layer).__name__}"
        )
    return held - kept, keys[:, :, :kept], values[:, :, :kept]


def cache_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache of which no layer slides, holding ``pairs`` as they are: the first update copies."""
    cache = DynamicCache()
    for key, value in pairs:
        layer = DynamicLayer()
        # As lazy_initialization does, whose arguments differ by version of transformers.
        layer.dtype, layer.device = key.dtype, key.device
        layer.keys, layer.values = key, value
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def unslid(cache: Any, held: int) -> DynamicCache:
    """A cache of all ``held`` columns of ``cache``, which it leaves alone, for reading on from it.

    What a sliding layer has dropped is zero here: the model's own mask hides it.
    """

    def padded(t: Tensor, first: int, device: torch.device) -> Tensor:
        t = t.to(device)
        if first == 0:
            return t
        return torch.cat([t.new_zeros(*t.shape[:2], first, t.shape[3]), t], dim=2)

    pairs = []
    for layer in cache.layers:
        first, keys, values = held_columns(layer, held)
        place = getattr(layer, "device", keys.device)  # where it is used, if it is offloaded
        pairs.append((padded(keys, first, place), padded(values, first, place)))
    return cache_of(pairs)


def room_problem(
    cache: Any, shapes: Sequence[tuple[int, int]], rows: int, tokens: int
) -> str | None:
    """Why a cache that holds tokens cannot grow to ``tokens`` of them; None: it can.

    Asked before anything is written: half of the layers must not have grown.

    Args:
        cache: a transformers Cache.
        shapes: (heads, head dim) of every layer of the model.
        rows: of the tokens to come.
        tokens: of a row, those held included.
    """
    if len(cache.layers) != len(shapes):
        return f"it holds {len(cache.layers)} layers, the receiver has {len(shapes)}"
    for index, (layer, shape) in enumerate(zip(cache.layers, shapes, strict=True)):
        _, keys, _ = held_columns(layer, 1)
        if (keys.shape[1], keys.shape[3]) != shape:
            return (
                f"its layer {index} holds {keys.shape[1]} heads of {keys.shape[3]} channels, the "
                f"receiver's {shape[0]} of {shape[1]}"
            )
        if keys.shape[0] != rows:
            return f"it holds {keys.shape[0]} rows"
        most = getattr(layer, "max_cache_len", None)
        if most is not None and not getattr(layer, "is_sliding", False) and tokens > most:
            return f"it has room for {most} tokens"
    return None


def append(cache: Any, pairs: Iterable[tuple[Tensor, Tensor]], held: int) -> None:
    """Gives ``cache``, which holds ``held`` tokens, those of ``pairs`` through its own update."""
    for index, (key, value) in enumerate(pairs):
        # Static layers of older versions of transformers are told where to write.
        places = torch.arange(held, held + key.shape[2], device=key.device)
        cache.update(key, value, index, {"cache_position": places})
        if getattr(cache.layers[index], "record_past", False):
            # Assisted decoding makes a sliding layer keep more than its window until cropped.
            cache.layers[index].crop(0)

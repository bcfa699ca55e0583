"""Reading and copying KV-caches: transformers Cache objects and plain (key, value) sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KVPairs = list[tuple[Tensor, Tensor]]


def is_cache_object(cache: Any) -> bool:
    """Whether ``cache`` is a transformers Cache, told by its layers without importing it."""
    return hasattr(cache, "layers") and hasattr(cache, "get_seq_length")


def kv_layers(cache: Any, name: str) -> KVPairs:
    """(key, value) views of all tokens that a cache holds, one pair per layer.

    Args:
        cache: a transformers Cache, or a sequence of (key, value), each ``[B, H, N, D]``.
        name: the argument's name, for messages.

    Raises:
        TypeError: neither of the two kinds, or a layer without plain keys and values.
        ValueError: a layer that is empty or has dropped tokens (sliding window).
    """
    if is_cache_object(cache):
        if not isinstance(cache.layers, Sequence):
            raise TypeError(
                f"c2c_ext.fuse: {name}.layers must be a list, got {type(cache.layers).__name__}"
            )
        return [_layer_views(layer, f"{name}.layers[{i}]") for i, layer in enumerate(cache.layers)]
    if isinstance(cache, Tensor) or not isinstance(cache, Sequence):
        raise TypeError(
            f"c2c_ext.fuse: {name} must be a transformers Cache or a sequence of (key, value) "
            f"tensors, got {type(cache).__name__}"
        )
    pairs = []
    for i, pair in enumerate(cache):
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(t, Tensor) for t in pair)
        ):
            raise TypeError(f"c2c_ext.fuse: {name}[{i}] must be a (key, value) pair of tensors")
        for which, t in zip(("key", "value"), pair, strict=True):
            if t.dim() != 4:
                raise ValueError(
                    f"c2c_ext.fuse: {name}[{i}] {which} must have 4 dimensions [B, H, N, D], "
                    f"got {t.dim()}"
                )
        pairs.append((pair[0], pair[1]))
    return pairs


def _layer_views(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if hasattr(layer, "_quantize") or not hasattr(layer, "keys"):
        raise TypeError(
            f"c2c_ext.fuse: {name} ({type(layer).__name__}) holds no plain keys and values"
        )
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() == 1:
        raise ValueError(f"c2c_ext.fuse: {name} is empty; prefill the cache first")
    if keys.dim() != 4 or values.dim() != 4:
        raise ValueError(
            f"c2c_ext.fuse: {name} keys and values must have 4 dimensions [B, H, N, D], got "
            f"{keys.dim()} and {values.dim()}"
        )
    length = int(layer.get_seq_length())
    if length < 0:
        raise ValueError(f"c2c_ext.fuse: {name} reports {length} tokens")
    if length > keys.shape[2]:
        raise ValueError(
            f"c2c_ext.fuse: {name} holds only the last {keys.shape[2]} of {length} tokens "
            "(sliding window); fuse a full cache, or let generate do it"
        )
    if length < keys.shape[2]:
        if type(layer).__name__.startswith("Dynamic"):
            raise ValueError(
                f"c2c_ext.fuse: {name} reports {length} tokens but holds {keys.shape[2]}"
            )
        keys, values = keys[:, :, :length], values[:, :, :length]
    return keys, values


def clone_cache(cache: Any) -> Any:
    """A cache of the same kind that shares no tensor with ``cache``."""
    if is_cache_object(cache):
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in twin.layers:
            for attribute, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(layer, attribute, _copied(value))
        return twin
    pairs = [(_copied(key), _copied(value)) for key, value in cache]
    return tuple(pairs) if isinstance(cache, tuple) else pairs


def _copied(t: Tensor) -> Tensor:
    # A pending negation (of conj().imag) survives a clone, and nothing can be written to it then.
    negated = not torch.compiler.is_compiling() and t.is_neg()
    return t.resolve_neg() if negated else t.clone()


def with_layers(cache: Any, pairs: KVPairs, length: int) -> Any:
    """A cache like ``cache`` whose first ``length`` tokens are ``pairs``; differentiable.

    A buffer longer than ``length`` (static caches) keeps its tail.
    """
    if not is_cache_object(cache):
        return tuple(pairs) if isinstance(cache, tuple) else list(pairs)
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, (key, value) in zip(twin.layers, pairs, strict=True):
        for attribute, held in vars(layer).items():
            if attribute in ("keys", "values"):
                fresh = key if attribute == "keys" else value
                tail = held[:, :, length:]
                setattr(
                    layer, attribute, torch.cat([fresh, tail], dim=2) if tail.shape[2] else fresh
                )
            elif isinstance(held, Tensor):
                setattr(layer, attribute, held.clone())
    return twin

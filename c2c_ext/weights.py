"""How much a fuser adds where: the dynamic weights of a fusion, per layer, head and token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cache import KVPairs, kv_layers
from .config import KINDS
from .fuser import Fuser
from .model_kv import ModelKV


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one receiver layer.

    Attributes:
        key, value: ``[B, H, N]`` in the caches' dtype, receiver heads and tokens: sigmoid(...) in
            (0, 1), what the projection is multiplied with; NaN for tokens that are not fused. 1 for
            a fuser without dynamic weighting; None where the fuser has no such stream.
        key_open, value_open: whether the stream's gate is open. Through a closed gate nothing is
            added, whatever the weights.
    """

    key: Tensor | None
    value: Tensor | None
    key_open: bool
    value_open: bool

    def applied(self, kind: str) -> Tensor | None:
        """The weights of ``"key"`` or ``"value"`` times the hard gate: 0 where it is closed."""
        weights = getattr(self, kind)
        if weights is None or getattr(self, f"{kind}_open"):
            return weights
        return weights * 0


@torch.no_grad()
def fusion_weights(
    receiver_cache: Any,
    sharer_cache: Any,
    fuser: Fuser,
    token_map: Tensor | None = None,
) -> list[LayerWeights]:
    """The dynamic weights with which `c2c_ext.fuse` fuses two caches (arXiv 2510.03215, 3.3).

    Computed by plain PyTorch, for looking at. A weight says nothing about the size of what it
    multiplies, and an open gate is no evidence that the receiver uses what passes it.

    Args:
        receiver_cache: a transformers Cache or (key, value) pairs ``[B, H, N, D]``, not fused yet.
        sharer_cache: likewise, of the same batch; without a map it holds the same N tokens or more.
        fuser: between the two; with its parameters.
        token_map: int64 ``[N]`` or ``[B, N]``, as in `c2c_ext.fuse`.

    Returns:
        one `LayerWeights` per receiver layer.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit the fuser, or each other.
    """
    if not isinstance(fuser, Fuser):
        raise TypeError(
            f"c2c_ext.fusion_weights: fuser must be a c2c_ext.Fuser, got {type(fuser).__name__}"
        )
    config = fuser.config
    receiver = kv_layers(receiver_cache, "receiver_cache")
    sharer = kv_layers(sharer_cache, "sharer_cache")
    batch, _, tokens, _ = receiver[0][0].shape if receiver else (0, 0, 0, 0)
    _check("receiver_cache", receiver, config.receiver, batch)
    _check("sharer_cache", sharer, config.sharer, batch)
    if token_map is None:
        if sharer[0][0].shape[2] < tokens:
            raise ValueError(
                f"c2c_ext.fusion_weights: sharer_cache must hold at least {tokens} tokens without "
                f"a token_map, got {sharer[0][0].shape[2]}"
            )
        sharer = [(key[:, :, :tokens], value[:, :, :tokens]) for key, value in sharer]
    elif tuple(token_map.shape) not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"c2c_ext.fusion_weights: token_map must be [{tokens}] or [{batch}, {tokens}], got "
            f"{list(token_map.shape)}"
        )
    streams = reference.streams_of(fuser)
    layers = []
    for layer, base_pair in enumerate(receiver):
        source_pair = sharer[config.layer_map[layer]]
        found: dict[str, Any] = {"key": None, "value": None, "key_open": False, "value_open": False}
        for kind, base, source in zip(KINDS, base_pair, source_pair, strict=True):
            if kind not in config.kinds:
                continue
            stream, index = streams[layer, kind]
            aligned, mapped = reference.align(source, token_map, base)
            seen = None if mapped is None else mapped[:, 0, :, 0]
            weights = reference.stream_weighting(
                stream(index, base.dtype), aligned, base, config, seen
            )
            if mapped is not None:
                weights = weights.masked_fill(~mapped[..., 0], torch.nan)
            found[kind] = weights
            logit = stream(index, None).gate_logit
            found[f"{kind}_open"] = logit is None or bool(logit > 0)
        layers.append(LayerWeights(**found))
    return layers


def _check(name: str, pairs: KVPairs, model: ModelKV, batch: int) -> None:
    where = f"c2c_ext.fusion_weights: {name}"
    if len(pairs) != len(model.layers):
        raise ValueError(f"{where} must have {len(model.layers)} layers, got {len(pairs)}")
    tokens = pairs[0][0].shape[2]
    for i, (pair, shape) in enumerate(zip(pairs, model.layers, strict=True)):
        for kind, tensor in zip(KINDS, pair, strict=True):
            expected = (batch, shape.num_heads, tokens, shape.head_dim)
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{where} layer {i} {kind} must be {list(expected)}, got {list(tensor.shape)}"
                )

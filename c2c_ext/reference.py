"""The plain PyTorch statement of cache fusion: oracle for tests, baseline for benchmarks.

Differentiable, any device and floating dtype. Formulas: arXiv 2510.03215, section 3, as the
published code computes them. The compiled op computes the same function from folded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import KINDS

if TYPE_CHECKING:
    from .fuser import Fuser

RMS_EPS = 1e-6
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
KVLayers = Sequence[tuple[Tensor, Tensor]]


@dataclass
class BlockWeights:
    """One feed-forward block ``z + W2 act(W1 (rmsnorm(z) * g))``; z ``[..., hidden]``."""

    norm: Tensor  # [hidden]
    w1: Tensor  # [inner, hidden]
    w2: Tensor  # [hidden, inner]


@dataclass
class StreamWeights:
    """The weights of one stream: keys or values of one receiver layer."""

    in_weight: Tensor  # [hidden, sharer width + receiver width]
    in_bias: Tensor  # [hidden]
    shared: BlockWeights
    proj: list[BlockWeights]  # depth - 2 of them
    out_weight: Tensor  # [receiver width, hidden]
    out_bias: Tensor  # [receiver width]
    weight: BlockWeights  # dynamic weighting; inner width is hidden
    head_weight: Tensor  # [receiver heads, hidden]
    head_bias: Tensor  # [receiver heads]
    gate_logit: Tensor  # []


def feed_forward(z: Tensor, w: BlockWeights, activation: str, dropout: float = 0.0) -> Tensor:
    """One pre-norm residual block; ``z`` is ``[..., hidden]``."""
    normed = F.rms_norm(z, (z.shape[-1],), w.norm, RMS_EPS)
    inner = ACTIVATION_FUNCTIONS[activation](F.linear(normed, w.w1))
    return z + F.dropout(F.linear(inner, w.w2), dropout)


def fuse_stream(
    w: StreamWeights,
    sharer: Tensor,
    base: Tensor,
    gate: Tensor,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Tensor:
    """``base + gate * sigmoid(weighting) * projection`` for one stream.

    Args:
        w: the stream's weights.
        sharer: ``[B, Hs, N, Ds]``, the sharer's keys or values, token by token aligned to `base`.
        base: ``[B, Ht, N, Dt]``, the receiver's.
        gate: broadcastable to ``[B, Ht, N, 1]``.

    Returns:
        ``[B, Ht, N, Dt]``.
    """
    batch, heads, tokens, dim = base.shape
    c = torch.cat([_flatten_heads(sharer), _flatten_heads(base)], dim=-1)
    z = feed_forward(F.linear(c, w.in_weight, w.in_bias), w.shared, activation, dropout)
    p = z
    for block in w.proj:
        p = feed_forward(p, block, activation, dropout)
    projected = F.linear(p, w.out_weight, w.out_bias)
    a = feed_forward(z, w.weight, activation, dropout)
    weighting = torch.sigmoid(F.linear(a, w.head_weight, w.head_bias))  # [B, N, Ht]
    projected = projected.view(batch, tokens, heads, dim).transpose(1, 2)
    return base + gate * weighting.transpose(1, 2).unsqueeze(-1) * projected


def soft_gate(logit: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Training gate of the published code: ``sigmoid((logit + G) / T)``, one Gumbel ``G``.

    Args:
        logit: ``[]``.
        u: uniform noise in [0, 1), ``[B, Ht, N, 1]``.
        temperature: T > 0.

    Returns:
        the shape of ``u``.
    """
    gumbel = -torch.log(-torch.log(u + 1e-20) + 1e-20)
    return torch.sigmoid((logit + gumbel) / temperature)


def fuse(
    receiver_kv: KVLayers,
    sharer_kv: KVLayers,
    fuser: Fuser,
    *,
    token_map: Tensor | None = None,
    gates: Sequence[tuple[Tensor, Tensor]] | None = None,
    dropout: float = 0.0,
) -> list[tuple[Tensor, Tensor]]:
    """Fuses all streams from two clean slices of equal length, or through a token map.

    Args:
        receiver_kv: one (key, value) per receiver layer, each ``[B, Ht, N, Dt]``.
        sharer_kv: one per sharer layer, each ``[B, Hs, N, Ds]`` (``[B, Hs, S, Ds]`` with a map).
        fuser: the fuser; its parameters are cast to the caches' dtype.
        token_map: int64 ``[N]`` or ``[B, N]``: sharer token of every receiver token; anything
            outside ``0 .. S-1`` leaves the receiver's token as it is.
        gates: one (key gate, value gate) per receiver layer, each broadcastable to
            ``[B, Ht, N, 1]``. By default hard: open iff the logit is > 0, no gradient reaches it.
        dropout: probability, applied where the published code applies it.

    Returns:
        one (key, value) per receiver layer, shapes as ``receiver_kv``.
    """
    fused = []
    for layer, base_pair in enumerate(receiver_kv):
        source_pair = sharer_kv[fuser.config.layer_map[layer]]
        outs = []
        for kind, base, source in zip(KINDS, base_pair, source_pair, strict=True):
            w = fuser.stream(layer, kind, dtype=base.dtype)
            aligned, mapped = _align(source, token_map, base)
            gate = base.new_ones(()) if gates is None else gates[layer][KINDS.index(kind)]
            out = fuse_stream(
                w, aligned, base, gate, activation=fuser.config.activation, dropout=dropout
            )
            if gates is None:
                # Chosen, not multiplied: a closed stream keeps its bits. The logit as it is, since
                # a small one is 0 in half precision.
                out = torch.where(fuser.stream(layer, kind).gate_logit > 0, out, base)
            outs.append(out if mapped is None else torch.where(mapped, out, base))
        fused.append((outs[0], outs[1]))
    return fused


def _align(source: Tensor, token_map: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
    """(sharer tokens gathered by the map [B, Hs, N, Ds], mapped [B, 1, N, 1] or None)."""
    if token_map is None:
        return source, None
    batch, heads, tokens, dim = source.shape
    index = token_map.to(source.device).expand(batch, base.shape[2])
    mapped = ((index >= 0) & (index < tokens))[:, None, :, None]
    if tokens == 0:
        return source.new_zeros(batch, heads, base.shape[2], dim), mapped
    index = index.clamp(0, tokens - 1)[:, None, :, None].expand(-1, heads, -1, dim)
    return source.gather(2, index), mapped


def _flatten_heads(x: Tensor) -> Tensor:
    """``[B, H, N, D]`` to ``[B, N, H * D]``, head-major."""
    return x.transpose(1, 2).flatten(2)

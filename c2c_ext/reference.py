"""The plain PyTorch statement of cache fusion: oracle for tests, baseline for benchmarks.

Differentiable, any device and floating dtype. Formulas: arXiv 2510.03215, section 3, as the
published code computes them; variants as in docs/differences.md. The compiled op computes
the same function from folded weights.
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
    from .config import FuserConfig
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
class AttentionWeights:
    """Attention of a ``"transformer"`` projection over the sharer's tokens."""

    source_weight: Tensor  # [hidden, sharer width]
    source_bias: Tensor  # [hidden]
    query_norm: Tensor  # [hidden]
    source_norm: Tensor  # [hidden]
    query_weight: Tensor  # [hidden, hidden]
    key_weight: Tensor  # [hidden, hidden]
    value_weight: Tensor  # [hidden, hidden]
    merge_weight: Tensor  # [hidden, hidden]


@dataclass
class StreamWeights:
    """The weights of one stream, keys or values of one receiver layer; None: it has none such."""

    # [hidden, sharer width + receiver width]; the sharer's alone if it reads nothing else;
    # transformer: the receiver's alone
    in_weight: Tensor | None
    in_bias: Tensor | None  # [hidden]
    shared: BlockWeights | None
    proj: list[BlockWeights]  # depth - 2 of them
    out_weight: Tensor  # [receiver width, hidden]; linear: [receiver width, width of what is read]
    out_bias: Tensor | None  # [receiver width]
    weight: BlockWeights | None  # dynamic weighting; inner width is hidden
    head_weight: Tensor | None  # [receiver heads, hidden]
    head_bias: Tensor | None  # [receiver heads]
    gate_logit: Tensor | None  # []
    attention: AttentionWeights | None


def feed_forward(z: Tensor, w: BlockWeights, activation: str, dropout: float = 0.0) -> Tensor:
    """One pre-norm residual block; ``z`` is ``[..., hidden]``."""
    normed = F.rms_norm(z, (z.shape[-1],), w.norm, RMS_EPS)
    inner = ACTIVATION_FUNCTIONS[activation](F.linear(normed, w.w1))
    return z + F.dropout(F.linear(inner, w.w2), dropout)


def attend(
    s: Tensor, t: Tensor | None, w: StreamWeights, heads: int, mapped: Tensor | None
) -> Tensor:
    """The first hidden state of a ``"transformer"`` projection: causal attention to the sharer.

    Token n asks the sharer's tokens that are aligned to receiver tokens 0 .. n, so what a token
    becomes does not depend on later ones; receiver tokens without a sharer token are not asked.

    Args:
        s: ``[B, N, sharer width]``, aligned token by token.
        t: ``[B, N, receiver width]``, what asks; None: the sharer's own tokens do.
        w: the stream's weights.
        heads: of the attention.
        mapped: bool ``[B, N]``, which tokens have a sharer token; None: all.

    Returns:
        ``[B, N, hidden]``.
    """
    a = w.attention
    source = F.linear(s, a.source_weight, a.source_bias)
    x = source if t is None else F.linear(t, w.in_weight, w.in_bias)
    normed = F.rms_norm(source, (source.shape[-1],), a.source_norm, RMS_EPS)
    query = F.linear(F.rms_norm(x, (x.shape[-1],), a.query_norm, RMS_EPS), a.query_weight)
    key, value = F.linear(normed, a.key_weight), F.linear(normed, a.value_weight)
    n = x.shape[1]
    allowed = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    if mapped is not None:
        # Every token may ask itself, or a row without any would be NaN; its result is not used.
        itself = torch.eye(n, dtype=torch.bool, device=x.device)
        allowed = (allowed & mapped[:, None, None, :]) | itself
    query, key, value = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (query, key, value))
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    attended = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    return x + F.linear(_flatten_heads(attended), a.merge_weight)


def fuse_stream(
    w: StreamWeights,
    sharer: Tensor,
    base: Tensor,
    gate: Tensor,
    config: FuserConfig,
    *,
    dropout: float = 0.0,
    mapped: Tensor | None = None,
) -> Tensor:
    """One stream: projection P, dynamic weighting w, gate; by default ``base + gate * w * P``.

    Args:
        w: the stream's weights.
        sharer: ``[B, Hs, N, Ds]``, the sharer's keys or values, token by token aligned to `base`.
        base: ``[B, Ht, N, Dt]``, the receiver's.
        gate: broadcastable to ``[B, Ht, N, 1]``.
        config: which activation and variant.
        dropout: probability.
        mapped: bool ``[B, N]``, which tokens have a sharer token; only a transformer asks.

    Returns:
        ``[B, Ht, N, Dt]``.
    """
    batch, heads, tokens, dim = base.shape
    read, z = _hidden(w, sharer, base, config, dropout, mapped)
    weighting: Tensor | float = 1.0
    if z is None:
        p = read
    else:
        p = z
        for block in w.proj:
            p = feed_forward(p, block, config.activation, dropout)
        if w.weight is not None:
            weighting = dynamic_weighting(w, z, config, dropout).unsqueeze(-1)
    projected = F.linear(p, w.out_weight, w.out_bias)
    projected = projected.view(batch, tokens, heads, dim).transpose(1, 2)
    if config.integration == "residual":
        return base + gate * weighting * projected
    if config.integration == "interpolation":
        return base + gate * weighting * (projected - base)
    return (1 - gate) * base + gate * weighting * projected


def dynamic_weighting(
    w: StreamWeights, z: Tensor, config: FuserConfig, dropout: float = 0.0
) -> Tensor:
    """How much of the projection is added: one number in (0, 1) per receiver head and token.

    Args:
        w: a stream's weights, with a weighting.
        z: ``[B, N, hidden]``, the stream's state after its shared block.
        config: which activation.
        dropout: probability.

    Returns:
        ``[B, Ht, N]``.
    """
    a = feed_forward(z, w.weight, config.activation, dropout)
    return torch.sigmoid(F.linear(a, w.head_weight, w.head_bias)).transpose(1, 2)


def stream_weighting(
    w: StreamWeights,
    sharer: Tensor,
    base: Tensor,
    config: FuserConfig,
    mapped: Tensor | None = None,
) -> Tensor:
    """`dynamic_weighting` from the caches, as `fuse_stream` takes them; 1 where there is none.

    Returns:
        ``[B, Ht, N]``.
    """
    _, z = _hidden(w, sharer, base, config, 0.0, mapped)
    if z is None or w.weight is None:
        return base.new_ones(base.shape[:3])
    return dynamic_weighting(w, z, config)


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
    config = fuser.config
    if gates is not None and not config.gate:
        raise ValueError("c2c_ext: gates must not be given for a fuser without gates (gate=False)")
    weights = streams_of(fuser)
    fused = []
    for layer, base_pair in enumerate(receiver_kv):
        source_pair = sharer_kv[config.layer_map[layer]]
        outs = []
        for kind, base, source in zip(KINDS, base_pair, source_pair, strict=True):
            if kind not in config.kinds:
                outs.append(base)
                continue
            stream, index = weights[layer, kind]
            w = stream(index, base.dtype)
            aligned, mapped = align(source, token_map, base)
            gate = base.new_ones(()) if gates is None else gates[layer][KINDS.index(kind)]
            seen = None if mapped is None else mapped[:, 0, :, 0]
            out = fuse_stream(w, aligned, base, gate, config, dropout=dropout, mapped=seen)
            if gates is None and config.gate:
                # Chosen, not multiplied: a closed stream keeps its bits. The logit as it is, since
                # a small one is 0 in half precision.
                out = torch.where(stream(index, None).gate_logit > 0, out, base)
            outs.append(out if mapped is None else torch.where(mapped, out, base))
        fused.append((outs[0], outs[1]))
    return fused


def _hidden(
    w: StreamWeights,
    sharer: Tensor,
    base: Tensor,
    config: FuserConfig,
    dropout: float,
    mapped: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """What a stream reads ``[B, N, width]``, and its state after the shared block, if any."""
    s, t = _flatten_heads(sharer), _flatten_heads(base)
    reads_both = config.reads == "both"
    read = torch.cat([s, t], dim=-1) if reads_both else s
    if w.shared is None:
        return read, None
    if w.attention is None:
        z = F.linear(read, w.in_weight, w.in_bias)
    else:
        z = attend(s, t if reads_both else None, w, config.attention_heads, mapped)
    return read, feed_forward(z, w.shared, config.activation, dropout)


def streams_of(
    fuser: Fuser,
) -> dict[tuple[int, str], tuple[Callable[[int, torch.dtype | None], StreamWeights], int]]:
    """(receiver layer, kind) -> how to get the stream's weights: a function and its argument."""
    return {
        group.place(g): (streams, g)
        for group in fuser.groups
        for streams in [group.streams()]
        for g in range(len(group.layers) * len(group.kinds))
    }


def align(source: Tensor, token_map: Tensor | None, base: Tensor) -> tuple[Tensor, Tensor | None]:
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

"""How far fusing turns what the receiver's attention puts out at the token that reads the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..demo.evaluate import continue_from
from ..fuser import Fuser
from .readings import Reading, fused


@torch.no_grad()
def attention_outputs(receiver: PreTrainedModel, cache: KVPairs, last: Tensor) -> list[Tensor]:
    """What each attention layer adds to the residual stream at the last token.

    Args:
        receiver: with one attention module per layer.
        cache: (key, value) ``[B, H, N, D]`` per layer: what comes before; left as it is.
        last: int64 ``[B, 1]``.

    Returns:
        per layer ``[B, hidden size]``, after the output projection.

    Raises:
        ValueError: a model whose attention modules are not found.
    """
    modules = _attention_modules(receiver, len(cache))
    found: dict[int, Tensor] = {}

    def keeper(layer: int) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            found[layer] = (output[0] if isinstance(output, tuple) else output)[:, -1]

        return keep

    handles = [m.register_forward_hook(keeper(i)) for i, m in enumerate(modules)]
    try:
        continue_from(receiver, cache, last)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in range(len(modules))]


def attention_rows(
    receiver: PreTrainedModel, fuser: Fuser, readings: Sequence[Reading]
) -> list[dict[str, Any]]:
    """Cosine between attention outputs on the fused and on the plain cache, per layer.

    At the last prompt token, the first that reads the fused cache. 1: attention puts out what it
    does without the sharer. Layers after the first also see different inputs: what the earlier ones
    put out. A small cosine shows that fusing changes the receiver, not that it helps.

    Returns:
        rows with ``layer``, ``mean``, ``min`` and ``max`` over the prompts, and their number; a
        prompt for which either output is zero counts as cosine 1 if both are, else 0.
    """
    cosines: list[list[Tensor]] = []
    for reading in readings:
        plain, changed = (
            attention_outputs(receiver, cache, reading.last)
            for cache in (reading.receiver, fused(reading, fuser))
        )
        cosines.append(
            [_cosine(a.double(), b.double()) for a, b in zip(plain, changed, strict=True)]
        )
    rows = []
    for layer, parts in enumerate(zip(*cosines, strict=True)):
        c = torch.cat(parts)
        spread = {name: float(getattr(c, name)()) for name in ("mean", "min", "max")}
        rows.append({"layer": layer, **spread, "questions": len(c)})
    return rows


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.norm(dim=1) * b.norm(dim=1)
    same = (a == b).all(dim=1).double()
    return torch.where(lengths > 0, (a * b).sum(dim=1) / lengths.clamp_min(1e-300), same)


def _attention_modules(model: PreTrainedModel, layers: int) -> list[nn.Module]:
    by_layer: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and type(module).__name__.endswith("Attention"):
            by_layer.setdefault(layer, []).append(module)
    if sorted(by_layer) != list(range(layers)) or any(len(m) > 1 for m in by_layer.values()):
        raise ValueError(
            f"c2c_ext.analysis: a receiver must have one attention module for each of its {layers} "
            f"layers, told by layer_idx; in {type(model).__name__} there are "
            f"{sum(map(len, by_layer.values()))}"
        )
    return [by_layer[layer][0] for layer in range(layers)]

"""How far fusing turns what the receiver's attention puts out at the token that reads the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..demo.evaluate import continue_from


@torch.no_grad()
def attention_outputs(
    receiver: PreTrainedModel, cache: KVPairs, last: Tensor
) -> tuple[list[Tensor], Tensor]:
    """What each attention layer adds to the residual stream at the last token, and the logits.

    Args:
        receiver: with one attention module per layer.
        cache: (key, value) ``[B, H, N, D]`` per layer: what comes before; left as it is.
        last: int64 ``[B, 1]``.

    Returns:
        per layer ``[B, hidden size]``, after the output projection; logits ``[B, V]``.

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
        logits = continue_from(receiver, cache, last)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in range(len(modules))], logits


def attention_cosines(outputs: Sequence[Tensor], plain: Sequence[Tensor]) -> Tensor:
    """Cosine of two `attention_outputs`, float64 ``[layers, B]``.

    1 where both are the same, zeros too; 0 where one alone is zero.
    """
    return torch.stack(
        [_cosine(a.double(), b.double()) for a, b in zip(outputs, plain, strict=True)]
    )


def cosine_rows(cosines: Tensor) -> list[dict[str, Any]]:
    """Cosines ``[layers, Q]`` summed up: ``layer``, ``mean``, ``min``, ``max``, ``questions``."""
    return [
        {
            "layer": layer,
            **{name: float(getattr(c, name)()) for name in ("mean", "min", "max")},
            "questions": len(c),
        }
        for layer, c in enumerate(cosines)
    ]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine = ((a * b).sum(dim=1) / lengths.clamp_min(1e-300)).clamp(-1, 1)
    return torch.where((a == b).all(dim=1), 1.0, cosine)


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

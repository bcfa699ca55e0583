"""Caches of single prompts, as they are stored, and the padded batch that they make."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KVPairs
from ..model_kv import KVShape

# (key, value) [H, n, D] of every layer of a model, n being the tokens of one row.
PromptRow = Sequence[tuple[Tensor, Tensor]]


def padded_batch(
    name: str,
    rows: Sequence[PromptRow],
    counts: list[int],
    shapes: Sequence[KVShape],
    device: torch.device,
) -> KVPairs:
    """Unpadded rows as one batch ``[B, H, N, D]`` per layer, zero on the left of shorter ones."""
    if len(rows) != len(counts):
        raise ValueError(f"c2c_ext.training: {name} must have {len(counts)} rows, got {len(rows)}")
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if len(row) != len(shapes):
            raise ValueError(
                f"c2c_ext.training: {name}[{i}] must have {len(shapes)} layers, got {len(row)}"
            )
        for layer, (pair, shape) in enumerate(zip(row, shapes, strict=True)):
            expected = (shape.num_heads, count, shape.head_dim)
            for kind, t in zip(("key", "value"), pair, strict=True):
                if tuple(t.shape) != expected:
                    raise ValueError(
                        f"c2c_ext.training: {name}[{i}] layer {layer} {kind} must have shape "
                        f"{list(expected)} (heads, tokens that the model would prefill, head dim), "
                        f"got {list(t.shape)}"
                    )
    width = max(counts)

    def stacked(layer: int, kind: int) -> Tensor:
        first = rows[0][layer][kind]
        size = (len(rows), first.shape[0], width, first.shape[2])
        batch = torch.zeros(size, dtype=first.dtype, device=device)
        for out, row, count in zip(batch, rows, counts, strict=True):
            out[:, width - count :] = row[layer][kind]
        return batch

    return [(stacked(layer, 0), stacked(layer, 1)) for layer in range(len(shapes))]

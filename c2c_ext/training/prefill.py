"""A frozen model's own cache of padded rows, whole or in chunks, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..prefill import read_tokens


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, role: str, chunk: int | None = None
) -> KVPairs:
    """(key, value) ``[B, H, N, D]`` of every layer, sliding ones too.

    Where a row is padded they are finite and mean nothing.

    Args:
        ids: int64 ``[B, N]``, padded on the left; N at least 1.
        mask: bool ``[B, N]``, false where a row is padded.
        role: of the model, for messages.
        chunk: tokens to run at a time, which bounds the memory of activations; None: all.

    Raises:
        RuntimeError: the model did not keep a cache of the tokens.
    """
    tokens = ids.shape[1]
    padding = (~mask).sum(1, keepdim=True)
    padded = bool(padding.any())
    columns = torch.arange(tokens, device=ids.device)
    if padded:
        # Padding goes behind, where no token of a model that reads forward sees it and none needs a
        # mask: in front it would have nothing to attend to, which gives NaN in some models.
        ids = ids.gather(1, (columns + padding).clamp(max=tokens - 1))
    position_ids = columns.expand(len(ids), -1)
    cache = read_tokens(
        role, model, ids, mask=torch.ones_like(ids), position_ids=position_ids, chunk=chunk
    )
    if padded:
        for layer in cache.layers:
            layer.keys = _moved(layer.keys, columns - padding)
            layer.values = _moved(layer.values, columns - padding)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _moved(x: Tensor, columns: Tensor) -> Tensor:
    """``x [B, H, N, D]`` at ``columns [B, N]``; at negative ones anything of the row."""
    index = columns.clamp(min=0)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))

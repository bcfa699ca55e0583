"""A frozen model's own cache of padded rows, whole or in chunks, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..cache import KVPairs


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, role: str, chunk: int | None = None
) -> KVPairs:
    """(key, value) ``[B, H, N, D]`` of every layer, sliding ones too; zero where there is padding.

    Args:
        ids: int64 ``[B, N]``, N at least 1.
        mask: bool ``[B, N]``, false where a row is padded.
        role: of the model, for messages.
        chunk: tokens to run at a time, which bounds the memory of activations; None: all.

    Raises:
        RuntimeError: the model did not keep a cache of the tokens.
    """
    cache = DynamicCache()  # made without the configuration, so that no layer slides
    tokens = ids.shape[1]
    chunk = tokens if chunk is None else chunk
    position_ids = positions(mask)
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        # The base model: no logits are needed.
        model.base_model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end].long(),
            position_ids=position_ids[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
    kept = [int(layer.get_seq_length()) for layer in cache.layers]
    if not kept or min(kept) != tokens:
        raise RuntimeError(
            f"c2c_ext.training: the {role} ({type(model).__name__}) kept no cache of the prompt"
        )
    if not bool(mask.all()):
        # Whatever a model computes there must reach nothing, NaN neither.
        padding = ~mask[:, None, :, None]
        for layer in cache.layers:
            layer.keys.masked_fill_(padding, 0)
            layer.values.masked_fill_(padding, 0)
    return [(layer.keys, layer.values) for layer in cache.layers]


def positions(mask: Tensor) -> Tensor:
    """Position of every token among its row's own, int64 in the shape of ``mask``."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)

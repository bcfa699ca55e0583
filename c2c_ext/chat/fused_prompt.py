"""What of a prompt was fused with what, and how strongly: the numbers behind the heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..generation_arguments import fused_columns
from ..weights import LayerWeights, fusion_weights
from .models import ChatModels
from .prompts import Message


@dataclass(frozen=True)
class FusedPrompt:
    """One prompt as receiver and sharer read it.

    Attributes:
        receiver_tokens, sharer_tokens: their texts.
        token_map: for every receiver token the sharer token that it is fused with, or -1.
        layers: the dynamic weights, batch 1, of all tokens but the last, which is never fused.
    """

    receiver_tokens: list[str]
    sharer_tokens: list[str]
    token_map: list[int]
    layers: list[LayerWeights]


@torch.no_grad()
def fused_prompt(models: ChatModels, messages: Sequence[Message]) -> FusedPrompt:
    """Both models read the prompt once more, for the weights of its fusion.

    Args:
        messages: of which the last is the user's.

    Raises:
        ValueError: messages that these models cannot read.
    """
    shared = models.prompts.shared(messages)
    ids = shared["input_ids"]
    length = ids.shape[1]
    models.check_length("receiver", length, 0)
    columns = fused_columns(shared.get("positions"), 1, length)
    token_map = torch.arange(length)
    if columns is not None:
        token_map[:-1][~columns[0]] = -1
    token_map[-1] = -1
    layers: list[LayerWeights] = []
    if length > 1:
        receiver = _prefill(models.receiver, ids[:, :-1])
        sharer = [
            (k.to(receiver[0][0]), v.to(receiver[0][0]))
            for k, v in _prefill(models.sharer, ids[:, :-1])
        ]
        layers = fusion_weights(
            receiver, sharer, models.fuser, token_map[:-1].to(models.receiver.device)
        )
    tokenizers = models.tokenizers
    return FusedPrompt(
        _texts(tokenizers["receiver"], ids),
        _texts(tokenizers["sharer"], ids),
        token_map.tolist(),
        layers,
    )


def _prefill(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    cache = DynamicCache()  # made without the configuration, so that no layer slides
    model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    return [tokenizer.decode([i]) for i in ids[0].tolist()]

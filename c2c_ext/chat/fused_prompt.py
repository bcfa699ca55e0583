"""What of a prompt was fused with what, and how strongly: the numbers behind the heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..positions import fused_columns
from ..prefill import read_tokens
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
    theirs, token_map = ids[:, :-1], torch.arange(length)
    if "sharer_inputs" in shared:
        theirs = shared["sharer_inputs"]["input_ids"]
        token_map = shared["sharer_inputs"]["token_map"][0].clone()
    if "positions" in shared:
        columns = fused_columns(shared["positions"], 1, length)
        token_map[:-1][~columns[0]] = -1
    token_map[-1] = -1
    models.check_length("receiver", length, 0)
    models.check_length("sharer", theirs.shape[1], 0)
    layers: list[LayerWeights] = []
    if length > 1:
        receiver = _read("receiver", models.receiver, ids[:, :-1])
        like = receiver[0][0]
        sharer = [(k.to(like), v.to(like)) for k, v in _read("sharer", models.sharer, theirs)]
        layers = fusion_weights(receiver, sharer, models.fuser, token_map[:-1].to(like.device))
    tokenizers = models.tokenizers
    return FusedPrompt(
        _texts(tokenizers["receiver"], ids),
        _texts(tokenizers["sharer"], theirs),
        token_map.tolist(),
        layers,
    )


def _read(role: str, model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    ids = ids.to(model.device)
    position_ids = torch.arange(ids.shape[1], device=ids.device)[None]
    cache = read_tokens(role, model, ids, position_ids=position_ids)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    return [tokenizer.decode([i]) for i in ids[0].tolist()]

"""Turns of a chat, its caches and who reads what: what the tests of chats share."""

from __future__ import annotations

import tiny_models
import torch
from generation_checks import generate, prompt
from torch import Tensor
from transformers import DynamicCache, StaticCache

STEPS = 3
CACHES = ["dynamic", "sliding", "static"]


def pair_of_sharers():
    """(receiver, two sharers, their fusers)."""
    receiver = tiny_models.receiver_model()
    sharers = [tiny_models.sharer_model(), tiny_models.other_sharer_model()]
    fusers = [
        tiny_models.fuser_between(receiver, sharers[0]),
        tiny_models.fuser_between(receiver, sharers[1], layer_map=[0, 0, 1]),
    ]
    return receiver, sharers, fusers


def new_cache(kind: str, receiver):
    if kind == "static":
        return StaticCache(config=receiver.config, max_cache_len=80)
    return DynamicCache(config=receiver.config) if kind == "sliding" else DynamicCache()


def said(turn: int, rows: int = 2, tokens: int = 3) -> Tensor:
    """What the user says next."""
    return prompt(rows, tokens, seed=20 + turn)


def answer(receiver, talk: Tensor, cache, **settings):
    # Given a mask, generate does not take an answered padding token for padding.
    how = {
        "past_key_values": cache,
        "max_new_tokens": STEPS,
        "attention_mask": torch.ones_like(talk),
    }
    return generate(receiver, talk, **{**how, **settings})


def spoken(output, turn: int = 1) -> Tensor:
    """The whole conversation with the user's next turn."""
    return torch.cat([output.sequences, said(turn, len(output.sequences))], dim=1)


def cropped(cache, tokens: int):
    """In place; older versions of transformers count what is kept, newer ones what is not."""
    cache.crop(tokens - int(cache.get_seq_length()))
    return cache


class Read:
    """How many tokens each forward of a model reads, and in how many rows."""

    def __init__(self, model) -> None:
        self.seen: list[tuple[int, int]] = []
        layer = model.model.layers[0]
        self.hook = layer.register_forward_hook(
            lambda module, args, output: self.seen.append(tuple(args[0].shape[:2]))
        )

    def __enter__(self) -> list[tuple[int, int]]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

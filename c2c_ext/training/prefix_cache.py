"""The cache a receiver answers from while a fuser is trained: a prefix that no forward changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values; tells their length as any dynamic layer does."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        # As lazy_initialization does, whose arguments differ by version of transformers.
        self.dtype, self.device = key.dtype, key.device
        self.keys, self.values = key, value
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix followed by the new states, which are not kept."""
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )


class PrefixCache(DynamicCache):
    """A transformers Cache that answers ``update`` with prefix and new states and keeps the prefix.

    Running a layer twice gives the same twice, so gradient checkpointing, which runs it again in
    the backward pass, is right with it. Differentiable in the prefix. No layer slides: models with
    sliding windows mask by themselves what a window leaves out.

    Args:
        prefix: (key, value) ``[B, H, N, D]`` of every layer; N may be 0.
    """

    def __init__(self, prefix: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layers = [_PrefixLayer(key, value) for key, value in prefix]
        self.layer_class_to_replicate = None  # a further layer is an error, not a new empty one

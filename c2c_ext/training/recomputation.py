"""Gradient checkpointing of a model that stays in eval mode and answers from a cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the layers of ``model`` keep their inputs alone for the backward pass.

    transformers' own way drops the cache that a layer is given, and wants training mode.
    """
    layers = decoder_layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers itself can checkpoint; ValueError if there are none."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"c2c_ext.training: {type(model).__name__} does not support gradient checkpointing: "
            "none of its layers does"
        )
    return layers

"""The cache that generate decodes from: which kinds a fused prompt can go into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def check_target(cache: Any, device: torch.device) -> None:
    """Refuses the ``past_key_values`` that cannot hold a fused prompt.

    Dynamic, sliding, static, quantised and, on a GPU, offloaded caches can.

    Raises:
        ValueError: names the kind of cache.
    """
    kind = type(cache).__name__
    if hasattr(cache, "cross_attention_cache"):
        raise ValueError(
            f"c2c_ext: past_key_values must be the cache of a decoder alone, got {kind}: it has "
            "another one for cross-attention"
        )
    if not hasattr(cache, "layers") or not hasattr(cache, "update"):
        raise ValueError(
            f"c2c_ext: past_key_values must be a transformers Cache made of layers, got {kind}"
        )
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states"):
            raise ValueError(
                f"c2c_ext: past_key_values must hold keys and values alone, its layer {index} "
                f"({type(layer).__name__}) keeps a state"
            )
    if getattr(cache, "offloading", False) and device.type != "cuda":
        raise ValueError(
            f"c2c_ext: past_key_values ({kind}) offloads its layers, which transformers does from "
            f"CUDA devices only; the prompt is on {device}"
        )


def check_kept(prepared: Mapping[str, Any], given: Mapping[str, Any], input_ids: Tensor) -> None:
    """Refuses a step for which the receiver would read everything again, without what was fused.

    Models whose rotary embedding changes at a length (Phi-3 with long rotary scaling) drop their
    cache there.

    Args:
        prepared: what the receiver made of ``given``, the arguments of
            `prepare_inputs_for_generation`.
        input_ids: ``[batch, tokens]``, all so far.

    Raises:
        RuntimeError: it dropped the cache.
    """
    if given.get("past_key_values") is not None and prepared.get("past_key_values") is None:
        raise RuntimeError(
            f"c2c_ext: the receiver drops its cache at {input_ids.shape[1]} tokens to read them "
            "again with other rotary embeddings (original_max_position_embeddings), which would "
            "lose what was fused: end prompt and answer before, or begin with a longer prompt"
        )

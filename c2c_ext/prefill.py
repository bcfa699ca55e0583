"""Reading tokens into a model's cache: how a prompt, or more of one, is run before it is fused."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def read_tokens(
    role: str,
    model: PreTrainedModel,
    ids: Tensor,
    *,
    position_ids: Tensor,
    cache: Any = None,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Any:
    """Runs ``ids`` over what ``cache`` holds, and gives the cache that holds them too.

    Everything is on the model's device. The caller decides on gradients.

    Args:
        role: of the model, for messages.
        model: only its base model is run: no logits are needed, and a compiled forward of the
            whole is left alone.
        ids: int64 ``[B, T]``, the new tokens, at least one.
        position_ids: ``[.., 1 or B, T]``, the new tokens'. A model whose forward does not name them
            counts by itself, as it does in transformers' own `generate`.
        cache: a transformers Cache whose layers hold N tokens each, which grows; None: a new one
            whose layers keep all tokens, sliding ones too.
        mask: ``[B, N + T]``, 0 where a row is padded; None: nowhere.
        chunk: tokens that one forward reads at most, which bounds the memory of activations;
            None: all. The result is the same but for rounding.

    Raises:
        RuntimeError: the model did not keep the tokens in the cache.
    """
    cache = DynamicCache() if cache is None else cache  # without a configuration no layer slides
    held, tokens = int(cache.get_seq_length()), ids.shape[1]
    positioned = "position_ids" in inspect.signature(type(model).forward).parameters
    for start in range(0, tokens, chunk or tokens):
        end = min(start + (chunk or tokens), tokens)
        model.base_model(
            input_ids=ids[:, start:end],
            attention_mask=None if mask is None else mask[:, : held + end],
            past_key_values=cache,
            use_cache=True,
            # A copy: XGLM before transformers 5.17 adds its offset to the tensor itself.
            **({"position_ids": position_ids[..., start:end].clone()} if positioned else {}),
        )
        _check_kept(role, model, cache, held + end)
    return cache


def _check_kept(role: str, model: PreTrainedModel, cache: Any, tokens: int) -> None:
    kept = [int(layer.get_seq_length()) for layer in cache.layers]
    if kept and min(kept) == tokens:
        return
    cause = (
        "it is in training mode, where gradient checkpointing makes transformers drop the cache: "
        "call its eval()"
        if model.training
        else "its forward did not fill the past_key_values it was given"
    )
    raise RuntimeError(
        f"c2c_ext: the {role} ({type(model).__name__}) kept no cache of the prompt; {cause}"
    )

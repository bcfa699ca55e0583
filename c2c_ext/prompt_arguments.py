"""From the arguments of an attached receiver's `generate` to the prompt that is to be fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .conversation import conversation_of
from .generation_arguments import (
    Settings,
    assistant_of,
    check_continuation,
    check_movable,
    check_prompt_tensors,
    check_tokens,
    prompt_shape,
    take_chunk_size,
    tokens_held,
)
from .padding import shift_of
from .positions import fused_columns
from .prompt_fusion import Prompt
from .response import check_response
from .selection import spans_of
from .sharer_inputs import checked_inputs
from .sharers import Sharing

_MOVED = ("input_ids", "attention_mask", "position_ids")  # with rows that are padded on the right


@dataclass(frozen=True)
class Options:
    """What `generate` of an attached receiver takes beside transformers' own arguments."""

    positions: Any
    sharers: Any
    sections: Any
    sharer_inputs: Any
    fuse_response: Any


def prompt_of(
    receiver: PreTrainedModel,
    sharing: Sharing,
    settings: Settings,
    options: Options,
    inputs: Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Prompt, Tensor | None, tuple[Any, ...], dict[str, Any]]:
    """The prompt, and ``inputs``, ``args`` and ``kwargs`` as transformers is to have them.

    Raises:
        TypeError, ValueError: an argument that does not fit, by its name; nothing has been read.
    """
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    batch, length = prompt_shape(ids)
    cache, shift = kwargs.get("past_key_values"), None
    if ids is not None:
        mask = kwargs.get("attention_mask")
        check_prompt_tensors(mask, kwargs.get("position_ids"), batch, length)
        check_tokens(ids, receiver.get_input_embeddings())
        shift = shift_of(mask)
    if shift is not None:
        check_movable(cache, options.sections)
        inputs = None if inputs is None else shift.move(inputs)
        moved = {n: shift.move(kwargs[n]) for n in _MOVED if kwargs.get(n) is not None}
        kwargs = {**kwargs, **moved}
    held = tokens_held(cache)
    if held:
        check_continuation(conversation_of(cache, held) is not None, held, length)
    columns = fused_columns(options.positions, batch, length, held)
    spans = spans_of(options.sharers, options.sections, batch, length, len(sharing), held)
    texts = checked_inputs(options.sharer_inputs, sharing, batch, length)
    if shift is not None:
        columns = shift.move_columns(columns)
        texts = tuple(None if text is None else text.moved(shift) for text in texts)
    names = ("past_key_values", "position_ids", "custom_generate")
    others = {name: kwargs.get(name) for name in names}
    others |= {"sharer_inputs": options.sharer_inputs, "sections": options.sections}
    others["assistant_model"] = assistant_of(args, kwargs)
    every = check_response(options.fuse_response, settings, others, receiver, sharing, length)
    # What a model drafts for another is its answer, which nobody goes on from.
    drafts = bool(settings["is_assistant"])
    outlives = cache is not None or bool(settings["return_dict_in_generate"])
    chunk, args, kwargs = take_chunk_size(receiver.generation_config, args, kwargs)
    prompt = Prompt(
        batch=batch,
        length=length,
        columns=columns,
        position_ids=kwargs.get("position_ids"),
        spans=spans,
        texts=texts,
        chunk=chunk,
        held=held,
        keeps=outlives and not drafts,
        every=every,
    )
    return prompt, inputs, args, kwargs

"""The fused prompt: read and fused span by span, and generate's cache filled with the result."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from .padding import check_last_tokens
from .position_limit import check_limit
from .positions import Positions, resolved
from .prefill import read_tokens
from .selection import Span
from .sharer_inputs import SharerInputs
from .sharers import SharerReading, Sharing, fuse_columns, read_beside, vocabulary_of

# Newer versions of transformers trim the inputs to this many tokens; older ones by cache_position.
_TRIMS_BY_LENGTH = (
    "next_sequence_length"
    in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)

# Tensors about the prompt that the prefills follow, what says how much of it is left (a tensor if
# the cache counts in tensors), and labels, which generate drops.
_PROMPT_TENSORS = (
    "attention_mask",
    "position_ids",
    "cache_position",
    "next_sequence_length",
    "labels",
)

# Set on a cache that a fused prompt went into: (layer, column, the keys fused there, one row per
# row of the cache). It survives copying and pickling the cache, by which a conversation branches or
# is kept, but not another prompt in its place.
_FUSED = "_c2c_fused"


@dataclass
class Prompt:
    """What a call of `generate` was given to fuse."""

    batch: int  # rows, before generate repeats them for beams
    length: int  # tokens of a row
    columns: Tensor | Positions | None  # bool [1 or batch, length - 1]: which to fuse; None: all
    position_ids: Tensor | None  # the caller's own, [1 or batch, length]
    spans: tuple[Span, ...]  # one after the other from column 0; what they leave over is not fused
    texts: tuple[SharerInputs | None, ...]  # what sharers read; None: the receiver's tokens
    chunk: int | None = None  # tokens that a forward of a prefill reads at most; None: all


def holds_fused_prompt(cache: Any) -> bool:
    """Whether the tokens that a cache holds are an earlier turn that an attached receiver ran.

    Where a layer still holds the prompt's last fused token, its keys are compared with those that
    were written: a cache may have been reset, and filled by something else.
    """
    mark = getattr(cache, _FUSED, None)
    if mark is None:
        return False
    if mark is True:  # nothing to compare: a prompt of one token, or no layer keeps all tokens
        return True
    layer, column, written = mark
    keys = cache.layers[layer].keys
    if keys.dim() != 4 or keys.shape[2] <= column or keys.shape[1::2] != written.shape[1:]:
        return False
    now = keys[:1, :, column].to(written)  # rows may have been reordered since, or selected
    return bool((now == written).flatten(1).all(1).any())


def fuse_prompt(
    receiver: PreTrainedModel,
    sharing: Sharing,
    prompt: Prompt,
    input_ids: Tensor,  # [batch * beams, prompt.length or more (drafted tokens)]
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Fills the cache to decode from with the fused prompt.

    Args:
        input_ids: of the first `prepare_inputs_for_generation` of a call of generate.
        kwargs: its other arguments.

    Returns:
        the arguments for what is left of the prompt: its last token and any drafted ones.
    """
    _check_use_cache(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _PROMPT_TENSORS:
            raise ValueError(
                f"c2c_ext: {name} is not supported by an attached receiver: its prompt is read as "
                "token ids alone"
            )
    cache = kwargs.get("past_key_values")
    if cache is None:
        # transformers 5.0 leaves the default cache to the model's forward. Without the model's
        # configuration no layer slides, so that drafted tokens can be taken back.
        cache = DynamicCache()
    held = int(cache.get_seq_length())
    if held:
        raise ValueError(
            f"c2c_ext: past_key_values must be empty when its prompt is to be fused, it holds "
            f"{held} tokens"
        )
    rows, given = input_ids.shape
    if given < prompt.length:
        raise ValueError(
            f"c2c_ext: the first step must see the whole prompt of {prompt.length} tokens, "
            f"got {given}"
        )
    kwargs = {**kwargs, "past_key_values": cache}
    length = prompt.length - 1
    if length > 0:
        repeats = rows // prompt.batch  # beams, return sequences: equal rows stand together
        mask = kwargs.get("attention_mask")
        mask = None if mask is None else mask[::repeats, : length + 1]
        check_last_tokens(mask)
        columns = resolved(prompt.columns, mask, prompt.length)
        mask = None if mask is None else mask[:, :length]
        ids = input_ids[::repeats, :length]
        fused = _fused_cache(receiver, sharing, prompt, ids, mask, columns)
        _fill(cache, [(layer.keys, layer.values) for layer in fused.layers], repeats)
        if _TRIMS_BY_LENGTH:
            kwargs["next_sequence_length"] = given - length
        if not _TRIMS_BY_LENGTH or kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = torch.arange(length, given, device=input_ids.device)
    setattr(cache, _FUSED, _mark(cache, length))
    return kwargs


def _mark(cache: Any, length: int) -> Any:
    """What `holds_fused_prompt` looks for, in a layer that keeps all tokens."""
    for index, layer in enumerate(cache.layers):
        if length and not getattr(layer, "is_sliding", False) and layer.get_seq_length() >= length:
            return index, length - 1, layer.keys[:, :, length - 1].clone()
    return True


def read_on(prompt: Prompt, held: int, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the first step of a later turn: what the cache holds is not run again.

    Args:
        held: tokens in the cache.
        input_ids: ``[batch, prompt.length or more (drafted tokens)]``, or a first chunk of less.
    """
    _check_use_cache(kwargs)
    given = input_ids.shape[1]
    # Assisted decoding of newer versions takes every first step for the beginning of a cache.
    if _TRIMS_BY_LENGTH and kwargs.get("next_sequence_length") is None and given >= prompt.length:
        kwargs = {**kwargs, "next_sequence_length": given - held}
    return kwargs


def _check_use_cache(kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_cache") is False:
        raise ValueError(
            "c2c_ext: use_cache=False is not supported by an attached receiver: there is no cache "
            "to fuse"
        )


def _fill(cache: Any, fused: list[tuple[Tensor, Tensor]], repeats: int) -> None:
    """Writes ``fused`` into the empty ``cache``, every row ``repeats`` times, or nothing."""
    try:
        for layer, (key, value) in enumerate(fused):
            if repeats > 1:
                key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
            cache.update(key, value, layer)
            if getattr(cache.layers[layer], "record_past", False):
                # Assisted decoding makes a sliding layer keep more than its window until cropped.
                cache.layers[layer].crop(0)
    except Exception as error:
        cache.reset()
        if type(error) not in (IndexError, RuntimeError, ValueError):
            raise
        rows, _, tokens, _ = key.shape
        raise ValueError(
            f"c2c_ext: past_key_values cannot take {len(fused)} layers of {rows} rows of {tokens} "
            f"fused tokens: {error}"
        ) from error


def _fused_cache(
    receiver: PreTrainedModel,
    sharing: Sharing,
    prompt: Prompt,
    ids: Tensor,  # [batch, n]: the prompt without its last token
    mask: Tensor | None,  # [batch, n]
    columns: Tensor | None,  # bool [1 or batch, n]; None: all
) -> DynamicCache:
    """The receiver's cache of ``ids``, fused; no layer slides."""
    n = ids.shape[1]
    if prompt.position_ids is not None:
        position_ids = prompt.position_ids[..., :n]
    else:
        position_ids = _positions(ids, mask)
    counted = prompt.position_ids is None
    check_limit("receiver", receiver, position_ids, counted=counted, more=1)  # the last token's
    place = receiver.device
    ids, mask, position_ids, columns = (
        None if t is None else t.to(place) for t in (ids, mask, position_ids, columns)
    )
    chosen = sorted({k for span in prompt.spans for k in span.sharers()})
    # Made now: each prefill may run on a stream or in a thread of its own.
    readings = {
        k: _reading(receiver, sharing, k, prompt.texts[k], ids, mask, position_ids, counted)
        for k in chosen
    }
    allowed = columns
    if mask is not None:
        allowed = mask != 0 if columns is None else (mask != 0) & columns
    spans = [span for span in prompt.spans if span.start < span.end]
    if not spans or spans[-1].end < n:
        nobody = torch.zeros(1, len(sharing), dtype=torch.bool)
        spans.append(Span(spans[-1].end if spans else 0, n, nobody))
    cache = None
    for span in spans:

        def read(span: Span = span, held: Any = cache) -> DynamicCache:
            return read_tokens(
                "receiver",
                receiver,
                ids[:, span.start : span.end],
                position_ids=position_ids[..., span.start : span.end],
                cache=held,
                mask=None if mask is None else mask[:, : span.end],
                chunk=prompt.chunk,
            )

        if cache is None:
            cache = read_beside(sharing, receiver, read, list(readings.values()), prompt.chunk)
        else:
            cache = read()
        here = span.sharers()
        fuse_columns(
            cache,
            [readings[k] for k in here],
            span.start,
            span.end,
            [_in_rows(allowed, span, k) for k in here],
            sharing.fusion,
        )
    return cache


def _in_rows(allowed: Tensor | None, span: Span, sharer: int) -> Tensor | None:
    """bool ``[1 or batch, columns of the span]``: where a sharer is fused; None: everywhere."""
    allowed = None if allowed is None else allowed[:, span.start : span.end]
    rows = span.selected[:, sharer]
    if bool(rows.all()):
        return allowed
    if allowed is None:
        allowed = torch.ones(1, span.end - span.start, dtype=torch.bool)
    return allowed & rows[:, None].to(allowed.device)


def _reading(
    receiver: PreTrainedModel,
    sharing: Sharing,
    place: int,
    text: SharerInputs | None,
    ids: Tensor,
    mask: Tensor | None,
    position_ids: Tensor,
    counted: bool,
) -> SharerReading:
    """A sharer that is to read its own text or, without one, the receiver's tokens."""
    model, role = sharing.sharers[place], sharing.role(place)
    token_map = None
    if text is None:
        own = _ids_for_sharer(role, receiver, model, ids, mask)
    else:
        own, mask, position_ids = text.ids, text.mask, text.position_ids
        counted = position_ids is None
        if position_ids is None:
            position_ids = _positions(own, mask)
        token_map = text.token_map[:, : ids.shape[1]].to(receiver.device)
    check_limit(role, model, position_ids, counted=counted)
    given = (None if t is None else t.to(model.device) for t in (own, mask, position_ids))
    return SharerReading(place, role, model, sharing.fusers[place], *given, token_map)


def _positions(ids: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, N]``: a row's first real token is at 0."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)


def _ids_for_sharer(
    role: str,
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """``ids`` with padding replaced by token 0, all inside the sharer's vocabulary."""
    if mask is not None:  # the receiver's padding token need not exist in the sharer
        ids = ids.masked_fill(mask == 0, 0)
    vocabulary = vocabulary_of(sharer)
    if vocabulary >= vocabulary_of(receiver):
        return ids  # without asking the device
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"c2c_ext: both models read the same tokens: input_ids must be below the {role}'s "
            f"vocabulary size {vocabulary}, got {largest}"
        )
    return ids

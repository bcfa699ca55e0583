"""The fused prompt: read and fused span by span, and generate's cache filled with the result."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from .cache_columns import append, room_problem, unslid
from .conversation import Conversation, check_tokens, conversation_of, padded, recall, remember
from .model_kv import ModelKV
from .padding import check_last_tokens
from .placement import input_device
from .position_limit import check_limit
from .positions import Positions, resolved
from .prefill import read_tokens
from .selection import Span
from .sharer_inputs import SharerInputs
from .sharers import (
    SharerReading,
    Sharing,
    fuse_columns,
    positions_of,
    read_beside,
    vocabulary_of,
)
from .target_cache import check_target

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
    held: int = 0  # tokens of a row that the cache holds already, from earlier turns
    keeps: bool = True  # whether the cache can outlive the call
    every: int = 0  # generated tokens are fused after so many steps; 0: never


@dataclass
class _Text:
    """What the receiver reads of a prompt, on its device, and what it did in earlier turns."""

    ids: Tensor  # [batch, n]: the prompt without its last token
    mask: Tensor | None  # [batch, n]
    position_ids: Tensor  # [.., 1 or batch, n]
    counted: bool  # whether these count the tokens
    spread: int  # how many of the rows here are one row of the prompt


def fuse_prompt(
    receiver: PreTrainedModel,
    sharing: Sharing,
    prompt: Prompt,
    input_ids: Tensor,  # [batch * beams, prompt.length or more (drafted tokens)]
    kwargs: dict[str, Any],
) -> tuple[dict[str, Any], dict[int, SharerReading]]:
    """Fills the cache to decode from with the fused prompt.

    Args:
        input_ids: of the first `prepare_inputs_for_generation` of a call of generate.
        kwargs: its other arguments.

    Returns:
        the arguments for what is left of the prompt, its last token and any drafted ones; and what
        each sharer that is selected, by its place, has read: empty where nobody goes on from that.
    """
    cache = _target(prompt, input_ids, kwargs)
    kwargs = {**kwargs, "past_key_values": cache}
    (rows, given), held, length = input_ids.shape, prompt.held, prompt.length - 1
    repeats = rows // prompt.batch  # beams, return sequences: equal rows stand together
    # Rows that go on from a cache may differ although their new tokens do not.
    step, spread = (repeats, 1) if held == 0 else (1, repeats)
    mask = kwargs.get("attention_mask")
    mask = None if mask is None else mask[::step, : length + 1]
    base = mark = None
    if held:
        base, mark = _base(cache, receiver, input_ids, mask, held, length)
    readings: dict[int, SharerReading] = {}
    if length > held or prompt.every:
        columns = prompt.columns
        if isinstance(columns, Positions):  # counted in the rows that the mask has
            columns = resolved(columns, mask, prompt.length, held)
        else:
            columns = _spread(columns, spread)
        text = _text(receiver, prompt, input_ids[::step, :length], mask, spread)
        readings = _readings(receiver, sharing, prompt, text)
        if mark is not None:
            recall(mark, list(readings.values()))
    if length > held:
        check_last_tokens(mask)
        fused = _fused_cache(receiver, sharing, prompt, text, columns, base, readings)
        if not (prompt.keeps or prompt.every):
            readings = {}  # frees the sharers' caches before the receiver's is copied
        _fill(cache, fused, step, held)
    if length > 0:
        if _TRIMS_BY_LENGTH:
            kwargs["next_sequence_length"] = given - length
        if not _TRIMS_BY_LENGTH or kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = torch.arange(length, given, device=input_ids.device)
    kept = list(readings.values()) if prompt.keeps else []
    tokens = padded(input_ids[:, : prompt.length], kwargs.get("attention_mask"))
    earlier = mark if prompt.keeps else None
    remember(cache, tokens, prompt.length, length, kept, earlier)
    return kwargs, readings


def _target(prompt: Prompt, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
    """The cache to fill.

    Raises:
        ValueError: what the first step was given is not what generate was, or does not go.
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
    check_target(cache, input_ids.device)
    held = int(cache.get_seq_length())
    if held != prompt.held:
        raise ValueError(
            f"c2c_ext: past_key_values must hold the {prompt.held} tokens that it held when "
            f"generate was called, it holds {held}"
        )
    if input_ids.shape[1] < prompt.length:
        raise ValueError(
            f"c2c_ext: the first step must see the whole prompt of {prompt.length} tokens, "
            f"got {input_ids.shape[1]}"
        )
    return cache


def _base(
    cache: Any,
    receiver: PreTrainedModel,
    input_ids: Tensor,  # [rows of the cache, length or more]
    mask: Tensor | None,
    held: int,
    length: int,
) -> tuple[DynamicCache, Conversation | None]:
    """What a later turn is read over, all that ``cache`` holds, and the mark of earlier turns.

    Raises:
        ValueError: it cannot go on with these tokens.
    """
    shapes = [(s.num_heads, s.head_dim) for s in ModelKV.from_config(receiver.config).layers]
    problem = room_problem(cache, shapes, len(input_ids), length)
    if problem is not None:
        raise ValueError(
            f"c2c_ext: past_key_values cannot take {len(input_ids)} rows of {length} tokens: "
            f"{problem}"
        )
    mark = conversation_of(cache, held)
    if mark is not None:
        check_tokens(mark, cache, input_ids, mask, held)
    return unslid(cache, held), mark


def _spread(rows: Tensor | None, times: int, dim: int = 0) -> Tensor | None:
    """One row for each of the cache's: every row ``times`` times, unless one is for all."""
    if rows is None or times == 1 or rows.shape[dim] == 1:
        return rows
    return rows.repeat_interleave(times, dim)


def read_on(prompt: Prompt, input_ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the first step of a call that reads on from a cache and fuses nothing.

    Args:
        input_ids: ``[batch, prompt.length or more (drafted tokens)]``.
    """
    _check_use_cache(kwargs)
    given = input_ids.shape[1]
    # Assisted decoding of newer versions takes every first step for the beginning of a cache.
    if _TRIMS_BY_LENGTH and kwargs.get("next_sequence_length") is None and given >= prompt.length:
        kwargs = {**kwargs, "next_sequence_length": given - prompt.held}
    return kwargs


def _check_use_cache(kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_cache") is False:
        raise ValueError(
            "c2c_ext: use_cache=False is not supported by an attached receiver: there is no cache "
            "to fuse"
        )


def _fill(cache: Any, fused: DynamicCache, repeats: int, held: int) -> None:
    """Writes ``fused`` behind the ``held`` tokens of ``cache``, every row ``repeats`` times.

    Into an empty cache it writes all or nothing; `room_problem` was asked before for others.
    ``fused`` loses its layers one by one, so that they are not held twice.
    """
    layers, (rows, _, tokens, _) = len(fused.layers), fused.layers[0].keys.shape
    rows, tokens = rows * repeats, tokens - held
    try:
        append(cache, _taken(fused, repeats, held), held)
    except Exception as error:
        if held == 0:
            cache.reset()
        if type(error) not in (IndexError, RuntimeError, ValueError):
            raise
        raise ValueError(
            f"c2c_ext: past_key_values cannot take {layers} layers of {rows} rows of {tokens} "
            f"fused tokens: {error}"
        ) from error


def _taken(fused: DynamicCache, repeats: int, held: int) -> Iterator[tuple[Tensor, Tensor]]:
    while fused.layers:
        layer = fused.layers.pop(0)
        key, value = layer.keys[:, :, held:], layer.values[:, :, held:]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        yield key, value


def _text(
    receiver: PreTrainedModel,
    prompt: Prompt,
    ids: Tensor,  # [batch, n]
    mask: Tensor | None,  # [batch, n or more]
    spread: int,
) -> _Text:
    n, counted = ids.shape[1], prompt.position_ids is None
    mask = None if mask is None else mask[:, :n]
    if counted:
        position_ids = positions_of(ids, mask)
    else:
        position_ids = _spread(prompt.position_ids[..., :n], spread, -2)
    check_limit("receiver", receiver, position_ids, counted=counted, more=1)  # the last token's
    place = input_device(receiver)
    given = (None if t is None else t.to(place) for t in (ids, mask, position_ids))
    return _Text(*given, counted, spread)


def _readings(
    receiver: PreTrainedModel, sharing: Sharing, prompt: Prompt, text: _Text
) -> dict[int, SharerReading]:
    """What the sharers that are selected are to read; nothing of it is read yet."""
    chosen = sorted({k for span in prompt.spans for k in span.sharers()})
    # Made now: each prefill may run on a stream or in a thread of its own.
    return {k: _reading(receiver, sharing, k, prompt.texts[k], text) for k in chosen}


def _fused_cache(
    receiver: PreTrainedModel,
    sharing: Sharing,
    prompt: Prompt,
    text: _Text,
    columns: Tensor | None,  # bool [1 or batch, n]: which to fuse; None: all
    base: DynamicCache | None,  # of the tokens that earlier turns left; None: there are none
    readings: dict[int, SharerReading],
) -> DynamicCache:
    """The receiver's cache of ``text``, fused from ``prompt.held`` on; no layer of it slides."""
    n, mask = text.ids.shape[1], text.mask
    allowed = None if columns is None else columns.to(text.ids.device)
    if mask is not None:
        allowed = mask != 0 if allowed is None else (mask != 0) & allowed
    spans = [span for span in prompt.spans if span.start < span.end]
    if not spans or spans[-1].end < n:
        nobody = torch.zeros(1, len(sharing), dtype=torch.bool)
        spans.append(Span(spans[-1].end if spans else prompt.held, n, nobody))
    cache, unread = base, list(readings.values())
    for span in spans:

        def read(span: Span = span, held: Any = cache) -> DynamicCache:
            return read_tokens(
                "receiver",
                receiver,
                text.ids[:, span.start : span.end],
                position_ids=text.position_ids[..., span.start : span.end],
                cache=held,
                mask=None if mask is None else mask[:, : span.end],
                chunk=prompt.chunk,
            )

        if unread:
            cache, unread = read_beside(sharing, receiver, read, unread, prompt.chunk), []
        else:
            cache = read()
        here = span.sharers()
        fuse_columns(
            cache,
            [readings[k] for k in here],
            span.start,
            span.end,
            [_in_rows(allowed, span, k, text.spread) for k in here],
            sharing.fusion,
        )
    return cache


def _in_rows(allowed: Tensor | None, span: Span, sharer: int, spread: int) -> Tensor | None:
    """bool ``[1 or batch, columns of the span]``: where a sharer is fused; None: everywhere."""
    allowed = None if allowed is None else allowed[:, span.start : span.end]
    rows = _spread(span.selected[:, sharer], spread)
    if bool(rows.all()):
        return allowed
    if allowed is None:
        allowed = torch.ones(1, span.end - span.start, dtype=torch.bool)
    return allowed & rows[:, None].to(allowed.device)


def _reading(
    receiver: PreTrainedModel,
    sharing: Sharing,
    place: int,
    own: SharerInputs | None,
    text: _Text,
) -> SharerReading:
    """A sharer that is to read its own text or, without one, the receiver's tokens."""
    model, role = sharing.sharers[place], sharing.role(place)
    token_map, mask, position_ids, counted = None, text.mask, text.position_ids, text.counted
    if own is None:
        ids = _ids_for_sharer(role, receiver, model, text.ids, mask)
    else:
        ids, mask = (
            None if t is None else t.repeat_interleave(text.spread, 0) for t in (own.ids, own.mask)
        )
        position_ids = _spread(own.position_ids, text.spread)
        counted = position_ids is None
        if counted:
            position_ids = positions_of(ids, mask)
        token_map = _spread(own.token_map[:, : text.ids.shape[1]], text.spread).to(text.ids.device)
    check_limit(role, model, position_ids, counted=counted)
    there = input_device(model)
    given = (None if t is None else t.to(there) for t in (ids, mask, position_ids))
    return SharerReading(place, role, model, sharing.fusers[place], *given, token_map)


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
    if vocabulary >= vocabulary_of(receiver) or ids.numel() == 0:
        return ids  # without asking the device
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"c2c_ext: both models read the same tokens: input_ids must be below the {role}'s "
            f"vocabulary size {vocabulary}, got {largest}"
        )
    return ids

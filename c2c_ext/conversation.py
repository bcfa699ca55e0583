"""What a returned cache remembers of its conversation, so that a later turn goes on from it.

A mark on the cache: the tokens that it holds, a sample of their keys, and the sharers' own caches.
It survives copying and pickling the cache, by which a conversation branches or is kept, cropping it
and moving its rows; a cache that was filled by something else is told by the keys. A mark never
changes: a later turn hangs a new one on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import KVPairs
from .cache_columns import cache_of, held_columns

_MARK = "_c2c_fused"
PADDED = -1
_SAMPLE = 4  # channels of a key: enough to tell two tokens of different histories apart
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Sample:
    """Some channels of the keys of one layer: columns ``first ..`` of every row."""

    layer: int
    first: int
    bits: Tensor  # integers [R, n, channels]: NaN, in padding, is the same as itself


@dataclass(frozen=True)
class _Shared:
    """A sharer's own, never fused cache and what it was read from."""

    model: weakref.ref | None  # None: it was pickled, and no model is known to be the same
    ids: Tensor  # int64 [R, S]
    mask: Tensor | None
    position_ids: Tensor  # [1 or R, S]
    pairs: KVPairs

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        copied = (copy.deepcopy(getattr(self, name), memo) for name in self._tensors())
        return _Shared(self.model, *copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shared, (None, *(getattr(self, name) for name in self._tensors()))

    @staticmethod
    def _tensors() -> tuple[str, ...]:
        return "ids", "mask", "position_ids", "pairs"


@dataclass(frozen=True)
class Conversation:
    """The mark."""

    ids: Tensor  # int64 [R, N]: the tokens of the first columns, all that are known; or PADDED
    read: int  # columns of them that were a prompt's, not an answer's: its mask is known
    sample: _Sample | None  # None: no layer holds what could be compared
    shared: tuple[_Shared, ...]


def conversation_of(cache: Any, held: int) -> Conversation | None:
    """The mark of a cache that holds what an attached receiver put there; None: it does not.

    Args:
        cache: a transformers Cache.
        held: tokens that it holds.
    """
    mark = getattr(cache, _MARK, None)
    if not isinstance(mark, Conversation):
        return None
    if mark.sample is None:
        return mark
    return mark if bool(_same_keys(mark.sample, cache, held).any(1).all()) else None


def check_tokens(
    mark: Conversation, cache: Any, ids: Tensor, mask: Tensor | None, held: int
) -> None:
    """``input_ids`` and ``attention_mask`` must begin with what the cache holds.

    Args:
        cache: which ``mark`` is of.
        ids: ``[R, held or more]``, of every row of the cache.
        mask: as long, 0 where a row is padded; None: nowhere.
        held: tokens in the cache.

    Raises:
        ValueError: another token, or another padding; names its row and column.
    """
    known = min(held, mark.ids.shape[1])
    if known == 0 or len(ids) == 0:
        return
    old, new = mark.ids[:, :known].to(ids.device), padded(ids[:, :known], mask)
    # An answer may have ended before those of other rows, and be masked from there on.
    skipped = (new == PADDED) & (torch.arange(known, device=new.device) >= mark.read)
    same_rows = None
    if mark.sample is not None and len(old) > 1:
        same_rows = _same_keys(mark.sample, cache, held).to(ids.device)
    for row in range(len(new)):
        candidates = old if same_rows is None else old[same_rows[row]]
        agree = (candidates == new[row]) | skipped[row]
        if bool(agree.all(1).any()):
            continue
        lengths = _leading(agree)
        column = int(lengths.max())
        before, now = int(candidates[int(lengths.argmax()), column]), int(new[row, column])
        if PADDED in (before, now):
            what = "masks" if now == PADDED else "does not mask"
            raise ValueError(
                "c2c_ext: attention_mask must mark the tokens that past_key_values holds as it did "
                f"when they were read: row {row} {what} column {column}"
            )
        raise ValueError(
            f"c2c_ext: input_ids must begin with the tokens that past_key_values holds: row {row} "
            f"has another one in column {column} (crop the cache to its first {column} tokens to "
            "go on from there)"
        )


def padded(ids: Tensor, mask: Tensor | None) -> Tensor:
    """``ids [R, N]`` with `PADDED` where ``mask [R, N or more]`` is 0."""
    return ids if mask is None else ids.masked_fill(mask[:, : ids.shape[1]] == 0, PADDED)


def recall(mark: Conversation, readings: Sequence[Any]) -> None:
    """Gives every reading what its sharer has read of its text already, as its cache.

    A text of which the mark knows no beginning is read from its start: the same in the end.

    Args:
        readings: `sharers.SharerReading` of the whole text of the conversation.
    """
    taken: set[int] = set()
    for reading in readings:
        for place, shared in enumerate(mark.shared):
            if place in taken or shared.model is None or shared.model() is not reading.model:
                continue
            taken.add(place)
            rows, columns = _common(shared, reading.ids, reading.mask, reading.position_ids)
            if columns:
                reading.cache = cache_of(
                    [(_rows(k, rows)[:, :, :columns], _rows(v, rows)[:, :, :columns])
                     for k, v in shared.pairs]
                )  # fmt: skip
            break


def remember(
    cache: Any,
    ids: Tensor,
    read: int,
    held: int,
    readings: Sequence[Any],
    earlier: Conversation | None = None,
) -> None:
    """Hangs the mark on a cache.

    Args:
        cache: a transformers Cache that holds ``held`` tokens.
        ids: int64 ``[R, N]``, the tokens of its first columns, or `PADDED`.
        read: columns of them that were a prompt's.
        readings: `sharers.SharerReading` to keep for a later turn.
        earlier: the mark of earlier turns, for the caches of sharers that this one has not used.
    """
    shared = [_kept(reading) for reading in readings if reading.held]
    if earlier is not None:
        done = [None, *(reading.model for reading in readings if reading.held)]  # None: it is gone
        shared += [s for s in earlier.shared if s.model and all(s.model() is not m for m in done)]
    setattr(cache, _MARK, Conversation(ids.clone(), read, _sampled(cache, held), tuple(shared)))


def _kept(reading: Any) -> _Shared:
    held = reading.held
    return _Shared(
        weakref.ref(reading.model),
        reading.ids[:, :held],
        None if reading.mask is None else reading.mask[:, :held],
        reading.position_ids[..., :held],
        [(layer.keys, layer.values) for layer in reading.cache.layers],
    )


def extend(cache: Any, sequences: Any, readings: Sequence[Any] = ()) -> None:
    """Lets the mark of a cache speak of all that it holds now, after generate.

    Args:
        cache: a transformers Cache; without a mark it is left alone.
        sequences: int64 ``[R, prompt and answer]``, the tokens of its rows where they are known;
            anything else: the answer is not known.
        readings: `sharers.SharerReading` that have read on since; without any, what was remembered.
    """
    mark = getattr(cache, _MARK, None)
    if mark is None:
        return
    held = int(cache.get_seq_length())
    ids = _in_cache_order(mark, cache, held)
    known = ids.shape[1]
    if (
        isinstance(sequences, Tensor)
        and sequences.shape[0] == len(ids)
        and sequences.shape[1] >= max(held, known)
    ):
        ids, answered = ids.to(sequences.device), sequences[:, known:held]
        if bool(((sequences[:, :known] == ids) | (ids == PADDED)).all()):
            ids = torch.cat([ids, answered], dim=1)[:, :held]
    remember(cache, ids, mark.read, held, readings, mark)


def _in_cache_order(mark: Conversation, cache: Any, held: int) -> Tensor:
    """int64 ``[R, N]``: the mark's tokens in the order that the cache's rows have now."""
    if mark.sample is None:
        return mark.ids
    same = _same_keys(mark.sample, cache, held)
    if len(same) == len(mark.ids) and bool(same.diagonal().all()):
        return mark.ids
    return mark.ids[same.to(mark.ids.device, torch.int8).argmax(1)]


def _sampled(cache: Any, held: int) -> _Sample | None:
    """Of the last layer that holds all columns, or else of the last one that slides."""
    found = None
    for index in reversed(range(len(cache.layers) if held else 0)):
        try:
            first, keys, _ = held_columns(cache.layers[index], held)
        except ValueError:
            continue
        if found is None or first < found[1]:
            found = index, first, keys
            if first == 0:
                break
    if found is None:
        return None
    index, first, keys = found
    return _Sample(index, first, _bits(keys).clone())


def _bits(keys: Tensor) -> Tensor:
    """integers ``[B, n, channels]`` from keys ``[B, H, n, D]``."""
    part = keys[:, 0, :, :_SAMPLE].contiguous()
    return part.view(_BITS[part.element_size()])


def _same_keys(sample: _Sample, cache: Any, held: int) -> Tensor:
    """bool ``[rows of the cache, rows of the sample]``: whose keys are the same, where both know.

    All true where they have no column in common, all false where the layer is another one.
    """
    rows = len(sample.bits)
    if sample.layer >= len(cache.layers):
        return torch.zeros(1, rows, dtype=torch.bool)
    try:
        first, keys, _ = held_columns(cache.layers[sample.layer], held)
    except ValueError:
        return torch.zeros(1, rows, dtype=torch.bool)
    start, end = max(first, sample.first), min(held, sample.first + sample.bits.shape[1])
    now = _bits(keys[:, :, max(start - first, 0) : max(end - first, 0)])
    then = sample.bits[:, max(start - sample.first, 0) : max(end - sample.first, 0)].to(now.device)
    if start >= end:
        return torch.ones(len(now), rows, dtype=torch.bool)
    if now.shape[2] != then.shape[2] or now.dtype != then.dtype:
        return torch.zeros(len(now), rows, dtype=torch.bool)
    return torch.stack([(now == row).flatten(1).all(1) for row in then], dim=1)


def _common(
    shared: _Shared, ids: Tensor, mask: Tensor | None, position_ids: Tensor
) -> tuple[Tensor | None, int]:
    """The old row for each new one (None: the same), and how many columns all have in common."""
    columns = min(shared.pairs[0][0].shape[2], ids.shape[1])
    if columns == 0 or position_ids.ndim != 2 or shared.position_ids.ndim != 2:
        return None, 0
    old, new = (
        torch.stack(
            [
                i[:, :columns],
                (torch.ones_like(i) if m is None else (m != 0).to(i))[:, :columns],
                p[:, :columns].expand(len(i), -1).to(i),
            ],
            dim=-1,
        )
        for i, m, p in (
            (shared.ids.to(ids.device), _to(shared.mask, ids), shared.position_ids.to(ids.device)),
            (ids, mask, position_ids),
        )
    )
    if len(old) == len(new):
        common = int(_leading((old == new).all(-1)).min())
        if common == columns or len(old) == 1:
            return None, common
    lengths = torch.stack([_leading((old == row).all(-1)) for row in new])
    most, rows = lengths.max(1)
    return rows, int(most.min())


def _leading(same: Tensor) -> Tensor:
    """int64 ``[R]``: how many columns of ``same [R, N]`` are true before the first false one."""
    return same.long().cumprod(1).sum(1)


def _rows(t: Tensor, rows: Tensor | None) -> Tensor:
    return t if rows is None else t[rows.to(t.device)]


def _to(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.device)

"""The sharers of one call of generate: what each reads, and fusing columns with what it has read.

A sharer's own cache is never fused, and grows as the call, or a later turn, gives it more to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache import KVPairs
from .fuser import Fuser
from .fusion import fuse
from .overlap import run_both
from .placement import on_one_device
from .prefill import read_tokens


@dataclass(frozen=True)
class Sharing:
    """What `attach` was given beside the receiver, in the order of its lists."""

    sharers: tuple[PreTrainedModel, ...]
    fusers: tuple[Fuser, ...]
    fusion: str  # of fusion_checks.FUSIONS
    overlap: str  # of overlap.usable

    def __len__(self) -> int:
        return len(self.sharers)

    def role(self, place: int) -> str:
        """What messages call a sharer."""
        return "sharer" if len(self) == 1 else f"sharer[{place}]"


def positions_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, N]``: a row's first real token is at 0."""
    if mask is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many token ids a model knows."""
    return model.config.get_text_config(decoder=True).vocab_size


@dataclass
class SharerReading:
    """One sharer in a call: its text and its own cache of what it has read of it.

    All tensors are on the sharer's device but ``token_map``, which is on the receiver's.
    """

    place: int  # in attach's lists
    role: str  # for messages
    model: PreTrainedModel
    fuser: Fuser
    ids: Tensor  # int64 [B, S]
    mask: Tensor | None  # [B, S], nonzero where a token is real; None: everywhere
    position_ids: Tensor  # [.., 1 or B, S]
    # int64 [1 or B, N]: for every receiver column the column of ``ids`` that it is fused with, or
    # -1; None: the same column.
    token_map: Tensor | None = None
    cache: Any = None  # its first columns, as many as were read

    @property
    def held(self) -> int:
        """Columns that were read."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def read(self, chunk: int | None = None) -> KVPairs:
        """Reads what is unread of its text; gives the (key, value) of every layer."""
        held = self.held
        if held < self.ids.shape[1]:
            self.cache = read_tokens(
                self.role,
                self.model,
                self.ids[:, held:],
                position_ids=self.position_ids[..., held:],
                cache=self.cache,
                mask=self.mask,
                chunk=chunk,
            )
        return [(layer.keys, layer.values) for layer in self.cache.layers]

    def shared(self, start: int, end: int, like: Tensor) -> KVPairs:
        """What receiver columns ``start .. end - 1`` are fused with, of the kind of ``like``.

        Its own columns of the same numbers or, where it has a map, all of them.
        """
        pairs = [(layer.keys, layer.values) for layer in self.cache.layers]
        if self.token_map is None:
            pairs = [(key[:, :, start:end], value[:, :, start:end]) for key, value in pairs]
        return [(key.to(like), value.to(like)) for key, value in pairs]


def fuse_columns(
    cache: Any,
    readings: Sequence[SharerReading],
    start: int,
    end: int,
    allowed: Sequence[Tensor | None],
    fusion: str,
) -> None:
    """Fuses columns ``start .. end - 1`` of a receiver's cache where they stand.

    Args:
        cache: a transformers Cache whose layers hold all their tokens, at least ``end``.
        readings: the sharers, in the order of fusing; each has read what the columns are fused
            with.
        allowed: for every reading, bool ``[1 or B, 1 or end - start]``: the columns to fuse in each
            row. None: all of them.
        fusion: of `fusion_checks.FUSIONS`.
    """
    fuse_pairs(
        [(layer.keys[:, :, start:end], layer.values[:, :, start:end]) for layer in cache.layers],
        readings,
        start,
        end,
        allowed,
        fusion,
    )


def fuse_pairs(
    base: KVPairs,
    readings: Sequence[SharerReading],
    start: int,
    end: int,
    allowed: Sequence[Tensor | None],
    fusion: str,
) -> None:
    """Fuses ``base``, columns ``start .. end - 1`` of a receiver's cache, in place.

    Args:
        base: (key, value) of every layer, ``[B, H, end - start, D]``.
        readings, start, end, allowed, fusion: as `fuse_columns`.
    """
    if not readings or start == end:
        return
    first = base[0][0]
    maps = []
    for reading, columns in zip(readings, allowed, strict=True):
        token_map = reading.token_map
        if token_map is not None:
            token_map = token_map[:, start:end].to(first.device)
        elif columns is not None:
            token_map = torch.arange(end - start, device=first.device)
        if columns is not None:
            token_map = torch.where(columns.to(first.device), token_map, -1)
        maps.append(None if token_map is None else token_map.expand(len(first), -1))
    shared = [reading.shared(start, end, first) for reading in readings]
    fusers = [reading.fuser for reading in readings]
    # In place: the caches are the call's own.
    with on_one_device(base) as near:
        fuse(near, shared, fusers, fusion=fusion, token_map=maps, inplace=True)


def read_beside(
    sharing: Sharing,
    receiver: PreTrainedModel,
    read_receiver: Any,
    readings: Sequence[SharerReading],
    chunk: int | None,
) -> Any:
    """Runs ``read_receiver()`` and what every sharer has unread, as ``overlap`` says.

    Returns:
        what ``read_receiver`` gives; the sharers' caches are ready for the current streams.
    """
    cache: list[Any] = []

    def read_base() -> KVPairs:
        cache.append(read_receiver())
        return []

    def read_all() -> KVPairs:
        return [pair for reading in readings for pair in reading.read(chunk)]

    models = [reading.model for reading in readings]
    run_both(sharing.overlap, receiver, models, read_base, read_all)
    return cache[0]

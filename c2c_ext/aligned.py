"""Aligned texts: the token ids of both models and the map between them, as rows and as a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .messages import shown
from .token_spans import TokenSpans

PADDING = ("left", "right")


@dataclass(frozen=True)
class Alignment:
    """One text as both models read it.

    Attributes:
        receiver_ids, sharer_ids: token ids.
        token_map: for every receiver token a place in ``sharer_ids``, or -1.
        receiver, sharer: text and character offsets of the tokens; None where there are none: the
            sharer's with a published strategy, and those of a tokenizer that gives none.
    """

    receiver_ids: list[int]
    sharer_ids: list[int]
    token_map: list[int]
    receiver: TokenSpans | None = field(default=None, repr=False, compare=False)
    sharer: TokenSpans | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class AlignedBatch:
    """Arguments of an attached receiver's ``generate``.

    ``receiver.generate(**aligned.receiver, sharer_inputs=aligned.sharer_inputs)``

    Attributes:
        receiver: ``input_ids`` and ``attention_mask``, int64 ``[B, P]``.
        sharer_inputs: ``input_ids`` and ``attention_mask``, int64 ``[B, S]``, and ``token_map``,
            int64 ``[B, P]``: columns of the sharer's ``input_ids``, or -1.
        alignments: the rows without padding.
    """

    receiver: dict[str, Tensor]
    sharer_inputs: dict[str, Tensor]
    alignments: tuple[Alignment, ...] = field(repr=False)

    def to(self, device: torch.device | str) -> AlignedBatch:
        """The same with all tensors on ``device``."""
        receiver, sharer = (
            {name: t.to(device) for name, t in tensors.items()}
            for tensors in (self.receiver, self.sharer_inputs)
        )
        return replace(self, receiver=receiver, sharer_inputs=sharer)


def batch_of(
    rows: Sequence[Alignment],
    names: Sequence[str],
    receiver: PreTrainedTokenizerBase,
    sharer: PreTrainedTokenizerBase,
    *,
    padding_side: str,
    max_length: int | None,
) -> AlignedBatch:
    """Rows padded to one length on either side, the maps moved with the sharer's tokens.

    Args:
        names: what messages call the rows.
        receiver, sharer: their padding tokens are used.
        padding_side: ``"left"`` or ``"right"``.
        max_length: see `TokenAligner.__call__`.

    Raises:
        ValueError: an argument out of range, or a row without tokens.
    """
    if padding_side not in PADDING:
        raise ValueError(
            f"TokenAligner: padding_side must be one of {', '.join(PADDING)}, got "
            f"{shown(padding_side)}"
        )
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(
            "TokenAligner: max_length must be None or an integer of at least 1, got "
            f"{shown(max_length)}"
        )
    if not rows:
        raise ValueError("TokenAligner: at least one text is needed, got none")
    if max_length is not None:
        rows = [_cut(row, max_length) for row in rows]
    for row, name in zip(rows, names, strict=True):
        for side, ids in (("receiver", row.receiver_ids), ("sharer", row.sharer_ids)):
            if not ids:
                raise ValueError(f"TokenAligner: {name} has no tokens for the {side}")
    left = padding_side == "left"
    sides = []
    for tokenizer, ids in (
        (receiver, [row.receiver_ids for row in rows]),
        (sharer, [row.sharer_ids for row in rows]),
    ):
        mask = _padded([[1] * len(line) for line in ids], 0, left)
        sides.append({"input_ids": _padded(ids, _padding(tokenizer), left)})
        sides[-1]["attention_mask"] = mask
    width = sides[1]["input_ids"].shape[1]
    maps = []
    for row in rows:
        moved = width - len(row.sharer_ids) if left else 0
        maps.append([place + moved if place >= 0 else -1 for place in row.token_map])
    sides[1]["token_map"] = _padded(maps, -1, left)
    return AlignedBatch(*sides, tuple(rows))


def _cut(row: Alignment, length: int) -> Alignment:
    if len(row.receiver_ids) <= length:
        return row
    token_map = row.token_map[:length]
    read = max(max(token_map) + 1, 1)
    return Alignment(
        row.receiver_ids[:length],
        row.sharer_ids[:read],
        token_map,
        row.receiver and row.receiver.first(length),
        row.sharer and row.sharer.first(read),
    )


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """What padding holds; any id will do, it is masked."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def _padded(rows: Sequence[Sequence[int]], fill: int, left: bool) -> Tensor:
    """int64 ``[B, longest]``."""
    width = max(map(len, rows))
    filled = [
        [fill] * (width - len(row)) + list(row) if left else [*row, *[fill] * (width - len(row))]
        for row in rows
    ]
    return torch.tensor(filled, dtype=torch.int64)

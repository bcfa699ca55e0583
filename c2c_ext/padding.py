"""Right padding moved to the left: decoding goes on from a row's last column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shift:
    """How far every row of a prompt moves to the right."""

    source: Tensor  # int64 [B, P]: the column that each column takes its content from

    def move(self, rows: Tensor) -> Tensor:
        """``[.., 1 or B, P]`` in the new columns, ``[.., B, P]``."""
        source = self.source.to(rows.device)
        rows = rows.expand(*rows.shape[:-2], *source.shape)
        return rows.gather(-1, source.expand(rows.shape))

    def move_columns(self, columns: Any) -> Any:
        """bool ``[1 or B, P - 1]``, which to fuse, as ``[B, P - 1]``; else what it is.

        What stood in a row's last token, which is never fused, falls away.
        """
        if not isinstance(columns, Tensor):
            return columns  # all; or counted in each row's own tokens
        return self.move(torch.nn.functional.pad(columns, (0, 1)))[:, :-1]


def shift_of(mask: Tensor | None) -> Shift | None:
    """The shift that brings every row's last real token into the last column; None: they are.

    Args:
        mask: ``attention_mask [B, P]`` of generate, nonzero where a token is real.

    Raises:
        ValueError: a row without a token.
    """
    if mask is None:
        return None
    real = mask != 0
    if bool(real[:, -1].all()):
        return None
    empty = (~real.any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"c2c_ext: attention_mask must mark at least one token in every row, row "
            f"{int(empty[0])} has none"
        )
    padding = real.flip(1).long().argmax(1)  # columns after the last token
    length = mask.shape[1]
    return Shift((torch.arange(length, device=mask.device) - padding[:, None]) % length)


def check_last_tokens(mask: Tensor | None) -> None:
    """Raises ValueError where ``mask [B, P]`` masks the last token of a row, which is read next.

    What generate is given has been moved; transformers makes a mask of its own where it is given
    none and finds padding tokens.
    """
    if mask is None:
        return
    masked = (mask[:, -1] == 0).nonzero()
    if len(masked):
        raise ValueError(
            f"c2c_ext: attention_mask must be given: row {int(masked[0])} of input_ids ends in the "
            "padding token"
        )

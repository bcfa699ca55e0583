"""Which tokens of a conversation are content, and where they end in the other side's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .token_spans import TokenSpans


@dataclass(frozen=True)
class Places:
    """Where the tokens of a rendered conversation are.

    Attributes:
        order: int64 ``[k]``, the pieces in the order of the text.
        inside: bool ``[n]``, whether a token has some of a piece's text.
        number: int64 ``[n]``, which of ``order`` it has or comes behind; -1: before the first.
        piece: int64 ``[n]``, that piece, or -1.
        clipped: float64 ``[n]``, where it ends, at the latest with that piece; -inf: before all.
    """

    order: np.ndarray
    inside: np.ndarray
    number: np.ndarray
    piece: np.ndarray
    clipped: np.ndarray


def places_of(tokens: TokenSpans, spans: Sequence[tuple[int, int] | None]) -> Places:
    there = [i for i, span in enumerate(spans) if span is not None]
    there.sort(key=lambda i: spans[i])
    order = np.array(there, dtype=np.int64)
    bounds = np.array([spans[i] for i in there], dtype=np.float64).reshape(-1, 2)
    ends = reached(tokens)
    number = np.searchsorted(bounds[:, 0], ends, side="left") - 1
    stops = np.concatenate([bounds[:, 1], [-np.inf]])[number]  # -1 is the last
    inside = (tokens.offsets[:, 0] < stops) & ~tokens.added
    pieces = np.concatenate([order, [-1]])[number]
    return Places(order, inside, number, pieces, np.where(inside, np.minimum(ends, stops), stops))


def reached(tokens: TokenSpans) -> np.ndarray:
    """Where the text read so far ends, -inf before the first token of it; float64 ``[n]``."""
    return np.maximum.accumulate(np.where(tokens.added, -np.inf, tokens.ends))


def in_other_text(
    places: Places,
    own: Sequence[tuple[int, int] | None],
    other: Sequence[tuple[int, int] | None],
) -> np.ndarray:
    """``places.clipped`` as characters of the other side's text.

    Behind or in a piece that the other side has dropped: the end of the one before.
    """
    moved = np.full(len(places.order) + 1, -np.inf)  # the last one: before the first piece
    ends = np.full(len(places.order) + 1, np.inf)
    last = -np.inf
    for number, piece in enumerate(places.order.tolist()):
        if other[piece] is None:
            moved[number], ends[number] = np.inf, last
        else:
            moved[number], last = other[piece][0] - own[piece][0], other[piece][1]
    return np.minimum(places.clipped + moved[places.number], ends[places.number])

"""What fusing more and more of a cache does: layer by layer, and by the part of its positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..fuser import Fuser
from .readings import Reading, fused, is_right, next_logits

MOST_STEPS = 12  # points of a curve over positions, if not one for each
PARTS = tuple(i / 6 for i in range(7))
ENDS = ("first", "last")


def layer_rows(
    receiver: PreTrainedModel, fuser: Fuser, readings: Sequence[Reading]
) -> list[dict[str, Any]]:
    """Answers when only some layers are fused (arXiv 2510.03215 fuses single layers and more).

    All streams are fused from the two plain caches, so a part of the layers is exactly that part of
    the whole fusion.

    Returns:
        rows of `_scores` with ``which`` and ``layers``: ``"first"`` and ``"last"``, the number of
        layers fused from that end (0: the receiver alone; all: C2C); ``"only"``, the one layer;
        ``"without"``, the one layer that is not fused.

    Raises:
        ValueError: no readings.
    """
    _check(readings)
    count = len(readings[0].receiver)
    points = [(which, n) for which in ENDS for n in range(count + 1)]
    points += [(which, layer) for which in ("only", "without") for layer in range(count)]

    def cache(reading: Reading, whole: KVPairs, which: str, number: int) -> KVPairs:
        return with_layers(reading, whole, chosen_layers(count, which, number))

    scored = _curve(receiver, fuser, readings, points, cache)
    return [
        {"which": which, "layers": n, **row} for (which, n), row in zip(points, scored, strict=True)
    ]


def chosen_layers(count: int, which: str, number: int) -> set[int]:
    """Which of ``count`` layers a row of `layer_rows` fuses."""
    return set(
        {
            "first": range(number),
            "last": range(count - number, count),
            "only": range(number, number + 1),
            "without": (layer for layer in range(count) if layer != number),
        }[which]
    )


def with_layers(reading: Reading, whole: KVPairs, layers: set[int]) -> KVPairs:
    """The receiver's plain cache, but these layers of the wholly fused one."""
    return [
        whole[layer] if layer in layers else plain for layer, plain in enumerate(reading.receiver)
    ]


def position_rows(
    receiver: PreTrainedModel,
    fuser: Fuser,
    readings: Sequence[Reading],
    parts: Iterable[float] | None = None,
) -> list[dict[str, Any]]:
    """Answers when only a part of the positions is fused (a curve of arXiv 2510.03215).

    Args:
        parts: of the positions that are fused otherwise, 0..1; rounded to whole positions. None:
            `parts_of` the readings.

    Returns:
        rows of `_scores` with ``which``, ``part``, and ``positions``, the mean number of fused
        ones. ``"first"`` and ``"last"``: counted from this end; ``"only"`` and ``"without"``: only
        the range that ends at this part and begins at the one before, or all but that range.

    Raises:
        ValueError: no readings, or a part outside of 0..1.
    """
    _check(readings)
    parts = sorted(parts_of(readings) if parts is None else parts)
    for part in parts:
        if not 0 <= part <= 1:
            raise ValueError(f"c2c_ext.analysis: parts must be within 0..1, got {part}")
    points = [(which, 0.0, part) for which in ENDS for part in parts]
    ranges = list(pairwise(parts))
    points += [(which, *ends) for which in ("only", "without") for ends in ranges]

    def cache(reading: Reading, _: KVPairs, which: str, begin: float, end: float) -> KVPairs:
        return fused(reading, fuser, map_of_part(reading, which, end, begin))

    scored = _curve(receiver, fuser, readings, points, cache)
    prompts = sum(len(r.last) for r in readings)

    def positions(which: str, begin: float, end: float) -> float:
        maps = ((map_of_part(r, which, end, begin), len(r.last)) for r in readings)
        return sum(int((places >= 0).sum()) * batch for places, batch in maps) / prompts

    return [
        {"which": which, "part": end, "positions": positions(which, begin, end), **row}
        for (which, begin, end), row in zip(points, scored, strict=True)
    ]


def parts_of(readings: Sequence[Reading]) -> tuple[float, ...]:
    """One part for each position where all readings fuse the same few, else `PARTS`."""
    numbers = {int((r.token_map >= 0).sum()) for r in readings}
    number = max(numbers)
    if len(numbers) == 1 and 0 < number <= MOST_STEPS:
        return tuple(i / number for i in range(number + 1))
    return PARTS


def map_of_part(reading: Reading, which: str, end: float, begin: float = 0.0) -> Tensor:
    """A reading's token map int64 ``[N]`` with a part of its positions, as `position_rows` says."""
    places = (reading.token_map >= 0).nonzero()[:, 0]
    first, last = (round(part * len(places)) for part in (begin, end))
    if which == "last":
        first, last = len(places) - last, len(places)
    kept = places[first:last]
    if which == "without":
        kept = torch.cat([places[:first], places[last:]])
    token_map = torch.full_like(reading.token_map, -1)
    token_map[kept] = reading.token_map[kept]
    return token_map


def _check(readings: Sequence[Reading]) -> None:
    if not readings:
        raise ValueError("c2c_ext.analysis: there must be at least one reading")


def _curve(
    receiver: PreTrainedModel,
    fuser: Fuser,
    readings: Sequence[Reading],
    points: Sequence[tuple[Any, ...]],
    cache: Callable[..., KVPairs],
) -> list[dict[str, Any]]:
    """`_scores` of every point, added up over the readings.

    Args:
        cache: of a reading, its wholly fused cache, and the parts of a point.
    """
    sums = [{"questions": 0, "right": 0, "as_fused": 0, "kl": 0.0} for _ in points]
    known = all(r.answers is not None for r in readings)
    for reading in readings:
        whole = fused(reading, fuser)
        full = next_logits(receiver, whole, reading)
        for point, total in zip(points, sums, strict=True):
            logits = next_logits(receiver, cache(reading, whole, *point), reading)
            for name, value in _scores(logits, full, reading).items():
                total[name] += value
    return [
        {**s, "right": s["right"] if known else None, "kl": s["kl"] / s["questions"]} for s in sums
    ]


def _scores(logits: Tensor, full: Tensor, reading: Reading) -> dict[str, Any]:
    """Of a batch: answers that are right, and those that are the whole fusion's.

    ``kl``: the divergence of the next token's distribution from that on the wholly fused cache,
    KL(fused || this) in nats (of the candidates, where there are such), here as a sum.
    """
    p, q = full.log_softmax(dim=1), logits.log_softmax(dim=1)
    # A model may rule tokens out with logits of -inf: what p does not expect adds nothing.
    divergence = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(dim=1).clamp_min(0)
    return {
        "questions": len(logits),
        "right": 0 if reading.answers is None else int(is_right(logits, reading).sum()),
        "as_fused": int((logits.argmax(dim=1) == full.argmax(dim=1)).sum()),
        "kl": float(divergence.sum()),
    }

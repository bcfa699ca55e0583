"""What fusing more and more of a cache does: layer by layer, and by the part of its positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..fuser import Fuser
from .readings import Reading, fused, is_right, next_logits

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
        layers fused from that end (0: the receiver alone; all: C2C); ``"only"``, the one layer.
    """
    count = len(readings[0].receiver)

    def chosen(which: str, number: int) -> set[int]:
        if which == "only":
            return {number}
        return set(range(number)) if which == "first" else set(range(count - number, count))

    def cache(reading: Reading, whole: KVPairs, which: str, number: int) -> KVPairs:
        layers = chosen(which, number)
        return [
            whole[layer] if layer in layers else plain
            for layer, plain in enumerate(reading.receiver)
        ]

    points = [(which, n) for which in ENDS for n in range(count + 1)]
    points += [("only", layer) for layer in range(count)]
    scored = _curve(receiver, fuser, readings, points, cache)
    return [
        {"which": which, "layers": n, **row} for (which, n), row in zip(points, scored, strict=True)
    ]


def position_rows(
    receiver: PreTrainedModel,
    fuser: Fuser,
    readings: Sequence[Reading],
    parts: Iterable[float] = PARTS,
) -> list[dict[str, Any]]:
    """Answers when only a part of the positions is fused (a curve of arXiv 2510.03215).

    Args:
        parts: of the positions that are fused otherwise, 0..1; rounded to whole positions.

    Returns:
        rows of `_scores` with ``which``, from which end the positions are counted, ``part``, and
        ``positions``, the mean number of fused ones.

    Raises:
        ValueError: a part outside of 0..1.
    """
    parts = list(parts)
    for part in parts:
        if not 0 <= part <= 1:
            raise ValueError(f"c2c_ext.analysis: parts must be within 0..1, got {part}")

    def map_of(reading: Reading, which: str, part: float) -> Tensor:
        places = (reading.token_map >= 0).nonzero()[:, 0]
        count = round(part * len(places))
        kept = places[:count] if which == "first" else places[len(places) - count :]
        token_map = torch.full_like(reading.token_map, -1)
        token_map[kept] = reading.token_map[kept]
        return token_map

    def cache(reading: Reading, whole: KVPairs, which: str, part: float) -> KVPairs:
        return fused(reading, fuser, map_of(reading, which, part))

    points = [(which, part) for which in ENDS for part in parts]
    scored = _curve(receiver, fuser, readings, points, cache)
    prompts = sum(len(r.last) for r in readings)
    return [
        {
            "which": which,
            "part": part,
            "positions": sum(
                int((map_of(r, which, part) >= 0).sum()) * len(r.last) for r in readings
            )
            / prompts,
            **row,
        }
        for (which, part), row in zip(points, scored, strict=True)
    ]


def _curve(
    receiver: PreTrainedModel,
    fuser: Fuser,
    readings: Sequence[Reading],
    points: Sequence[tuple[str, Any]],
    cache: Callable[[Reading, KVPairs, str, Any], KVPairs],
) -> list[dict[str, Any]]:
    """`_scores` of every point, added up over the readings."""
    if not readings:
        raise ValueError("c2c_ext.analysis: there must be at least one reading")
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
    divergence = (p.exp() * (p - q)).sum(dim=1).clamp_min(0)
    return {
        "questions": len(logits),
        "right": 0 if reading.answers is None else int(is_right(logits, reading).sum()),
        "as_fused": int((logits.argmax(dim=1) == full.argmax(dim=1)).sum()),
        "kl": float(divergence.sum()),
    }

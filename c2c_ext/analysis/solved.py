"""Which questions each mode and control solves, and whether content crossed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..cache import KVPairs
from ..chat.models import ChatModels
from ..evaluation.statistics import Verdict, compare, mcnemar, verdict, wilson_interval
from .controls import noisy, zeroed
from .questions import Questions
from .readings import Reading, fused, is_right, next_logits

PATTERNED = ("receiver", "sharer", "t2t", "c2c")  # the others are made of these, or say nothing


def answers(models: ChatModels, asked: Questions, t2t_tokens: int) -> dict[str, Tensor]:
    """Which questions every mode and control answers right.

    Routing takes the answer of the model that is surer of its own, the receiver's where both are
    equally sure. Mismatched is left out where there is no other question.

    Args:
        t2t_tokens: that the sharer may write, at least 1.

    Returns:
        by mode, named as in `c2c eval`, bool ``[Q]``, in the order of the readings.

    Raises:
        ValueError: a model computes NaN, or what is to be read is too long for it.
    """

    def right(readings: list[Reading], cache: Callable[[Reading], KVPairs]) -> Tensor:
        logits = [(next_logits(models.receiver, cache(r), r), r) for r in readings]
        return torch.cat([is_right(of, r).cpu() for of, r in logits])

    def c2c(reading: Reading) -> KVPairs:
        return fused(reading, models.fuser)

    alone = [(next_logits(models.receiver, r.receiver, r), r) for r in asked.readings]
    receiver = torch.cat([is_right(of, r).cpu() for of, r in alone])
    sure = torch.cat([of.softmax(dim=1).amax(dim=1).cpu() for of, _ in alone])
    sharer, sharer_sure = asked.ask_sharer()
    found = {
        "receiver": receiver,
        "sharer": sharer,
        "routing": torch.where(sure >= sharer_sure, receiver, sharer),
        "t2t": asked.ask_by_text(t2t_tokens),
        "c2c": right(asked.readings, c2c),
    }
    if asked.mismatched:
        found["mismatched"] = right(asked.mismatched, c2c)
    found["zero"] = right(asked.readings, lambda r: c2c(zeroed(r)))
    found["noise"] = right(asked.readings, lambda r: c2c(noisy(r)))
    return found


def mode_rows(right: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Counts of right answers per mode, and each mode against C2C.

    Returns:
        rows with ``mode``, ``right`` of ``questions``, ``low`` and ``high``, Wilson's 95% interval
        of the part that is right, ``only_c2c`` and ``only_it``, the questions that one of the two
        alone solves, and ``p``, exact McNemar (`c2c_ext.evaluation.statistics`); None for C2C.
    """
    _check(right)
    listed = {mode: answers.tolist() for mode, answers in right.items()}
    rows = []
    for mode, found in listed.items():
        low, high = wilson_interval(sum(found), len(found))
        row = {"mode": mode, "right": sum(found), "questions": len(found), "low": low, "high": high}
        row |= {"only_c2c": None, "only_it": None, "p": None}
        if mode != "c2c":
            test = compare("c2c", mode, listed)
            row |= {"only_c2c": test.first_only, "only_it": test.second_only, "p": test.p}
        rows.append(row)
    return rows


def verdict_of(right: Mapping[str, Tensor]) -> Verdict | None:
    """`c2c_ext.evaluation.statistics.verdict`; None where mismatched was not measured."""
    if "mismatched" not in right:
        return None
    return verdict({mode: answers.tolist() for mode, answers in right.items()})


def patterns(right: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How many questions exactly these modes solve, for every set of modes that occurs.

    Args:
        right: by mode, bool ``[Q]``: whether its answer to each question is right.

    Returns:
        rows with ``solved_by``, a list of modes, and ``questions``; the most frequent first. The
        counts add up to Q.

    Raises:
        TypeError, ValueError: no modes, no bools, or different numbers of questions.
    """
    _check(right)
    names = list(right)
    columns = torch.stack([right[name].cpu() for name in names], dim=1).tolist()
    counts = Counter(tuple(row) for row in columns)
    return [
        {"solved_by": [n for n, yes in zip(names, row, strict=True) if yes], "questions": count}
        for row, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def pairs(right: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The two-by-two table of every two modes (what McNemar's test is of): see `patterns`.

    Returns:
        rows with ``first`` and ``second``, ``both``, ``only_first``, ``only_second``, ``neither``,
        and ``p``, exact McNemar.
    """
    _check(right)
    rows = []
    for first, second in combinations(right, 2):
        a, b = right[first].cpu(), right[second].cpu()
        counts = {"both": a & b, "only_first": a & ~b, "only_second": ~a & b, "neither": ~a & ~b}
        row = {"first": first, "second": second, **{k: int(v.sum()) for k, v in counts.items()}}
        rows.append(row | {"p": mcnemar(row["only_first"], row["only_second"])})
    return rows


def _check(right: Mapping[str, Tensor]) -> None:
    if not right:
        raise ValueError("c2c_ext.analysis: there must be at least one mode")
    if any(isinstance(found, Tensor) and found.numel() == 0 for found in right.values()):
        raise ValueError("c2c_ext.analysis: there must be at least one question")
    questions = None
    for name, answers in right.items():
        if not isinstance(answers, Tensor) or answers.dtype != torch.bool or answers.dim() != 1:
            raise TypeError(f"c2c_ext.analysis: {name} must be a bool tensor [Q]")
        if questions is None:
            questions = len(answers)
        if len(answers) != questions:
            raise ValueError(
                f"c2c_ext.analysis: {name} must have {questions} questions as the others, got "
                f"{len(answers)}"
            )

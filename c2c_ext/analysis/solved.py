"""Which questions each mode solves: whether the modes are right about the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor


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
        rows with ``first`` and ``second``, ``both``, ``only_first``, ``only_second``, ``neither``.
    """
    _check(right)
    rows = []
    for first, second in combinations(right, 2):
        a, b = right[first].cpu(), right[second].cpu()
        counts = {"both": a & b, "only_first": a & ~b, "only_second": ~a & b, "neither": ~a & ~b}
        rows.append(
            {"first": first, "second": second, **{k: int(v.sum()) for k, v in counts.items()}}
        )
    return rows


def _check(right: Mapping[str, Tensor]) -> None:
    if not right:
        raise ValueError("c2c_ext.analysis: there must be at least one mode")
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

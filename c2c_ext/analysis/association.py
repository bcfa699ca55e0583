"""How well a number tells yes from no, and two orders agree: AUC and Spearman, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

RESAMPLES = 1000
SEED = 0  # of the bootstrap's draws
FEWEST = 20  # questions that a bootstrap needs: of fewer its interval would be too narrow


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95% interval; without one where there are too few questions."""

    value: float
    low: float | None
    high: float | None


def auc(scores: Tensor, outcomes: Tensor) -> Estimate | None:
    """How often a "yes" has the larger score of a yes and a no, ties counting half.

    The area under the ROC curve, 0.5 where the score says nothing (Mann and Whitney, 1947). The
    interval is Newcombe's (Statistics in Medicine 25, 2006, pp. 559-573, method 5): the values that
    are not further from the one found than 1.96 of the standard errors which they themselves imply;
    it is of some width at 0 and 1 too. Questions are taken for independent.

    Args:
        scores: ``[Q]``, finite.
        outcomes: bool ``[Q]``.

    Returns:
        None without a yes or without a no.

    Raises:
        ValueError: shapes that differ, or a score that is not finite.
    """
    if scores.dim() != 1 or scores.shape != outcomes.shape:
        raise ValueError(
            f"auc: scores and outcomes must both be [Q], got {list(scores.shape)} and "
            f"{list(outcomes.shape)}"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("auc: scores must be finite")
    yes = int(outcomes.sum())
    no = len(outcomes) - yes
    if not yes or not no:
        return None
    # Mean rank of each value, from 1: exact where the sum of all of them is below 2 ** 53.
    _, places, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    rank = (ends - (counts.double() - 1) / 2)[places]
    value = float((rank[outcomes].sum() - yes * (yes + 1) / 2) / (yes * no))
    return Estimate(value, *newcombe_interval(value, yes, no))


def newcombe_interval(value: float, yes: int, no: int) -> tuple[float, float]:
    """The 95% interval of an area under the ROC curve: see `auc`."""
    z = NormalDist().inv_cdf(0.975)
    half = (yes + no) / 2

    def is_inside(theta: float) -> bool:
        spread = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = theta * (1 - theta) * (1 + (half - 1) * spread) / (yes * no)
        return abs(value - theta) <= z * math.sqrt(variance)

    def bound(end: float) -> float:
        inside, outside = value, end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_inside(middle) else (inside, middle)
        return inside

    return (0.0 if value == 0 else bound(0.0)), (1.0 if value == 1 else bound(1.0))


def order_across(scores: Tensor, outcomes: Tensor) -> Estimate | None:
    """Spearman's rank correlation, over conditions, of mean score and rate of "yes".

    The interval is of a percentile bootstrap over questions: what other questions would have given
    under the same conditions, not what other conditions would. A resample in which all conditions
    are equal counts as 0. Without an interval if there are fewer than `FEWEST` questions.

    Args:
        scores: ``[C, Q]``, of every question under every condition.
        outcomes: bool ``[C, Q]``.

    Returns:
        None with less than 3 conditions or no question, or where all conditions are equal.
    """
    conditions, questions = scores.shape
    if conditions < 3 or not questions:
        return None
    scores, rates = scores.double(), outcomes.double()
    whole = _spearman(_settled(scores.mean(dim=1)), _settled(rates.mean(dim=1)))
    if bool(whole.isnan()):
        return None
    if questions < FEWEST:
        return Estimate(float(whole), None, None)
    drawn = _resamples(questions) / questions
    found = _spearman(_settled(drawn @ scores.T), _settled(drawn @ rates.T)).nan_to_num(0.0)
    return _with_interval(float(whole), found)


def order_within(scores: Tensor, outcomes: Tensor) -> Estimate | None:
    """How often, of two conditions of one question, the "yes" has the larger score; ties half.

    As `auc`, but only conditions of the same question are compared: what questions differ in counts
    for nothing. The interval is as in `order_across`.

    Args:
        scores: ``[C, Q]``.
        outcomes: bool ``[C, Q]``.

    Returns:
        None where no question has both.
    """
    right = torch.zeros(scores.shape[1], dtype=torch.float64)
    pairs = torch.zeros_like(right)
    for yes in range(len(scores)):
        compared = outcomes[yes] & ~outcomes
        wins = (scores[yes] > scores).double() + (scores[yes] == scores).double() / 2
        right += (wins * compared).sum(dim=0)
        pairs += compared.sum(dim=0)
    if not bool(pairs.any()):
        return None
    value = float(right.sum() / pairs.sum())
    if len(pairs) < FEWEST:
        return Estimate(value, None, None)
    drawn = _resamples(len(pairs))
    # A resample without a pair says nothing.
    return _with_interval(value, ((drawn @ right) / (drawn @ pairs)).nan_to_num(0.5))


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension from 1, equal values at the mean of theirs."""
    one, other = values[..., :, None], values[..., None, :]
    return (one > other).sum(dim=-1) + ((one == other).sum(dim=-1) + 1) / 2


def _spearman(x: Tensor, y: Tensor) -> Tensor:
    """Along the last dimension; NaN where either does not vary."""
    a, b = (mean_ranks(t).double() for t in (x, y))
    a, b = (t - t.mean(dim=-1, keepdim=True) for t in (a, b))
    return (a * b).sum(dim=-1) / (a.square().sum(dim=-1) * b.square().sum(dim=-1)).sqrt()


def _settled(means: Tensor) -> Tensor:
    """Rounded so that means which are equal but for the order of summing are ties."""
    return (means * 2**40).round() / 2**40


def _resamples(questions: int) -> Tensor:
    """float64 ``[RESAMPLES, Q]``: how often each question is in each draw with replacement."""
    generator = torch.Generator().manual_seed(SEED)
    counts = torch.zeros(RESAMPLES, questions, dtype=torch.float64)
    for row in counts:
        drawn = torch.randint(questions, (questions,), generator=generator)
        row += torch.bincount(drawn, minlength=questions)
    return counts


def _with_interval(value: float, resampled: Tensor) -> Estimate:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)

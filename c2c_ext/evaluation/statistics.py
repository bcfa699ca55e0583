"""What counts of right answers say: intervals, paired tests, and whether content was transferred.

Everything here is of answers that are right or wrong, in one order of questions for all modes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

# What C2C must beat before its gain counts as content. A verdict needs the first two.
NEEDED = ("receiver", "mismatched")
BASELINES = (*NEEDED, "zero", "noise", "identical")


def wilson_interval(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927), inside 0 .. 1.

    Args:
        right: of ``count``, at least 0.
        count: at least 1.
        level: that the interval covers the proportion with, between 0 and 1.

    Raises:
        ValueError: numbers outside of these.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"wilson_interval: needs 0 <= right <= count, 1 <= count: {right}/{count}")
    if not 0 < level < 1:
        raise ValueError(f"wilson_interval: level must be between 0 and 1, got {level}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, spread = right / count, z * z / count
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    # At the ends the exact bounds are 0 and 1, which rounding may miss.
    low = 0.0 if right == 0 else max(0.0, centre - half)
    return low, 1.0 if right == count else min(1.0, centre + half)


def mcnemar(first_only: int, second_only: int) -> float:
    """The exact two-sided p-value of McNemar's test (1947).

    Of the questions that exactly one of two modes solves, either mode would solve as many if both
    were equally good: binomial with 1/2. Questions that both or neither solve say nothing.

    Args:
        first_only, second_only: questions that only this mode solves, at least 0.

    Raises:
        ValueError: a negative number.
    """
    if min(first_only, second_only) < 0:
        raise ValueError(f"mcnemar: counts must be at least 0, got {first_only}, {second_only}")
    count, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)  # of integers: exact until the division


@dataclass(frozen=True)
class Comparison:
    """Two modes on the same questions."""

    first: str
    second: str
    first_only: int  # questions that only the first solves
    second_only: int
    p: float  # `mcnemar` of them

    def first_is_better(self, level: float = 0.95) -> bool:
        """Whether the first solves more, and chance explains that with less than 1 - level."""
        return self.first_only > self.second_only and self.p < 1 - level


def compare(first: str, second: str, right: Mapping[str, Sequence[bool]]) -> Comparison:
    """The paired comparison of two modes.

    Args:
        first, second: keys of ``right``.
        right: for every mode, whether each question was answered right.

    Raises:
        ValueError: different numbers of questions.
    """
    a, b = right[first], right[second]
    if len(a) != len(b):
        raise ValueError(
            f"compare: both modes must have answered the same questions, {first} has {len(a)} "
            f"and {second} {len(b)}"
        )
    only = [sum(bool(x) and not y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (b, a))]
    return Comparison(first, second, *only, mcnemar(*only))


@dataclass(frozen=True)
class Verdict:
    """Whether the meaning of the sharer's cache reached the answers."""

    transferred: bool
    line: str  # for people
    p: float  # the largest of its tests', 1 where C2C is not the better one: that of "no transfer"


def verdict(right: Mapping[str, Sequence[bool]], level: float = 0.95) -> Verdict:
    """Content counts as transferred where C2C beats the receiver and every control, each in pairs.

    A gain over the receiver alone is no evidence: a fuser is trained, and may improve the receiver
    whatever it is given. Released fusers kept their gain when the sharer had read another question
    (arXiv 2608.04893). So C2C must also be better with the question's own cache than with another
    one's (mismatched), and than without content at all (zero, noise), or with what the receiver
    itself knows (identical). To be better than the mismatched cache is not enough either: a wrong
    cache may just do harm.

    Every one of these tests must reject equality at 1 - level (exact McNemar, C2C the better one).
    As all are needed, the chance of a false "transferred" is at most 1 - level without a correction
    for their number (an intersection-union test). "No evidence" is not evidence of absence: few
    questions, or a task in which the sharer knows no more than the receiver, show nothing.

    Args:
        right: as for `compare`; ``"c2c"``, and of `BASELINES` those that were measured.

    Raises:
        ValueError: C2C, the receiver or the mismatched cache was not measured.
    """
    for mode in ("c2c", *NEEDED):
        if mode not in right:
            raise ValueError(f"verdict: needs the answers of {mode}, which were not measured")
    tests = [compare("c2c", mode, right) for mode in BASELINES if mode in right]
    worst = max(test.p if test.first_only > test.second_only else 1.0 for test in tests)
    failed = [test for test in tests if not test.first_is_better(level)]
    if failed:
        why = "; ".join(
            f"against {test.second} {test.first_only} : {test.second_only} (p = {test.p:.2g})"
            for test in failed
        )
        return Verdict(False, f"no evidence that content was transferred: {why}", worst)
    names = ", ".join(test.second for test in tests)
    missing = [mode for mode in BASELINES if mode not in right]
    rest = f"; not measured: {', '.join(missing)}" if missing else ""
    at_most = f"<= {worst:.2g}" if worst else "< 1e-300"  # which no float64 holds
    line = f"content transferred: C2C beats {names} (p {at_most}{rest})"
    return Verdict(True, line, worst)


def holm(p: Mapping[str, float], level: float = 0.95) -> list[str]:
    """Which of several hypotheses are rejected when one false rejection among all is one too many.

    S. Holm (1979): the smallest p-value is held against (1 - level) / their number, the next
    against (1 - level) / one less, until the first that does not pass. Holds however the tests
    depend on each other.

    Args:
        p: by name.

    Returns:
        names, the smallest p first.
    """
    rejected = []
    for k, name in enumerate(sorted(p, key=lambda name: p[name])):
        if not p[name] * (len(p) - k) < 1 - level:
            break
        rejected.append(name)
    return rejected

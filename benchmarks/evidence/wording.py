"""How the report names modes and says what tests found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.evidence.outcomes import Cell
from c2c_ext.demo.evaluate import chance_interval
from c2c_ext.evaluation.statistics import compare

LABELS = {
    "receiver": "receiver alone",
    "sharer": "sharer alone",
    "sharer_a": "sharer A alone",
    "sharer_b": "sharer B alone",
    "routing": "routing by confidence",
    "ensemble": "logit ensemble",
    "t2t": "T2T: the sharer writes, the receiver reads",
    "t2t_parallel": "parallel text: read off one prefill",
    "t2t_passes": "text of all slots side by side, a pass per token",
    "t2t_heads": "text read off one prefill by extra heads",
    "t2t_asked": "T2T of a sharer that sees the question",
    "t2t_a": "T2T of sharer A",
    "t2t_b": "T2T of sharer B",
    "c2c": "**C2C**",
    "c2c_sequential": "C2C, one sharer after the other",
    "c2c_everywhere": "C2C, both sharers at all attributes",
    "c2c_everywhere_a_b": "C2C, all attributes, A then B",
    "c2c_everywhere_b_a": "C2C, all attributes, B then A",
    "c2c_a": "C2C, sharer A only",
    "c2c_b": "C2C, sharer B only",
    "wrong_map": "token map shifted by a word",
    "index_map": "token map by index, as if tokens were the same",
    "mismatched": "control: another question's cache",
    "mismatched_a": "another question's cache of sharer A only",
    "mismatched_b": "another question's cache of sharer B only",
    "zero": "control: a cache of zeros",
    "noise": "control: noise of equal norm",
    "identical": "control: the receiver as its own sharer",
    "swapped": "another entity's cache: says that entity's fact",
    "swapped_a": "another entity's cache of A: says that answer",
    "swapped_b": "another entity's cache of B: says that answer",
}
# Text that is read off in parallel, the faster first.
PARALLEL = ("t2t_parallel", "t2t_heads", "t2t_passes")
AT_CHANCE = ("receiver", "mismatched", "zero", "noise", "identical")


def modes(cells: Any) -> list[str]:
    """Of these cells, as the report orders them."""
    return ordered({mode for cell in cells for mode in cell.right})


def ordered(modes: set[str]) -> list[str]:
    """Baselines, C2C and what is like it, controls."""
    known = [mode for mode in LABELS if mode in modes]
    place = known.index("c2c") + 1 if "c2c" in known else len(known)
    return [*known[:place], *sorted(modes - set(known)), *known[place:]]


def against_text(cells: dict[str, Cell], which: str) -> str:
    """McNemar's test of C2C and T2T, in every cell."""
    found = []
    for name, cell in cells.items():
        if {"c2c", "t2t"} <= set(cell.right):
            test = compare("c2c", "t2t", {m: b.tolist() for m, b in cell.right.items()})
            sign = "" if test.p < 1e-300 else "= "
            counts = f"{test.first_only} : {test.second_only}"
            found.append(f"{name} {counts} (p {sign}{p_value(test.p)})")
    return f"- Questions that only C2C : only T2T gets, {which}: {'; '.join(found)}."


def at_chance(cells: dict[str, Cell], which: str) -> str:
    """Jointly: by Bonferroni every control of every cell has an interval of its own."""
    tests = [(n, m, c) for n, c in cells.items() for m in AT_CHANCE if m in c.right]
    level = 1 - 0.05 / len(tests)
    astray, spans = [], set()
    for name, mode, cell in tests:
        low, high = chance_interval(cell.questions, level, cell.candidates)
        spans.add((low, high))
        if not low <= cell.count(mode) <= high:
            astray.append(f"{mode} ({name}): {cell.count(mode)}")
    inside = " or ".join(f"{low} to {high}" for low, high in sorted(spans))
    outside = f"outside are {'; '.join(astray)}" if astray else "all are"
    return (
        f"- Who knows nothing ({', '.join(dict.fromkeys(m for _, m, _ in tests))}: {len(tests)} "
        f"counts of {which}) must be within {inside}, in 95% of cases all at once: {outside}."
    )


def environments(environments: Sequence[dict[str, Any]]) -> str:
    """When, at which commits and on what."""
    at: dict[str, list[str]] = {}
    for one in environments:
        machine = f"{one['cpu']}, torch {one['torch']}, transformers {one['transformers']}"
        commit = (one["commit"] or "no commit")[:7] + (" and changes" if one.get("dirty") else "")
        at.setdefault(f"{machine}, on {one['date'][:10]}", []).append(commit)
    return "; ".join(
        f"{machine} at {', '.join(dict.fromkeys(commits))}" for machine, commits in at.items()
    )


def percent(share: float) -> str:
    """With one digit after the point."""
    return f"{100 * share:.1f}%"


def p_value(p: float) -> str:
    """Two digits; what no float64 holds is below the least that one does."""
    return f"{p:.2g}" if p >= 1e-300 else "< 1e-300"


def listed(seeds: Sequence[int]) -> str:
    """Joined by commas."""
    return ", ".join(map(str, seeds))

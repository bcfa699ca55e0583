"""What the modes answered to a task: counts, intervals, paired tests, verdict, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from .statistics import NEEDED, Comparison, compare, holm, verdict, wilson_interval

METRICS = ("acc", "exact_match")  # preferred, in this order, where a task has several


def right_or_wrong(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str | None = None
) -> str | None:
    """The metric by which every mode's answers to a task are right or wrong; None: there is none.

    Args:
        samples: by mode, as the harness logs them, for each question and filter one.
        metric: that it must be; by default the first of `METRICS` that there is, or else the first
            at all.
    """
    common: list[str] | None = None
    for logged in samples.values():
        chosen = of_first_filter(logged)
        names = [n for n in chosen[0]["metrics"] if all(_is_answer(s.get(n)) for s in chosen)]
        common = names if common is None else [n for n in common if n in names]
    if metric is not None:
        return metric if metric in (common or ()) else None
    return next((n for n in (*METRICS, *(common or ())) if n in (common or ())), None)


def of_first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One sample for each question, in the order of questions."""
    chosen = [s for s in samples if s["filter"] == samples[0]["filter"]]
    return sorted(chosen, key=lambda s: s["doc_id"])


def _is_answer(value: object) -> bool:
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def summarise(right: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    """Counts with 95% intervals, all paired comparisons and the verdict, ready for JSON.

    Args:
        right: for every mode, whether each question was answered right; the same questions.

    Returns:
        ``verdict`` is None where C2C, the receiver or the mismatched cache was not measured.
    """
    modes = {}
    for mode, answers in right.items():
        low, high = wilson_interval(sum(answers), len(answers))
        modes[mode] = {"right": sum(answers), "count": len(answers), "interval": [low, high]}
    judged = None
    if all(mode in right for mode in ("c2c", *NEEDED)):
        judged = asdict(verdict(right))
    return {
        "modes": modes,
        "comparisons": [asdict(compare(*pair, right)) for pair in combinations(right, 2)],
        "verdict": judged,
    }


@dataclass(frozen=True)
class Answers:
    """A task's answers in all modes.

    Attributes:
        right: for every mode, whether each question was answered right.
        documents: what tells the questions from each other, in their order.
    """

    right: Mapping[str, Sequence[bool]]
    documents: Sequence[str]


def pooled(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """`summarise` of the questions of several tasks together.

    A question that an earlier task has asked is left out: counted again, it would look like more
    evidence than it is.

    Args:
        answers: by task; the same modes.
    """
    modes = list(next(iter(answers.values())).right)
    right: dict[str, list[bool]] = {mode: [] for mode in modes}
    seen: set[str] = set()
    repeated = 0
    for task in answers.values():
        new = [k for k, document in enumerate(task.documents) if document not in seen]
        repeated += len(task.documents) - len(new)
        for mode in modes:
            right[mode] += [task.right[mode][k] for k in new]
        seen.update(task.documents)
    return {"tasks": list(answers), "repeated": repeated, **summarise(right)}


def multiplicity(verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What verdicts on several tasks say together; the line is for people.

    Args:
        verdicts: by task, as `summarise` gives them.
    """
    alone = [name for name, found in verdicts.items() if found["transferred"]]
    kept = holm({name: found["p"] for name, found in verdicts.items()})
    count = len(verdicts)
    chance = min(1.0, 0.05 * count)
    line = (
        f"{count} tasks were judged, each at 95%: without any transfer the chance of one false "
        f'"content transferred" is up to {chance:.0%}. Transferred: {len(alone)}; after the '
        f"correction for {count} verdicts (Holm) {len(kept)}"
    )
    line += f": {', '.join(kept)}" if kept else ""
    return {"judged": count, "transferred": alone, "transferred_holm": kept, "line": line}


def table(task: str, metric: str, summary: Mapping[str, Any]) -> str:
    """A task's results as a Markdown table with its verdict line."""
    lines = [
        f"{task} ({metric})",
        "",
        "| mode | right | 95% interval | only C2C : only it | p |",
        "|---|---|---|---|---|",
    ]
    for mode, row in summary["modes"].items():
        low, high = row["interval"]
        cells = [mode, f"{row['right']} of {row['count']}", f"{low:.1%} - {high:.1%}"]
        test = _against_c2c(mode, summary["comparisons"])
        cells += ["", ""] if test is None else [f"{test[0]} : {test[1]}", f"{test[2]:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    judged = summary["verdict"]
    needed = ", ".join(("c2c", *NEEDED))
    lines += ["", judged["line"] if judged else f"no verdict: it needs the modes {needed}"]
    return "\n".join(lines)


def _against_c2c(
    mode: str, comparisons: Sequence[Mapping[str, Any]]
) -> tuple[int, int, float] | None:
    for found in (Comparison(**c) for c in comparisons):
        if (found.first, found.second) == ("c2c", mode):
            return found.first_only, found.second_only, found.p
        if (found.first, found.second) == (mode, "c2c"):
            return found.second_only, found.first_only, found.p
    return None

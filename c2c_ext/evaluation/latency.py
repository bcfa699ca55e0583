"""Where the time of a mode goes, by the parts that the literature tells apart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

# Reading a prompt, and every forward after that: the prompt's last token, options, written tokens.
PARTS = (
    *("sharer_prefill", "sharer_decode", "transfer", "fusing"),
    *("receiver_prefill", "receiver_decode"),
)


@dataclass
class Stopwatch:
    """Sums the seconds of parts that do not overlap, and counts.

    Attributes:
        waits_for: a GPU that is waited for around every part, so that a part's time is its own;
            None: nothing is waited for, which is right where the work is the CPU's.
        seconds: by part.
        counts: by name.
    """

    waits_for: torch.device | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a part of `PARTS`."""
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def count(self, name: str, more: int) -> None:
        """Adds to a count."""
        self.counts[name] = self.counts.get(name, 0) + more

    def _now(self) -> float:
        if self.waits_for is not None:
            torch.cuda.synchronize(self.waits_for)
        return time.perf_counter()


def latency(
    clock: Stopwatch, device: torch.device, *, questions: int, total: float
) -> dict[str, Any]:
    """What a mode's run took, ready for JSON.

    Args:
        device: of both models. On a GPU that was not waited for, calls return before their work is
            done: then the parts are None.
        questions: that it answered, at least 1.
        total: seconds of the whole run, with what belongs to no part (tokenizing, the harness).
    """
    told_apart = device.type == "cpu" or clock.waits_for is not None
    seconds = dict(clock.seconds) if told_apart else None
    return {
        "questions": questions,
        "total_seconds": total,
        "seconds": seconds,
        "mean_seconds": seconds and {part: t / questions for part, t in seconds.items()},
        "synchronized": clock.waits_for is not None,
        **clock.counts,
    }


def latency_table(modes: Mapping[str, Mapping[str, Any]]) -> str:
    """Milliseconds per question as a Markdown table.

    Args:
        modes: by mode what `latency` gave, with ``tokens_written`` and ``tokens_answered``.
    """
    heads = [part.replace("_", " ") for part in PARTS]
    lines = [
        "latency, ms per question (the run of all questions, in s)",
        "",
        f"| mode | {' | '.join(heads)} | run | tokens written by the sharer | answered |",
        "|---" * (len(PARTS) + 4) + "|",
    ]
    for mode, row in modes.items():
        mean, count = row["mean_seconds"], row["questions"]
        cells = ["-" if mean is None else f"{1000 * mean[part]:.3g}" for part in PARTS]
        tokens = [f"{row[name] / count:.3g}" for name in ("tokens_written", "tokens_answered")]
        run = f"{row['total_seconds']:.3g}"
        lines.append(f"| {' | '.join([mode, *cells, run, *tokens])} |")
    if any(row["mean_seconds"] is None for row in modes.values()):
        lines += ["", "parts on a GPU are told apart with --synchronize alone"]
    return "\n".join(lines)

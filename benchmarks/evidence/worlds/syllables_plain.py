"""The world `syllables` with a sharer that was trained to predict the next token and no further.

Nothing made it look up a value's second syllable before it has written the first one. Receiver,
questions and the fuser's training are as in `syllables`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.evidence.outcomes import Cell

from . import syllable_runs as runs
from .syllable_training import Recipe

NAME = "syllables_plain"
TITLE = "Values of two tokens, a sharer that looks one token ahead"
# The receiver as its own sharer is the same here as there, and not trained again.
RECIPE = Recipe(ahead=0.0, fusers=("fuser",))


def train(seed: int, directory: Path) -> dict[str, Any]:
    """Trains sharer, receiver and fuser."""
    return runs.train(seed, directory, RECIPE)


def evaluate(seed: int, directory: Path) -> list[Cell]:
    """Every mode and control on all questions about held-out entities."""
    return runs.evaluate(seed, directory, RECIPE)


def latency(seed: int, directory: Path) -> list[dict[str, Any]]:
    """Times of every way to an answer."""
    return runs.latency(seed, directory, RECIPE)

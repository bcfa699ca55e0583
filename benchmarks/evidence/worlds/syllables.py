"""The form world with values of several tokens, which no single pass of the sharer can spell out.

Eight values an attribute, each two syllables of one token each: four first ones, two second ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.evidence.outcomes import Cell

from . import syllable_runs as runs
from .syllable_training import Recipe

NAME = "syllables"
TITLE = "Values of two tokens"
RECIPE = Recipe()


def train(seed: int, directory: Path) -> dict[str, Any]:
    """Trains sharer, receiver and both fusers."""
    return runs.train(seed, directory, RECIPE)


def evaluate(seed: int, directory: Path) -> list[Cell]:
    """Every mode and control on all questions about held-out entities."""
    return runs.evaluate(seed, directory, RECIPE)


def latency(seed: int, directory: Path) -> list[dict[str, Any]]:
    """Times of every way to an answer."""
    return runs.latency(seed, directory, RECIPE)

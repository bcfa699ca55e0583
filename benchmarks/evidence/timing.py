"""Milliseconds from question to answer at batch 1, all modes alternating, C2C by its parts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache

from c2c_ext import fuse
from c2c_ext.demo.evaluate import prefill

from .asking import Models, Task

ROUNDS, WARM_UP = 31, 3
PARTS = ("sharer_prefill", "receiver_prefill", "transfer", "fusing", "decode")


class Watch:
    """Adds up the time between calls under the names of parts."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        """What was done since the last call was this part."""
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now


@torch.no_grad()
def c2c_by_parts(models: Models, task: Task, watch: Watch) -> None:
    """One C2C answer; on one device the transfer is nothing, and is measured as that."""
    shared = prefill(models.sharer, task.shared)
    watch("sharer_prefill")
    clean = prefill(models.receiver, task.prompt[:, : -task.tail])
    watch("receiver_prefill")
    shared = [(k.to(clean[0][0].device), v.to(clean[0][0].device)) for k, v in shared]
    watch("transfer")
    fused = fuse(clean, shared, models.fuser, token_map=task.token_map, inplace=True)
    watch("fusing")
    cache = DynamicCache()
    for layer, (key, value) in enumerate(fused):
        cache.update(key, value, layer)
    ids = task.prompt[:, -task.tail :]
    for step in range(task.truth.shape[1]):
        out = models.receiver(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        places = out.logits[:, -1].gather(1, task.candidates[:, step]).argmax(1, keepdim=True)
        ids = task.candidates[:, step].gather(1, places)
    watch("decode")


def measure(
    cell: str, modes: Mapping[str, Callable[[Watch], Any]], rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Rows of median, p20 and p80 in milliseconds, and medians of the parts that a mode names.

    Args:
        cell: the kind of questions.
        modes: what answers one question; it may call its `Watch` after each of its parts.
        rounds: after the first ones, which warm up. In a round every mode has its turn, so that a
            slow moment of the machine meets all of them.
    """
    totals: dict[str, list[float]] = {mode: [] for mode in modes}
    parts: dict[str, dict[str, list[float]]] = {mode: {} for mode in modes}
    for turn in range(rounds + WARM_UP):
        for mode, answer in modes.items():
            watch = Watch()
            started = time.perf_counter()
            answer(watch)
            took = time.perf_counter() - started
            if turn < WARM_UP:
                continue
            totals[mode].append(took)
            for part, seconds in watch.parts.items():
                parts[mode].setdefault(part, []).append(seconds)
    rows = []
    for mode, seconds in totals.items():
        deciles = statistics.quantiles(seconds, n=10)
        row = {"cell": cell, "mode": mode, "rounds": rounds}
        row |= {name: _ms(deciles[k]) for name, k in (("p20", 1), ("median", 4), ("p80", 7))}
        if parts[mode]:
            row["parts"] = {p: _ms(statistics.median(s)) for p, s in parts[mode].items()}
        rows.append(row)
    return rows


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)

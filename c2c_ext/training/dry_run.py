"""`c2c train --dry-run`: parameters, memory and time of a run, from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import estimate
from ..config import FuserConfig
from ..estimate import Ceilings, Workload
from ..facts import ModelFacts
from ..info import format_bytes, format_seconds
from ..probe import probe
from .recipes import TORCH_DTYPES, Recipe

PROBE_SECONDS = 3.0
# Configurations do not tell prompt from response; both halves of a sample are counted as such.
RESPONSE_PART = 0.5


def plan(
    recipe: Recipe,
    config: FuserConfig,
    receiver: ModelFacts,
    sharer: ModelFacts,
    *,
    samples: int | None,
    processes: int = 1,
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """What a run needs, as a JSON-ready object.

    Every sample is counted with ``max_tokens`` tokens, so memory and times are those of the longest
    samples; times count nothing but the multiplications of the models and the fuser.

    Args:
        config: of the fuser.
        samples: in the training data; None: unknown, then so are the steps (without ``max_steps``).
        processes: of torchrun.
        ceilings: of the device; None: no times.
    """
    micro, passes = recipe.micro_batches(processes)
    work = Workload(micro, recipe.max_tokens, TORCH_DTYPES[recipe.dtype])
    memory = estimate.training_memory(
        config, work, receiver=receiver.sizes, sharer=sharer.sizes, recompute=recipe.recompute
    )
    steps = recipe.max_steps or None if samples is None else recipe.steps(samples)
    per_pass = None
    if ceilings is not None and not (receiver.experts or sharer.experts):
        per_pass = _seconds(config, receiver, sharer, work, ceilings)
    per_step = None if per_pass is None else per_pass * passes
    return {
        "fuser_parameters": config.num_parameters(),
        "streams": estimate.num_streams(config),
        "receiver_parameters": None if receiver.sizes is None else receiver.sizes.total,
        "sharer_parameters": None if sharer.sizes is None else sharer.sizes.total,
        "samples": samples,
        "steps": steps,
        "batch": recipe.batch,
        "micro_batch": micro,
        "passes_per_step": passes,
        "processes": processes,
        "memory_bytes": memory,
        "seconds_per_step": per_step,
        "seconds": None if None in (per_step, steps) else per_step * steps,
    }


def measured_ceilings(recipe: Recipe) -> Ceilings:
    """The ceilings of the device that the recipe runs on, measured for a few seconds."""
    on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda:0" if on_gpu else "cpu")
    return probe(device, [TORCH_DTYPES[recipe.dtype]], seconds=PROBE_SECONDS)


def lines(planned: Mapping[str, Any], dtype: str) -> list[str]:
    """A plan as text."""

    def count(name: str) -> str:
        return "unknown" if planned[name] is None else f"{planned[name]:,}"

    memory = planned["memory_bytes"]
    known = sum(number for number in memory.values() if number is not None)
    least = "at least " if None in memory.values() else ""
    times = [
        "unknown" if planned[name] is None else f"at least {format_seconds(planned[name])}"
        for name in ("seconds_per_step", "seconds")
    ]
    rows = [
        ("fuser", f"{count('fuser_parameters')} parameters in {planned['streams']} streams"),
        ("frozen", f"receiver {count('receiver_parameters')}, sharer {count('sharer_parameters')}"),
        ("data", f"{count('samples')} samples, {count('steps')} steps of {planned['batch']}"),
        (
            "a step",
            f"{planned['passes_per_step']} x {planned['micro_batch']} samples on each of "
            f"{planned['processes']} processes",
        ),
        ("memory", f"{least}{format_bytes(known)} per process, models in {dtype}:"),
        *((f"  {n}", "unknown" if b is None else format_bytes(b)) for n, b in memory.items()),
        ("not counted", "what the models' own forward (and backward) passes hold"),
        ("time of a step", times[0]),
        ("time in all", times[1]),
    ]
    return [f"{label:20} {text}" for label, text in rows]


def _seconds(
    config: FuserConfig,
    receiver: ModelFacts,
    sharer: ModelFacts,
    work: Workload,
    ceilings: Ceilings,
) -> float | None:
    """One forward and backward pass of ``work`` at the device's best GEMM rate."""
    if receiver.sizes is None or sharer.sizes is None:
        return None
    response = int(work.tokens * RESPONSE_PART)
    prompt = Workload(work.batch, work.tokens - response, work.dtype)
    flop = sum(
        estimate.prefill_work(m.sizes, m.kv, m.query_heads, prompt).flop for m in (receiver, sharer)
    )
    # A product's backward pass is two of its size; frozen weights need one of the two.
    flop += 3 * 2 * config.num_parameters() * prompt.rows
    answered = receiver.sizes.decoder + receiver.sizes.head
    flop += 2 * 2 * answered * work.batch * response
    return flop / ceilings.gemm[work.dtype]

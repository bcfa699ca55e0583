"""How benchmarks measure: providers are verified against float64 first, then timed in turns."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .estimate import Ceilings, Work
from .files import write_atomically

FORMAT_VERSION = 1
# Plain PyTorch is the yardstick of the others; its own RMS error may be this many roundings.
PLAIN_ROUNDINGS = 16
BASELINE = "reference"

Cell = dict[str, Any]  # what tells one measurement from another: shape, dtype, tokens, ...


class Unverified(Exception):
    """A provider did not give what it has to, or cannot run here: its times mean nothing."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: every provider has at least this many turns,
        seconds: and at least this long in all,
        limit: unless all of them together took longer than this, looked at after every round.
        turn: a provider is called again and again for so long before it is the next one's turn.
    """

    rounds: int = 5
    seconds: float = 1.0
    limit: float = 120.0
    turn: float = 0.05


@dataclass(frozen=True)
class Timing:
    """Seconds of every single call, and how many turns they were spread over."""

    seconds: list[float]
    rounds: int

    def summary(self) -> dict[str, float]:
        """Median, 20th and 80th percentile."""
        if len(self.seconds) == 1:
            return dict.fromkeys(("median", "p20", "p80"), self.seconds[0])
        fifths = statistics.quantiles(self.seconds, n=5, method="inclusive")
        return {"median": statistics.median(self.seconds), "p20": fifths[0], "p80": fifths[-1]}


def alternate(
    calls: Mapping[str, Callable[[int], object]],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    before_round: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times ``calls`` in turns, so that a slow moment of the machine hits all of them.

    Every second round goes backwards. Nothing is warmed up here. The garbage collector is off.

    Args:
        calls: by provider; each is called with 0, 1, 2, ...
        clock: seconds.
        before_round: called before every round, not timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begun = clock()
        for round_ in itertools.count(1):
            before_round()
            for name in calls if round_ % 2 else reversed(calls):
                _take_turn(calls[name], samples[name], effort.turn, clock)
            enough = round_ >= effort.rounds and all(
                sum(taken) >= effort.seconds for taken in samples.values()
            )
            if enough or clock() - begun >= effort.limit:
                return {name: Timing(taken, round_) for name, taken in samples.items()}
        raise AssertionError
    finally:
        if collecting:
            gc.enable()


def _take_turn(
    call: Callable[[int], object], samples: list[float], turn: float, clock: Callable[[], float]
) -> None:
    spent = 0.0
    while spent == 0.0 or spent < turn:
        start = clock()
        call(len(samples))
        taken = max(clock() - start, 1e-9)
        samples.append(taken)
        spent += taken


def rms(x: Tensor) -> float:
    """Root of the mean square; 0 for an empty tensor."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def max_abs(x: Tensor) -> float:
    """Largest absolute value; 0 for an empty tensor, NaN if any element is."""
    return x.double().abs().max().item() if x.numel() else 0.0


def compare(
    ours: Tensor, plain: Sequence[Tensor], truth: Tensor, what: str, *, is_plain: bool = False
) -> dict[str, float]:
    """The tests' tolerance, stated there as ``assert_as_good_as_plain`` of conftest.py.

    For the maximum and the RMS of the errors against ``truth`` (float64): ``error(ours) <= 2 *
    error(plain) + eps * rms(truth)``, the largest of a few plain draws counting, eps that of the
    plain tensors' dtype.

    Args:
        is_plain: ``ours`` is itself the yardstick: its RMS error may be `PLAIN_ROUNDINGS` roundings
            and there is no bound on the maximum but that it is finite.

    Returns:
        both errors and both bounds.

    Raises:
        Unverified: an error exceeds its bound, or a shape or dtype differs; ``what`` names it.
    """
    if ours.shape != truth.shape or not ours.is_floating_point():
        raise Unverified(
            f"{what} must be {list(truth.shape)} numbers, got {list(ours.shape)} {ours.dtype}"
        )
    rounding = torch.finfo(plain[0].dtype).eps * rms(truth)
    found: dict[str, float] = {}
    for name, size in (("max", max_abs), ("rms", rms)):
        error = size(ours.double() - truth)
        if is_plain:
            bound = PLAIN_ROUNDINGS * rounding if name == "rms" else float("inf")
        else:
            bound = 2 * max(size(p.double() - truth) for p in plain) + rounding
        if not error <= bound or error == float("inf"):
            raise Unverified(f"{what}: {name} error {error:.3g}, at most {bound:.3g} allowed")
        found |= {f"{name}_error": error, f"{name}_bound": bound}
    if is_plain:
        found["max_bound"] = found["max_error"]
    return found


def worst(comparisons: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of several tensors, for maximum and RMS, the error that comes closest to its bound."""
    rows = list(comparisons)
    result: dict[str, float] = {"tensors": len(rows)}
    for name in ("max", "rms"):
        error, bound = f"{name}_error", f"{name}_bound"
        row = max(rows, key=lambda r: r[error] / r[bound] if r[bound] > 0 else 0.0)
        result |= {error: row[error], bound: row[bound]}
    return result


def measure_cell(
    cell: Cell,
    calls: Mapping[str, Callable[[int], Any]],
    check: Callable[[str, Callable[[int], Any]], Mapping[str, Any]],
    work: Work | None,
    ceilings: Callable[[torch.dtype], Ceilings],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Cell], list[Cell]]:
    """Verifies every provider, times those that passed; (rows, what was left out and why).

    A provider that is `Unverified` is left out; without a verified `BASELINE` there are no rows.

    Args:
        cell: goes into every row.
        calls: by provider, `BASELINE` among them and first.
        check: of a provider's name and call: calls it, which also warms it up, and compares what
            it gives. Returns what goes into its row as ``verified``, or raises `Unverified`.
        work: what has to be done at least; None: not known, no fraction of a ceiling.
        ceilings: measures those of a GEMM dtype, before every round; the best of all count.
    """
    verified, left_out = {}, []
    for name, call in calls.items():
        try:
            verified[name] = dict(check(name, call))
        except Unverified as error:
            left_out.append({**cell, "provider": name, "reason": str(error)})
            if name == BASELINE:
                break
    if BASELINE not in verified:
        return [], left_out
    seen: list[Ceilings] = []
    timings = alternate(
        {name: calls[name] for name in verified},
        effort,
        clock,
        lambda: seen.append(ceilings(work.dtype)) if work is not None else None,
    )
    return result_rows(cell, timings, verified, work, fastest(seen)), left_out


def fastest(seen: Sequence[Ceilings]) -> Ceilings | None:
    """Each ceiling at its best; None of none."""
    if not seen:
        return None
    gemm = {dtype: max(c.gemm[dtype] for c in seen) for dtype in seen[0].gemm}
    return Ceilings(seen[0].device, max(c.memory for c in seen), gemm)


def result_rows(
    cell: Cell,
    timings: Mapping[str, Timing],
    verified: Mapping[str, Mapping[str, Any]],
    work: Work | None,
    ceilings: Ceilings | None,
) -> list[Cell]:
    """One row per provider. ``ratios``: how many times as long the others took, by median."""
    medians = {name: timing.summary()["median"] for name, timing in timings.items()}
    rows = []
    for name, timing in timings.items():
        row = {
            **cell,
            "provider": name,
            "seconds": timing.summary(),
            "calls": len(timing.seconds),
            "rounds": timing.rounds,
        }
        if work is not None and ceilings is not None:
            row |= {
                "bytes": work.bytes,
                "flop": work.flop,
                "bytes_per_second": work.bytes / medians[name],
                "flop_per_second": work.flop / medians[name],
                "memory_ceiling": ceilings.memory,
                "gemm_ceiling": ceilings.gemm[work.dtype],
                "bound": work.bound(ceilings),
                "fraction_of_ceiling": work.seconds(ceilings) / medians[name],
            }
        row["ratios"] = {o: taken / medians[name] for o, taken in medians.items() if o != name}
        rows.append(row | {"verified": dict(verified[name])})
    return rows


def document(
    benchmark: str,
    arguments: Mapping[str, Any],
    environment: Mapping[str, Any],
    ceilings: Ceilings | None,
    rows: Sequence[Cell],
    left_out: Sequence[Cell],
    *,
    complete: bool,
) -> dict[str, Any]:
    """What a results file holds."""
    measured = None
    if ceilings is not None:
        gemm = {str(dtype).removeprefix("torch."): rate for dtype, rate in ceilings.gemm.items()}
        measured = {
            "device": ceilings.device,
            "memory_bytes_per_second": ceilings.memory,
            "gemm_flop_per_second": gemm,
        }
    return {
        "format_version": FORMAT_VERSION,
        "benchmark": benchmark,
        "complete": complete,
        "arguments": dict(arguments),
        "environment": dict(environment),
        "ceilings": measured,
        "rows": list(rows),
        "left_out": list(left_out),
    }


def write_json(target: Path, data: Mapping[str, Any]) -> None:
    """Writes a results file that is there whole or not at all."""
    write_text(target, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(target: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    write_atomically({target: lambda path: Path(path).write_text(text, "utf-8")})

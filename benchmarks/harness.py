"""What the benchmark scripts share: the command line, threads, the ceilings, the results file.

How providers are verified and timed is `c2c_ext.measure`, which `c2c bench` uses too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch

from c2c_ext.fusion_bench import gemm_dtypes
from c2c_ext.machine import environment
from c2c_ext.measure import Cell, Effort, document, write_json
from c2c_ext.probe import CeilingSampler, probe
from c2c_ext.report import DTYPES

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
QUICK = Effort(rounds=2, seconds=0.02, limit=1.0)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    default = Effort()
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--threads", type=positive, help="of PyTorch and the op")
    parser.add_argument(
        "--affinity", type=cpus, metavar="CPU,CPU", help="the CPUs to run on, by number"
    )
    parser.add_argument("--rounds", type=positive, help=f"at least (default: {default.rounds})")
    parser.add_argument(
        "--seconds", type=float, help=f"per provider, at least (default: {default.seconds})"
    )
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds of a cell after which no further round begins "
        f"(default: {default.limit:.0f})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="does it run? The times mean little; no default output"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="results, written row by row")
    return parser


def with_device(parser: argparse.ArgumentParser) -> None:
    """Adds the option of benchmarks that run on a GPU too."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def cpus(text: str) -> list[int]:
    """An argument that lists CPUs of this process."""
    known = os.sched_getaffinity(0)
    chosen = [int(part) for part in text.split(",")]
    if not set(chosen) <= known:
        raise argparse.ArgumentTypeError(f"must be among {sorted(known)}, got {text}")
    return chosen


def effort_of(options: argparse.Namespace) -> Effort:
    """How long to measure, by the options."""
    base = QUICK if options.quick else Effort()
    given = {name: getattr(options, name) for name in ("rounds", "seconds", "limit")}
    for name in ("seconds", "limit"):
        value = given[name]
        if value is not None and not 0 < value < float("inf"):
            raise SystemExit(f"--{name} must be a finite number above 0, got {value}")
    return Effort(**{n: getattr(base, n) if v is None else v for n, v in given.items()})


class Results:
    """Rows of one run, on disk after every cell: an interrupted run keeps what it has.

    Sets threads and affinity, measures the ceilings and records all of them.

    Args:
        benchmark: its name; without --output and --quick the file is results/<name>.json, or
            results/<name>_cuda.json.
        options: parsed `arguments`.
        dtypes: of the GEMM ceilings, keys of `report.DTYPES`.
        device: whose ceilings.
    """

    def __init__(
        self,
        benchmark: str,
        options: argparse.Namespace,
        dtypes: Sequence[str],
        device: torch.device = CPU,
    ) -> None:
        self.benchmark, self.effort = benchmark, effort_of(options)
        if options.output is not None and not options.output.resolve().parent.is_dir():
            raise SystemExit(f"--output: there is no directory {options.output.resolve().parent}")
        if options.output is not None and options.output.is_dir():
            raise SystemExit(f"--output must be a file, {options.output} is a directory")
        on = getattr(options, "device", "cpu")
        name = benchmark if on == "cpu" else f"{benchmark}_{on}"
        default = None if options.quick else RESULTS / f"{name}.json"
        self.target: Path | None = options.output or default
        if options.affinity is not None:  # before the first thread is started: they inherit it
            os.sched_setaffinity(0, options.affinity)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.arguments = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name != "output"
        }
        self.environment = {**environment(ROOT), "load_average": {"start": os.getloadavg()[0]}}
        self.rows: list[Cell] = []
        self.left_out: list[Cell] = []
        say("ceilings of this machine")
        chosen = {name: DTYPES[name] for name in dtypes}
        seconds = 0.3 if options.quick else 8.0
        self._device, self._gemms = device, gemm_dtypes(chosen)
        self.ceilings = probe(device, self._gemms, seconds=seconds)
        self._write(complete=False)

    @cached_property
    def sampler(self) -> CeilingSampler:
        """Measures the ceilings again, as `measure_cell` wants it."""
        return CeilingSampler(self._device, self._gemms)

    def add(self, rows: Sequence[Cell], left_out: Sequence[Cell] = ()) -> None:
        """Keeps and prints the rows of a cell, and what was left out of it."""
        self.rows += rows
        self.left_out += left_out
        self._write(complete=False)
        for row in rows:
            print(described(row), flush=True)
        for cell in left_out:
            where = " ".join(str(v) for k, v in cell.items() if k != "reason")
            print(f"left out: {where}: {cell['reason']}", flush=True)

    def finish(self) -> int:
        """Marks the file complete; returns the exit status, 1 if anything was left out."""
        self.environment["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._write(complete=True)
        if self.target is not None:
            print(f"{len(self.rows)} rows in {self.target}")
        return 1 if self.left_out else 0

    def _write(self, *, complete: bool) -> None:
        self.environment["load_average"]["end"] = os.getloadavg()[0]
        if self.target is not None:
            whole = document(
                self.benchmark,
                self.arguments,
                self.environment,
                self.ceilings,
                self.rows,
                self.left_out,
                complete=complete,
            )
            write_json(self.target, whole)


def described(row: Cell) -> str:
    """One row on one line."""
    seconds = row["seconds"]
    last = list(row).index("provider")
    where = " ".join(
        str(value) if isinstance(value, str) else f"{name} {value}"
        for name, value in list(row.items())[: last + 1]
    )
    parts = [f"{1e3 * seconds['median']:.4g} ms"]
    parts.append(f"({1e3 * seconds['p20']:.4g} .. {1e3 * seconds['p80']:.4g})")
    if "fraction_of_ceiling" in row:
        parts.append(f"{row['fraction_of_ceiling']:.0%} of the {row['bound']} ceiling")
    return f"{where}: {' '.join(parts)}"


def say(what: str) -> None:
    """What begins now, on standard error."""
    print(f"{what} ...", file=sys.stderr, flush=True)

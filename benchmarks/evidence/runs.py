"""One world with one seed: trains what is not there, asks, times, and writes the result file."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
from pathlib import Path
from types import ModuleType

import torch
import transformers

from benchmarks.evidence import worlds
from benchmarks.evidence.outcomes import update_run
from c2c_ext.machine import environment

PARTS = ("train", "evaluate", "latency")
DONE = "trained.json"  # in the directory of a world and seed, once everything in it is


def names() -> list[str]:
    """The worlds there are: modules of `worlds` that have all of a world's functions."""
    found = [module.name for module in pkgutil.iter_modules(worlds.__path__)]
    return [name for name in found if all(hasattr(load(name), part) for part in ("NAME", *PARTS))]


def seeds(name: str) -> tuple[int, ...]:
    """Those that are recorded: 0 to 2 and a fresh one, 3 if it was not seen before its time."""
    return getattr(load(name), "SEEDS", (0, 1, 2, 3))


def load(name: str) -> ModuleType:
    """The module of a world: NAME, TITLE, train, evaluate and latency."""
    return importlib.import_module(f"benchmarks.evidence.worlds.{name}")


def run(
    name: str, seed: int, work: Path, output: Path, parts: list[str], *, again: bool = False
) -> None:
    """Runs parts of a world for a seed and writes what they give into its result file.

    Args:
        work: holds what is trained, in ``NAME/seedS``.
        output: of the result file.
        again: trains although that was done.
    """
    torch.set_num_threads(1)  # the order of additions, and so every bit, depends on it
    transformers.utils.logging.disable_progress_bar()
    world, directory = load(name), work / name / f"seed{seed}"
    done = directory / DONE
    if "train" in parts and (again or not done.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        started, cpu = time.perf_counter(), time.process_time()
        training = world.train(seed, directory)
        training = {
            "environment": environment(),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),  # whatever else the machine did
            **training,
        }
        done.write_text(json.dumps(training, indent=1) + "\n")
    if not done.exists():
        raise FileNotFoundError(f"{directory}: nothing was trained here; run the part train")
    update_run(output, name, seed, title=world.TITLE, training=json.loads(done.read_text()))
    if "evaluate" in parts:
        cells = [cell.to_json() for cell in world.evaluate(seed, directory)]
        update_run(output, name, seed, accuracy={"environment": environment(), "cells": cells})
    if "latency" in parts:
        rows = world.latency(seed, directory)
        update_run(output, name, seed, latency={"environment": environment(), "rows": rows})


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=names())
    parser.add_argument("seed", type=int)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args(arguments)
    run(
        options.world,
        options.seed,
        options.work,
        options.output,
        options.only,
        again=options.again,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

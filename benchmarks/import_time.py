"""What does `import c2c_ext` add to `import torch`? Cold processes of both, in turns.

usage: python benchmarks/import_time.py [OUTPUT.json] [--runs N]

Prints the medians and the median difference of neighbours, in wall and in processor time (which
other work on the machine disturbs less); writes them with the environment, by default to
benchmarks/results/import_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from c2c_ext.machine import environment
from c2c_ext.measure import Timing, write_json

ROOT = Path(__file__).resolve().parent.parent
BASELINE, OURS = "import torch", "import torch, c2c_ext"


def processor_time() -> float:
    """User and system seconds of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(statement: str, directory: str) -> dict[str, float]:
    """Wall and processor time of a fresh interpreter that runs ``statement`` in ``directory``."""
    wall, processor = time.perf_counter(), processor_time()
    subprocess.run([sys.executable, "-c", statement], check=True, cwd=directory)
    return {"wall": time.perf_counter() - wall, "processor": processor_time() - processor}


def measure(runs: int) -> dict[str, list[dict[str, float]]]:
    """Every run of both statements, in turns, after one of each that is not counted."""
    times: dict[str, list[dict[str, float]]] = {BASELINE: [], OURS: []}
    with tempfile.TemporaryDirectory() as directory:
        for i in range(runs + 1):
            for statement in (BASELINE, OURS) if i % 2 else (OURS, BASELINE):
                taken = seconds(statement, directory)
                if i > 0:
                    times[statement].append(taken)
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in seconds."""
    return Timing(values, len(values)).summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    output = ROOT / "benchmarks" / "results" / "import_time.json"
    parser.add_argument("output", nargs="?", type=Path, default=output)
    parser.add_argument("--runs", type=int, default=25)
    options = parser.parse_args()
    if options.runs < 2:
        parser.error(f"--runs must be at least 2, got {options.runs}")

    times = measure(options.runs)
    rows = {}
    for clock in ("wall", "processor"):
        torch, ours = ([run[clock] for run in times[statement]] for statement in (BASELINE, OURS))
        added = [b - a for a, b in zip(torch, ours, strict=True)]
        rows[clock] = {BASELINE: summary(torch), OURS: summary(ours), "added": summary(added)}
    results = {
        "environment": environment(ROOT),
        "load_average": os.getloadavg()[0],
        "runs": options.runs,
        "seconds": rows,
    }
    write_json(options.output, results)
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()

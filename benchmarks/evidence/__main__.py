"""usage: python -m benchmarks.evidence run [WORLD ...] [--seeds S ...] [--jobs J] [--only PART ...]
       python -m benchmarks.evidence compare DIR
       python -m benchmarks.evidence report [--check]

`run` trains, asks and times worlds and writes benchmarks/results/evidence/WORLD_seedS.json; what is
trained is kept in --work and not trained again. `compare` sets the counts of result files elsewhere
beside the recorded ones. `report` writes the tables and drawings of
docs/evidence.md from these files, or only says whether they are as the files have it (--check).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.evidence import runs
from benchmarks.evidence.outcomes import read_runs

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__.split("\n\n")[1]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train, ask and time worlds")
    run.add_argument("worlds", nargs="*", metavar="WORLD", help="default: all")
    run.add_argument(
        "--seeds", type=int, nargs="+", metavar="S", help="default: a world's own four"
    )
    run.add_argument("--jobs", type=int, default=1, help="seeds at a time, one thread each")
    run.add_argument(
        "--only", nargs="+", choices=runs.PARTS, default=list(runs.PARTS), help="default: all"
    )
    run.add_argument("--work", type=Path, default=ROOT / "build" / "evidence", metavar="DIR")
    run.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    run.add_argument("--again", action="store_true", help="train what is trained, too")
    compare = commands.add_parser("compare", help="counts beside the recorded ones")
    compare.add_argument("directory", type=Path, metavar="DIR", help="the --output of a run")
    report = commands.add_parser("report", help="tables and drawings from the result files")
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 if they differ")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "report":
        from benchmarks.evidence import report

        return report.main(check=options.check)
    if options.command == "compare":
        return compare(options.directory)
    names = options.worlds or runs.names()
    if unknown := sorted(set(names) - set(runs.names())):
        parser.error(f"WORLD: there are {', '.join(runs.names())}; got {', '.join(unknown)}")
    if options.jobs < 1 or min(options.seeds or [0]) < 0:
        parser.error("--jobs must be at least 1 and --seeds at least 0")
    jobs = [(name, seed) for name in names for seed in options.seeds or runs.seeds(name)]
    trained = [part for part in options.only if part != "latency"]
    done = True
    if trained:
        done = _parallel(options, jobs, trained)
    if "latency" in options.only:  # one after the other: they would disturb each other's times
        for job in jobs:
            done = _one(options, *job, ["latency"]) and done
    return 0 if done else 1


def compare(directory: Path) -> int:
    """Prints right answers there beside those that are recorded; returns 1 if there are none."""
    runs = {(run.world, run.seed): run for run in read_runs(RESULTS)}
    here = read_runs(directory)
    for run in here:
        other = runs.get((run.world, run.seed))
        recorded = {cell.name: cell for cell in other.cells} if other else {}
        print(f"{run.world}, seed {run.seed}: right now : as recorded, of as many questions")
        for cell in run.cells:
            old = recorded.get(cell.name)
            known = {mode: old.count(mode) for mode in old.right} if old else {}
            counts = [f"{mode} {cell.count(mode)} : {known.get(mode, '-')}" for mode in cell.right]
            print(f"  {cell.name} ({cell.questions}): {', '.join(counts)}")
    if not here:
        print(f"no result files in {directory}", file=sys.stderr)
    return 0 if here else 1


def _parallel(options: argparse.Namespace, jobs: list[tuple[str, int]], parts: list[str]) -> bool:
    with ThreadPoolExecutor(options.jobs) as pool:
        return all([*pool.map(lambda job: _one(options, *job, parts), jobs)])


def _one(options: argparse.Namespace, world: str, seed: int, parts: list[str]) -> bool:
    """One world with one seed in a process of its own, its output in a log; whether it worked."""
    options.work.mkdir(parents=True, exist_ok=True)
    log = options.work / f"{world}_seed{seed}.log"
    command = [sys.executable, "-m", "benchmarks.evidence.runs", world, str(seed)]
    command += ["--work", str(options.work), "--output", str(options.output), "--only", *parts]
    command += ["--again"] if options.again else []
    print(f"{world}, seed {seed}: {', '.join(parts)} ({log})", flush=True)
    with log.open("a") as out:
        status = subprocess.run(command, cwd=ROOT, stdout=out, stderr=out).returncode
    if status:
        print(f"{world}, seed {seed}: failed, see {log}", file=sys.stderr, flush=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes csrc/cuda/dispatch_table.h, which CUDA path `auto` takes, from measured results alone.

usage: python tools/fill_dispatch.py [--check] [--output FILE.h] [RESULTS.json...]

Reads benchmarks/results/fuse_cuda*.json, results of

    python benchmarks/bench_fuse.py --device cuda --cuda-paths plain fused hopper

The path of a bucket of rows (batch * tokens) is the one that took the least time, relative to the
plain path (geometric mean over shapes, gates and batches), among those that were verified in all of
the bucket's cells. A bucket is known by measurements at its upper end. Where nothing was measured
there is no row, and the plain path runs. A file that cannot be trusted stops the tool: one of
another benchmark, of a run that did not end, of a tree with changes, or with rows that do not say
what was verified and which kernels ran. So does a cell that two runs have parts of. With --check
nothing is written; the exit status is 1 if the table differs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from c2c_ext.cuda_paths import PATHS, DispatchRow
from c2c_ext.measure import FORMAT_VERSION, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = ROOT / "csrc" / "cuda" / "dispatch_table.h"
UP_TO = (1, 16, 64, 170, 512, 2048, 8192)  # upper ends of the buckets
PLAIN = PATHS[0]
TYPES = {"float32": "kFloat32", "bfloat16": "kBfloat16", "float16": "kFloat16"}
CELL = ("capability", "dtype", "shape", "gates", "batch", "tokens")
HEADER = """\
// Written by tools/fill_dispatch.py from{source}: do not edit.
#pragma once

#include "dispatch.h"

namespace c2c::cuda {{

{table}

}}  // namespace c2c::cuda
"""

Row = dict[str, Any]


class Untrusted(ValueError):
    """A results file that no table may be made from; the message names file and rule."""


def measurements(path: Path) -> tuple[str, list[Row]]:
    """(where and when it was measured, one row per cell and CUDA path) of a results file.

    Raises:
        Untrusted: the file breaks a rule of this module's description.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Untrusted(f"{path.name} cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise Untrusted(f"{path.name} is no results file of format version {FORMAT_VERSION}")
    environment, arguments = _object(data, "environment"), _object(data, "arguments")
    for wrong, rule in (
        (
            (data.get("benchmark"), arguments.get("device")) != ("fuse", "cuda"),
            "must be of bench_fuse.py --device cuda",
        ),
        (data.get("complete") is not True, "is of a run that did not come to its end"),
        (arguments.get("quick") is not False, "is of a quick run, whose times mean little"),
        (environment.get("package") != "checkout", "was not measured in a checkout"),
        (environment.get("dirty") is not False, "was measured with changes to tracked files"),
        (
            not re.fullmatch("[0-9a-f]{40}", str(environment.get("commit"))),
            "does not say its commit",
        ),
        (
            not re.match("[0-9]{4}-[0-9]{2}-[0-9]{2}", str(environment.get("date"))),
            "does not say its date",
        ),
    ):
        if wrong:
            raise Untrusted(f"{path.name} {rule}")
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Untrusted(f"{path.name} has no list of rows")
    rows = [{**row, "file": path.name} for row in rows if "cuda_path" in row]
    if not rows:
        raise Untrusted(f"{path.name} has no row with a cuda_path: run with --cuda-paths")
    for row in rows:
        _check(row, path.name)
    devices = ", ".join(sorted({row["device"] for row in rows}))
    found = f"{devices}, {environment['date'][:10]}, {environment['commit'][:7]}"
    return f"{_place(path)} ({found})", rows


def _place(path: Path) -> str:
    """Where a file lies in the checkout; the name alone of one that lies elsewhere."""
    place = path.resolve()
    return place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else path.name


def _check(row: Row, name: str) -> None:
    """Raises `Untrusted` unless a row says what was verified, where, and which kernels ran."""
    missing = [key for key in (*CELL, "device", "cuda_path_ran", "seconds") if key not in row]
    if missing:
        raise Untrusted(f"{name}: a row of path {row['cuda_path']} lacks {', '.join(missing)}")
    what = f"{name}: {row['cuda_path']}, {row['shape']} {row['dtype']} {row['tokens']} tokens"
    for key in ("device", "capability", "dtype", "shape", "gates"):
        # The device's name goes into a comment of the table: no line may end in it.
        if not re.fullmatch(r"[ -\[\]-~]+", row[key] if isinstance(row[key], str) else ""):
            raise Untrusted(f"{what}: {key} must be a line of text, got {row[key]!r}")
    for key in ("batch", "tokens"):
        if type(row[key]) is not int or row[key] < 1:
            raise Untrusted(f"{what}: {key} must be an integer above 0, got {row[key]!r}")
    if row["cuda_path"] not in PATHS:
        raise Untrusted(f"{what}: the path must be one of {', '.join(PATHS)}")
    if row["cuda_path_ran"] != row["cuda_path"]:
        raise Untrusted(
            f"{what}: the kernels that ran are those of {row['cuda_path_ran'] or 'an unknown path'}"
        )
    if row["dtype"] not in TYPES:
        raise Untrusted(f"{what}: dtype must be one of {', '.join(TYPES)}")
    if not re.fullmatch(r"[0-9]{1,3}\.[0-9]", row["capability"]):
        raise Untrusted(f"{what}: capability must be like 9.0, got {row['capability']!r}")
    found = _object(row, "verified")
    for kind in ("max", "rms"):
        error, bound = (_number(found.get(f"{kind}_{end}")) for end in ("error", "bound"))
        if not 0 <= error <= bound < math.inf:
            raise Untrusted(f"{what}: is not verified ({kind} error {error}, bound {bound})")
    if not 0 < _number(_object(row, "seconds").get("median")) < math.inf:
        raise Untrusted(f"{what}: seconds must be above 0")


def _object(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The object of that name; an empty one where there is none, which no rule lets pass."""
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if is_number else math.nan
    except OverflowError:
        return math.inf


def table_of(rows: Iterable[Row]) -> list[DispatchRow]:
    """The fastest path of every bucket that was measured.

    Raises:
        Untrusted: two rows are of the same cell and path, or of one cell and two files: only what
            was timed in turns in one run is compared.
    """
    cells: dict[tuple, dict[str, float]] = {}
    files: dict[tuple, str | None] = {}
    for row in rows:
        key = tuple(row[name] for name in CELL)
        cell, where = cells.setdefault(key, {}), " ".join(map(str, key))
        if row["cuda_path"] in cell:
            raise Untrusted(f"measured twice: {where} {row['cuda_path']}")
        if files.setdefault(key, row.get("file")) != row.get("file"):
            raise Untrusted(f"measured in two runs: {where} ({files[key]}, {row['file']})")
        cell[row["cuda_path"]] = row["seconds"]["median"]
    buckets: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for (capability, dtype, _, _, batch, tokens), seconds in cells.items():
        if batch * tokens in UP_TO and PLAIN in seconds:
            buckets.setdefault((capability, dtype, batch * tokens), []).append(seconds)
    lower = dict(zip(UP_TO, (0, *UP_TO), strict=False))
    table = []
    for (capability, dtype, up_to), measured in buckets.items():
        verified = [p for p in PATHS if all(p in seconds for seconds in measured)]
        # min keeps the first of equals: plain.
        fastest = min(verified, key=lambda p, m=measured: sum(math.log(s[p] / s[PLAIN]) for s in m))
        major, minor = map(int, capability.split("."))
        table.append((10 * major + minor, dtype, lower[up_to], up_to, fastest))
    return sorted(table, key=lambda row: (row[0], list(TYPES).index(row[1]), row[3]))


def merged(table: Sequence[DispatchRow]) -> list[DispatchRow]:
    """The same with neighbouring buckets of one path as one row."""
    result = list(table[:1])
    for before, row in pairwise(table):
        if before[:2] == row[:2] and before[3:] == (row[2], row[4]):
            result[-1] = (*result[-1][:3], *row[3:])
        else:
            result.append(row)
    return result


def header(table: Sequence[DispatchRow], sources: Sequence[str]) -> str:
    """The text of dispatch_table.h."""
    lines = [
        f"    {{{capability}, CacheType::{TYPES[dtype]}, {above}, {up_to}, Path::k{path.title()}}},"
        for capability, dtype, above, up_to, path in table
    ]
    rows = "{}" if not lines else "{{\n" + "\n".join(lines) + "\n}}"
    declared = f"constexpr std::array<DispatchRow, {len(lines)}> kDispatchTable{rows};"
    source = "".join(f"\n//   {name}" for name in sources) + "\n//"
    if not sources:
        source = " benchmarks/results/"
        declared = "// No path has been measured on a GPU.\n" + declared
    return HEADER.format(source=source, table=declared)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULTS.json")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it differs")
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args(argv)
    sources, rows = [], []
    try:
        for path in options.results or sorted(RESULTS.glob("fuse_cuda*.json")):
            source, found = measurements(path)
            sources.append(source)
            rows += found
        text = header(merged(table_of(rows)), sources)
    except Untrusted as error:
        print(f"fill_dispatch.py: {error}", file=sys.stderr)
        return 2
    same = options.output.exists() and options.output.read_text("utf-8") == text
    if options.check or same:
        print(f"{options.output.name}: {'as the results say' if same else 'differs'}")
        return 0 if same else 1
    try:
        write_text(options.output, text)
    except OSError as error:
        print(f"fill_dispatch.py: {options.output} cannot be written: {error}", file=sys.stderr)
        return 2
    print(f"{options.output.name}: written from {len(sources)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())

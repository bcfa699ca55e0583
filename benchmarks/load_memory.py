"""How much memory does loading a fuser take, with its parameters and as its packed form alone?

usage: python benchmarks/load_memory.py [--shape real] [--file-dtype fp32] [--dtype bf16]
           [--output FILE]

Saves a random fuser, then loads it in a fresh process for each way and reads the process's resident
memory: before loading, at most during it, and after the packed form exists. Pages of the mapped
weights file count as resident while it is mapped.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import torch

from c2c_ext import Fuser
from c2c_ext.fusion_bench import SHAPES, make_fuser
from c2c_ext.machine import environment, peak_memory, resident_memory
from c2c_ext.measure import write_json
from c2c_ext.report import DTYPES

WAYS = ("parameters", "inference_dtype")


def measure(way: str, directory: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes and seconds of one way, in this process."""
    held = []

    def load() -> None:
        options = {} if way == "parameters" else {"inference_dtype": dtype}
        held.append(Fuser.from_pretrained(directory, **options))
        held[0].packed(dtype, torch.device("cpu"))

    start = time.perf_counter()
    found = peak_memory(load)
    taken = time.perf_counter() - start
    if found is None:
        raise SystemExit("load_memory.py reads /proc, which only Linux has")
    gc.collect()
    before, most = found
    return {
        "before": before,
        "peak": most,
        "after": resident_memory(),
        "packed": held[0].packed(dtype, torch.device("cpu")).nbytes,
        "seconds": taken,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="real")
    parser.add_argument("--file-dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the caches")
    parser.add_argument("--output", type=Path, help="needed for other shapes than real")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.output is None:
        if options.shape != "real" and not options.measure:
            parser.error("--shape: the recorded file is of the real shape; give --output too")
        options.output = harness.RESULTS / "load_memory.json"
    if options.measure:
        way, directory = options.measure
        print(json.dumps(measure(way, directory, DTYPES[options.dtype])))
        return 0
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        fuser = make_fuser(SHAPES[options.shape], DTYPES[options.file_dtype])
        parameters = sum(p.nbytes for p in fuser.parameters())
        fuser.save_pretrained(directory)
        del fuser
        for way in WAYS:
            command = [sys.executable, __file__, "--dtype", options.dtype]
            command += ["--measure", way, directory]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[way] = json.loads(done.stdout)
            taken = rows[way]["peak"] - rows[way]["before"]
            kept = rows[way]["after"] - rows[way]["before"]
            print(f"{way}: at most {taken / 1e9:.2f} GB, {kept / 1e9:.2f} GB kept")
    results = {
        "environment": environment(harness.ROOT),
        "shape": options.shape,
        "file_dtype": options.file_dtype,
        "dtype": options.dtype,
        "parameter_bytes": parameters,
        "bytes": rows,
    }
    write_json(options.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

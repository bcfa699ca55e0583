"""Compiles every CUDA kernel without a GPU, records what each needs, and loads the library.

usage: python tools/check_cuda.py [--output FILE.json] [--no-library]

Needs nvcc, and a Python with torch, pybind11, cmake and ninja; any torch will do. Writes the table
beside the JSON file as .md. Fails if a kernel spills registers, or if the library, built against
this torch, does not register its ops.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
OUTPUT = ROOT / "benchmarks" / "results" / "cuda_resources.json"
ARCHITECTURES = ("80", "90a")
ONLY = {"hopper": ("90a",)}  # sources whose name begins so are for these alone
FLAGS = ["-std=c++17", "-O3", "-Xptxas=-v"]
JOBS = 2
COLUMNS = ("registers", "shared", "stack", "spill_stores", "spill_loads")


def find_tool(name: str) -> str:
    """The tool's path, on PATH, in CUDA_HOME or beside this Python."""
    places = [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    places += [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"),) if home]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise SystemExit(f"check_cuda: needs {name}, and none is on PATH")
    return found


def parse(report: str) -> dict[str, dict[str, int]]:
    """Mangled kernel name -> its numbers, from what ``ptxas -v`` says.

    Raises:
        ValueError: a kernel lacks a number: ptxas speaks otherwise than it did.
    """
    kernels: dict[str, dict[str, int]] = {}
    for part in re.split(r"Compiling entry function ", report)[1:]:
        name = re.match(r"'([^']+)'", part)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        used = re.search(r"Used (\d+) registers", part)
        if name is None or frame is None or used is None:
            raise ValueError(f"ptxas said something unknown: {part[:300]}")
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = [used[1], shared[1] if shared else 0, *frame.groups()]
        kernels[name[1]] = dict(zip(COLUMNS, map(int, numbers), strict=True))
    return kernels


def readable(mangled: list[str]) -> dict[str, str]:
    """Mangled name -> ``kernel<arguments>`` without namespaces and parameters."""
    tool = shutil.which("c++filt")
    if tool is None or not mangled:
        return {name: name for name in mangled}
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True)
    names = {}
    for name, text in zip(mangled, done.stdout.splitlines(), strict=True):
        text = re.sub(r"\(anonymous namespace\)::|c2c::|cuda::", "", text).removeprefix("void ")
        text = re.sub(r"\((Activation|Integration)\)", r"\1 ", text)
        end, depth = len(text), 0
        for i, letter in enumerate(text):  # the parameters begin at the first outer parenthesis
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                end = i
                break
        names[name] = text[:end]
    return names


def compile_one(nvcc: str, source: Path, architecture: str, directory: Path) -> str:
    """What ptxas says about one source for one architecture."""
    target = directory / f"{source.stem}_{architecture}.cubin"
    gencode = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *FLAGS, gencode, "-cubin", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode or not target.exists():
        raise SystemExit(
            f"check_cuda: {source.name} does not compile for sm_{architecture}:\n{done.stderr}"
        )
    return done.stdout + done.stderr


def measure(nvcc: str) -> list[dict[str, Any]]:
    """One row per source, kernel and architecture."""
    jobs = [
        (source, architecture)
        for source in sorted(SOURCES.glob("*.cu"))
        for architecture in next(
            (a for prefix, a in ONLY.items() if source.name.startswith(prefix)), ARCHITECTURES
        )
    ]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(JOBS) as pool:
        reports = pool.map(lambda job: compile_one(nvcc, *job, Path(directory)), jobs)
        rows = []
        for (source, architecture), report in zip(jobs, reports, strict=True):
            kernels = parse(report)
            names = readable(list(kernels))
            named = sorted((names[mangled], numbers) for mangled, numbers in kernels.items())
            for name, numbers in named:
                where = {
                    "source": source.name,
                    "kernel": name,
                    "architecture": f"sm_{architecture}",
                }
                rows.append(where | numbers)
            print(f"{source.name} sm_{architecture}: {len(named)} kernels", flush=True)
    return rows


def write(output: Path, nvcc: str, rows: list[dict[str, Any]]) -> None:
    """The JSON file, and the same as a table beside it."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release \S+, (V\S+)", said)
    document = {
        "nvcc": version[1] if version else "unknown",
        "flags": FLAGS,
        "rows": rows,
    }
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    titles = ["kernel", "source", "GPU", *(column.replace("_", " ") for column in COLUMNS)]
    lines = [
        "# What the CUDA kernels need",
        "",
        f"By `ptxas -v` of nvcc {document['nvcc']}, written by `make check-cuda`. Bytes, but for "
        "registers per thread; dynamic shared memory is not counted.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * 3}{'---:|' * len(COLUMNS)}",
    ]
    for row in rows:
        numbers = " | ".join(str(row[column]) for column in COLUMNS)
        lines.append(f"| `{row['kernel']}` | {row['source']} | {row['architecture']} | {numbers} |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def check_library() -> None:
    """Builds the library against this Python's torch, GPU or not, and has it register its ops."""
    build = ROOT / "build" / "check_cuda"
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DC2C_EXT_CUDA=1"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    make = ["--build", str(build), "--parallel", str(JOBS)]
    make += ["--target", "c2c_ext", "--target", "c2c_ext_cuda"]
    for arguments in (configure, make):
        done = subprocess.run([cmake, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"check_cuda: the build failed:\n{done.stdout}{done.stderr}")
    code = f"""
import torch
torch.ops.load_library({str(build / "libc2c_ext.so")!r})
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = ("c2c::fuse_", "c2c::fuse", "c2c::fuse_backward")
assert not any(has(op, "CUDA") for op in ops), "the check cannot fail"
torch.ops.load_library({str(build / "libc2c_ext_cuda.so")!r})
assert all(has(op, "CUDA") for op in ops), "a CUDA op was not registered"
print("libc2c_ext_cuda.so: registered beside torch", torch.__version__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE.json")
    parser.add_argument("--no-library", action="store_true", help="compile and record only")
    options = parser.parse_args()
    nvcc = find_tool("nvcc")
    rows = measure(nvcc)
    write(options.output, nvcc, rows)
    spilled = [row for row in rows if row["spill_stores"] or row["spill_loads"]]
    for row in spilled:
        print(f"spills: {row}", file=sys.stderr)
    if not options.no_library:
        check_library()
    print(f"{len(rows)} rows in {options.output}")
    if spilled:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

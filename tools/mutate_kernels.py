"""Would the tests notice a wrong kernel? Changes emulated kernels one place at a time.

usage: python tools/mutate_kernels.py [OPTION...] SOURCE... -- TEST FILE OR PYTEST ARGUMENT...
       e.g. python tools/mutate_kernels.py csrc/cuda/x.cu -- python_tests/test_cuda_emulated.py

Each mutant lacks one `__syncthreads()`, `__syncwarp()` or `cp_async_wait<>()`, waits for one group
of copies less, or has one comparison shifted by one, up or down (tools/kernel_mutants.py). All are
built into one library, in a copy of the tree (build/mutants), and switched on one by one; those in
constant expressions are built each by itself. A mutant is tested by the tests that run its place,
with the emulation's threads in both orders (tools/mutant_runs.py). It is caught if a test fails,
crashes or takes too long in either order; one that does not compile counts apart. Survivors have
to be in tools/surviving_mutants.json, each with the reason why no test can tell it from the
original. Ends with 1 if another one survives, or if a listed one was caught or is no longer there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from kernel_mutants import KINDS, Mutant, header, mutants, switched
from mutant_runs import SURVIVED, UNCHANGED, Runs

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "mutants"
TREE = PLACE / "tree"
SURVIVORS = ROOT / "tools" / "surviving_mutants.json"
COPIED = ["cmake", "csrc", "CMakeLists.txt", "pyproject.toml"]
CONFIGURE = (
    "cmake -S . -B build -G Ninja -DC2C_EXT_CUDA=0 -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE={0} "
    "'-DCMAKE_CXX_FLAGS=-O1 -w -fsanitize={1} -fsanitize-undefined-trap-on-error "
    f"-include {TREE}/mutants.h'"
)
BUILD = "cmake --build build -j {0} --target c2c_ext_emulated"
PRELOADED = "C2C_MUTANTS_SANITIZED"
LISTED, NOT_COMPILED = "survived, as listed", "does not compile"


class Workshop:
    """A copy of the tree with switches in it, where the libraries are built."""

    def __init__(self, texts: dict[str, str], numbered: dict[int, Mutant], sanitize: bool) -> None:
        self.texts, self.numbered = texts, numbered
        for name in COPIED:
            source, target = ROOT / name, TREE / name
            if source.is_dir():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target)
            else:
                TREE.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        (TREE / "mutants.h").write_text(header(len(numbered)))
        for file in texts:
            self.write(file)
        sanitizers = "address,bounds" if sanitize else "bounds"
        why = self.run(CONFIGURE.format(sys.executable, sanitizers))
        library, why = (None, why) if why else self.build("switched")
        if library is None:
            sys.exit(f"the kernels with switches do not compile:\n{why}")
        self.switched = library

    def run(self, command: str) -> str:
        """What a command in the copy says if it fails, else nothing."""
        plain = {name: v for name, v in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            command, cwd=TREE, env=plain, shell=True, capture_output=True, text=True
        )
        return f"{command}\n{done.stdout}{done.stderr}" if done.returncode != 0 else ""

    def write(self, file: str, changed: Mutant | None = None) -> None:
        ours = {n: m for n, m in self.numbered.items() if m.file == file}
        (TREE / file).write_text(switched(self.texts[file], ours, changed))

    def build(self, name: str) -> tuple[Path | None, str]:
        """A library of the copy as it is; or None, and why not."""
        if why := self.run(BUILD.format(os.environ.get("MAX_JOBS", "1"))):
            return None, why
        built = TREE / "build" / "libc2c_ext_emulated.so"
        return Path(shutil.copy2(built, PLACE / f"{name}.so")), ""

    def library_of(self, mutant: Mutant) -> Path | None:
        """One that has the mutant; None if it does not compile."""
        if not mutant.constant:
            return self.switched
        try:
            self.write(mutant.file, mutant)
            return self.build("constant")[0]
        finally:
            self.write(mutant.file)


def listed_survivors() -> dict[tuple[str, str, str], str]:
    """(file, line before, line after) -> reason, from the checked-in list."""
    entries = json.loads(SURVIVORS.read_text())
    return {(e["file"], e["before"], e["after"]): e["reason"] for e in entries}


def record(options: argparse.Namespace, counts: dict[str, dict[str, Counter[str]]]) -> None:
    """Writes how many mutants of which file and kind were caught, survived, did not compile."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "none"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    total: Counter[str] = Counter()
    for kinds in counts.values():
        for counted in kinds.values():
            total.update(counted)
    data = {
        "date": date,
        "commit": commit,
        "tests": options.tests,
        "seconds": options.seconds if options.seconds < float("inf") else None,
        "sanitize": options.sanitize,
        "total": total,
        "files": counts,
    }
    options.record.write_text(json.dumps(data, indent=2) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", help="kernel sources, relative to the root")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which changes")
    parser.add_argument("--lines", default="", help="only lines where this regex matches")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="of tests for a mutant and order: a survey, what survives may be caught by the rest",
    )
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="with AddressSanitizer: takes twice as long, and may catch listed survivors",
    )
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    parser.add_argument("--record", type=Path, help="JSON file for the counts")
    tests: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, tests = arguments[:split], arguments[split + 1 :]
    options = parser.parse_args(arguments)
    options.tests = tests
    options.sources = [str(Path(s).resolve().relative_to(ROOT)) for s in options.sources]
    return options


class Mutation:
    """The pytest plugin that runs the mutants where pytest would run the tests it collected."""

    def __init__(self, options: argparse.Namespace, texts: dict[str, str]) -> None:
        self.options, self.texts = options, texts
        every = (mutant for file, text in texts.items() for mutant in mutants(file, text))
        self.numbered = dict(enumerate(every))
        kinds = options.kinds.split(",")
        self.chosen = {
            n: m
            for n, m in self.numbered.items()
            if m.kind in kinds and re.search(options.lines, self.key(m)[1])
        }
        self.bad = 0

    def key(self, mutant: Mutant) -> tuple[str, str, str]:
        return mutant.key(self.texts[mutant.file])

    def show(self, mutant: Mutant, what: str) -> None:
        file, before, after = self.key(mutant)
        place = f"{file}:{mutant.line(self.texts[file])}"
        print(f"{place}: {mutant.kind}{what}\n  - {before}\n  + {after}", flush=True)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        started = time.monotonic()
        workshop = Workshop(self.texts, self.numbered, self.options.sanitize)
        runs = Runs(session.items, len(self.numbered), PLACE, self.options.seconds)
        print(f"built ({time.monotonic() - started:.0f} s)", flush=True)
        runs.measure(workshop.switched)
        print(f"the unchanged kernels pass ({time.monotonic() - started:.0f} s)", flush=True)
        listed = listed_survivors()
        counts: dict = defaultdict(lambda: defaultdict(Counter))
        survived = set()
        # Those that have to be built last: they take longest.
        for number, mutant in sorted(
            self.chosen.items(), key=lambda one: (one[1].constant, one[0])
        ):
            begun = time.monotonic()
            library = workshop.library_of(mutant)
            if library is None:
                verdict, why = NOT_COMPILED, ""
            elif mutant.constant:
                beside = {n for n, m in self.numbered.items() if m.file == mutant.file}
                verdict, why = runs.verdict(library, UNCHANGED, beside)
            else:
                verdict, why = runs.verdict(library, number, {number})
            if verdict == SURVIVED:
                survived.add(self.key(mutant))
                self.bad += self.key(mutant) not in listed
                if self.key(mutant) in listed:
                    verdict, why = LISTED, listed[self.key(mutant)]
            counts[mutant.file][mutant.kind][verdict] += 1
            self.show(mutant, f": {verdict} {why} ({time.monotonic() - begun:.1f} s)")
        asked = {self.key(mutant) for mutant in self.chosen.values()}
        there = {self.key(mutant) for mutant in self.numbered.values()}
        caught = asked - survived if not self.options.sanitize else set()
        for key in listed:
            if key[0] in self.texts and (key not in there or key in caught):
                self.bad += 1
                print(f"listed as a survivor, but {'caught' if key in there else 'gone'}: {key}")
        total = sum((c for kinds in counts.values() for c in kinds.values()), Counter())
        said = ", ".join(f"{count} {verdict}" for verdict, count in total.items())
        print(f"{said} ({time.monotonic() - started:.0f} s)")
        if self.options.record:
            record(self.options, counts)
        return True


def preload_sanitizer() -> None:
    """Starts this program again with AddressSanitizer in front of all other libraries."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        ask = [os.environ.get("CXX", "g++"), f"-print-file-name={name}"]
        asked = subprocess.run(ask, capture_output=True, text=True, check=True)
        libraries.append(str(Path(asked.stdout.strip()).resolve(strict=True)))
    asan = "detect_leaks=0:abort_on_error=1:handle_abort=0:symbolize=0:max_allocation_size_mb=4096"
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": asan}
    os.execve(
        sys.executable,
        [sys.executable, *sys.argv],
        {**os.environ, **environment, PRELOADED: "1"},
    )


def main() -> int:
    options = parse(sys.argv[1:])
    if options.sanitize and PRELOADED not in os.environ:
        preload_sanitizer()
    mutation = Mutation(options, {file: (ROOT / file).read_text() for file in options.sources})
    if options.list:
        for mutant in mutation.chosen.values():
            mutation.show(mutant, "")
        print(f"{len(mutation.chosen)} mutants")
        return 0
    torch.set_num_threads(1)  # a forked process has no other threads
    arguments = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--tb=no"]
    status = pytest.main([*arguments, *options.tests], plugins=[mutation])
    return int(status) or int(mutation.bad > 0)


if __name__ == "__main__":
    sys.exit(main())

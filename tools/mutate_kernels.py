"""Would the tests notice a wrong kernel? Changes emulated kernels one place at a time.

usage: python tools/mutate_kernels.py [OPTION...] SOURCE... [-- PYTEST ARGUMENT...]
       e.g. python tools/mutate_kernels.py csrc/cuda/x.cu -- python_tests/test_cuda_emulated.py

Each mutant lacks one `__syncthreads()`, `__syncwarp()` or `cp_async_wait<>()`, waits for one group
of copies less, or has one comparison shifted by one, up or down. It is built and tested in a copy
of the tree (build/mutants), with the emulation's threads in both orders. A mutant is caught if a
test fails, crashes or takes too long; one that does not compile counts apart. Survivors have to be
in tools/surviving_mutants.json, each with the reason why no test can tell it from the original.
Ends with 1 if another one survives, or if a listed one was caught or is no longer there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "mutants" / "tree"
SURVIVORS = ROOT / "tools" / "surviving_mutants.json"
COPIED = ["c2c_ext", "cmake", "csrc", "python_tests", "CMakeLists.txt", "pyproject.toml"]
LIBRARY = TREE / "build" / "emulated" / "libc2c_ext_emulated.so"  # if `BUILD` makes it
BUILD = (
    "cmake -S . -B build/emulated -G Ninja -DC2C_EXT_CUDA=0 -DPython_EXECUTABLE={python} "
    "&& cmake --build build/emulated --target c2c_ext_emulated"
)
ORDERS = ("forward", "reverse")

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
NOT_RUN = re.compile(r"static_assert\s*\(.*?\)\s*;|^\s*#[^\n]*", re.DOTALL | re.MULTILINE)
BARRIER = re.compile(r"\b(?:__syncthreads|__syncwarp|cp_async_wait\s*<[^;]*?>)\s*\([^;]*?\)\s*;")
GROUPS = re.compile(r"\bcp_async_wait\s*<([^;]*?)>\s*\(")
# clang-format puts spaces around comparisons and none into template argument lists.
COMPARISON = re.compile(r"(?<= )(<=?|>=?)(?=\s)")
SHIFTED = {  # looser, stricter
    "<": ("<=", "+ 1 <"),
    "<=": ("<= 1 +", "<"),
    ">": (">=", "> 1 +"),
    ">=": ("+ 1 >=", ">"),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one source text."""

    file: str  # relative to the root
    start: int
    end: int
    replacement: str
    kind: str  # "barrier", "groups", "looser" or "stricter"

    def applied(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def key(self, text: str) -> tuple[str, str, str]:
        """(file, line before, line after): what the list of survivors knows it by."""
        first = text.rfind("\n", 0, self.start) + 1
        last = text.find("\n", self.end)
        last = len(text) if last < 0 else last
        after = text[first : self.start] + self.replacement + text[self.end : last]
        return self.file, " ".join(text[first:last].split()), " ".join(after.split())

    def line(self, text: str) -> int:
        return text.count("\n", 0, self.start) + 1


def blanked(text: str, pattern: re.Pattern[str]) -> str:
    """The text with every match turned into as many spaces; line ends stay."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Every mutant of a source text, from its beginning to its end."""
    code = blanked(blanked(text, COMMENT_OR_STRING), NOT_RUN)
    found = [Mutant(file, *m.span(), ";", "barrier") for m in BARRIER.finditer(code)]
    found += [Mutant(file, *m.span(1), f"({m[1]}) + 1", "groups") for m in GROUPS.finditer(code)]
    for match in COMPARISON.finditer(code):
        for kind, replacement in zip(("looser", "stricter"), SHIFTED[match[1]], strict=True):
            found.append(Mutant(file, *match.span(1), replacement, kind))
    yield from sorted(found, key=lambda mutant: (mutant.start, mutant.kind))


class Workshop:
    """A copy of the tree, in which mutants are built and tested."""

    def __init__(self, build: str, tests: list[str]) -> None:
        self.build, self.tests = build, tests
        self.limit: float | None = None  # seconds for the tests in one order
        for name in COPIED:
            source, target = ROOT / name, TREE / name
            if not source.is_dir():
                TREE.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
                continue
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))

    def run(
        self, command: str | list[str], limit: float | None = None, **environment: str
    ) -> tuple[int, str]:
        """Exit status (124: took too long) and output of a command in the copy."""
        process = subprocess.Popen(
            command,
            cwd=TREE,
            env={
                **os.environ,
                "PYTHONPATH": str(TREE),
                "C2C_EMULATED_LIBRARY": str(LIBRARY) if LIBRARY.exists() else "",
                **environment,
            },
            shell=isinstance(command, str),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            return 124, output
        return process.returncode, output

    def verdict(self) -> tuple[str, str]:
        """("caught" | "survived" | "does not compile", by what or why) of the copy as it is."""
        status, output = self.run(self.build) if self.build else (0, "")
        if status != 0:
            return "does not compile", output
        for order in ORDERS:
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
            status, output = self.run(
                [*command, "--tb=line", *self.tests], self.limit, C2C_EMULATE_ORDER=order
            )
            if status == 124:
                return "caught", f"{order}: takes too long"
            if status == 1:
                failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+)(?: |$)", output, re.MULTILINE)
                return "caught", f"{order}: {failed[1] if failed else 'a test'}"
            if status < 0 or status > 128:
                return "caught", f"{order}: the process died"
            if status != 0:
                sys.exit(f"pytest could not run the tests:\n{output}")
        return "survived", ""


def listed_survivors() -> dict[tuple[str, str, str], str]:
    """(file, line before, line after) -> reason, from the checked-in list."""
    entries = json.loads(SURVIVORS.read_text())
    return {(e["file"], e["before"], e["after"]): e["reason"] for e in entries}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", help="kernel sources, relative to the root")
    parser.add_argument("--build", default=BUILD, help="shell command for the copy; '': none")
    parser.add_argument("--kinds", default="barrier,groups,looser,stricter", help="which changes")
    parser.add_argument("--lines", default="", help="only lines where this regex matches")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    tests: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, tests = arguments[:split], arguments[split + 1 :]
    options = parser.parse_args(arguments)
    options.tests = tests
    options.sources = [str(Path(s).resolve().relative_to(ROOT)) for s in options.sources]
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    kinds = options.kinds.split(",")
    texts = {file: (ROOT / file).read_text() for file in options.sources}
    chosen = [
        mutant
        for file, text in texts.items()
        for mutant in mutants(file, text)
        if mutant.kind in kinds and re.search(options.lines, mutant.key(text)[1])
    ]
    if options.list:
        for mutant in chosen:
            file, before, after = mutant.key(texts[mutant.file])
            print(f"{file}:{mutant.line(texts[file])}: {mutant.kind}\n  - {before}\n  + {after}")
        print(f"{len(chosen)} mutants")
        return 0

    workshop = Workshop(options.build.replace("{python}", sys.executable), options.tests)
    started = time.monotonic()
    verdict, why = workshop.verdict()
    if verdict != "survived":
        sys.exit(f"the unchanged kernels do not pass: {verdict} {why}")
    workshop.limit = 60 + 2 * (time.monotonic() - started)
    listed = listed_survivors()
    counts: Counter[str] = Counter()
    bad = 0
    for mutant in chosen:
        text = texts[mutant.file]
        file, before, after = key = mutant.key(text)
        target = TREE / file
        started = time.monotonic()
        try:
            target.write_text(mutant.applied(text))
            verdict, why = workshop.verdict()
        finally:
            target.write_text(text)
        if verdict == "survived" and key in listed:
            verdict, why = "survived, as listed", listed[key]
        elif verdict == "survived" or (verdict == "caught" and key in listed):
            bad += 1
            why = why if verdict == "survived" else f"{why}; but listed as a survivor"
        counts[verdict] += 1
        why = "" if verdict == "does not compile" else why
        seconds = time.monotonic() - started
        print(f"{file}:{mutant.line(text)} {mutant.kind}: {verdict} {why} ({seconds:.0f} s)")
        print(f"  - {before}\n  + {after}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))

    everything = {m.key(text) for file, text in texts.items() for m in mutants(file, text)}
    for key in listed.keys() - everything:
        if key[0] in texts:
            bad += 1
            print(f"no longer there, but listed as a survivor: {key}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

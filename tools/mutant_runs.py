"""Runs collected tests with one mutant of a library of kernels at a time, in forked processes.

A process shares what this one has imported, and ends with whatever a mutant made of it. What no
mutant changes is computed once: the unchanged run keeps what `c2c_ext.reference.fuse` said.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import pytest
import torch

from c2c_ext import reference

ORDERS = ("forward", "reverse")  # C2C_EMULATE_ORDER
CAUGHT, SURVIVED = "caught", "survived"
LEAST_SECONDS = 5.0  # that a test may take with a mutant, beside five times what it took before
UNCHANGED = -1  # in place of a mutant's number
Answers = dict[tuple[str, int], object]  # (test, nth call in it) -> what the reference said


class Runs:
    """Tests by order of threads, and what the unchanged run told of them."""

    def __init__(
        self, tests: Sequence[pytest.Item], count: int, place: Path, most_seconds: float
    ) -> None:
        self.count = count  # of mutants
        self.place = place  # a directory for files
        self.most_seconds = most_seconds  # of tests of one mutant in one order
        self.tests = {}
        for order in ORDERS:  # a test that picks the order itself runs where that is its turn
            other = [o for o in ORDERS if o != order]
            chosen = [t for t in tests if parameters(t).get("order") not in other]
            self.tests[order] = {test.nodeid: test for test in chosen}
        self.seconds: dict[str, float] = {}  # of a test
        self.reached: dict[tuple[str, str], set[int]] = {}  # (order, test) -> mutants' numbers
        self.caught: Counter[str] = Counter()  # test -> mutants
        self.answers: Answers = {}

    def measure(self, library: Path) -> None:
        """Runs everything without a mutant."""
        for order in ORDERS:
            tests = list(self.tests[order])
            for said in self.run(library, UNCHANGED, order, tests, measuring=True):
                if said["result"] != "passed":
                    sys.exit(f"the unchanged kernels do not pass: {order}, {said}")
                self.seconds[said["test"]] = said["seconds"]
                self.reached[order, said["test"]] = set(said["reached"])
            self.answers.update(torch.load(self.file(order), weights_only=True))

    def file(self, order: str) -> Path:
        return self.place / f"answers_{order}.pt"

    def verdict(self, library: Path, number: int, places: set[int]) -> tuple[str, str]:
        """(CAUGHT, by what) or (SURVIVED, ""), of a mutant (UNCHANGED: of the library as it is).

        By the tests that run one of the places; first those that caught most so far, then the
        quickest of each test function, the second quickest, and so on.
        """
        for order in ORDERS:
            tests = [t for t in self.tests[order] if places & self.reached[order, t]]
            tests.sort(key=lambda test: self.seconds[test])
            turns: Counter[str] = Counter()  # of a function
            turn = {}
            for test in tests:
                function = test.partition("[")[0]
                turn[test] = turns[function]
                turns[function] += 1
            tests.sort(key=lambda test: (-self.caught[test], turn[test]))
            ends = itertools.accumulate(self.seconds[test] for test in tests)
            tests = [t for t, end in zip(tests, ends, strict=True) if end <= self.most_seconds]
            for said in self.run(library, number, order, tests):
                if said["result"] != "passed":
                    self.caught[said["test"]] += 1
                    return CAUGHT, f"{order}: {said['test'].partition('::')[2]} {said['result']}"
        return SURVIVED, ""

    def run(
        self,
        library: Path,
        number: int,
        order: str,
        tests: Sequence[str],
        measuring: bool = False,
    ) -> list[dict]:
        """{test, result, seconds, reached} of the tests, up to the first that does not pass."""
        sys.stdout.flush()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(read)
                with os.fdopen(write, "w") as say:
                    self.run_here(library, number, order, tests, measuring, say)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as heard:
            lines = [json.loads(line) for line in heard if line.endswith("}\n")]
        _, status = os.waitpid(child, 0)
        ended = [line for line in lines if "result" in line]
        if status == 0:
            return ended
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        late = killed in (signal.SIGPROF, signal.SIGALRM)
        result = "took too long" if late else f"died, status {status}"
        return [*ended, {"test": lines[-1]["test"] if lines else "none", "result": result}]

    def run_here(
        self,
        library: Path,
        number: int,
        order: str,
        tests: Sequence[str],
        measuring: bool,
        say: TextIO,
    ) -> None:
        """The forked process's part: says what it starts and what came of it."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.update(C2C_EMULATED_LIBRARY=str(library), C2C_EMULATE_ORDER=order)
        kernels = ctypes.CDLL(str(library))
        ctypes.c_int.in_dll(kernels, "c2c_mutant").value = number
        reached = (ctypes.c_ubyte * self.count).in_dll(kernels, "c2c_reached")
        failed: list[str] = []

        class Listener:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    failed.append(report.nodeid)

        items = [self.tests[order][test] for test in tests]
        if items:
            items[0].config.pluginmanager.register(Listener())
        for i, item in enumerate(items):
            test = item.nodeid
            print(json.dumps({"test": test}), file=say, flush=True)
            seconds = 600.0 if measuring else LEAST_SECONDS + 5 * self.seconds[test]
            signal.setitimer(signal.ITIMER_PROF, seconds)  # of this process's own time
            signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
            reference.fuse = remembering(self.answers, test, plain_reference)
            ctypes.memset(reached, 0, self.count)
            started = time.process_time()
            following = items[i + 1] if i + 1 < len(items) else None
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            result = {
                "test": test,
                "result": "failed" if failed else "passed",
                "seconds": time.process_time() - started,
                "reached": [i for i in range(self.count) if reached[i]] if measuring else [],
            }
            print(json.dumps(result), file=say, flush=True)
            if failed:
                return
        if measuring:
            torch.save(self.answers, self.file(order))


def parameters(test: pytest.Item) -> dict[str, object]:
    """What the test is parametrised with, by name."""
    return test.callspec.params if hasattr(test, "callspec") else {}


plain_reference = reference.fuse


def remembering(answers: Answers, test: str, function: Callable) -> Callable:
    """The function, which gives the answers that are there already and adds the others."""
    calls = 0

    def fuse(*arguments: object, **named: object) -> object:
        nonlocal calls
        key = test, calls
        calls += 1
        if key not in answers:
            answer = function(*arguments, **named)
            if torch.is_grad_enabled():  # a graph is of use to this call alone
                return answer
            answers[key] = copy.deepcopy(answer)
        return answers[key]

    return fuse

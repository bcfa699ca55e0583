"""tools/mutant_runs.py: which mutants of a library are caught, by what, and which survive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import c2c_ext

TOOLS = Path(__file__).resolve().parent.parent / "tools"
# c2c_mutant 0: wrong; 1: wrong in reverse alone; 2: crashes; 3: hangs; 4: right; 5: not reached.
LIBRARY = """\
#include <cstdlib>
#include <cstring>
extern "C" {
int c2c_mutant = -1;
unsigned char c2c_reached[6];
int answer() {
  for (int i = 0; i < 5; ++i) c2c_reached[i] = 1;
  const bool reverse = std::strcmp(std::getenv("C2C_EMULATE_ORDER"), "reverse") == 0;
  if (c2c_mutant == 2) std::abort();
  while (c2c_mutant == 3) asm volatile("");
  return c2c_mutant == 0 || (c2c_mutant == 1 && reverse) ? 41 : 42;
}
}
"""
TESTS = """\
import ctypes
import os

import pytest

@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_order(order):
    assert os.environ["C2C_EMULATE_ORDER"] == order

def test_answer():
    assert ctypes.CDLL(os.environ["C2C_EMULATED_LIBRARY"]).answer() == 42
"""
SCRIPT = """\
import json
import pathlib
import sys

import mutant_runs
import pytest

class Plugin:
    def pytest_runtestloop(self, session):
        mutant_runs.LEAST_SECONDS = 0.5
        runs = mutant_runs.Runs(session.items, 6, pathlib.Path.cwd(), 60.0)
        library = pathlib.Path("library.so").resolve()
        runs.measure(library)
        said = {n: runs.verdict(library, n, {n}) for n in range(6)}
        pathlib.Path("said.json").write_text(json.dumps([
            said,
            [sorted(runs.tests[order]) for order in mutant_runs.ORDERS],
        ]))
        return True

sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "test_it.py"], plugins=[Plugin()]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Verdicts by number, and the tests of each order."""
    place = tmp_path_factory.mktemp("runs")
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    (place / "library.cpp").write_text(LIBRARY)
    build = [compiler, "-shared", "-fPIC", "-o", "library.so", "library.cpp"]
    subprocess.run(build, cwd=place, check=True)
    (place / "test_it.py").write_text(TESTS)
    package = Path(c2c_ext.__path__[0]).parent  # the one that is tested here
    path = os.pathsep.join([str(TOOLS), str(package), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((place / "said.json").read_text())


@pytest.mark.parametrize(
    ("number", "verdict", "by"),
    [
        (0, "caught", "forward: test_answer failed"),
        (1, "caught", "reverse: test_answer failed"),
        (2, "caught", "forward: test_answer died, status 6"),
        (3, "caught", "forward: test_answer took too long"),
        (4, "survived", ""),
        (5, "survived", ""),
    ],
)
def test_a_mutant_is_caught_by_what_notices_it(said, number, verdict, by) -> None:
    assert said[0][str(number)] == [verdict, by]


def test_a_test_of_one_order_runs_in_that_order_alone(said) -> None:
    assert said[1] == [
        ["test_it.py::test_answer", f"test_it.py::test_order[{order}]"]
        for order in ("forward", "reverse")
    ]


def test_answers_are_remembered_but_not_those_with_a_graph(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import mutant_runs

    weight, asked = torch.ones(2, requires_grad=True), []

    def reference(scale: float) -> list[torch.Tensor]:
        asked.append(scale)
        return [scale * weight]

    answers: dict = {}
    for _ in range(2):  # a test runs once for every mutant
        fuse = mutant_runs.remembering(answers, "a test", reference)
        with torch.no_grad():
            assert fuse(2.0)[0].tolist() == [2.0, 2.0]
        (gradient,) = torch.autograd.grad(fuse(3.0)[0].sum(), weight)
        assert gradient.tolist() == [3.0, 3.0]
        with torch.no_grad():
            assert fuse(4.0)[0].tolist() == [4.0, 4.0]
    assert asked == [2.0, 3.0, 4.0, 3.0]

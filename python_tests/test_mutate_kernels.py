"""tools/mutate_kernels.py: which mutants it makes of a source."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SOURCE = """\
#if VERSION < 3
#endif
// waits < here: __syncthreads();
template <class T, int kStages>
__global__ void f_kernel(const T* x, int rows) {
  static_assert(sizeof(T) <= 8, "a < b");
  for (int i = 0; i < rows && x[i] >= T(1); ++i) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
  }
  if (rows > 3) __syncwarp(0xff);  // rows <= 3
  if (rows <= g<T, 3>(x)) h<int>(x);
}
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutate_kernels", TOOLS / "mutate_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_every_barrier_and_bound_gives_its_mutants(tool: ModuleType) -> None:
    condition = "if (rows > 3) __syncwarp(0xff); // rows <= 3"
    last = "if (rows <= g<T, 3>(x)) h<int>(x);"
    loop = "for (int i = 0; i {} rows && x[i] {} T(1); ++i) {{"
    assert [m.key(SOURCE)[1:] for m in tool.mutants("f.cu", SOURCE)] == [
        (loop.format("<", ">="), loop.format("<=", ">=")),
        (loop.format("<", ">="), loop.format("+ 1 <", ">=")),
        (loop.format("<", ">="), loop.format("<", "+ 1 >=")),
        (loop.format("<", ">="), loop.format("<", ">")),
        ("cp_async_wait<kStages - 2>();", ";"),
        ("cp_async_wait<kStages - 2>();", "cp_async_wait<(kStages - 2) + 1>();"),
        ("__syncthreads();", ";"),
        (condition, condition.replace("> 3", ">= 3")),
        (condition, condition.replace("> 3", "> 1 + 3")),
        (condition, condition.replace("__syncwarp(0xff);", ";")),
        (last, last.replace("<= g", "<= 1 + g")),
        (last, last.replace("<= g", "< g")),
    ]


def test_a_mutant_changes_its_own_place_only(tool: ModuleType) -> None:
    for mutant in tool.mutants("f.cu", SOURCE):
        changed = mutant.applied(SOURCE)
        assert changed != SOURCE
        assert changed[: mutant.start] == SOURCE[: mutant.start]
        assert changed.endswith(SOURCE[mutant.end :])
        assert changed.count("\n") == SOURCE.count("\n")


def test_every_listed_survivor_has_a_reason_and_is_a_mutant(tool: ModuleType) -> None:
    root = TOOLS.parent
    entries = json.loads((TOOLS / "surviving_mutants.json").read_text())
    for entry in entries:
        assert set(entry) == {"file", "before", "after", "reason"} and entry["reason"].strip()
        text = (root / entry["file"]).read_text()
        made = {mutant.key(text) for mutant in tool.mutants(entry["file"], text)}
        assert (entry["file"], entry["before"], entry["after"]) in made

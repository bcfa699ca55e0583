"""tools/kernel_mutants.py, tools/mutate_kernels.py: which mutants there are, and their switches."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
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
CONSTANTS = """\
constexpr int larger(int a, int b) {
  if (a > b) return a;
  return b;
}
struct alignas(kSize < 16 ? kSize : 16) Pack {};
static constexpr int kBytes = kFirst > kSecond ? kFirst : kSecond;
void f(int n) {
  if constexpr (kBytes > 0) {
    if (n < 3) g();
  }
  if constexpr (kBytes > 1) __syncthreads();
  constexpr int kGroup = kBytes <= 4 ? 1 : 4;
}
bool h(int n) { return n >= 0; }
"""
# What a switched text needs of the emulation, and a program that prints what each mutant does.
PROGRAM = """\
#include <cstdio>
#include <cstdlib>
inline void __syncthreads() {{ std::printf(" barrier"); }}
template <int kNewest> void cp_async_wait() {{ std::printf(" wait %d", kNewest); }}
{switched}
int main(int, char** arguments) {{
  for (c2c_mutant = -1; c2c_mutant < {count}; ++c2c_mutant) {{
    for (int i = 0; i < {count}; ++i) c2c_reached[i] = 0;
    std::printf("%d:", c2c_mutant);
    f(true);
    std::printf(" reached");
    for (int i = 0; i < {count}; ++i) std::printf("%c", c2c_reached[i] ? '1' : '0');
    std::printf("\\n");
  }}
}}
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        yield importlib.import_module("kernel_mutants")
    finally:
        sys.path.remove(str(TOOLS))


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


def test_what_the_compiler_has_to_know_gets_no_switch(tool: ModuleType) -> None:
    made = list(tool.mutants("f.cu", CONSTANTS))
    switched = {m.key(CONSTANTS)[1] for m in made if not m.constant}
    assert switched == {
        "if (n < 3) g();",
        "if constexpr (kBytes > 1) __syncthreads();",  # its barrier
        "bool h(int n) { return n >= 0; }",
    }
    assert sum(m.constant for m in made) == 2 * 6


def test_a_switched_source_behaves_as_each_of_its_mutants(tool: ModuleType, tmp_path) -> None:
    """Each comparison is asked at, below and above its bound; compiled, and run for each mutant."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    source = """\
void f(bool) {
  unsigned count = 2;
  for (int i = 1; i <= 3; ++i) std::printf(" %d", i < 2);
  for (double x = 1; x < 4; ++x) std::printf(" %d", x > 2.0);
  for (int i = 1; i < 4; ++i) std::printf(" %d", unsigned(i) >= count);
  if (count > 0) __syncthreads();
  cp_async_wait<3 - 1>();
}
"""
    numbered = dict(enumerate(tool.mutants("f.cu", source)))
    assert len(numbered) == 2 * 7 + 1 + 2

    def said(text: str, head: str, name: str) -> list[str]:
        file = tmp_path / f"{name}.cpp"
        file.write_text(head + PROGRAM.format(switched=text, count=len(numbered)))
        program = tmp_path / name
        subprocess.run([compiler, "-std=c++17", "-w", "-o", program, file], check=True)
        done = subprocess.run([program], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def of(line: str) -> str:
        return re.sub(r"^\S+|reached.*", "", line)

    head = tool.header(len(numbered))
    lines = said(tool.switched(source, numbered), head, "switched")
    assert len({of(line) for line in lines}) > 12  # they differ
    assert lines[0].endswith("reached" + "1" * len(numbered))
    assert of(lines[0]) == of(said(source, head, "original")[0])
    for number, mutant in numbered.items():
        alone = said(mutant.applied(source), head, f"mutant{number}")
        assert of(lines[number + 1]) == of(alone[0]), mutant


def test_every_listed_survivor_has_a_reason_and_is_a_mutant(tool: ModuleType) -> None:
    root = TOOLS.parent
    entries = json.loads((TOOLS / "surviving_mutants.json").read_text())
    for entry in entries:
        assert set(entry) == {"file", "before", "after", "reason"} and entry["reason"].strip()
        text = (root / entry["file"]).read_text()
        made = {mutant.key(text) for mutant in tool.mutants(entry["file"], text)}
        assert (entry["file"], entry["before"], entry["after"]) in made

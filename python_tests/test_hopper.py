"""The Hopper path without a Hopper GPU: its index arithmetic, and its stages on the CPU.

wgmma and the bulk tensor copy engine are not emulated: what they are told (descriptors, layouts,
barrier phases) is checked against the PTX ISA, and everything around them runs in emulation with
plain products (hopper_layout_checks.cpp, hopper_fuse_checks.cpp). What only a GPU can show is in
benchmarks/hopper_selfcheck.cu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from conftest import assert_fused, flat, make_caches, make_config, make_fuser, same_bits

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent / "csrc" / "cuda"


def compiled(place: Path, source: str, *options: str) -> Path:
    """What CMake's compiler makes of a source file of the tests."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "the checkout is built with a C++ compiler, and none is on PATH or in CXX"
    program = place / Path(source).stem
    command = [*compiler.split(), "-std=c++17", "-O2", "-Wall", "-Wextra", "-o", str(program)]
    build = subprocess.run([*command, str(HERE / source), *options], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return program


def check(program: Path, *arguments: str) -> str:
    ran = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, f"{ran.returncode}: {ran.stdout}{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("hopper"), "hopper_layout_checks.cpp")


def test_wgmma_reads_through_its_descriptors_what_the_copy_engine_wrote(layout: Path) -> None:
    check(layout, "descriptors")


def test_every_sum_of_a_tile_belongs_to_the_register_that_the_isa_says(layout: Path) -> None:
    check(layout, "fragments")


def test_no_stage_is_overwritten_before_it_was_read_and_nobody_waits_forever(layout: Path) -> None:
    check(layout, "barriers")


def test_stages_and_epilogues_compute_the_fuser(tmp_path: Path) -> None:
    emulated = ("-DC2C_EMULATE", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
    sources = [str(CUDA / name) for name in ("hopper_gemm.cu", "row_kernels.cu")]
    program = compiled(
        tmp_path,
        "hopper_fuse_checks.cpp",
        *emulated,
        str(CUDA / "hopper_fuse.cpp"),
        *("-x", "c++", *sources),
    )
    assert len(check(program).splitlines()) == 11  # every case says how near it came


@pytest.mark.parametrize("changes", [{"depth": 4}, {"depth": 5, "weighting": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_op_takes_this_path_where_it_is_asked_for(dtype, changes, monkeypatch) -> None:
    config = make_config(
        ((4, 32),), ((2, 32),), (0,), hidden_size=128, intermediate_size=128, **changes
    )
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 70, dtype=dtype)
    ours = {}
    for path in ("hopper", "fused"):
        monkeypatch.setenv("C2C_EXT_CUDA_PATH", path)
        ours[path] = emulated.run_op(fuser, base, sharer)
        assert_fused(fuser, base, sharer, ours[path])
    # They sum in other orders.
    tensors = zip(flat(ours["hopper"]), flat(ours["fused"]), strict=True)
    assert not all(same_bits(a, b) for a, b in tensors)


def test_what_this_path_does_not_run_goes_through_the_others(monkeypatch) -> None:
    config = make_config()
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, 5)
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", "hopper")
    ours = emulated.run_op(fuser, base, sharer)
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", "plain")
    plain = emulated.run_op(fuser, base, sharer)
    assert all(same_bits(a, b) for a, b in zip(flat(ours), flat(plain), strict=True))

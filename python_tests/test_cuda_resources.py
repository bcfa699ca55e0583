"""The recorded table of what CUDA kernels need (`make check-cuda`): complete, and no spills."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = json.loads((ROOT / "benchmarks" / "results" / "cuda_resources.json").read_text())["rows"]
SPILLS_ALLOWED: dict[str, str] = {}  # kernel -> why


def load_tool():
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "tools" / "check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_is_in_the_table():
    recorded = {(row["source"], row["architecture"]) for row in ROWS}
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        wanted = {"sm_90a"} if source.name.startswith("hopper") else {"sm_80", "sm_90a"}
        assert {(source.name, architecture) for architecture in wanted} <= recorded


def test_no_kernel_spills_registers():
    assert len(ROWS) > 0
    for row in ROWS:
        if row["kernel"] not in SPILLS_ALLOWED:
            assert (row["spill_stores"], row["spill_loads"]) == (0, 0), row


def test_no_row_kernel_keeps_a_stack():
    """Neither an array that is indexed at run time nor a copy of the streams' views."""
    for source in ("row_kernels.cu", "train_kernels.cu", "train_cache_kernels.cu"):
        rows = [row for row in ROWS if row["source"] == source]
        assert rows and all(row["stack"] == 0 for row in rows), source


REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstPf' for 'sm_80'
ptxas info    : Function properties for _Z5firstPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z6secondPf' for 'sm_80'
ptxas info    : Function properties for _Z6secondPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 360 bytes cmem[0]
"""


def test_the_report_is_read_kernel_by_kernel():
    kernels = load_tool().parse(REPORT)
    assert list(kernels["_Z5firstPf"].values()) == [32, 64, 16, 4, 8]
    assert list(kernels["_Z6secondPf"].values()) == [255, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="ptxas said something unknown"):
        load_tool().parse(REPORT.replace("spill stores", "spilled"))

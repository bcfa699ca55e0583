"""Every compiled variant of the CPU kernels, whatever this CPU would choose by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED = {
    "baseline": {"baseline"},
    "avx2": {"baseline", "avx2"},
    "avx512": {"baseline", "avx2", "avx512"},
    "avx512bf16": {"baseline", "avx2", "avx512", "avx512bf16"},
}
CHECK = """
import torch
import c2c_ext
from conftest import DTYPES, SHAPES, assert_fused, make_caches, make_config, make_fuser, run_op

for shape in SHAPES.values():
    for dtype in DTYPES:
        config = make_config(**shape)
        fuser = make_fuser(config)
        base, sharer = make_caches(config, 2, 33, dtype=dtype)
        token_map = torch.arange(33).flip(0).clone()
        token_map[5] = -1
        for mapped in (None, token_map):
            assert_fused(fuser, base, sharer, run_op(fuser, base, sharer, mapped), mapped)
print(c2c_ext.build_info()["cpu_instruction_set"])
"""


def run(limit: str, code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"C2C_EXT_CPU_ISA": limit}
    path = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    environment["PYTHONPATH"] = path.rstrip(os.pathsep)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("limit", ALLOWED)
def test_variant_is_as_good_as_plain(limit: str) -> None:
    done = run(limit, CHECK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ALLOWED[limit]


@pytest.mark.parametrize("limit", list(ALLOWED)[:-1])
def test_stages_hold_with_less(limit: str) -> None:
    """The best set is what test_stages.py itself runs with."""
    tests = Path(__file__).parent / "test_stages.py"
    arguments = ["-q", "-p", "no:cacheprovider", str(tests)]
    done = run(limit, f"import pytest; raise SystemExit(pytest.main({arguments}))")
    assert done.returncode == 0, done.stdout[-4000:]


def test_unknown_limit_is_refused() -> None:
    done = run("sse9", "import c2c_ext; c2c_ext.build_info()")
    assert done.returncode != 0
    assert "C2C_EXT_CPU_ISA must be baseline, avx2, avx512 or avx512bf16, got sse9" in done.stderr

"""benchmarks/gpu_check.sh without a GPU: its parts, its time, its benchmarks' options."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import test_bench
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_check.sh"

scripts = test_bench.scripts


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *options], capture_output=True, text=True)


@pytest.fixture
def recorded(tmp_path):
    """Runs parts with a Python that only writes down its arguments; returns them, call by call."""
    calls, stub = tmp_path / "calls", tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nfor a in "$@"; do printf "%s " "$a"; done >> {calls}\n')
    stub.write_text(stub.read_text() + f"echo >> {calls}\n")
    stub.chmod(0o755)

    def record(*parts: str) -> list[list[str]]:
        done = run("--python", str(stub), "--out", str(tmp_path / "out"), *parts)
        assert done.returncode == 0, done.stdout + done.stderr
        return [shlex.split(line) for line in calls.read_text().splitlines()]

    return record


def test_every_benchmark_takes_the_options_it_is_given(recorded, scripts, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = recorded("bench")
    written = []
    for script, *options in calls:
        name = Path(script).stem
        with pytest.raises(SystemExit, match=f"{name}.py: --device cuda needs a GPU"):
            scripts(name).main(options)
        written.append(Path(options[options.index("--output") + 1]).name)
    assert written == [
        "fuse_cuda_bf16.json",
        "generate_cuda.json",
        "kernels_cuda.json",
        "compiled_cuda.json",
        *("fuse_cuda_fp16.json", "fuse_cuda_fp32.json"),
        *("fuse_cuda_batches.json", "fuse_cuda_large.json"),
        "train_cuda.json",
    ]


def test_what_fills_the_table_has_paths_and_every_bucket(recorded) -> None:
    (first, *_) = recorded("fuse")
    assert "--cuda-paths plain fused hopper" in " ".join(first)
    assert "--tokens 1 16 64 170 512 2048 8192" in " ".join(first)


def test_a_part_can_be_run_by_itself(recorded) -> None:
    assert [Path(call[0]).name for call in recorded("stages", "generate")] == [
        "bench_kernels.py",
        "bench_generate.py",
    ]


def test_the_tests_part_runs_the_tests_of_a_gpu(recorded) -> None:
    (call,) = recorded("tests")
    assert call[:2] == ["-m", "pytest"] and "python_tests/test_cuda.py" in call


def test_the_build_part_builds_installs_and_tells_what_it_built(recorded, tmp_path, monkeypatch):
    """`timeout` runs programs only, and the part is several."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").symlink_to(tmp_path / "python")  # the one that writes down
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    configure, build, install, info = recorded("build")
    assert "-DC2C_EXT_CUDA=1" in configure
    assert (build[0], install[0]) == ("--build", "--install")
    assert info == ["-m", "c2c_ext.cli", "info"]


def test_a_part_that_fails_fails_the_whole(tmp_path) -> None:
    done = run("--python", "false", "--out", str(tmp_path), "stages")
    assert done.returncode == 1 and "kernels_cuda: FAILED (1)" in done.stdout


def test_the_hopper_part_fails_where_no_gpu_answers(tmp_path) -> None:
    """Not the same as a GPU that has no such kernels, for which it is left out."""
    done = run("--python", "false", "--out", str(tmp_path), "hopper")
    assert done.returncode == 1 and "hopper: FAILED" in done.stdout


@pytest.mark.parametrize(("answer", "status"), [("8.0", 0), ("9.0", 1)])
def test_the_hopper_part_is_for_one_kind_of_gpu(tmp_path, monkeypatch, answer, status) -> None:
    stub, nvcc = tmp_path / "python", tmp_path / "nvcc"
    stub.write_text(f"#!/bin/sh\necho {answer}\n")
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    for program in (stub, nvcc):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = run("--python", str(stub), "--out", str(tmp_path / "out"), "hopper")
    assert done.returncode == status, done.stdout
    said = "FAILED (1)" if status else "left out: not a GPU of compute capability 9.0,"
    assert done.stdout.startswith(f"hopper: {said}") and "passed" not in done.stdout


def test_no_part_begins_when_the_time_is_over(tmp_path) -> None:
    done = run("--python", sys.executable, "--out", str(tmp_path), "--seconds", "4", "stages")
    assert done.returncode == 1 and "kernels_cuda: NOT RUN, the 4 s are over" in done.stdout


def test_an_unknown_part_is_refused_with_the_usage(tmp_path) -> None:
    done = run("everything")
    assert done.returncode == 2 and "usage: benchmarks/gpu_check.sh" in done.stderr
    for part in ("build", "hopper", "sanitizer", "fuse", "generate", "stages", "batches", "train"):
        assert part in done.stderr


def test_what_the_sanitizers_watch_runs(tmp_path) -> None:
    """On the CPU's ops; that it reaches every kernel only a GPU can tell."""
    assert run("--python", "true", "--out", str(tmp_path), "stages").returncode == 0
    text = (tmp_path / "small.py").read_text()
    for on_gpu, here in (
        ('"cuda"', '"cpu"'),
        ("torch.cuda.get_device_capability()", "None"),
        ("torch.cuda.synchronize()", ""),
    ):
        assert on_gpu in text
        text = text.replace(on_gpu, here)
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=SCRIPT.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

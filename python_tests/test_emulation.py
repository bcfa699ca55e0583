"""The host emulation of CUDA: each primitive is right, and wrong kernels are noticed.

The checks are C++ (emulation_checks.cpp, emulation_faults.cpp) and need no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DEVICE = HERE.parent / "csrc" / "cuda"
ORDERS = ("forward", "reverse")
AT = r" \(emulation_faults\.cpp:\d+\)"
WHERE = r"c2c_ext emulation: kernel check_kernel, block \(0, 0, 0\)"
THREAD = WHERE + r", thread \(\d+, 0, 0\): "

Run = Callable[[str, str], str]


def names(source: str) -> list[str]:
    return re.findall(r"\bCHECK\((\w+)\)", (HERE / source).read_text())


def compiler() -> str:
    """What CMake would take."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    found = found or shutil.which("clang++")
    assert found, "the checkout is built with a C++ compiler, and none is on PATH or in CXX"
    return found


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a check in an order of threads; gives what it says."""
    place = tmp_path_factory.mktemp("emulation")
    options = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-I{DEVICE}"]
    programs = {}
    for source in ("emulation_checks.cpp", "emulation_faults.cpp"):
        program = place / Path(source).stem
        command = [*compiler().split(), *options, str(HERE / source), "-o", str(program)]
        build = subprocess.run(command, capture_output=True, text=True)
        assert build.returncode == 0, build.stderr
        programs.update(dict.fromkeys(names(source), program))

    def run_check(name: str, order: str) -> str:
        environment = {**os.environ, "C2C_EMULATE_ORDER": order}
        ran = subprocess.run(
            [programs[name], name], env=environment, capture_output=True, text=True, timeout=60
        )
        assert ran.returncode in (0, 1), f"{name}: {ran.returncode} {ran.stderr}"
        assert (ran.returncode == 0) == ran.stdout.endswith("ok\n"), ran.stdout
        return ran.stdout.rstrip("\n")

    return run_check


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", names("emulation_checks.cpp"))
def test_primitive_agrees_with_a_plain_computation(name: str, order: str, run: Run) -> None:
    assert run(name, order) == "ok"


@pytest.mark.parametrize(
    ("name", "wrong_in"),
    [
        ("missing_barrier_before_reading_a_later_thread", "forward"),
        ("missing_barrier_before_reading_an_earlier_thread", "reverse"),
        ("missing_syncwarp_before_reading_a_later_lane", "forward"),
        ("missing_syncwarp_before_reading_an_earlier_lane", "reverse"),
        ("missing_barrier_before_the_first_thread_writes_again", "forward"),
        ("missing_barrier_before_the_last_thread_writes_again", "reverse"),
        ("a_result_that_depends_on_the_order_of_blocks", "reverse"),
    ],
)
def test_a_race_shows_in_one_of_the_two_orders(name: str, wrong_in: str, run: Run) -> None:
    for order in ORDERS:
        assert run(name, order).startswith("expected: the") == (order == wrong_in)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_wait", "expected: what was copied"),
        ("overrun_of_dynamic_shared_memory", WHERE + ": wrote outside its dynamic shared memory"),
        ("underrun_of_dynamic_shared_memory", WHERE + ": wrote outside its dynamic shared memory"),
        (
            "divergent_barrier",
            WHERE + ": threads wait at different barriers: "
            f"32 at __syncthreads{AT}, 32 at __syncthreads{AT}",
        ),
        (
            "barrier_that_one_lane_reaches",
            WHERE + ": no thread can go on: "
            f"31 at __shfl_xor_sync of lanes 0xffffffff{AT}, 1 at __syncthreads{AT}",
        ),
        (
            "shuffles_that_do_not_meet",
            WHERE + ": no thread can go on: 16 at __shfl_xor_sync of lanes 0xffffffff"
            f"{AT}, 16 at __shfl_xor_sync of lanes 0xffffffff{AT}",
        ),
        (
            "shuffle_of_a_lane_that_is_not_there",
            WHERE + f": no thread can go on: 31 at __shfl_xor_sync of lanes 0xffffffff{AT}",
        ),
        (
            "shuffle_whose_mask_lacks_the_caller",
            THREAD + f"__shfl_xor_sync: the mask lacks the calling lane{AT}",
        ),
        (
            "shuffle_of_a_wrong_width",
            THREAD + f"__shfl_xor_sync: width must be 1, 2, 4, 8, 16 or 32, got 12{AT}",
        ),
        (
            "product_without_a_lane",
            WHERE + f": no thread can go on: 31 at mma_m16n8k16 of lanes 0xffffffff{AT}, "
            "1 returned",
        ),
        (
            "copy_from_a_misaligned_address",
            THREAD + f"cp_async_16: the global address is no multiple of 16{AT}",
        ),
        (
            "copy_to_a_misaligned_address",
            THREAD + f"cp_async_16: the shared address is no multiple of 16{AT}",
        ),
        (
            "copy_to_global_memory",
            THREAD + f"cp_async_16: the address is not in the block's shared memory{AT}",
        ),
        (
            "copy_to_behind_shared_memory",
            THREAD + f"cp_async_16: the address is not in the block's shared memory{AT}",
        ),
        (
            "matrix_rows_at_misaligned_addresses",
            THREAD + f"ldmatrix_x4: the shared address is no multiple of 16{AT}",
        ),
        (
            "matrix_rows_behind_shared_memory",
            THREAD + f"ldmatrix_x4: the address is not in the block's shared memory{AT}",
        ),
        (
            "too_many_threads",
            "c2c_ext emulation: kernel check_kernel: blocks have 1 to 1024 threads, "
            r"at most 64 deep, got \(32, 33, 1\)",
        ),
        (
            "too_many_blocks",
            "c2c_ext emulation: kernel check_kernel: grids have at most "
            r"2147483647 x 65535 x 65535 blocks, got \(1, 65536, 1\)",
        ),
        (
            "too_much_shared_memory",
            "c2c_ext emulation: kernel check_kernel: dynamic shared memory has at most "
            "232448 bytes, got 232449",
        ),
        ("the_next_launch_is_right_after_an_error", "ok"),
    ],
)
def test_a_fault_is_noticed_and_named(name: str, message: str, order: str, run: Run) -> None:
    said = run(name, order)
    assert re.fullmatch(message, said), said


@pytest.mark.parametrize(("order", "entered"), [("forward", 41), ("reverse", 24)])
def test_every_thread_that_was_entered_is_unwound_after_an_error(
    order: str, entered: int, run: Run
) -> None:
    assert run("every_thread_is_unwound_after_an_error", order) == f"{entered} unwound\nok"


def test_an_error_names_the_line_of_the_call(run: Run) -> None:
    lines = (HERE / "emulation_faults.cpp").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith("// the first barrier")]
    assert f"emulation_faults.cpp:{number})" in run("divergent_barrier", "forward")


def test_an_unknown_order_is_refused(run: Run) -> None:
    assert run("missing_wait", "random") == (
        "c2c_ext emulation: C2C_EMULATE_ORDER must be forward or reverse, got 'random'"
    )

"""What a benchmark ran on: machine, versions, commit; and the memory that a call needs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from . import build_info, cuda_paths
from .info import describe

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
# Environment variables that change which instructions or kernels run, or on how many threads.
VARIABLES = (
    cuda_paths.VARIABLE,
    *("C2C_EXT_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY"),
)
PACKAGE = Path(__file__).resolve().parent


def environment(root: Path = PACKAGE.parent) -> dict[str, Any]:
    """Everything about machine and software that a time may depend on.

    Args:
        root: the checkout that the benchmark belongs to. Its commit is recorded, if it is one; of
            a copy without history, what C2C_EXT_COMMIT says: 40 digits, then -dirty if changed.
    """
    commit, dirty = commit_of(root)
    if commit is None:
        commit, dirty = _commit_told()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "package": "checkout" if PACKAGE.parent == root.resolve() else "installed",
        **describe(),
        "instruction_set": build_info()["cpu_instruction_set"],
        "os": f"{platform.system()} {platform.release().partition('-')[0]}, "
        + " ".join(platform.libc_ver()),
        "logical_cpus": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "cache_bytes": cache_sizes(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "parallel": [s.strip() for s in torch.__config__.parallel_info().splitlines() if s.strip()],
    }


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); (None, None) where ``root`` is no checkout.

    A directory inside another project's checkout is none.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None, None
        return git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno") != ""
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _commit_told() -> tuple[str | None, bool | None]:
    """As `commit_of`, of a copy without history: by the environment variable C2C_EXT_COMMIT."""
    told = os.environ.get("C2C_EXT_COMMIT")
    if told is None:
        return None, None
    if not re.fullmatch("[0-9a-f]{40}(-dirty)?", told):
        raise ValueError(f"C2C_EXT_COMMIT must be 40 digits and perhaps -dirty, got {told!r}")
    return told[:40], told.endswith("-dirty")


def cache_sizes() -> dict[str, int]:
    """Bytes by name (L1d, L2, ...) of the caches that the first CPU has or shares."""
    sizes = {}
    try:
        for index in sorted(CACHES.glob("index*")):
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            if kind != "Instruction":
                name = f"L{level}" + ("d" if kind == "Data" else "")
                sizes[name] = int(size.removesuffix("K")) << 10
    except (OSError, ValueError):
        pass  # not Linux on real hardware: unknown
    return sizes


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the machine does not tell."""
    return max(cache_sizes().values(), default=32 << 20)


def peak_memory(run: Callable[[], object]) -> tuple[int, int] | None:
    """(bytes resident before, most bytes resident during) ``run()``; Linux, else None.

    Resident memory of the whole process, by the kernel's own high-water mark.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the mark so far
        before = resident_memory()
    except OSError:
        return None
    run()
    return before, _status("VmHWM")


def resident_memory() -> int:
    """Bytes of this process that are in memory now; Linux."""
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    raise OSError(f"/proc/self/status has no {field}")

"""The CUDA kernels: a library beside the module, loaded only where torch has CUDA."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from .shared_library import check_whole

HOW_TO_BUILD = "install the CUDA toolkit (nvcc) and run `C2C_EXT_CUDA=1 pip install .` again"


def load(directory: Path) -> str | None:
    """Registers the CUDA kernels of ``torch.ops.c2c``.

    Args:
        directory: holds ``libc2c_ext_cuda.so``, if the build made one.

    Returns:
        Why there are none; None where they are registered. Never raises: everything else works
        without them.
    """
    library = directory / "libc2c_ext_cuda.so"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not library.exists():
        return f"this build of c2c_ext has no CUDA kernels; to have them, {HOW_TO_BUILD}"
    try:
        check_whole(library)
        torch.ops.load_library(library)
        driver, runtime = _versions(library)
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{library.name} cannot be loaded ({error}); {HOW_TO_BUILD}"
    return driver_obstacle(driver, runtime)


def _versions(library: Path) -> tuple[int, int]:
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(library)).c2c_cuda_versions(ctypes.byref(driver), ctypes.byref(runtime))
    return driver.value, runtime.value


def driver_obstacle(driver: int, runtime: int) -> str | None:
    """What keeps kernels of one CUDA (13000 is 13.0) from running with a driver for another.

    A driver runs every CUDA of its own major version and all older ones; torch's own CUDA may be
    older than that of these kernels. No driver (0) is no obstacle: there is no GPU either.
    """
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the CUDA kernels were built with CUDA {runtime // 1000}, this machine's GPU driver is "
        f"for CUDA {driver // 1000}.{driver % 1000 // 10}; update the driver, or {HOW_TO_BUILD} "
        "with an older toolkit"
    )

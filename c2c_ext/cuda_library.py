"""The CUDA kernels: a library beside the module, loaded only where torch has CUDA."""

from __future__ import annotations

from pathlib import Path

import torch

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
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{library.name} cannot be loaded ({error}); {HOW_TO_BUILD}"
    return None

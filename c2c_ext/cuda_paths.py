"""The CUDA op's paths: which there are, how one is asked for, and which `auto` takes where."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

VARIABLE = "C2C_EXT_CUDA_PATH"  # read by the op at every call
PATHS = ("plain", "fused", "hopper")

# (compute capability times ten, dtype, above, up to so many rows, path), of csrc/cuda/dispatch.h.
DispatchRow = tuple[int, str, int, int, str]


@contextmanager
def asked_for(path: str) -> Iterator[None]:
    """Has the op take ``path`` (of `PATHS`, or ``"auto"``) while it lasts, in the whole process."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def describe(table: Sequence[DispatchRow], asked: str | None) -> str:
    """One line: the paths, and which is taken.

    Args:
        table: ``build_info()["cuda_dispatch"]``.
        asked: value of the environment variable `VARIABLE`, if it is set.
    """
    line = f"{', '.join(PATHS)} ({VARIABLE} chooses); "
    if asked in PATHS:
        line += f"it says {asked}; auto would take "
    elif asked not in (None, "", "auto"):
        line += f"it says {asked!r}, which the op refuses; auto would take "
    else:
        line += "auto, the default, takes "
    if not table:
        return line + "plain everywhere: no path has been measured on a GPU"
    chosen = [
        f"{path} on {capability / 10:.1f}, {dtype}, {above + 1}..{up_to} rows"
        for capability, dtype, above, up_to, path in table
    ]
    return line + "; ".join(chosen) + "; else plain: nothing else has been measured"

"""Says in one sentence that torch is missing, broken or too old, before a loader error does."""

import os
import re
import sys

MINIMUM_TORCH = "2.10"  # as `dependencies` in pyproject.toml and C2C_ABI_TARGET in CMakeLists.txt


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version string; ``(0, 0)`` for what is none."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return tuple(int(n) for n in numbers.groups()) if numbers else (0, 0)


try:
    import torch
except ImportError as error:
    raise ImportError(
        f"c2c_ext needs torch {MINIMUM_TORCH} or newer, which cannot be imported here: {error}"
    ) from error
except KeyboardInterrupt:
    # Takes seconds, before the command line's own code runs; Ctrl-C is no error there.
    if os.path.basename(sys.argv[0]) == "c2c":
        sys.exit(130)
    raise

if release(torch.__version__) < release(MINIMUM_TORCH):
    raise ImportError(
        f"c2c_ext needs torch {MINIMUM_TORCH} or newer (its stable ABI), found {torch.__version__}"
    )

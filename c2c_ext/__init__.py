"""Cache-to-Cache: a sharer LLM hands its KV-cache to a receiver LLM (arXiv 2510.03215)."""

from importlib.metadata import PackageNotFoundError, version

from .config import FuserConfig
from .fuser import Fuser
from .fusion import fuse
from .layer_map import layer_map
from .ops import _C

try:
    __version__ = version("c2c_ext")
except PackageNotFoundError:  # used from a checkout, built by CMake alone
    __version__ = _C.build_info()["version"]

build_info = _C.build_info

__all__ = ["Fuser", "FuserConfig", "__version__", "build_info", "fuse", "layer_map"]

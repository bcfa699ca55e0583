"""Cache-to-Cache: a sharer LLM hands its KV-cache to a receiver LLM (arXiv 2510.03215)."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import requirements  # noqa: F401  first: says in one sentence what is wrong with torch
from .config import FuserConfig
from .fuser import Fuser
from .fusion import fuse
from .layer_map import layer_map
from .model_card import CardInfo, CardMetric
from .ops import _C
from .positions import Positions

if TYPE_CHECKING:
    from .alignment import TokenAligner
    from .generation import attach, attached, detach

try:
    __version__ = version("c2c_ext")
except PackageNotFoundError:  # used from a checkout, built by CMake alone
    __version__ = _C.build_info()["version"]

build_info = _C.build_info

__all__ = [
    "CardInfo",
    "CardMetric",
    "Fuser",
    "FuserConfig",
    "Positions",
    "TokenAligner",
    "__version__",
    "attach",
    "attached",
    "build_info",
    "detach",
    "fuse",
    "layer_map",
]


def __getattr__(name: str) -> Any:
    # These import transformers, which takes longer than all of the rest.
    if name in ("attach", "attached", "detach"):
        from . import generation

        return getattr(generation, name)
    if name == "TokenAligner":
        from .alignment import TokenAligner

        return TokenAligner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

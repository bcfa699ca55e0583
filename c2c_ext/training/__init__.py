"""Training a fuser between two frozen models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gates import GateSampler
    from .model import C2CTrainingModel, parameter_groups

# Imported on first use: most of them import transformers.
_HOMES = {
    "C2CTrainingModel": "model",
    "GateSampler": "gates",
    "parameter_groups": "model",
}

__all__ = ["C2CTrainingModel", "GateSampler", "parameter_groups"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

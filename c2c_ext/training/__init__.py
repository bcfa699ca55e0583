"""Training a fuser between two frozen models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cached_collator import CachedCollator, prompts_of
    from .gates import GateSampler
    from .layout import Layout, lay_out
    from .model import C2CTrainingModel, parameter_groups
    from .prompt_cache_writer import write_prompt_caches
    from .prompt_caches import PromptCaches

# Imported on first use: most of them import transformers.
_HOMES = {
    "C2CTrainingModel": "model",
    "CachedCollator": "cached_collator",
    "GateSampler": "gates",
    "Layout": "layout",
    "PromptCaches": "prompt_caches",
    "lay_out": "layout",
    "parameter_groups": "model",
    "prompts_of": "cached_collator",
    "write_prompt_caches": "prompt_cache_writer",
}

__all__ = [
    "C2CTrainingModel",
    "CachedCollator",
    "GateSampler",
    "Layout",
    "PromptCaches",
    "lay_out",
    "parameter_groups",
    "prompts_of",
    "write_prompt_caches",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Training a fuser between two frozen models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import training_arguments
    from .cached_collator import CachedCollator, prompts_of
    from .collator import ChatCollator, ChatDataset, Encoder
    from .gates import GateSampler
    from .layout import Layout, lay_out
    from .model import C2CTrainingModel, parameter_groups
    from .prompt_cache_writer import write_prompt_caches
    from .prompt_caches import PromptCaches
    from .recipes import Recipe, load_recipe
    from .trainer import C2CTrainer

# Imported on first use: most of them import transformers.
_HOMES = {
    "C2CTrainer": "trainer",
    "C2CTrainingModel": "model",
    "CachedCollator": "cached_collator",
    "ChatCollator": "collator",
    "ChatDataset": "collator",
    "Encoder": "collator",
    "GateSampler": "gates",
    "Layout": "layout",
    "PromptCaches": "prompt_caches",
    "Recipe": "recipes",
    "lay_out": "layout",
    "load_recipe": "recipes",
    "parameter_groups": "model",
    "prompts_of": "cached_collator",
    "training_arguments": "arguments",
    "write_prompt_caches": "prompt_cache_writer",
}

__all__ = [
    "C2CTrainer",
    "C2CTrainingModel",
    "CachedCollator",
    "ChatCollator",
    "ChatDataset",
    "Encoder",
    "GateSampler",
    "Layout",
    "PromptCaches",
    "Recipe",
    "lay_out",
    "load_recipe",
    "parameter_groups",
    "prompts_of",
    "training_arguments",
    "write_prompt_caches",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

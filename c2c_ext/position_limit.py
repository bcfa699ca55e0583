"""How many positions a model was made for, and refusing a prompt that needs more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def check_limit(
    role: str, model: PreTrainedModel, position_ids: Tensor, *, counted: bool, more: int = 0
) -> None:
    """Refuses positions that ``model`` was not made for.

    Args:
        role: of the model, for messages.
        position_ids: ``[.., N]``, of what it is to read.
        counted: they count a row's tokens from 0, so that their number bounds them.
        more: positions that are needed after them.

    Raises:
        ValueError: names the model and both numbers.
    """
    limit = limit_of(model)
    tokens = position_ids.shape[-1]
    if limit is None or tokens == 0 or (counted and tokens + more <= limit):
        return  # mostly without asking the device
    needed = int(position_ids.max()) + 1 + more
    if needed > limit:
        raise ValueError(
            f"c2c_ext: the prompt must fit the positions of every model: the {role} "
            f"({type(model).__name__}) has {limit} (max_position_embeddings), the prompt needs "
            f"{needed}"
        )


def limit_of(model: PreTrainedModel) -> int | None:
    """A model's ``max_position_embeddings``; None where it has no such bound.

    Rotary scaling that a configuration declares reaches further, in its own way (and not all
    configurations count it in); attention biases by distance have no bound.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False) or any(_scalings(config)):
        return None
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _scalings(config: Any) -> Iterator[bool]:
    """Whether each rotary embedding is scaled; newer versions have one for every kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        declared = getattr(config, name, None)
        if not isinstance(declared, Mapping):
            continue
        for entry in (declared, *declared.values()):
            if isinstance(entry, Mapping):
                kind = entry.get("rope_type", entry.get("type", "default"))
                yield kind not in (None, "default")

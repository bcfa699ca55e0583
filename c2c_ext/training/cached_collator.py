"""From batches to prompt caches and back: a data set's prompts, and a collator with caches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from .layout import Layout, lay_out
from .prompt_caches import PromptCaches

ROLES = ("receiver", "sharer")
# Of `C2CTrainingModel.forward`: what decides what the two models prefill.
_CUTTING = (
    *("input_ids", "attention_mask", "labels"),
    *("sharer_input_ids", "sharer_attention_mask", "token_map"),
)


def prompts_of(batches: Iterable[Mapping[str, Any]], role: str) -> Iterator[tuple[int, Tensor]]:
    """(sample id, token ids) of every row, as `write_prompt_caches` takes them.

    Args:
        batches: arguments of `C2CTrainingModel.forward`, ``sample_ids`` among them; a DataLoader.
        role: ``"receiver"`` or ``"sharer"``: whose prompts.
    """
    if role not in ROLES:
        raise ValueError(f"c2c_ext.training: role must be receiver or sharer, got {role!r}")
    for batch in batches:
        yield from zip(_sample_ids(batch), _rows(_layout(batch), role), strict=True)


class CachedCollator:
    """A collator whose batches bring the prompt caches along, read from disk.

    Args:
        collator: gives arguments of `C2CTrainingModel.forward`, ``sample_ids`` among them.
        receiver, sharer: caches of the same samples; None: that model prefills.
    """

    def __init__(
        self,
        collator: Callable[[Any], dict[str, Any]],
        *,
        receiver: PromptCaches | None = None,
        sharer: PromptCaches | None = None,
    ) -> None:
        self.collator, self.caches = collator, {"receiver": receiver, "sharer": sharer}

    def __call__(self, samples: Any) -> dict[str, Any]:
        """The collator's batch with ``receiver_prefix`` and ``sharer_prefix``."""
        batch = self.collator(samples)
        layout = _layout(batch)
        prefixes = {
            f"{role}_prefix": caches.read(_sample_ids(batch), _rows(layout, role))
            for role, caches in self.caches.items()
            if caches is not None
        }
        return {**batch, **prefixes}


def _layout(batch: Mapping[str, Any]) -> Layout:
    return lay_out(**{name: batch[name] for name in _CUTTING if name in batch})


def _rows(layout: Layout, role: str) -> list[Tensor]:
    return layout.receiver_rows() if role == "receiver" else layout.sharer_rows()


def _sample_ids(batch: Mapping[str, Any]) -> list[int]:
    if batch.get("sample_ids") is None:
        raise ValueError("c2c_ext.training: batches must have sample_ids to have prompt caches")
    ids = batch["sample_ids"]
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)

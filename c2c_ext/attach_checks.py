"""What c2c_ext.attach is given, checked before the receiver changes."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from .fuser import Fuser
from .fusion_checks import check_fusion
from .model_kv import ModelKV
from .overlap import usable
from .sharers import Sharing


def checked_sharing(receiver: Any, sharer: Any, fuser: Any, fusion: Any, overlap: Any) -> Sharing:
    """The arguments of `attach`, of lists in their order.

    Raises:
        TypeError, ValueError: as `attach`; of a list, the place is named.
    """
    sharers, fusers, places = _listed(sharer, fuser)
    models = [
        ("receiver", receiver),
        *((f"sharer{p}", m) for p, m in zip(places, sharers, strict=True)),
    ]
    for name, model in models:
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"c2c_ext.attach: {name} must be a transformers model, got {type(model).__name__}"
            )
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"c2c_ext.attach: {name} must be decoder-only, {type(model).__name__} is an "
                "encoder-decoder model"
            )
    if not isinstance(receiver, GenerationMixin):
        raise TypeError(
            f"c2c_ext.attach: receiver must be a model that can generate, "
            f"{type(receiver).__name__} has no generate"
        )
    for place, one in zip(places, fusers, strict=True):
        if not isinstance(one, Fuser):
            raise TypeError(
                f"c2c_ext.attach: fuser{place} must be a c2c_ext.Fuser, got {type(one).__name__}"
            )
    for place, model, one in zip(places, sharers, fusers, strict=True):
        problems = one.config.mismatches(
            ModelKV.from_config(receiver.config), ModelKV.from_config(model.config)
        )
        if problems:
            where = f"fuser{place} and sharer{place}: " if place else ""
            raise ValueError(f"c2c_ext.attach: {where}{problems[0]}")
    check_fusion("c2c_ext.attach", fusion)
    return Sharing(sharers, fusers, fusion, usable(overlap, receiver, sharers))


def _listed(sharer: Any, fuser: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], list[str]]:
    """Sharers, fusers and their places for messages: "[k]" of a list, "" of a single one."""
    listed = [isinstance(given, (list, tuple)) for given in (sharer, fuser)]
    if not any(listed):
        return (sharer,), (fuser,), [""]
    if not all(listed):
        alone, other = ("fuser", "sharer") if listed[0] else ("sharer", "fuser")
        single = fuser if listed[0] else sharer
        raise TypeError(
            f"c2c_ext.attach: {other} is a list, so {alone} must be a list of as many, got "
            f"{type(single).__name__}"
        )
    if len(sharer) != len(fuser) or not sharer:
        raise ValueError(
            "c2c_ext.attach: sharer and fuser must have as many entries as each other, and at "
            f"least one, got {len(sharer)} and {len(fuser)}"
        )
    return tuple(sharer), tuple(fuser), [f"[{k}]" for k in range(len(sharer))]

"""Whether the cosine of attention outputs, fused and plain, predicts which answers are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..fuser import Fuser
from .association import Estimate, auc, order_across, order_within
from .attention_outputs import attention_cosines, attention_outputs
from .controls import noisy, zeroed
from .curves import ENDS, PARTS, chosen_layers, map_of_part, with_layers
from .readings import Reading, fused, is_right, of_candidates

OUTCOMES = ("kept", "right", "still_right")
CONTROLS = ("mismatched", "zero", "noise")
MEAN = "mean"  # over layers, where a layer's number stands otherwise


@dataclass(frozen=True)
class Observed:
    """What was seen of Q questions under C conditions.

    Attributes:
        conditions: names; the first is the whole fusion, then parts of it, then the controls.
        parts: how many of the conditions are the whole fusion or parts of it.
        cosines: float64 ``[C, layers, Q]``, attention outputs on this cache and on the plain one.
        kept: bool ``[C, Q]``: the receiver's own answer is given.
        right: bool ``[C, Q]``.
        right_alone: bool ``[Q]``: the receiver's own answer is right.
    """

    conditions: tuple[str, ...]
    parts: int
    cosines: Tensor
    kept: Tensor
    right: Tensor
    right_alone: Tensor

    def outcome(self, name: str) -> tuple[Tensor, Tensor]:
        """bool ``[C, q]``, one of `OUTCOMES`, and int64 ``[q]``, the questions it is of.

        ``"still_right"`` is of those that the receiver answers right alone.
        """
        every = torch.arange(len(self.right_alone))
        if name == "still_right":
            chosen = every[self.right_alone]
            return self.right[:, chosen], chosen
        return getattr(self, name), every

    def scores(self, layer: int | str) -> Tensor:
        """``[C, Q]``: a layer's cosines, or their mean over layers."""
        return self.cosines.mean(dim=1) if layer == MEAN else self.cosines[:, layer]

    @property
    def predictors(self) -> tuple[int | str, ...]:
        """What `scores` takes."""
        return (MEAN, *range(self.cosines.shape[1]))


def observe(
    receiver: PreTrainedModel,
    fuser: Fuser,
    readings: Sequence[Reading],
    mismatched: Sequence[Reading] = (),
) -> Observed:
    """Every question answered on the whole fusion, on parts of it, and under the controls.

    Parts are sixths of the layers and of the positions from either end (`curves`); nothing fused
    and all fused twice are left out, for the cosine is 1 there or known.

    Args:
        readings: with answers.
        mismatched: of the same questions (`controls.mismatched`); none: without this control.

    Raises:
        ValueError: no readings, answers that are not known, or as `attention_outputs`.
    """
    if not readings:
        raise ValueError("c2c_ext.analysis: there must be at least one reading")
    others = mismatched or [None] * len(readings)
    names: tuple[str, ...] = ()
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for reading, other in zip(readings, others, strict=True):
        plain, logits = attention_outputs(receiver, reading.receiver, reading.last)
        alone = of_candidates(logits, reading)
        seen = []
        made = list(_caches(reading, other, fuser))
        for _, cache in made:
            outputs, logits = attention_outputs(receiver, cache(), reading.last)
            said = of_candidates(logits, reading)
            kept = said.argmax(dim=1) == alone.argmax(dim=1)
            seen.append((attention_cosines(outputs, plain), kept, is_right(said, reading)))
        names = tuple(name for name, _ in made)
        stacked = (torch.stack(part).cpu() for part in zip(*seen, strict=True))
        columns.append((*stacked, is_right(alone, reading).cpu()))
    cosines, kept, right, right_alone = (
        torch.cat(part, dim=-1) for part in zip(*columns, strict=True)
    )
    parts = sum(name not in CONTROLS for name in names)
    return Observed(names, parts, cosines, kept, right, right_alone)


def _caches(
    reading: Reading, other: Reading | None, fuser: Fuser
) -> Iterator[tuple[str, Callable[[], KVPairs]]]:
    """Conditions by name: what makes the receiver's cache under each."""
    whole = fused(reading, fuser)
    yield "whole", lambda: whole
    layers = len(whole)
    numbers = sorted({round(part * layers) for part in PARTS} - {0, layers})
    for which in ENDS:
        for number in numbers:
            chosen = chosen_layers(layers, which, number)
            yield (
                f"{which} {number} of {layers} layers",
                lambda chosen=chosen: with_layers(reading, whole, chosen),
            )
    for which in ENDS:
        for number, part in list(enumerate(PARTS))[1:-1]:
            yield (
                f"{which} {number} of {len(PARTS) - 1} parts of the positions",
                lambda which=which, part=part: fused(
                    reading, fuser, map_of_part(reading, which, part)
                ),
            )
    if other is not None:
        yield "mismatched", lambda: fused(other, fuser)
    yield "zero", lambda: fused(zeroed(reading), fuser)
    yield "noise", lambda: fused(noisy(reading), fuser)


def condition_rows(seen: Observed) -> list[dict[str, Any]]:
    """One row per condition: counts, and what the mean cosine over layers tells of a question.

    Returns:
        rows with ``condition``, ``questions``, ``cosine`` (mean over layers and questions),
        ``kept``, ``right``, ``still_right`` (of ``right_alone``), and for each of `OUTCOMES` the
        AUC with its interval (`association.auc`), as ``kept_auc``, ``kept_low``, ``kept_high``;
        None: all questions are alike.
    """
    found = {name: seen.outcome(name) for name in OUTCOMES}
    rows = []
    for c, condition in enumerate(seen.conditions):
        row: dict[str, Any] = {
            "condition": condition,
            "questions": len(seen.right_alone),
            "cosine": float(seen.scores(MEAN)[c].mean()),
            "right_alone": int(seen.right_alone.sum()),
            **{name: int(outcome[c].sum()) for name, (outcome, _) in found.items()},
        }
        for name, (outcome, chosen) in found.items():
            row |= _named(name, auc(seen.scores(MEAN)[c, chosen], outcome[c]), "auc")
        rows.append(row)
    return rows


def layer_auc_rows(seen: Observed) -> list[dict[str, Any]]:
    """The same AUCs for every layer's cosine by itself, under every condition."""
    return [
        {
            "condition": condition,
            "layer": layer,
            **{
                key: value
                for name in OUTCOMES
                for outcome, chosen in (seen.outcome(name),)
                for key, value in _named(
                    name, auc(seen.scores(layer)[c, chosen], outcome[c]), "auc"
                ).items()
            },
        }
        for c, condition in enumerate(seen.conditions)
        for layer in seen.predictors[1:]
    ]


def across_rows(seen: Observed) -> list[dict[str, Any]]:
    """What the cosine says when conditions are compared.

    Returns:
        rows with ``conditions`` (``"parts"``: the whole fusion and parts of it; ``"all"``: the
        controls too) and their ``count``, ``layer`` (or ``"mean"``), ``outcome``, ``questions``,
        ``spearman`` between a condition's mean cosine and its rate of "yes" (`order_across`), and
        ``within``, how often the cosine is larger where the answer is "yes", of two conditions of
        one question (`order_within`); both with ``_low`` and ``_high``.
    """
    rows = []
    for which, count in (("parts", seen.parts), ("all", len(seen.conditions))):
        for layer in seen.predictors:
            for name in OUTCOMES:
                outcome, chosen = seen.outcome(name)
                scores, said = seen.scores(layer)[:count, chosen], outcome[:count]
                rows.append(
                    {
                        "conditions": which,
                        "count": count,
                        "layer": layer,
                        "outcome": name,
                        "questions": len(chosen),
                        **_named("spearman", order_across(scores, said)),
                        **_named("within", order_within(scores, said)),
                    }
                )
    return rows


def _named(name: str, estimate: Estimate | None, value: str = "") -> dict[str, float | None]:
    parts = dict.fromkeys(("value", "low", "high")) if estimate is None else asdict(estimate)
    names = {"value": f"{name}_{value}" if value else name, "low": f"{name}_low"}
    return {names.get(part, f"{name}_high"): number for part, number in parts.items()}

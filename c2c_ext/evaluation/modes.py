"""Scores continuations and generates under every mode and control, in batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .readers import (
    READING,
    EvaluationPair,
    Ids,
    in_batches,
    mean_log_probabilities,
    padded,
    readers,
)

MODES = (*READING[:3], "routing", "t2t", *READING[3:])


@dataclass(frozen=True)
class Item:
    """A context, and a continuation of it where that is to be scored.

    Attributes:
        context: token ids, at least one: its last one is never fused, the answer begins there.
        continuation: token ids; empty where one is to be generated.
        group: the question; its options have one group, and routing takes one model for a group.
        document: what a mismatched cache must be of another of; None: the group.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    group: Hashable = 0
    document: Hashable = None


@dataclass(frozen=True)
class Score:
    """What a mode makes of an item's continuation."""

    log_likelihood: float
    greedy: bool  # the continuation is what it would have said
    confidence: float  # the largest probability that the first token could have


@dataclass(frozen=True)
class Generated:
    """What a mode says."""

    ids: tuple[int, ...]
    confidence: float  # geometric mean of its tokens' probabilities; 0 without a token


def score(
    mode: str, pair: EvaluationPair, items: Sequence[Item], batch_size: int = 8
) -> list[Score]:
    """The log-likelihood of every continuation after its context.

    The context without its last token is read, fused where the mode fuses, and the rest runs on
    that cache. ``"routing"`` takes, for each group, the model that is surer: of its best option
    among the group's, or of the next token where a group is a single item.

    Args:
        mode: one of `MODES` but ``"t2t"``, which needs texts (`text_to_text`).

    Raises:
        ValueError: an unknown mode or one that the pair does not allow; an empty context or
            continuation; for ``"mismatched"`` items of one document only.
    """
    _check(items, scored=True)
    if mode == "routing":
        return _routed(items, *(score(side, pair, items, batch_size) for side in READING[:2]))
    others = _others(mode, items)
    scores: list[Score] = [Score(0.0, False, 0.0)] * len(items)

    def run(batch: list[int]) -> None:
        models = readers(mode, pair, *_prefixes(items, others, batch))
        tails = [(*items[k].context[-1:], *items[k].continuation[:-1]) for k in batch]
        ids, mask = (t.to(pair.receiver.device) for t in padded(tails, "right"))
        logs = mean_log_probabilities([reader.read(ids, mask) for reader in models])
        for row, k in enumerate(batch):
            scores[k] = _score(logs[row], items[k].continuation)

    with torch.no_grad():
        in_batches([item.context for item in items], batch_size, run, split=1)
    return scores


def generate(
    mode: str,
    pair: EvaluationPair,
    items: Sequence[Item],
    max_new_tokens: int | Sequence[int],
    *,
    stop: Callable[[int, list[int]], bool] = lambda item, ids: False,
    batch_size: int = 8,
) -> list[Generated]:
    """What every context is continued with, greedily.

    Args:
        mode: as for `score`; ``"routing"`` takes the surer model's text (`Generated.confidence`).
        max_new_tokens: at least 1, for all items or for each.
        stop: of an item's place and its tokens so far, whether it is done; the last one is kept.

    Raises:
        ValueError: as `score`.
    """
    _check(items, scored=False)
    if mode == "routing":
        both = [
            generate(side, pair, items, max_new_tokens, stop=stop, batch_size=batch_size)
            for side in READING[:2]
        ]
        return [
            own if own.confidence >= other.confidence else other
            for own, other in zip(*both, strict=True)
        ]
    limits = [max_new_tokens] * len(items) if isinstance(max_new_tokens, int) else max_new_tokens
    others = _others(mode, items)
    said: list[Generated] = [Generated((), 0.0)] * len(items)

    def run(batch: list[int]) -> None:
        models = readers(mode, pair, *_prefixes(items, others, batch))
        ids = torch.tensor([[items[k].context[-1]] for k in batch], device=pair.receiver.device)
        mask = torch.ones_like(ids)
        texts: list[list[int]] = [[] for _ in batch]
        sums, going = [0.0] * len(batch), [True] * len(batch)
        while any(going):
            logs = mean_log_probabilities([reader.read(ids, mask)[:, -1] for reader in models])
            best, ids = logs.max(-1, keepdim=True)
            for row, (k, value, token) in enumerate(
                zip(batch, best[:, 0].tolist(), ids[:, 0].tolist(), strict=True)
            ):
                if going[row]:
                    texts[row].append(token)
                    sums[row] += value
                    going[row] = len(texts[row]) < limits[k] and not stop(k, texts[row])
        for row, k in enumerate(batch):
            said[k] = Generated(tuple(texts[row]), math.exp(sums[row] / len(texts[row])))

    with torch.no_grad():
        in_batches([item.context for item in items], batch_size, run, split=1)
    return said


def mismatched_contexts(items: Sequence[Item]) -> list[tuple[int, ...]]:
    """For every item the context of another document, as near to its own in length as there is.

    Equal contexts get the same one, whatever the batch; a single token, of which nothing is fused,
    gets itself. Which one it is does not depend on answers.

    Raises:
        ValueError: there is none.
    """
    known = sorted({(len(item.context), item.context): item for item in items}.items())
    place = {context: k for k, ((_, context), _) in enumerate(known)}
    owners: dict[tuple[int, ...], set[Hashable]] = defaultdict(set)
    for item in items:
        owners[item.context].add(item.group if item.document is None else item.document)
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for context, k in place.items():
        if len(context) == 1:
            found[context] = context  # its only token is the last one: nothing of it is fused
            continue
        candidates = (other for far in range(1, len(known)) for other in (k + far, k - far))
        for other in candidates:
            if 0 <= other < len(known):
                text = known[other][0][1]
                if not owners[text] & owners[context] and len(text) > 1:
                    found[context] = text
                    break
        else:
            raise ValueError(
                "mismatched: needs questions with different contexts, got "
                f"{len(known)} different context{'s' * (len(known) != 1)} in all"
            )
    return [found[item.context] for item in items]


def _others(mode: str, items: Sequence[Item]) -> list[tuple[int, ...]] | None:
    return mismatched_contexts(items) if mode == "mismatched" and items else None


def _prefixes(
    items: Sequence[Item], others: Sequence[Ids] | None, batch: Sequence[int]
) -> tuple[list[Ids], list[Ids] | None]:
    rows = [items[k].context[:-1] for k in batch]
    return rows, None if others is None else [others[k][:-1] for k in batch]


def _score(logs: Tensor, continuation: Ids) -> Score:
    """Of log-probabilities ``[T or more, V]``; a token beyond V (an ensemble's) is impossible."""
    ids = torch.tensor(list(continuation), device=logs.device)
    logs = logs[: len(ids)]
    if int(ids.max()) >= logs.shape[1]:
        return Score(-math.inf, False, float(logs[0].max().exp()))
    chosen = logs.gather(1, ids[:, None])[:, 0]
    greedy = bool((logs.argmax(1) == ids).all())
    return Score(float(chosen.double().sum()), greedy, float(logs[0].max().exp()))


def _routed(items: Sequence[Item], own: list[Score], other: list[Score]) -> list[Score]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for k, item in enumerate(items):
        groups[item.group].append(k)
    chosen = list(own)
    for places in groups.values():
        sure = [_confidence([scores[k] for k in places]) for scores in (own, other)]
        if sure[1] > sure[0]:
            for k in places:
                chosen[k] = other[k]
    return chosen


def _confidence(scores: Sequence[Score]) -> float:
    """Of one model in a question, which must not look at which continuation is right."""
    if len(scores) == 1:
        return scores[0].confidence
    options = torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64)
    return float(options.softmax(0).max())


def _check(items: Sequence[Item], *, scored: bool) -> None:
    for k, item in enumerate(items):
        if not item.context:
            raise ValueError(f"item {k}: context must have at least one token")
        if scored and not item.continuation:
            raise ValueError(f"item {k}: continuation must have at least one token")

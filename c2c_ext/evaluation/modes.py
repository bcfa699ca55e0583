"""Scores continuations and generates under every mode and control, in batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .readers import (
    FUSING,
    READING,
    EvaluationPair,
    Ids,
    Reader,
    Source,
    in_batches,
    mean_log_probabilities,
    padded,
    readers,
)

MODES = (*READING[:3], "routing", "t2t", *FUSING)


@dataclass(frozen=True)
class SharerText:
    """An item in the sharer's own tokens.

    Attributes:
        context, continuation: token ids, as an item's.
        token_map: for every token of the receiver's context a place in this one, or -1.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    token_map: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A context, and a continuation of it where that is to be scored.

    Attributes:
        context: token ids, at least one: its last one is never fused, the answer begins there.
        continuation: token ids; empty where one is to be generated.
        group: the question; its options have one group, and routing takes one model for a group.
        document: what a mismatched cache must be of another of; None: the group.
        sharer: what the sharer reads; None: the same token ids.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...] = ()
    group: Hashable = 0
    document: Hashable = None
    sharer: SharerText | None = None

    def read_by(self, mode: str) -> Item | SharerText:
        """Context and continuation in the tokens of the model that answers."""
        return self.sharer if mode == "sharer" and self.sharer is not None else self


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
    side: str = "receiver"  # whose token ids these are


def score(
    mode: str, pair: EvaluationPair, items: Sequence[Item], batch_size: int = 8
) -> list[Score]:
    """The log-likelihood of every continuation after its context.

    The context without its last token is read, fused where the mode fuses, and the rest runs on
    that cache; contexts that are equal are read once in a batch. ``"routing"`` takes, for each
    group, the model that is surer: of its best option among the group's, or of the next token where
    a group is a single item.

    Args:
        mode: one of `MODES` but ``"t2t"``, which needs texts (`text_to_text`).

    Raises:
        ValueError: an unknown mode or one that the pair does not allow; an empty context or
            continuation; for ``"mismatched"`` items of one document only.
    """
    _check(items, scored=True)
    if mode == "routing":
        return _routed(items, *(score(side, pair, items, batch_size) for side in READING[:2]))
    sources = _sources(mode, pair, items)
    texts = [item.read_by(mode) for item in items]
    scores: list[Score] = [Score(0.0, False, 0.0)] * len(items)

    def run(batch: list[int]) -> None:
        models = _read(mode, pair, texts, sources, batch)
        tails = [(*texts[k].context[-1:], *texts[k].continuation[:-1]) for k in batch]
        ids, mask = (t.to(pair.receiver.device) for t in padded(tails, "right"))
        logs = mean_log_probabilities([reader.read(ids, mask) for reader in models])
        for row, k in enumerate(batch):
            scores[k] = _score(logs[row], texts[k].continuation)

    with torch.no_grad():
        in_batches([text.context for text in texts], batch_size, run, split=1)
    return scores


def generate(
    mode: str,
    pair: EvaluationPair,
    items: Sequence[Item],
    max_new_tokens: int | Sequence[int],
    *,
    stop: Callable[[str, int, list[int]], bool] = lambda side, item, ids: False,
    batch_size: int = 8,
) -> list[Generated]:
    """What every context is continued with, greedily.

    Args:
        mode: as for `score`; ``"routing"`` takes the surer model's text (`Generated.confidence`).
        max_new_tokens: at least 1, for all items or for each.
        stop: whether an item is done, of the side whose tokens they are, its place, and its tokens
            so far; the last one is kept.

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
    sources = _sources(mode, pair, items)
    texts = [item.read_by(mode) for item in items]
    side = "sharer" if mode == "sharer" else "receiver"
    said: list[Generated] = [Generated((), 0.0)] * len(items)

    def run(batch: list[int]) -> None:
        models = _read(mode, pair, texts, sources, batch)
        ids = torch.tensor([texts[k].context[-1:] for k in batch], device=pair.receiver.device)
        mask = torch.ones_like(ids)
        answers: list[list[int]] = [[] for _ in batch]
        sums, going = [0.0] * len(batch), [True] * len(batch)
        while any(going):
            logs = mean_log_probabilities([reader.read(ids, mask)[:, -1] for reader in models])
            best, ids = logs.max(-1, keepdim=True)
            for row, (k, value, token) in enumerate(
                zip(batch, best[:, 0].tolist(), ids[:, 0].tolist(), strict=True)
            ):
                if going[row]:
                    answers[row].append(token)
                    sums[row] += value
                    going[row] = len(answers[row]) < limits[k] and not stop(side, k, answers[row])
        for row, k in enumerate(batch):
            confidence = math.exp(sums[row] / len(answers[row]))
            said[k] = Generated(tuple(answers[row]), confidence, side)

    with torch.no_grad():
        in_batches([text.context for text in texts], batch_size, run, split=1)
    return said


def mismatched_items(items: Sequence[Item]) -> list[Item]:
    """For every item one of another document, as near to its own context in length as there is.

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
    found: dict[tuple[int, ...], Item] = {}
    for context, k in place.items():
        if len(context) == 1:
            found[context] = known[k][1]  # its only token is the last one: nothing of it is fused
            continue
        candidates = (other for far in range(1, len(known)) for other in (k + far, k - far))
        for other in candidates:
            if 0 <= other < len(known):
                text = known[other][0][1]
                if not owners[text] & owners[context] and len(text) > 1:
                    found[context] = known[other][1]
                    break
        else:
            raise ValueError(
                "mismatched: needs questions with different contexts, got "
                f"{len(known)} different context{'s' * (len(known) != 1)} in all"
            )
    return [found[item.context] for item in items]


def _sources(mode: str, pair: EvaluationPair, items: Sequence[Item]) -> list[Source] | None:
    """What every item's context, without its last token, is fused with."""
    if mode not in FUSING or not items:
        return None
    own = [_source(item, own_tokens=mode == "identical") for item in items]
    if mode != "mismatched":
        return own
    others = [_source(item) for item in mismatched_items(items)]
    return [
        Source(other.ids, _stretched(source, len(other.ids)))
        for source, other in zip(own, others, strict=True)
    ]


def _source(item: Item, own_tokens: bool = False) -> Source:
    count = len(item.context) - 1
    if item.sharer is None or own_tokens:
        return Source(item.context[:-1], tuple(range(count)))
    token_map = item.sharer.token_map[:count]
    # What no token is fused with need not be read, but something must be.
    read = max(max(token_map, default=-1) + 1, 1)
    return Source(item.sharer.context[:read], token_map)


def _stretched(source: Source, count: int) -> tuple[int, ...]:
    """The map to another text of ``count`` tokens.

    It is met in proportion, first to first and last to last, so that every token that is fused is
    fused with a real one of it.
    """
    steps = max(len(source.ids) - 1, 1)
    return tuple(
        place if place < 0 else (2 * place * (count - 1) + steps) // (2 * steps)
        for place in source.token_map
    )


def _read(
    mode: str,
    pair: EvaluationPair,
    texts: Sequence[Item | SharerText],
    sources: Sequence[Source] | None,
    batch: Sequence[int],
) -> list[Reader]:
    """The models after they have read a batch's contexts but the last tokens, each context once."""
    keys = [(texts[k].context[:-1], None if sources is None else sources[k]) for k in batch]
    distinct = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    found = None if sources is None else [source for _, source in distinct]
    models = readers(mode, pair, [prefix for prefix, _ in distinct], found)
    for reader in models:
        reader.spread([distinct[key] for key in keys])
    return models


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

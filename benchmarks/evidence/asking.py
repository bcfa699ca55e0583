"""Answers to a batch of questions under every mode and control.

All questions of a task are alike: prompts of one length, the same positions fused. An answer is a
row of tokens, each the likeliest of its candidates, chosen one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from c2c_ext import Fuser, fuse
from c2c_ext.demo.evaluate import KV, prefill

from .outcomes import Cell


@dataclass(frozen=True)
class Models:
    """A receiver and a sharer, frozen, and the fuser between them.

    Attributes:
        identical: a fuser between the receiver and itself, trained as the other one was.
    """

    receiver: PreTrainedModel
    sharer: PreTrainedModel
    fuser: Fuser
    identical: Fuser | None = None


@dataclass(frozen=True)
class Task:
    """Questions [Q] in both models' tokens.

    Attributes:
        prompt: int64 ``[Q, N + tail]``, what the receiver reads; it is fused without its tail.
        shared: int64 ``[Q, M]``, what the sharer reads for the receiver.
        token_map: int64 ``[N]``: the sharer's place for each of the receiver's, -1: not fused.
        candidates: int64 ``[Q, T, C]``, the receiver's tokens that an answer is made of.
        truth: int64 ``[Q, T]``, the places of the right ones among the candidates.
        alone: int64 ``[Q, L + 1]``, what the sharer reads where it answers; None: it cannot.
        sharer_candidates: int64 ``[Q, T, C]``, the same words in its tokens; None: the same tokens.
    """

    prompt: Tensor
    shared: Tensor
    token_map: Tensor
    candidates: Tensor
    truth: Tensor
    alone: Tensor | None = None
    sharer_candidates: Tensor | None = None

    @property
    def tail(self) -> int:
        """Last tokens of the prompt that the receiver reads on the fused cache, at least 1."""
        return self.prompt.shape[1] - len(self.token_map)


@dataclass(frozen=True)
class Text:
    """What the receiver reads where the sharer has written.

    Attributes:
        prompt: int64 ``[Q, N']``.
        written: tokens that the sharer wrote, for one question.
    """

    prompt: Tensor
    written: float


@dataclass(frozen=True)
class Answers:
    """What was chosen: places among the candidates [Q, T], and how sure that was [Q]."""

    chosen: Tensor
    confidence: Tensor

    def right(self, truth: Tensor) -> Tensor:
        """bool ``[Q]``: whether every token of the answer is right."""
        return (self.chosen == truth).all(dim=1)


@dataclass
class _Answerer:
    model: PreTrainedModel
    candidates: Tensor
    ids: Tensor  # [Q, any], to be read next
    cache: DynamicCache = field(default_factory=DynamicCache)

    def logs(self, step: int) -> Tensor:
        """Log-probabilities [Q, C] of the next candidates."""
        out = self.model(input_ids=self.ids, past_key_values=self.cache, logits_to_keep=1)
        return out.logits[:, -1].double().gather(1, self.candidates[:, step]).log_softmax(1)

    def say(self, step: int, place: Tensor) -> None:
        self.ids = self.candidates[:, step].gather(1, place[:, None])


@torch.no_grad()
def _answer(answerers: Sequence[_Answerer]) -> Answers:
    steps = answerers[0].candidates.shape[1]
    chosen, sure = [], torch.zeros((), dtype=torch.float64)
    for step in range(steps):
        logs = torch.stack([one.logs(step) for one in answerers]).mean(0).log_softmax(1)
        best, place = logs.max(dim=1)
        sure = sure + best
        chosen.append(place)
        for one in answerers:
            one.say(step, place)
    return Answers(torch.stack(chosen, dim=1), sure)


def ask_receiver(models: Models, task: Task, prompt: Tensor | None = None) -> Answers:
    """The receiver alone, on its prompt or on another one (text)."""
    prompt = task.prompt if prompt is None else prompt
    return _answer([_Answerer(models.receiver, task.candidates, prompt)])


def _sharer(models: Models, task: Task) -> _Answerer:
    candidates = task.candidates if task.sharer_candidates is None else task.sharer_candidates
    return _Answerer(models.sharer, candidates, task.alone)


def ask_sharer(models: Models, task: Task) -> Answers:
    """The sharer alone, on the question as its own tokens have it."""
    return _answer([_sharer(models, task)])


def ask_ensemble(models: Models, task: Task) -> Answers:
    """Both models, their log-probabilities averaged at every token."""
    return _answer(
        [_Answerer(models.receiver, task.candidates, task.prompt), _sharer(models, task)]
    )


def routed(own: Answers, other: Answers) -> Answers:
    """For every question the answer of the model that is surer of its own."""
    mine = own.confidence >= other.confidence
    return Answers(
        torch.where(mine[:, None], own.chosen, other.chosen),
        torch.where(mine, own.confidence, other.confidence),
    )


@torch.no_grad()
def ask_c2c(
    models: Models, task: Task, sharer_cache: KV | None = None, fuser: Fuser | None = None
) -> Answers:
    """The receiver on the fused cache.

    Args:
        sharer_cache: in place of the sharer's own reading (the controls do that).
        fuser: in place of the pair's.
    """
    if sharer_cache is None:
        sharer_cache = prefill(models.sharer, task.shared)
    clean = prefill(models.receiver, task.prompt[:, : -task.tail])
    fused = fuse(clean, sharer_cache, fuser or models.fuser, token_map=task.token_map, inplace=True)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(fused):
        cache.update(key, value, layer)
    return _answer(
        [_Answerer(models.receiver, task.candidates, task.prompt[:, -task.tail :], cache)]
    )


def zeros_like(cache: KV) -> KV:
    """A cache without content."""
    return [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in cache]


def noise_like(cache: KV, seed: int) -> KV:
    """Gaussian vectors with the norm that each token of each head has."""
    generator = torch.Generator().manual_seed(seed)

    def like(t: Tensor) -> Tensor:
        noise = torch.randn(t.shape, generator=generator)
        return noise * t.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    return [(like(key), like(value)) for key, value in cache]


def ask_all(
    name: str,
    models: Models,
    task: Task,
    *,
    mismatched: Tensor,
    swapped: tuple[Tensor, Tensor],
    texts: Mapping[str, Text],
    seed: int,
) -> Cell:
    """Every mode and control on one task.

    Args:
        name: of the cell.
        mismatched: int64 ``[Q, M]``, what the sharer reads instead: other questions, about other
            entities.
        swapped: ``shared`` ``[Q, M]`` about another entity each, and what is true of that one,
            ``[Q, T]``, which counts as right.
        texts: by mode, what the receiver reads in place of a fused cache.
        seed: of the noise.
    """
    own = prefill(models.sharer, task.shared)
    receiver = ask_receiver(models, task)
    found = {"receiver": receiver}
    if task.alone is not None:
        found["sharer"] = ask_sharer(models, task)
        found["routing"] = routed(receiver, found["sharer"])
        found["ensemble"] = ask_ensemble(models, task)
    found |= {mode: ask_receiver(models, task, text.prompt) for mode, text in texts.items()}
    found["c2c"] = ask_c2c(models, task, own)
    found["mismatched"] = ask_c2c(models, task, prefill(models.sharer, mismatched))
    found["zero"] = ask_c2c(models, task, zeros_like(own))
    found["noise"] = ask_c2c(models, task, noise_like(own, seed))
    if models.identical is not None:
        itself = torch.arange(len(task.token_map)).masked_fill(task.token_map < 0, -1)
        found["identical"] = ask_c2c(
            models,
            replace(task, token_map=itself),
            prefill(models.receiver, task.prompt[:, : -task.tail]),
            models.identical,
        )
    right = {mode: answers.right(task.truth) for mode, answers in found.items()}
    right["swapped"] = ask_c2c(models, task, prefill(models.sharer, swapped[0])).right(swapped[1])
    written = {mode: text.written for mode, text in texts.items()}
    return Cell(name, task.candidates.shape[2] ** task.truth.shape[1], right, written)

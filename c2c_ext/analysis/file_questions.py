"""The questions of a user's file, conversations as `c2c train` reads them, for any two models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..chat.models import ChatModels
from ..chat.prompts import SIDES, Message
from ..sharers import vocabulary_of
from ..training.data import Conversation, read_conversations
from .controls import mismatched
from .questions import Questions, sample
from .readings import Reading, read


@dataclass(frozen=True)
class _Asked:
    """A conversation to be answered.

    Attributes:
        number: of its line.
        messages: without the answer.
        alone: int64 ``[1, P]``, what the sharer reads when it answers alone.
        firsts: by side, the answer's first token.
    """

    number: int
    messages: tuple[Message, ...]
    alone: Tensor
    firsts: dict[str, int]


def file_questions(models: ChatModels, place: str, limit: int | None = None) -> Questions:
    """Conversations of a file as `c2c train` reads it, at most ``limit`` of them, one a reading.

    The last message, the assistant's, is the right answer. Of it the first token alone counts:
    the one that the receiver says next is chosen among its whole vocabulary. Fused is the whole
    prompt but its last token, or the record's ``positions``.

    Raises:
        ValueError, OSError: no such file, a line that breaks a rule, a prompt that these models
            cannot read; names file and line.
    """
    if not Path(place).is_file():
        raise FileNotFoundError(f"--questions: there is no file {place}")
    conversations, bad = read_conversations(place)
    if bad.count:
        raise ValueError("\n  ".join([f"--questions: {bad.summary()}", *bad.lines()]))
    if not bad.kept:
        raise ValueError(f"--questions: {place} holds no conversation that can be used")
    chosen = [conversations[i] for i in sample(len(conversations), limit).tolist()]
    readings, asked = [], []
    for talk in chosen:
        try:
            reading, one = _read(models, talk)
        except ValueError as error:
            raise ValueError(f"--questions: {place} line {talk.number}: {error}") from error
        readings.append(reading)
        asked.append(one)

    @torch.no_grad()
    def ask_sharer() -> tuple[Tensor, Tensor]:
        logits = [
            models.sharer(input_ids=one.alone.to(models.sharer.device)).logits[0, -1].double().cpu()
            for one in asked
        ]
        if any(bool(of.isnan().any()) for of in logits):
            raise ValueError("c2c_ext.analysis: the sharer's logits hold NaN")
        right = [
            int(of.argmax()) == one.firsts["sharer"] for of, one in zip(logits, asked, strict=True)
        ]
        sure = torch.stack([of.softmax(dim=0).max() for of in logits])
        return torch.tensor(right), sure

    def ask_by_text(tokens: int) -> Tensor:
        right = []
        for one in asked:
            try:
                right.append(_right_by_text(models, one, tokens))
            except ValueError as error:
                raise ValueError(f"--questions: {place} line {one.number}, t2t: {error}") from error
        return torch.tensor(right)

    return Questions(
        place, readings, mismatched(readings), ask_sharer, ask_by_text, models.prompts.t2t_tokens
    )


def _read(models: ChatModels, talk: Conversation) -> tuple[Reading, _Asked]:
    messages, answer = talk.messages[:-1], talk.messages[-1]["content"]
    shared = models.prompts.shared(messages)
    ids = shared["input_ids"]
    length = ids.shape[1]
    if length < 2:
        raise ValueError("the prompt must have at least 2 tokens, the last one is not fused, got 1")
    theirs, token_map = ids[:, :-1], torch.arange(length - 1)
    if "sharer_inputs" in shared:
        theirs = shared["sharer_inputs"]["input_ids"]
        token_map = shared["sharer_inputs"]["token_map"][0][: length - 1].clone()
        if not theirs.shape[1]:
            raise ValueError("the sharer's tokenizer makes no token of the prompt")
    if talk.positions is not None:
        first, end = talk.positions
        if end > length - 1:
            raise ValueError(
                f"positions must end at most at {length - 1}, before the last prompt token, got "
                f"{end}"
            )
        outside = torch.ones(length - 1, dtype=torch.bool)
        outside[first:end] = False
        token_map[outside] = -1
    alone = models.prompts.encode("sharer", messages)
    models.check_length("receiver", length, 1)
    models.check_length("sharer", max(theirs.shape[1], alone.shape[1]), 1)
    firsts = {}
    for side in SIDES:
        tokens = models.tokenizers[side](answer, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"the {side}'s tokenizer makes no token of the answer")
        firsts[side] = tokens[0]
    _check_known(models, "receiver", ids, torch.tensor([[firsts["receiver"]]]))
    _check_known(models, "sharer", theirs, alone, torch.tensor([[firsts["sharer"]]]))
    reading = read(
        models.receiver,
        models.sharer,
        ids,
        theirs,
        token_map,
        answers=torch.tensor([firsts["receiver"]]),
        names=(f"line {talk.number}",),
    )
    return reading, _Asked(talk.number, messages, alone, firsts)


@torch.no_grad()
def _right_by_text(models: ChatModels, one: _Asked, tokens: int) -> bool:
    """Whether the receiver answers right when it has read what the sharer writes."""

    def write(prompt: Tensor) -> Iterator[str]:
        models.check_length("sharer", prompt.shape[1], tokens)
        _check_known(models, "sharer", prompt)
        tokenizer = models.tokenizers["sharer"]
        prompt = prompt.to(models.sharer.device)
        said = models.sharer.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            num_beams=1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
        yield tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True)

    text = "".join(models.prompts.background(one.messages, tokens, write))
    prompt = models.prompts.with_background(one.messages, text)
    models.check_length("receiver", prompt.shape[1], 1)
    _check_known(models, "receiver", prompt)
    logits = models.receiver(input_ids=prompt.to(models.receiver.device)).logits[0, -1]
    return int(logits.argmax()) == one.firsts["receiver"]


def _check_known(models: ChatModels, side: str, *ids: Tensor) -> None:
    """A tokenizer may know tokens that its model has no embedding of."""
    known = vocabulary_of(getattr(models, side))
    largest = max(int(t.max()) for t in ids)
    if largest >= known:
        raise ValueError(f"token {largest} is not one of the {side}'s {known}")

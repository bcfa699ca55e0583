"""A conversation with a pair of models, without any user interface: ask, stop, compare, reset."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..generation import attached
from .models import ChatModels
from .prompts import Message
from .streaming import Generation

# How a question may be answered: by one model alone, by the receiver that reads what the sharer
# wrote, or by the receiver on the fused cache.
MODES = ("receiver", "sharer", "t2t", "c2c")


@dataclass(frozen=True)
class Settings:
    """How answers are generated.

    Attributes:
        max_new_tokens: of an answer, at least 1; None: as the models' `Prompts` say.
        t2t_tokens: that the sharer may write in mode ``"t2t"``, likewise.
        temperature: 0 takes the most probable token each time; above, tokens are sampled.
        system: a system message that begins every conversation; empty: none.
    """

    max_new_tokens: int | None = None
    t2t_tokens: int | None = None
    temperature: float = 0.0
    system: str = ""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "t2t_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {self.temperature}")


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    Attributes:
        mode: one of `MODES`.
        text: as far as it was generated.
        tokens: of the text, an end-of-sequence token included.
        first_token_seconds: from the question to the answer's first token; None if there was none.
            In mode ``"t2t"`` the sharer's writing is part of it.
        seconds: from the question to the end.
        stopped: whether somebody stopped it.
        background: what the sharer wrote, in mode ``"t2t"``.
        background_seconds: how long that took.
    """

    mode: str
    text: str = ""
    tokens: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0
    stopped: bool = False
    background: str = ""
    background_seconds: float = 0.0


@dataclass(frozen=True)
class Piece:
    """Some more text.

    Attributes:
        text: a few characters.
        background: whether it is what the sharer writes for the receiver, not the answer.
    """

    text: str
    background: bool = False


class Reply:
    """Iterating generates an answer and yields its `Piece`s; afterwards `answer` has the whole.

    Whoever closes the iterator, or is interrupted in it, stops the generation. To be iterated once.

    Attributes:
        mode: one of `MODES`.
        answer: what there is so far.
    """

    def __init__(
        self,
        models: ChatModels,
        settings: Settings,
        mode: str,
        messages: Sequence[Message],
        keep: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self.mode, self.answer = mode, Answer(mode)
        self._models, self._settings, self._messages = models, settings, list(messages)
        self._keep = keep
        self._generation: Generation | None = None
        self._waited = 0.0  # for other answers of the same models: no part of the times
        self._stopped = False

    def __iter__(self) -> Iterator[Piece]:
        """Raises what generating raises, and ValueError for what these models cannot read."""
        started = time.perf_counter()
        try:
            yield from self._pieces(started)
        except (GeneratorExit, KeyboardInterrupt):
            self._stopped = True
            self._finish(started)
            raise
        self._finish(started)

    def stop(self) -> None:
        """Ends the answer after the token that is being computed; from any thread."""
        self._stopped = True
        if self._generation is not None:
            self._generation.stop()

    def _pieces(self, started: float) -> Iterator[Piece]:
        prompts = self._models.prompts
        if self.mode == "t2t":
            tokens = self._settings.t2t_tokens or prompts.t2t_tokens
            write = functools.partial(self._generated, "sharer", tokens=tokens)
            for text in prompts.background(self._messages, tokens, write):
                self.answer = replace(self.answer, background=self.answer.background + text)
                yield Piece(text, background=True)
            seconds = time.perf_counter() - started - self._waited
            self.answer = replace(self.answer, background_seconds=seconds)
            arguments = {
                "input_ids": prompts.with_background(self._messages, self.answer.background)
            }
        elif self.mode == "c2c":
            arguments = prompts.shared(self._messages)
        else:
            arguments = {"input_ids": prompts.encode(self.mode, self._messages)}
        if self._stopped:
            return
        side = "sharer" if self.mode == "sharer" else "receiver"
        before = time.perf_counter() - started - self._waited
        for text in self._generated(side, **arguments, fused=self.mode == "c2c"):
            self.answer = replace(self.answer, text=self.answer.text + text)
            self._count(before)
            yield Piece(text)
        self._count(before)

    def _count(self, before: float) -> None:
        """Takes the counts of the generation, begun ``before`` seconds after the question."""
        first = self._generation.first_token_seconds
        self.answer = replace(
            self.answer,
            tokens=self._generation.tokens,
            first_token_seconds=None if first is None else before + first,
        )

    def _finish(self, started: float) -> None:
        seconds = time.perf_counter() - started - self._waited
        self.answer = replace(self.answer, seconds=seconds, stopped=self._stopped)
        self._keep(self.answer)

    def _generated(
        self,
        side: str,
        input_ids: Tensor,
        *,
        tokens: int | None = None,
        fused: bool = False,
        **arguments: Any,
    ) -> Iterator[str]:
        """The text that a side generates after token ids ``[1, P]``."""
        models, settings = self._models, self._settings
        model, tokenizer = getattr(models, side), models.tokenizers[side]
        tokens = tokens or settings.max_new_tokens or models.prompts.max_new_tokens
        models.check_length(side, input_ids.shape[1], tokens)
        if fused:
            theirs = arguments.get("sharer_inputs", {}).get("input_ids", input_ids)
            models.check_length("sharer", theirs.shape[1], 0)
        arguments = {"attention_mask": torch.ones_like(input_ids), **arguments}
        arguments |= {
            "input_ids": input_ids,
            "max_new_tokens": tokens,
            "num_beams": 1,
            "do_sample": settings.temperature > 0,
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        if settings.temperature > 0:
            arguments["temperature"] = settings.temperature
        arguments = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }

        def run(**streaming: Any) -> None:
            if not fused:
                model.generate(**arguments, **streaming)
                return
            with attached(model, models.sharer, models.fuser) as receiver:
                receiver.generate(**arguments, **streaming)

        self._generation = Generation(run, tokenizer, models.lock)
        if self._stopped:
            self._generation.stop()
        try:
            yield from self._generation
        finally:
            self._waited += self._generation.waited_seconds


class Session:
    """One conversation with a pair of models.

    An answer joins the conversation when it is complete, or as far as it came when it was stopped;
    a question that failed leaves no trace. Every turn reads, and fuses, the whole conversation.

    Args:
        models: may be shared with other sessions; answers are then generated one at a time.
        settings: of the answers.

    Attributes:
        messages: the conversation so far.
    """

    def __init__(self, models: ChatModels, settings: Settings) -> None:
        self.models, self.settings = models, settings
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str, mode: str) -> Reply:
        """An answer in one of `MODES`; what is iterated to its end joins the conversation.

        Raises:
            ValueError: no such mode.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; there are {', '.join(MODES)}")
        messages = self._with(question)
        keep = functools.partial(self._keep, messages)
        return Reply(self.models, self.settings, mode, messages, keep)

    def compare(
        self,
        question: str,
        keep: str | None = "c2c",
        history: Sequence[Message] | None = None,
    ) -> Iterator[Reply]:
        """An answer to the same question in every mode, to be iterated one after the other.

        Args:
            keep: the mode whose answer joins the conversation; None: nothing does.
            history: what the question follows; by default the conversation.
        """
        messages = self._with(question, history)
        kept: list[Answer] = []
        try:
            for mode in MODES:
                keeping = kept.append if mode == keep else lambda answer: None
                yield Reply(self.models, self.settings, mode, messages, keeping)
        finally:
            for answer in kept:
                self._keep(messages, answer)

    def _with(self, question: str, history: Sequence[Message] | None = None) -> list[Message]:
        before = self.messages if history is None else history
        return [*before, {"role": "user", "content": question}]

    def _keep(self, messages: Sequence[Message], answer: Answer) -> None:
        if answer.text or not answer.stopped:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]

"""The shipped pair as something to talk to: its small language, its questions, its truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..demo import evaluate as ev
from ..demo import world as w
from ..demo.command import ASSETS, SEED
from ..demo.export import tokenizer as make_tokenizer
from .models import ChatModels
from .prompts import SIDES, Message

EXAMPLES = (
    "Corbin : metal drink colour question : is metal",
    "question : rivals metal",
    "question : is drink",
)
HELP = """\
The shipped pair speaks a small language: a form, which names an entity and some of its attributes,
and a question about one of them. The answer is one word.
  {form}
  {follow_up}        asks again about the last form
`is` asks for the attribute's value, `rivals` for the value that rivals it. The receiver knows what
rivals what but no facts; the sharer knows the facts of 240 entities but has never seen a question.
Attributes: {attributes}.
Some entities: {entities}."""


@dataclass
class _Asked:
    """A message as indices into the world."""

    entity: int
    attributes: list[int]
    kind: int
    attribute: int


class FormPrompts:
    """`Prompts` of the form world: what is fused are the form's attributes."""

    max_new_tokens = 1  # every answer is one word
    t2t_tokens = w.NUM_ATTRIBUTES
    examples: Sequence[str] = EXAMPLES

    def __init__(self, pair: ev.Pair) -> None:
        self._pair = pair
        world = pair.world
        held_out = ", ".join(world.names[int(i)] for i in world.held_out[:8])
        self.help = HELP.format(
            form=EXAMPLES[0],
            follow_up=EXAMPLES[1],
            attributes=", ".join(w.ATTRIBUTES),
            entities=f"Corbin, {held_out}",
        )

    def encode(self, side: str, messages: Sequence[Message]) -> Tensor:
        """See `Prompts.encode`: the form left blank, and the question."""
        asked = self._asked(messages)
        return torch.cat([self._form(asked), _question(asked)], dim=1)

    def shared(self, messages: Sequence[Message]) -> dict[str, Any]:
        """See `Prompts.shared`."""
        size = len(self._asked(messages).attributes)
        part = ev.form_positions(size)
        return {
            "input_ids": self.encode("receiver", messages),
            "positions": range(part.start, part.stop),
        }

    def background(
        self,
        messages: Sequence[Message],
        tokens: int,
        generate: Callable[[Tensor], Iterator[str]],
    ) -> Iterator[str]:
        """See `Prompts.background`: the form, filled in as far as ``tokens`` values reach."""
        asked = self._asked(messages)
        entity, attributes = torch.tensor([asked.entity]), torch.tensor([asked.attributes[:tokens]])
        values = ev.write_form(self._pair.sharer, self._pair.world, entity, attributes)
        yield w.decode(self._pair.world.filled_form(entity, attributes, values)[0, 1:])

    def with_background(self, messages: Sequence[Message], text: str) -> Tensor:
        """See `Prompts.with_background`: the filled form in place of the blank one."""
        form = torch.tensor([[w.BOS, *w.encode(text)]])
        return torch.cat([form, _question(self._asked(messages))], dim=1)

    def truth(self, messages: Sequence[Message]) -> str | None:
        """See `Prompts.truth`."""
        asked, world = self._asked(messages), self._pair.world
        attribute = torch.tensor([asked.attribute])
        fact = world.facts[asked.entity, asked.attribute][None]
        answer = world.answers(torch.tensor([asked.kind]), attribute, fact)
        return w.decode(w.value_ids(attribute, answer))

    def _form(self, asked: _Asked) -> Tensor:
        entity, attributes = torch.tensor([asked.entity]), torch.tensor([asked.attributes])
        return self._pair.world.blank_form(entity, attributes)

    def _asked(self, messages: Sequence[Message]) -> _Asked:
        """The last message, with the form of an earlier one if it has none."""
        form, question = _parts(messages[-1]["content"])
        for message in reversed(messages[:-1]):
            if form:
                break
            if message["role"] == "user":
                form, _ = _parts(message["content"])
        if not form:
            raise ValueError(f"there is no form to ask about yet; try: {EXAMPLES[0]}")
        entity = self._pair.world.entity(form[0])
        attributes = [w.attribute(word) for word in form[2:]]
        if len(set(attributes)) < len(attributes):
            raise ValueError("an attribute may be in the form only once")
        kind, attribute = w.KINDS.index(question[2]), w.attribute(question[3])
        if attribute not in attributes:
            raise ValueError(f"the form does not have {question[3]!r}, only {', '.join(form[2:])}")
        return _Asked(entity, attributes, kind, attribute)


def load_shipped_pair() -> ChatModels:
    """The demo's pair, in float32 on the CPU."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pair = ev.load_pair(ASSETS, SEED)
    finally:
        if was_on:
            logging.enable_progress_bar()
    words = make_tokenizer()
    names = {name: f"the shipped {name}" for name in (*SIDES, "fuser")}
    return ChatModels(
        pair.receiver,
        pair.sharer,
        pair.fuser,
        dict.fromkeys(SIDES, words),
        FormPrompts(pair),
        names,
    )


def _parts(text: str) -> tuple[list[str], list[str]]:
    """The words of form and question of a message; the form may be empty."""
    words = text.split()
    if words[:1] == ["<bos>"]:
        words = words[1:]
    form, question = words[:-4], words[-4:]
    if (
        question[:2] != ["question", ":"]
        or len(question) != 4
        or question[2] not in w.KINDS
        or (form and (len(form) < 3 or form[1] != ":"))
    ):
        w.encode(words)  # an unknown word is what to complain about first
        raise ValueError(
            f"not a question in the language of this pair; try: {EXAMPLES[0]}  (/help explains it)"
        )
    return form, question


def _question(asked: _Asked) -> Tensor:
    return w.question(torch.tensor([asked.kind]), torch.tensor([asked.attribute]))

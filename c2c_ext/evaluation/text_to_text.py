"""Text-to-text: the sharer writes something about each question, the receiver reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..messages import shown_name
from .modes import Item, generate
from .readers import EvaluationPair, Ids

# What the sharer is asked for; it sees the options where there are some.
T2T_PROMPT = (
    "In one or two sentences, write down what somebody has to know to answer the question below. "
    "Do not answer it.\n\n{question}{options}\n"
)
T2T_READING = "{text}\n\n{question}"
T2T_TOKENS = 128


@dataclass(frozen=True)
class Wording:
    """How the two talk.

    Attributes:
        prompt: what the sharer reads; has ``{question}`` and may have ``{options}``, a list of them
            on lines of its own, empty where there are none.
        reading: what the receiver then reads in place of the question; has ``{text}`` and
            ``{question}``.
        tokens: that the sharer may write, at least 1.

    Raises:
        ValueError: a placeholder is missing, or a number below 1.
    """

    prompt: str = T2T_PROMPT
    reading: str = T2T_READING
    tokens: int = T2T_TOKENS

    def __post_init__(self) -> None:
        needed = {"prompt": ("{question}",), "reading": ("{text}", "{question}")}
        for name, placeholders in needed.items():
            for placeholder in placeholders:
                if placeholder not in getattr(self, name):
                    raise ValueError(
                        f"t2t {name} must have the placeholder {placeholder}, got "
                        f"{shown_name(getattr(self, name))}"
                    )
        if self.tokens < 1:
            raise ValueError(f"t2t tokens must be at least 1, got {self.tokens}")

    def asked(self, question: str, options: Sequence[str]) -> str:
        """What the sharer reads."""
        listed = "".join(f"\n- {option.strip()}" for option in options)
        return _filled(self.prompt, question=question, options=listed)

    def read(self, text: str, question: str) -> str:
        """What the receiver reads."""
        return _filled(self.reading, text=text, question=question)


def _filled(template: str, **values: str) -> str:
    """``template`` with its placeholders replaced; those inside of values mean nothing."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found[1]], template)


def write(
    pair: EvaluationPair,
    prompts: Sequence[Ids],
    tokens: int,
    *,
    ends: Sequence[int] = (),
    batch_size: int = 8,
) -> list[tuple[int, ...]]:
    """The token ids that the sharer writes after every prompt, greedily, without the last end.

    Args:
        prompts: token ids of the sharer's, as what it writes.
        tokens: at most so many.
        ends: tokens that end a text.
    """
    items = [Item(tuple(prompt)) for prompt in prompts]
    said = generate(
        "sharer",
        pair,
        items,
        tokens,
        stop=lambda side, item, ids: ids[-1] in ends,
        batch_size=batch_size,
    )
    return [s.ids[:-1] if s.ids[-1] in ends else s.ids for s in said]

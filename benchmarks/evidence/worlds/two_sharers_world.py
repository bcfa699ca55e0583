"""The form world with two sharers: who knows what, what is read, and what is asked.

Sharer A knows the first six of the demo's twelve attributes of every entity, sharer B the other
six. All three models read the same blank form, `<bos> Corbin : metal drink tree cloth`, of both
sharers' attributes in any order. The receiver is asked `question : is metal`, which one sharer can
answer, or `question : which metal cloth`, which needs one of each: every value of every attribute
has a number from 0 to 7 that only the receiver knows, and the answer is the word for the sum of the
two numbers modulo 8. Whoever knows only one of the two values knows nothing about the answer.

That is exact, not only likely: within the held-out entities, and within the train entities, any two
attributes are jointly uniform (each of the 64 pairs of values is the fact of exactly two of 128
entities: an orthogonal array of strength two), so any guess from one value alone, or from none, is
right for exactly one entity in eight.

Batches are int64 tensors of indices, as in `c2c_ext.demo.world`.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from c2c_ext.demo import world as w

ANSWERS = (
    *("north", "northeast", "east", "southeast"),
    *("south", "southwest", "west", "northwest"),
)
WHICH = "which"
VOCABULARY: tuple[str, ...] = (*w.VOCABULARY, WHICH, *ANSWERS)
WHICH_ID = len(w.VOCABULARY)
FIRST_ANSWER = WHICH_ID + 1

SHARERS = ("A", "B")
OWNED = w.NUM_ATTRIBUTES // len(SHARERS)  # attributes that a sharer knows
IS, WHICH_SUM = "is", "which"  # the kinds of question
BITS = 7
ENTITIES = 2**BITS  # of a block: its entities are the points of a space over the field of two


@dataclass(frozen=True, eq=False)
class TwoSharerWorld:
    """One seed's entities, facts and numbers (`make_world`)."""

    seed: int
    names: tuple[str, ...]  # the train entities, the held-out ones, then names that have no facts
    facts: Tensor  # [256, 12], the value of each entity's attribute
    number_of: Tensor  # [12, 8], the number of each value

    @property
    def train(self) -> Tensor:
        """Entities [128] whose facts a fuser may be trained on."""
        return torch.arange(ENTITIES)

    @property
    def held_out(self) -> Tensor:
        """Entities [128] that no fuser training sees."""
        return torch.arange(ENTITIES, 2 * ENTITIES)

    @property
    def others(self) -> Tensor:
        """Entities [144] without facts, for the receiver's training."""
        return torch.arange(2 * ENTITIES, len(self.names))

    @cached_property
    def name_ids(self) -> Tensor:
        """Token ids [400] of the entities' names."""
        return torch.tensor(w.encode(self.names))

    def sums(self, first: Tensor, first_values: Tensor, second: Tensor, values: Tensor) -> Tensor:
        """The answers (places in `ANSWERS`) to `which` questions about two attributes' values."""
        numbers = self.number_of[first, first_values] + self.number_of[second, values]
        return numbers % len(ANSWERS)

    def form(
        self, entities: Tensor, attributes: Tensor, values: Tensor, given: Tensor | None = None
    ) -> Tensor:
        """Token ids [B, N] of `<bos> E : A1 V1 ... AK VK`.

        Args:
            given: bool [K], at which places the value is written (default: everywhere), or
                [B, K] with as many places in every row.
        """
        head = self.blank_form(entities, attributes[:, :0])
        pairs = torch.stack(
            [attributes + w.FIRST_ATTRIBUTE, w.value_ids(attributes, values)], dim=-1
        ).flatten(1)
        if given is not None:
            given = given.expand(attributes.shape)
            keep = torch.stack([torch.ones_like(given), given], dim=-1).flatten(1)
            pairs = pairs[keep].view(len(pairs), -1)
        return torch.cat([head, pairs], dim=1)

    def blank_form(self, entities: Tensor, attributes: Tensor) -> Tensor:
        """Token ids [B, 3 + K] of `<bos> E : A1 ... AK`."""
        name = self.name_ids[entities]
        bos, colon = torch.full_like(name, w.BOS), torch.full_like(name, w.COLON)
        head = torch.stack([bos, name, colon], dim=1)
        return torch.cat([head, attributes + w.FIRST_ATTRIBUTE], dim=1)

    def digest(self) -> str:
        """SHA-256 of everything that is drawn from the seed."""
        drawn = [self.names, self.facts.tolist(), self.number_of.tolist()]
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def owned(sharer: int) -> Tensor:
    """The attributes [6] that this sharer (a place in `SHARERS`) knows."""
    return torch.arange(sharer * OWNED, (sharer + 1) * OWNED)


def owner(attributes: Tensor) -> Tensor:
    """The sharer that knows each attribute."""
    return attributes // OWNED


def question(kind: str, first: Tensor, second: Tensor | None = None) -> Tensor:
    """Token ids [B, 4] of `question : is A`, or [B, 5] of `question : which A1 A2`."""
    kind_id = w.FIRST_KIND + w.IS if kind == IS else WHICH_ID
    words = [torch.full_like(first, word) for word in (w.QUESTION, w.COLON, kind_id)]
    asked = [first] if kind == IS else [first, second]
    return torch.stack([*words, *(a + w.FIRST_ATTRIBUTE for a in asked)], dim=1)


def decode(ids: Tensor) -> str:
    """The words of token ids, joined by spaces."""
    return " ".join(VOCABULARY[int(i)] for i in ids)


def make_world(seed: int) -> TwoSharerWorld:
    """The world of a seed, the same on every machine and with every version."""
    draw = random.Random(f"two sharers {seed}")
    names = tuple(w.shuffled(w.NAMES, draw))
    facts = _block(draw) + _block(draw)
    numbers = [w.shuffled(range(w.NUM_VALUES), draw) for _ in w.ATTRIBUTES]
    return TwoSharerWorld(seed, names, torch.tensor(facts), torch.tensor(numbers))


def _block(draw: random.Random) -> list[list[int]]:
    """Facts [128][12] of which any two attributes are jointly uniform.

    An entity is a vector of seven bits, an attribute three linear functions of it: two attributes
    are jointly uniform where their six functions are independent, that is, where the spaces that
    they span share nothing but zero. Which entity is which vector, and which value is which three
    bits, is drawn too.
    """
    functions: list[tuple[int, int, int]] = []
    while len(functions) < w.NUM_ATTRIBUTES:
        functions, used = [], {0}
        for _ in range(20_000):  # a dead end is possible, then all are drawn again
            a, b, c = (1 + int(draw.random() * (ENTITIES - 1)) for _ in range(3))
            span = {a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c}
            if len(span) == 7 and not span & used:
                functions.append((a, b, c))
                used |= span
                if len(functions) == w.NUM_ATTRIBUTES:
                    break
    values = [w.shuffled(range(w.NUM_VALUES), draw) for _ in w.ATTRIBUTES]
    return [
        [
            value_of[sum(_parity(vector & f) << bit for bit, f in enumerate(three))]
            for three, value_of in zip(functions, values, strict=True)
        ]
        for vector in w.shuffled(range(ENTITIES), draw)
    ]


def _parity(number: int) -> int:
    return bin(number).count("1") % 2

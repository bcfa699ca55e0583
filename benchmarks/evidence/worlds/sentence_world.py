"""The sentence world: facts as sentences about named entities, and questions about them.

A fact is stated in one of three ways, `the metal of ba di is iron .`, `ba di 's metal is the iron
.`, `what is the metal of ba di ? iron .`; a question is `question : what is the metal of ba di ?
is answer :`, and the answer is predicted at its last word. With `rivals` in place of the last `is`
it asks for the value that rivals the fact, a cycle through the attribute's eight values.

Only the sharer knows the facts, only the receiver knows questions and rivals. As in
`c2c_ext.demo.world`, facts and rivals are drawn from a seed, and every value is the fact of exactly
as many entities as any other, within the train and within the held-out entities: whoever answers
without knowing is right one time in eight.

Batches are int64 tensors of indices: entities `[B]` (rows of `World.names`), attributes `[B]`
(places in `ATTRIBUTES`), values `[B]` (places among the attribute's eight), kinds `[B]` (places in
`KINDS`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from c2c_ext.demo import world as forms

ATTRIBUTES = ("colour", "animal", "metal")
NUM_ATTRIBUTES = len(ATTRIBUTES)
NUM_VALUES = forms.NUM_VALUES
VALUES = tuple(value for attribute in ATTRIBUTES for value in forms.VALUES_OF[attribute])
KINDS = forms.KINDS
IS, RIVALS = forms.IS, forms.RIVALS
SYLLABLES = tuple(c + v for c, v in itertools.product("bdfgklmnpr", "aeio"))
WORDS = (
    *("<pad>", "<bos>", ".", ":", "?", "the", "of", "is", "'s", "has", "what", "which", "rivals"),
    *("question", "options", "answer", "and", "for", "A", "B", "C", "D"),
)
VOCABULARY = (*WORDS, *ATTRIBUTES, *VALUES, *SYLLABLES)
_ID_OF = {word: i for i, word in enumerate(VOCABULARY)}
PAD, BOS, STOP = _ID_OF["<pad>"], _ID_OF["<bos>"], _ID_OF["."]
FIRST_ATTRIBUTE, FIRST_VALUE = _ID_OF[ATTRIBUTES[0]], _ID_OF[VALUES[0]]
FIRST_SYLLABLE = _ID_OF[SYLLABLES[0]]

# E stands for the two syllables of a name, A for an attribute, V for a value, KIND for a kind.
STATEMENTS = ("the A of E is V .", "E 's A is the V .", "what is the A of E ? V .")
STATED = STATEMENTS[:2]  # the ways in which the receiver is told facts
OPENING = "the A of E is"  # what the sharer completes where it writes a fact
ASKED = "what is the A of E ?"
QUESTION = f"question : {ASKED} KIND answer :"
QUESTION_TOKENS = len(QUESTION.split()) + 1  # a name is two tokens

NUM_TRAIN, NUM_HELD_OUT = 160, 80
NUM_KNOWN = NUM_TRAIN + NUM_HELD_OUT


@dataclass(frozen=True, eq=False)
class World:
    """One seed's entities, facts and rivals (`make_world`)."""

    seed: int
    names: Tensor  # [1560, 2] syllables; the train entities, the held-out ones, then without facts
    facts: Tensor  # [240, 3], the value of each entity's attribute
    rival_of: Tensor  # [3, 8], the value that rivals a value

    @property
    def train(self) -> Tensor:
        """Entities [160] whose facts a fuser may be trained on."""
        return torch.arange(NUM_TRAIN)

    @property
    def held_out(self) -> Tensor:
        """Entities [80] that no fuser training sees."""
        return torch.arange(NUM_TRAIN, NUM_KNOWN)

    @property
    def others(self) -> Tensor:
        """Entities [1320] without facts, for the receiver's training."""
        return torch.arange(NUM_KNOWN, len(self.names))

    @cached_property
    def name_ids(self) -> Tensor:
        """Token ids [1560, 2] of the entities' names."""
        return self.names + FIRST_SYLLABLE

    def answers(self, kinds: Tensor, attributes: Tensor, facts: Tensor) -> Tensor:
        """The values [B] that answer questions of these kinds, given the facts [B]."""
        return torch.where(kinds == IS, facts, self.rival_of[attributes, facts])

    def sentence(
        self,
        template: str,
        entities: Tensor,
        attributes: Tensor,
        values: Tensor | None = None,
        kinds: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, N] of one sentence, filled in for every row.

        Args:
            values, kinds: needed where the template has V, KIND.
        """
        columns: list[Tensor] = []
        for word in template.split():
            if word == "E":
                columns += self.name_ids[entities].unbind(1)
            elif word == "A":
                columns.append(attributes + FIRST_ATTRIBUTE)
            elif word == "V":
                columns.append(value_ids(attributes, values))
            elif word == "KIND":
                columns.append(torch.where(kinds == IS, *map(_ID_OF.get, KINDS)))
            else:
                columns.append(torch.full_like(entities, _ID_OF[word]))
        return torch.stack(columns, dim=1)

    def digest(self) -> str:
        """SHA-256 of everything that is drawn from the seed."""
        drawn = [self.names.tolist(), self.facts.tolist(), self.rival_of.tolist()]
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def decode(ids: Iterable[int] | Tensor) -> str:
    """The words of token ids, joined by spaces."""
    return " ".join(VOCABULARY[int(i)] for i in ids)


def value_ids(attributes: Tensor, values: Tensor) -> Tensor:
    """Token ids of values of attributes; both broadcast."""
    return FIRST_VALUE + attributes * NUM_VALUES + values


def candidate_ids(attributes: Tensor) -> Tensor:
    """Token ids [B, 8] of all values of the attributes."""
    return value_ids(attributes[:, None], torch.arange(NUM_VALUES))


def opened(*parts: Tensor) -> Tensor:
    """Token ids [B, 1 + N] of `<bos>` and the parts [B, n] after each other."""
    return torch.cat([torch.full_like(parts[0][:, :1], BOS), *parts], dim=1)


def place_of(word: str, template: str = QUESTION) -> int:
    """Where a word of a template stands in its tokens, after `<bos>`."""
    words = template.split()
    before = words[: words.index(word)]
    return 1 + len(before) + before.count("E")  # a name is two tokens


def make_world(seed: int) -> World:
    """The world of a seed, the same on every machine and with every version."""
    draw = random.Random(seed)
    pairs = itertools.permutations(range(len(SYLLABLES)), 2)
    names = torch.tensor(forms.shuffled(pairs, draw))
    facts, rivals = forms.draw_tables(draw, len(ATTRIBUTES))
    return World(seed, names, facts, rivals)

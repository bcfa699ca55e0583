"""The form world: what the demo's tiny models read, what they know, and what they are asked.

A *form* names an entity and some attributes, `<bos> Corbin : metal drink colour`; filled in, each
attribute is followed by its value. A *question* follows the form, `question : is metal`, and the
answer, one of the attribute's eight values, is predicted at the last word. `question : rivals
metal` asks for the value that rivals the fact, a cycle through the eight values.

Only the sharer knows the facts, only the receiver knows questions and rivals. Facts and rivals are
drawn from a seed. Every value is the fact of exactly as many entities as any other, within the
train and within the held-out entities: whoever answers without knowing is right one time in eight.

Batches are int64 tensors of indices: entities `[B]` (rows of `World.names`), attributes `[B, K]`
(places in `ATTRIBUTES`), values `[B, K]` (places among the attribute's eight).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

VALUES_OF: dict[str, tuple[str, ...]] = {
    "colour": ("red", "green", "blue", "yellow", "purple", "black", "white", "brown"),
    "animal": ("otter", "falcon", "badger", "heron", "lynx", "beaver", "raven", "stag"),
    "metal": ("iron", "copper", "silver", "gold", "tin", "zinc", "nickel", "lead"),
    "drink": ("tea", "coffee", "cider", "milk", "cocoa", "lemonade", "water", "wine"),
    "tree": ("oak", "birch", "maple", "willow", "cedar", "elm", "larch", "poplar"),
    "fruit": ("apple", "pear", "cherry", "mango", "fig", "quince", "grape", "apricot"),
    "instrument": ("violin", "flute", "piano", "drum", "harp", "trumpet", "cello", "guitar"),
    "tool": ("hammer", "chisel", "saw", "wrench", "pliers", "shovel", "axe", "drill"),
    "weather": ("rain", "snow", "fog", "sunshine", "thunder", "hail", "drizzle", "frost"),
    "sport": ("rowing", "tennis", "fencing", "archery", "skiing", "judo", "cricket", "golf"),
    "cloth": ("linen", "cotton", "silk", "wool", "velvet", "denim", "satin", "felt"),
    "shape": ("circle", "square", "spiral", "cube", "cone", "star", "arrow", "oval"),
}
ATTRIBUTES = tuple(VALUES_OF)
NUM_ATTRIBUTES = len(ATTRIBUTES)
NUM_VALUES = 8

KINDS = ("is", "rivals")
IS, RIVALS = range(len(KINDS))
SPECIAL = ("<pad>", "<bos>", ":", "question", *KINDS)
_FIRST = "Al Bar Ben Cor Dal El Fen Gar Hal Il Jor Kel Lor Mar Nor Or Per Ros Sel Tor".split()
_LAST = "an bin da dric eth fa gar ia ken lea lin mo na ory ric sa ton va win zor".split()
NAMES = tuple(first + last for first in _FIRST for last in _LAST)
NUM_TRAIN, NUM_HELD_OUT = 160, 80

VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *ATTRIBUTES,
    *(value for values in VALUES_OF.values() for value in values),
    *NAMES,
)
_ID_OF = {word: i for i, word in enumerate(VOCABULARY)}
PAD, BOS, COLON, QUESTION = (_ID_OF[word] for word in SPECIAL[:4])
FIRST_KIND = _ID_OF[KINDS[0]]
FIRST_ATTRIBUTE = _ID_OF[ATTRIBUTES[0]]
FIRST_VALUE = _ID_OF[VALUES_OF[ATTRIBUTES[0]][0]]

FORM_START = 3  # `<bos> E :` precedes the first attribute

# The seeds in use, with the digest of the world each one makes: facts and split were fixed by these
# lines before any model was trained on them. Seed 0 is the shipped pair's (and the only one that
# anything was tuned on); 1, 2 and 3 are checks, trained with everything fixed before.
WORLD_DIGESTS = {
    0: "4ef722101c761a86f9d46fdecdec14d9c37e5ba4bd06a3c464f745326d1fc767",
    1: "80d16092e774678ef9a51eb49e06a2770d3962f451441b1fa2d0d9a42057d396",
    2: "1b1e37d152a3323d7a804234e9ef337560bc005f7548b30687479c0286d05c29",
    3: "262ed3db93bed52c4283ea4ee49fd13cc924674a3d38ce5d659cd48816acec3b",
}


def encode(text: str | Iterable[str]) -> list[int]:
    """Token ids of words (a text is split at spaces). Raises ValueError for an unknown word."""
    words = text.split() if isinstance(text, str) else list(text)
    unknown = [word for word in words if word not in _ID_OF]
    if unknown:
        raise ValueError(
            f"not in the demo's vocabulary: {', '.join(unknown)}; it has {' '.join(SPECIAL)}, "
            f"the attributes {', '.join(ATTRIBUTES)}, their values, and the names of the entities"
        )
    return [_ID_OF[word] for word in words]


def decode(ids: Iterable[int] | Tensor) -> str:
    """The words of token ids, joined by spaces."""
    return " ".join(VOCABULARY[int(i)] for i in ids)


@dataclass(frozen=True, eq=False)
class World:
    """One seed's entities, facts and rivals (`make_world`)."""

    seed: int
    names: tuple[str, ...]  # the train entities, the held-out ones, then names that have no facts
    facts: Tensor  # [240, 12], the value of each entity's attribute
    rival_of: Tensor  # [12, 8], the value that rivals a value

    @property
    def train(self) -> Tensor:
        """Entities [160] whose facts a fuser may be trained on."""
        return torch.arange(NUM_TRAIN)

    @property
    def held_out(self) -> Tensor:
        """Entities [80] that no fuser training sees."""
        return torch.arange(NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT)

    @property
    def others(self) -> Tensor:
        """Entities [160] without facts, for the receiver's training."""
        return torch.arange(NUM_TRAIN + NUM_HELD_OUT, len(self.names))

    @cached_property
    def name_ids(self) -> Tensor:
        """Token ids [400] of the entities' names."""
        return torch.tensor(encode(self.names))

    def answers(self, kinds: Tensor, attributes: Tensor, facts: Tensor) -> Tensor:
        """The values that answer questions of these kinds (places in `KINDS`), given the facts.

        All [B]; a fact is the value that the form or the knowledge base gives the attribute.
        """
        return torch.where(kinds == IS, facts, self.rival_of[attributes, facts])

    def blank_form(self, entities: Tensor, attributes: Tensor) -> Tensor:
        """Token ids [B, 3 + K] of `<bos> E : A1 ... AK`."""
        return torch.cat([self._head(entities), attributes + FIRST_ATTRIBUTE], dim=1)

    def filled_form(self, entities: Tensor, attributes: Tensor, values: Tensor) -> Tensor:
        """Token ids [B, 3 + 2K] of `<bos> E : A1 V1 ... AK VK`."""
        pairs = torch.stack([attributes + FIRST_ATTRIBUTE, value_ids(attributes, values)], dim=-1)
        return torch.cat([self._head(entities), pairs.flatten(1)], dim=1)

    def _head(self, entities: Tensor) -> Tensor:
        name = self.name_ids[entities]
        return torch.stack([torch.full_like(name, BOS), name, torch.full_like(name, COLON)], dim=1)

    def entity(self, name: str) -> int:
        """The entity of that name. Raises ValueError, naming those that have facts, if none."""
        known = self.names[: len(self.facts)]
        if name not in known:
            raise ValueError(f"unknown entity {name!r}; known are {', '.join(sorted(known))}")
        return known.index(name)

    def digest(self) -> str:
        """SHA-256 of everything that is drawn from the seed."""
        drawn = [self.names, self.facts.tolist(), self.rival_of.tolist()]
        return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def attribute(name: str) -> int:
    """The attribute of that name. Raises ValueError, naming all attributes, if there is none."""
    if name not in VALUES_OF:
        raise ValueError(f"unknown attribute {name!r}; known are {', '.join(ATTRIBUTES)}")
    return ATTRIBUTES.index(name)


def value_ids(attributes: Tensor, values: Tensor) -> Tensor:
    """Token ids of values of attributes; both broadcast."""
    return FIRST_VALUE + attributes * NUM_VALUES + values


def question(kinds: Tensor, attributes: Tensor) -> Tensor:
    """Token ids [B, 4] of `question : KIND A` for kinds [B] (places in `KINDS`), attributes [B]."""
    words = [torch.full_like(kinds, QUESTION), torch.full_like(kinds, COLON)]
    return torch.stack([*words, kinds + FIRST_KIND, attributes + FIRST_ATTRIBUTE], dim=1)


def make_world(seed: int) -> World:
    """The world of a seed, the same on every machine and with every version."""
    draw = random.Random(seed)
    names = tuple(shuffled(NAMES, draw))
    facts, rivals = draw_tables(draw, NUM_ATTRIBUTES)
    return World(seed, names, facts, rivals)


def draw_tables(draw: random.Random, attributes: int) -> tuple[Tensor, Tensor]:
    """Facts [240, attributes], balanced within either split, and rivals [attributes, 8], cycles."""
    columns = []
    for _ in range(attributes):
        column: list[int] = []
        for split in (NUM_TRAIN, NUM_HELD_OUT):
            column += shuffled([i % NUM_VALUES for i in range(split)], draw)
        columns.append(column)
    rivals = []
    for _ in range(attributes):
        cycle = shuffled(range(NUM_VALUES), draw)
        rivals.append([cycle[(cycle.index(v) + 1) % NUM_VALUES] for v in range(NUM_VALUES)])
    return torch.tensor(columns).T.contiguous(), torch.tensor(rivals)


def shuffled(items: Iterable, draw: random.Random) -> list:
    """In an order that the draw gives."""
    # Of all the generators at hand only random.random() promises one stream for all versions.
    return [item for _, item in sorted([(draw.random(), item) for item in items])]

"""Forms whose values are words of several syllables, one token each: what is read and asked.

Entities, facts, rivals and splits are those of `c2c_ext.demo.world`, drawn from the same seed. The
value's spelling is new: the eight values of an attribute are all combinations of a few first
syllables with a few second ones (and so on), so that no syllable alone tells the value. With two
syllables a filled form is `<bos> E : A1 F1 S1 ... AK FK SK`.

Token ids are those of the demo's vocabulary, where an attribute's eight words serve as its
syllables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from c2c_ext.demo import world as w

# How many syllables there are to choose from at each place of a value.
BRANCHING = {2: (4, 2), 3: (2, 2, 2)}
for _choices in BRANCHING.values():
    assert math.prod(_choices) == w.NUM_VALUES and sum(_choices) <= w.NUM_VALUES


def syllables(values: Tensor, length: int) -> Tensor:
    """Which syllable [..., length] stands at each place of values [...] (0 .. 7)."""
    places, rest = [], w.NUM_VALUES
    for choices in BRANCHING[length]:
        rest //= choices
        places.append(values // rest % choices)
    return torch.stack(places, dim=-1)


def syllable_ids(attributes: Tensor, values: Tensor, length: int) -> Tensor:
    """Token ids [..., length] of values of attributes; both are of one shape."""
    spelled = syllables(values, length)
    ids = [
        place_ids(attributes, place, length).gather(-1, spelled[..., place : place + 1])
        for place in range(length)
    ]
    return torch.cat(ids, dim=-1)


def place_ids(attributes: Tensor, place: int, length: int) -> Tensor:
    """Token ids [..., choices] of all the syllables that attributes [...] have at one place."""
    choices = BRANCHING[length]
    first = w.FIRST_VALUE + attributes * w.NUM_VALUES + sum(choices[:place])
    return first[..., None] + torch.arange(choices[place])


def form(
    world: w.World, entities: Tensor, attributes: Tensor, spelled: Tensor, given: list[int]
) -> Tensor:
    """Token ids of forms whose k-th slot holds the first `given[k]` syllables of its value.

    Args:
        entities, attributes: [B] and [B, K].
        spelled: [B, K, L], the values' token ids (what is beyond `given` is not read).
    """
    columns = [world.blank_form(entities, attributes[:, :0])]
    for k, count in enumerate(given):
        columns += [attributes[:, k : k + 1] + w.FIRST_ATTRIBUTE, spelled[:, k, :count]]
    return torch.cat(columns, dim=1)


def filled_form(world: w.World, entities: Tensor, attributes: Tensor, spelled: Tensor) -> Tensor:
    """Token ids [B, 3 + K (1 + L)] of forms with whole values [B, K, L]."""
    return form(world, entities, attributes, spelled, [spelled.shape[2]] * spelled.shape[1])

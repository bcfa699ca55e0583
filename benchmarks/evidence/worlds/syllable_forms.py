"""Forms whose values are words of several syllables, one token each: what is read and asked.

Entities, facts, rivals and splits are those of `c2c_ext.demo.world`, drawn from the same seed. The
values' spelling is new: the eight of an attribute are all combinations of its four first syllables
with its two second ones, so that no syllable alone tells the value. A filled form is
`<bos> E : A1 F1 S1 ... AK FK SK`. L below is 2, the length of a value.

Token ids are those of the demo's vocabulary, where an attribute's eight words serve as its
syllables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from c2c_ext.demo import world as w

# How many syllables there are to choose from at each place of a value.
CHOICES = (4, 2)
LENGTH = len(CHOICES)
assert math.prod(CHOICES) == w.NUM_VALUES and sum(CHOICES) <= w.NUM_VALUES


def syllables(values: Tensor) -> Tensor:
    """Which syllable [..., L] stands at each place of values [...] (0 .. 7)."""
    places, rest = [], w.NUM_VALUES
    for choices in CHOICES:
        rest //= choices
        places.append(values // rest % choices)
    return torch.stack(places, dim=-1)


def syllable_ids(attributes: Tensor, values: Tensor) -> Tensor:
    """Token ids [..., L] of values of attributes; both are of one shape."""
    spelled = syllables(values)
    ids = [
        place_ids(attributes, place).gather(-1, spelled[..., place : place + 1])
        for place in range(LENGTH)
    ]
    return torch.cat(ids, dim=-1)


def place_ids(attributes: Tensor, place: int) -> Tensor:
    """Token ids [..., choices] of all the syllables that attributes [...] have at one place."""
    first = w.FIRST_VALUE + attributes * w.NUM_VALUES + sum(CHOICES[:place])
    return first[..., None] + torch.arange(CHOICES[place])


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

"""Trains the syllable world's fusers: on questions about train entities alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.evidence.learning import Batch
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import train as demo
from c2c_ext.demo import world as w

from . import syllable_forms as sf


def drawing(
    world: w.World, rows: int, seed: int, *, itself: bool = False
) -> Callable[[int], Batch]:
    """Draws random questions of both kinds, all forms of a batch of one random size.

    Args:
        rows: questions in a batch.
        itself: the receiver's own reading of the form is fused, not the sharer's.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(step: int) -> Batch:
        size = demo.pick(ev.FORM_SIZES, generator)
        entities = world.train[torch.randint(w.NUM_TRAIN, (rows,), generator=generator)]
        asked = torch.randint(w.NUM_ATTRIBUTES, (rows,), generator=generator)
        kinds = torch.randint(len(w.KINDS), (rows,), generator=generator)
        forms = ev.random_forms(asked, size, generator)
        values = world.answers(kinds, asked, world.facts[entities, asked])
        answers = sf.syllable_ids(asked, values)
        form = world.blank_form(entities, forms)
        ids = torch.cat([form, w.question(kinds, asked), answers], dim=1)
        labels = torch.full_like(ids, demo.IGNORE)
        labels[:, -sf.LENGTH :] = answers
        fused = torch.zeros_like(ids, dtype=torch.bool)
        fused[:, ev.form_positions(size)] = True
        if itself:
            return Batch(ids, labels, fused)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return Batch(ids, labels, fused, form, places.masked_fill(~fused, -1))

    return draw

"""What an analysis is of: questions both models have read; the shipped pair's are made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..chat.models import ChatModels
from ..demo import evaluate as ev
from ..demo import world as w
from ..demo.command import SEED
from .controls import with_sharer_of
from .readings import Reading, read

FORM_SIZE = 6  # attributes in the shipped pair's forms, unless asked otherwise
FORM_SEED = 0  # of the forms that are drawn, as the demo draws them


@dataclass
class Questions:
    """What an analysis is of.

    Attributes:
        source: for people.
        readings: at least one, all with names and answers.
        mismatched: of the same prompts, with what the sharer has read for another question; empty
            where there is no other.
        ask_sharer: which questions the sharer alone answers right, bool ``[Q]``, and how sure it
            is, float64 ``[Q]``, the probability of its answer; in the order of the readings.
        ask_by_text: of the tokens that the sharer may write, which questions the receiver then
            answers right, bool ``[Q]``.
        t2t_tokens: that the sharer may write unless asked otherwise.
    """

    source: str
    readings: list[Reading]
    mismatched: list[Reading]
    ask_sharer: Callable[[], tuple[Tensor, Tensor]]
    ask_by_text: Callable[[int], Tensor]
    t2t_tokens: int


def sample(count: int, limit: int | None) -> Tensor:
    """At most ``limit`` of the places 0..count - 1, ascending int64; always the same ones.

    Drawn, for every n-th would be of one attribute where questions take turns.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:limit].sort().values


def shipped_questions(
    models: ChatModels,
    limit: int | None = None,
    size: int = FORM_SIZE,
    *,
    filled: bool = False,
) -> Questions:
    """Questions about held-out entities with forms of ``size``, of each kind at most ``limit``.

    An answer is chosen among the asked attribute's eight values; only the form's attributes are
    fused, and T2T is the sharer's filling in the form, one value a token.

    Args:
        filled: the receiver reads forms that are filled in, with values drawn at random, and by
            those an answer is right: something that it can do alone, and that the sharer, who reads
            the blank form, contradicts.
    """
    pair = ev.Pair(w.make_world(SEED), models.receiver, models.sharer, models.fuser)
    world, parts, readings, mismatched = pair.world, [], [], []
    for kind in w.KINDS:
        every = ev.held_out_questions(world, kind, size, FORM_SEED)
        kept = sample(len(every.asked), limit)
        fields = (every.entities, every.attributes, every.asked, every.kinds)
        questions = ev.Questions(*(field[kept] for field in fields))
        parts.append(questions)
        drawn = _drawn_values(every)[kept] if filled else None
        reading = _of_forms(pair, questions, world.blank_form(*fields[:2])[kept], drawn)
        readings.append(reading)
        other = _of_forms(pair, questions, _other_forms(world, every)[kept], drawn)
        mismatched.append(with_sharer_of(reading, other, reading.token_map))

    def ask_sharer() -> tuple[Tensor, Tensor]:
        logits = [ev.answer_alone(pair.sharer, world, q) for q in parts]
        right = [of.argmax(dim=1) == q.answers(world) for of, q in zip(logits, parts, strict=True)]
        return torch.cat(right), torch.cat(logits).double().softmax(dim=1).amax(dim=1)

    def ask_by_text(tokens: int) -> Tensor:
        written = [replace(q, attributes=q.attributes[:, :tokens]) for q in parts]
        logits = [ev.answer_t2t(pair, q, ev.write_form) for q in written]
        right = [of.argmax(dim=1) == q.answers(world) for of, q in zip(logits, parts, strict=True)]
        return torch.cat(right)

    return Questions(
        f"the shipped pair's held-out questions{', forms filled in' if filled else ''}",
        readings,
        mismatched,
        ask_sharer,
        ask_by_text,
        models.prompts.t2t_tokens,
    )


def _of_forms(
    pair: ev.Pair, questions: ev.Questions, read_by_sharer: Tensor, filled_with: Tensor | None
) -> Reading:
    """The questions, read by the receiver; the sharer reads forms ``[Q, 3 + K]``.

    Args:
        filled_with: values ``[Q, K]`` in the receiver's forms; None: they are blank, and the facts
            are asked for.
    """
    world, asked = pair.world, questions.asked
    places = ev.form_positions(questions.size)
    if filled_with is None:
        form = world.blank_form(questions.entities, questions.attributes)
        step, answers = 1, questions.answers(world)
    else:
        form = world.filled_form(questions.entities, questions.attributes, filled_with)
        step = 2  # a value follows each attribute
        told = filled_with[questions.attributes == asked[:, None]]
        answers = world.answers(questions.kinds, asked, told)
    ids = torch.cat([form, questions.question()], dim=1)
    token_map = torch.full((ids.shape[1] - 1,), -1)
    token_map[places.start : form.shape[1] : step] = torch.arange(places.start, places.stop)
    values = torch.arange(w.NUM_VALUES)
    return read(
        pair.receiver,
        pair.sharer,
        ids,
        read_by_sharer,
        token_map,
        answers=w.value_ids(asked, answers),
        candidates=w.value_ids(asked[:, None], values),
        names=tuple(w.decode(row[1:]) for row in ids),
    )


def _drawn_values(questions: ev.Questions) -> Tensor:
    """Values ``[Q, K]``, the same for the same questions."""
    generator = torch.Generator().manual_seed(FORM_SEED + 1)
    return torch.randint(w.NUM_VALUES, questions.attributes.shape, generator=generator)


def _other_forms(world: w.World, questions: ev.Questions) -> Tensor:
    """What the sharer reads instead, as in `ev.answer_mismatched`: forms of train entities."""
    generator = torch.Generator().manual_seed(1000 * FORM_SEED + questions.size)
    count = len(questions.asked)
    entities = torch.randint(w.NUM_TRAIN, (count,), generator=generator)
    asked = torch.randint(w.NUM_ATTRIBUTES, (count,), generator=generator)
    return world.blank_form(entities, ev.random_forms(asked, questions.size, generator))

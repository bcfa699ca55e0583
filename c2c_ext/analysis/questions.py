"""The questions that are analysed: the shipped pair's held-out ones, or those of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..chat.models import ChatModels
from ..chat.prompts import SIDES
from ..demo import evaluate as ev
from ..demo import world as w
from ..demo.command import SEED
from ..training.data import Conversation, read_conversations
from .readings import Reading, fused, is_right, next_logits, read

FORM_SIZE = 6  # attributes in the shipped pair's forms
FORM_SEED = 0  # of the forms that are drawn, as the demo draws them


@dataclass
class Questions:
    """What an analysis is of.

    Attributes:
        source: for people.
        readings: at least one, all with names and answers.
        solve: computes which questions each mode answers right: by mode bool ``[Q]``, in the order
            of the readings.
    """

    source: str
    readings: list[Reading]
    solve: Callable[[], dict[str, Tensor]]


def sample(count: int, limit: int | None) -> Tensor:
    """At most ``limit`` of the places 0..count - 1, ascending int64; always the same ones.

    Drawn, for every n-th would be of one attribute where questions take turns.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:limit].sort().values


def shipped_questions(models: ChatModels, limit: int | None = None) -> Questions:
    """Questions about held-out entities with forms of `FORM_SIZE`, of each kind at most ``limit``.

    An answer is chosen among the asked attribute's eight values; only the form's attributes are
    fused, and T2T is the sharer's filling in the whole form, as in `c2c_ext.demo.evaluate`.
    """
    pair = ev.Pair(w.make_world(SEED), models.receiver, models.sharer, models.fuser)
    world, parts, readings = pair.world, [], []
    for kind in w.KINDS:
        every = ev.held_out_questions(world, kind, FORM_SIZE, FORM_SEED)
        kept = sample(len(every.asked), limit)
        fields = (every.entities, every.attributes, every.asked, every.kinds)
        questions = ev.Questions(*(field[kept] for field in fields))
        parts.append(questions)
        form = world.blank_form(questions.entities, questions.attributes)
        ids = torch.cat([form, questions.question()], dim=1)
        token_map = torch.full((ids.shape[1] - 1,), -1)
        places = ev.form_positions(questions.size)
        token_map[places] = torch.arange(places.start, places.stop)
        values = torch.arange(w.NUM_VALUES)
        reading = read(
            models.receiver,
            models.sharer,
            ids,
            form,
            token_map,
            answers=w.value_ids(questions.asked, questions.answers(world)),
            candidates=w.value_ids(questions.asked[:, None], values),
            names=tuple(w.decode(row[1:]) for row in ids),
        )
        readings.append(reading)

    def solve() -> dict[str, Tensor]:
        modes: dict[str, Callable[[ev.Questions], Tensor]] = {
            "receiver": lambda q: ev.answer_alone(pair.receiver, world, q),
            "sharer": lambda q: ev.answer_alone(pair.sharer, world, q),
            "T2T": lambda q: ev.answer_t2t(pair, q, ev.write_form),
            "C2C": lambda q: ev.answer_c2c(pair, q),
        }
        return {
            mode: torch.cat([answer(q).argmax(dim=1) == q.answers(world) for q in parts])
            for mode, answer in modes.items()
        }

    return Questions("the shipped pair's held-out questions", readings, solve)


def file_questions(models: ChatModels, place: str, limit: int | None = None) -> Questions:
    """Conversations of a file as `c2c train` reads it, at most ``limit`` of them, one a reading.

    The last message, the assistant's, is the right answer. Of it the first token alone counts:
    the one that the receiver says next is chosen among its whole vocabulary. Fused is the whole
    prompt but its last token, or the record's ``positions``.

    Raises:
        ValueError, OSError: no such file, a line that breaks a rule, a prompt that these models
            cannot read; names file and line.
    """
    if not Path(place).is_file():
        raise FileNotFoundError(f"--questions: there is no file {place}")
    conversations, bad = read_conversations(place)
    bad.check()
    chosen = [conversations[i] for i in sample(len(conversations), limit).tolist()]
    readings, prompts, firsts = [], [], []
    for talk in chosen:
        try:
            reading, own, first = _of_conversation(models, talk)
        except ValueError as error:
            raise ValueError(f"--questions: {place} line {talk.number}: {error}") from error
        readings.append(reading)
        prompts.append(own)
        firsts.append(first)

    @torch.no_grad()
    def solve() -> dict[str, Tensor]:
        alone = [is_right(next_logits(models.receiver, r.receiver, r), r).cpu() for r in readings]
        together = [
            is_right(next_logits(models.receiver, fused(r, models.fuser), r), r).cpu()
            for r in readings
        ]
        theirs = [
            models.sharer(input_ids=ids.to(models.sharer.device)).logits[:, -1].argmax(dim=1).cpu()
            == first
            for ids, first in zip(prompts, firsts, strict=True)
        ]
        found = {"receiver": alone, "sharer": theirs, "C2C": together}
        return {mode: torch.cat(right) for mode, right in found.items()}

    return Questions(place, readings, solve)


def _of_conversation(models: ChatModels, talk: Conversation) -> tuple[Reading, Tensor, int]:
    """The reading, what the sharer reads when it answers alone, and the first token it must say."""
    messages, answer = talk.messages[:-1], talk.messages[-1]["content"]
    shared = models.prompts.shared(messages)
    ids = shared["input_ids"]
    length = ids.shape[1]
    theirs, token_map = ids[:, :-1], torch.arange(length - 1)
    if "sharer_inputs" in shared:
        theirs = shared["sharer_inputs"]["input_ids"]
        token_map = shared["sharer_inputs"]["token_map"][0][: length - 1].clone()
    if talk.positions is not None:
        first, end = talk.positions
        if end > length - 1:
            raise ValueError(
                f"positions must end at most at {length - 1}, before the last prompt token, got "
                f"{end}"
            )
        outside = torch.ones(length - 1, dtype=torch.bool)
        outside[first:end] = False
        token_map[outside] = -1
    alone = models.prompts.encode("sharer", messages)
    models.check_length("receiver", length, 1)
    models.check_length("sharer", max(theirs.shape[1], alone.shape[1]), 1)
    largest, vocabulary = int(theirs.max()), models.sharer.config.vocab_size
    if largest >= vocabulary:
        raise ValueError(f"token {largest} is not one of the sharer's {vocabulary}")
    firsts = {}
    for side in SIDES:
        tokens = models.tokenizers[side](answer, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise ValueError(f"the {side}'s tokenizer makes no token of the answer")
        firsts[side] = tokens[0]
    reading = read(
        models.receiver,
        models.sharer,
        ids,
        theirs,
        token_map,
        answers=torch.tensor([firsts["receiver"]]),
        names=(f"line {talk.number}",),
    )
    return reading, alone, firsts["sharer"]

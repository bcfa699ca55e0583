"""Questions of the syllable world as tasks, and every way in which the sharer can write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from benchmarks.evidence.asking import Models, Task, Text, ask_all
from benchmarks.evidence.outcomes import Cell
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w

from . import syllable_forms as sf


def token_map(size: int) -> Tensor:
    """For a prompt of form and question: a form's attributes are fused, each with its own."""
    places = torch.arange(w.FORM_START + size + 3)  # the question's last word is never fused
    form = ev.form_positions(size)
    return places.masked_fill((places < form.start) | (places >= form.stop), -1)


def candidates(asked: Tensor) -> Tensor:
    """Token ids [Q, L, C] among which each syllable of an answer is chosen.

    Where a place has fewer syllables than C they are repeated (of equal ones the first is chosen),
    so that guessing is right one time in eight.
    """
    most = max(sf.CHOICES)
    places = [sf.place_ids(asked, place) for place in range(sf.LENGTH)]
    return torch.stack([ids.repeat(1, most // ids.shape[1]) for ids in places], dim=1)


def make_task(world: w.World, questions: ev.Questions) -> Task:
    """The questions, in the receiver's own form; the sharer reads the blank form alone."""
    form = world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    return Task(
        prompt,
        form,
        token_map(questions.size),
        candidates(questions.asked),
        sf.syllables(questions.answers(world)),
        alone=prompt,
    )


def _chosen(logits: Tensor, attributes: Tensor, place: int) -> Tensor:
    """The likeliest syllables [...] of a place, as token ids, from logits [..., V]."""
    ids = sf.place_ids(attributes, place)
    best = logits.gather(-1, ids).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, best).squeeze(-1)


@torch.no_grad()
def write_serially(
    sharer: PreTrainedModel, world: w.World, entities: Tensor, attributes: Tensor
) -> Tensor:
    """The values' token ids [B, K, L], one token after the other: K L passes."""
    cache, written = DynamicCache(), []
    ids = world.blank_form(entities, attributes[:, :1])
    for k, attribute in enumerate(attributes.unbind(dim=1)):
        if k:
            ids = torch.stack([written[-1], attribute + w.FIRST_ATTRIBUTE], dim=1)
        for place in range(sf.LENGTH):
            logits = sharer(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            written.append(_chosen(logits, attribute, place))
            ids = written[-1][:, None]
    return torch.stack(written, dim=1).unflatten(1, (-1, sf.LENGTH))


@torch.no_grad()
def write_at_once(
    sharer: PreTrainedModel, world: w.World, entities: Tensor, attributes: Tensor
) -> Tensor:
    """The values' token ids [B, K, L] from one pass over the blank form.

    After an attribute stands its first syllable; the others are completed by what is likeliest of
    their places' syllables at the same spot, the only thing that this pass says about them.
    """
    logits = sharer(input_ids=world.blank_form(entities, attributes)).logits[:, w.FORM_START :]
    places = [_chosen(logits, attributes, place) for place in range(sf.LENGTH)]
    return torch.stack(places, dim=-1)


@torch.no_grad()
def write_in_passes(
    sharer: PreTrainedModel, world: w.World, entities: Tensor, attributes: Tensor
) -> Tensor:
    """The values' token ids [B, K, L], all slots side by side and L passes one after the other.

    After the first pass over the blank form, every slot is a form of its own, `<bos> E : A F`, and
    all K are read as one batch: what the sharer has learnt to go on from.
    """
    count, size = attributes.shape
    logits = sharer(input_ids=world.blank_form(entities, attributes)).logits[:, w.FORM_START :]
    flat = attributes.reshape(-1, 1)
    spelled = _chosen(logits, attributes, 0).view(-1, 1)
    owners = entities.repeat_interleave(size)
    for place in range(1, sf.LENGTH):
        ids = torch.cat([world.blank_form(owners, flat), spelled], dim=1)
        logits = sharer(input_ids=ids, logits_to_keep=1).logits[:, -1]
        following = _chosen(logits, flat[:, 0], place)
        spelled = torch.cat([spelled, following[:, None]], dim=1)
    return spelled.view(count, size, sf.LENGTH)


@torch.no_grad()
def write_with_heads(
    sharer: PreTrainedModel,
    heads: nn.ModuleList,
    world: w.World,
    entities: Tensor,
    attributes: Tensor,
) -> Tensor:
    """The values' token ids [B, K, L] from one pass, where the training's heads were kept."""
    ids = world.blank_form(entities, attributes)
    out = sharer(input_ids=ids, output_hidden_states=True)
    places = [_chosen(out.logits[:, w.FORM_START :], attributes, 0)]
    entering = out.hidden_states[-2][:, w.FORM_START :]
    for place, head in enumerate(heads, start=1):
        logits = sharer.lm_head(sharer.model.norm(head(entering)))
        places.append(_chosen(logits, attributes, place))
    return torch.stack(places, dim=-1)


def writers(models: Models, heads: nn.ModuleList | None) -> dict[str, Callable[..., Tensor]]:
    """By mode, what fills in forms: `write(world, entities, attributes)`."""

    def by_sharer(write: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments: write(models.sharer, *arguments)

    found = {
        "t2t": by_sharer(write_serially),
        "t2t_parallel": by_sharer(write_at_once),
        "t2t_passes": by_sharer(write_in_passes),
    }
    if heads is not None:
        found["t2t_heads"] = lambda *rest: write_with_heads(models.sharer, heads, *rest)
    return found


def text_prompt(world: w.World, questions: ev.Questions, write: Callable) -> Tensor:
    """What the receiver reads [Q, N]: the form as the sharer filled it in, and the question."""
    spelled = write(world, questions.entities, questions.attributes)
    form = sf.filled_form(world, questions.entities, questions.attributes, spelled)
    return torch.cat([form, questions.question()], dim=1)


def others(world: w.World, questions: ev.Questions) -> Tensor:
    """Another held-out entity for each question: the next whose value of what is asked differs."""
    entities, asked = questions.entities.clone(), questions.asked
    for _ in world.held_out:
        same = world.facts[entities, asked] == world.facts[questions.entities, asked]
        following = (entities + 1 - w.NUM_TRAIN) % w.NUM_HELD_OUT + w.NUM_TRAIN
        entities = torch.where(same, following, entities)
    return entities


def mismatched(world: w.World, questions: ev.Questions, seed: int) -> Tensor:
    """Forms [Q, 3 + K] about random train entities, made for other questions."""
    generator = torch.Generator().manual_seed(seed)
    count = len(questions.asked)
    entities = torch.randint(w.NUM_TRAIN, (count,), generator=generator)
    asked = torch.randint(w.NUM_ATTRIBUTES, (count,), generator=generator)
    return world.blank_form(entities, ev.random_forms(asked, questions.size, generator))


def ask(
    world: w.World,
    models: Models,
    heads: nn.ModuleList | None,
    questions: ev.Questions,
) -> Cell:
    """Every mode and control on questions of one kind and form size."""
    seed = 1000 * world.seed + questions.size
    other = others(world, questions)
    swapped = world.blank_form(other, questions.attributes)
    told = sf.syllables(questions.answers(world, other))
    cell = ask_all(
        f"{w.KINDS[int(questions.kinds[0])]}, K = {questions.size}",
        models,
        make_task(world, questions),
        mismatched=mismatched(world, questions, seed),
        swapped=(swapped, told),
        texts={
            mode: Text(text_prompt(world, questions, write), sf.LENGTH * questions.size)
            for mode, write in writers(models, heads).items()
        },
        seed=seed,
    )
    return replace(cell, candidates=w.NUM_VALUES)  # repeated candidates are not more choices

"""The sentence world under every mode: one fact per question, fused at a single token.

The sharer knows 720 facts and has never seen a question of the receiver's; the receiver knows the
questions and no fact. The receiver reads `question : what is the metal of ba di ? is answer :`, the
sharer `what is the metal of ba di ?`, and the two caches are fused at the `?` alone. The receiver
reads the rest, `is answer :`, on the fused cache: a receiver may use a fact at any of these tokens.
One short sentence says everything here, so text can lose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.evidence import asking, timing
from benchmarks.evidence.outcomes import Cell
from benchmarks.evidence.worlds import sentence_models as sm
from benchmarks.evidence.worlds import sentence_world as sw
from benchmarks.evidence.worlds.sentence_fuser import Samples, train_fuser
from c2c_ext import Fuser
from c2c_ext.training.recipes import Recipe, load_recipe

NAME = "sentence"
TITLE = "The sentence world: one fact, one sentence, one fused token"
SEEDS = (0, 1, 2, 4)  # 3 was seen by the recipe before this one
FUSED, READ = sw.place_of("?"), sw.place_of("?", sw.ASKED)  # the `?` of receiver and sharer
LOG_EVERY = 25
# What differs from `c2c train`'s recipe for pairs of this size; tuned on seed 0 alone. Every
# receiver layer reads the sharer's last layer: lower ones have not retrieved the fact at the `?`.
FUSER_CHANGES = {"max_steps": 400, "anneal_steps": 400, "batch": 240, "beta2": 0.98}


def fuser_recipe(receiver: PreTrainedModel, sharer: PreTrainedModel, seed: int) -> Recipe:
    """How the fuser between two models is trained."""
    layers = [sharer.config.num_hidden_layers - 1] * receiver.config.num_hidden_layers
    return load_recipe("tiny").changed({**FUSER_CHANGES, "layer_map": layers, "seed": seed})


def train(seed: int, directory: Path) -> dict[str, Any]:
    """Trains sharer, receiver and both fusers into the directory; returns what to record."""
    recipe, world = sm.Recipe(), sw.make_world(seed)
    stages: dict[str, Any] = {}
    models: dict[str, LlamaForCausalLM] = {}
    for name, make in (("sharer", sm.train_sharer), ("receiver", sm.train_receiver)):
        curve: list[dict] = []
        start = time.perf_counter()
        model = make(world, recipe, seed, curve)
        stages[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "parameters": model.num_parameters(),
            "curve": curve,
        }
        model.save_pretrained(directory / name)
        models[name] = model.eval().requires_grad_(False)
    for name, source in (("fuser", "sharer"), ("identical", "receiver")):
        sharer, samples = models[source], samples_of(world, itself=source == "receiver")
        order = sm.deck(len(samples.answer), torch.Generator().manual_seed(seed + 2))
        fuser, stages[name] = train_fuser(
            models["receiver"],
            sharer,
            fuser_recipe(models["receiver"], sharer, seed),
            samples,
            order,
            lambda step, loss, name=name: step % LOG_EVERY or print(name, step, loss, flush=True),
        )
        fuser.save_pretrained(directory / name)
    return {"world": world.digest(), "recipe": asdict(recipe), "stages": stages}


def every_question(entities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entities, attributes and kinds [Q] of all questions about these entities."""
    grid = torch.cartesian_prod(
        entities, torch.arange(sw.NUM_ATTRIBUTES), torch.arange(len(sw.KINDS))
    )
    return grid[:, 0], grid[:, 1], grid[:, 2]


def samples_of(world: sw.World, *, itself: bool = False) -> Samples:
    """All 960 questions of both kinds about train entities.

    Args:
        itself: the receiver is its own sharer, and reads its own prompt.
    """
    entities, attributes, kinds = every_question(world.train)
    prompt = sw.opened(world.sentence(sw.QUESTION, entities, attributes, kinds=kinds))
    answers = world.answers(kinds, attributes, world.facts[entities, attributes])
    shared = prompt[:, : FUSED + 1] if itself else read_by_sharer(world, entities, attributes)
    answer = sw.value_ids(attributes, answers)
    return Samples(prompt, answer, shared, FUSED, FUSED if itself else READ)


def load(seed: int, directory: Path) -> tuple[sw.World, asking.Models]:
    """What `train` made for the seed, ready to answer."""
    receiver, sharer = (
        LlamaForCausalLM.from_pretrained(directory / name).eval().requires_grad_(False)
        for name in ("receiver", "sharer")
    )
    fusers = (Fuser.from_pretrained(directory / name) for name in ("fuser", "identical"))
    return sw.make_world(seed), asking.Models(receiver, sharer, *fusers)


def held_out_questions(world: sw.World) -> tuple[Tensor, Tensor]:
    """Entities and attributes [240] of all questions about held-out entities."""
    grid = torch.cartesian_prod(world.held_out, torch.arange(sw.NUM_ATTRIBUTES))
    return grid[:, 0], grid[:, 1]


def task_of(world: sw.World, kind: int, entities: Tensor, attributes: Tensor) -> asking.Task:
    """Questions of one kind."""
    kinds = torch.full_like(entities, kind)
    prompt = sw.opened(world.sentence(sw.QUESTION, entities, attributes, kinds=kinds))
    token_map = torch.full((FUSED + 1,), -1)
    token_map[FUSED] = READ
    truth = world.answers(kinds, attributes, world.facts[entities, attributes])
    return asking.Task(
        prompt=prompt,
        shared=read_by_sharer(world, entities, attributes),
        token_map=token_map,
        candidates=sw.candidate_ids(attributes)[:, None],
        truth=truth[:, None],
        alone=prompt,
    )


def read_by_sharer(world: sw.World, entities: Tensor, attributes: Tensor) -> Tensor:
    """Token ids [Q, N] of what the sharer reads for the receiver, in words that it knows.

    The receiver's own wording is strange to it, and what it finds at the `?` there is worse.
    """
    return sw.opened(world.sentence(sw.ASKED, entities, attributes))


def facts_as_text(
    world: sw.World, written: Tensor, entities: Tensor, attributes: Tensor, kinds: Tensor
) -> Tensor:
    """Token ids [Q, N] of the opening, what the sharer wrote [Q, n] after it, and the question."""
    opening = world.sentence(sw.OPENING, entities, attributes)
    return sw.opened(
        opening, written, world.sentence(sw.QUESTION, entities, attributes, kinds=kinds)
    )


@torch.no_grad()
def write(sharer: PreTrainedModel, world: sw.World, entities: Tensor, attributes: Tensor) -> Tensor:
    """The two tokens [Q, 2] with which the sharer goes on from `<bos> the A of E is`.

    It is free to say anything; a value and a full stop if it has learnt its sentences.
    """
    ids, cache, written = sw.opened(world.sentence(sw.OPENING, entities, attributes)), None, []
    for _ in range(2):
        out = sharer(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(dim=1, keepdim=True), out.past_key_values
        written.append(ids)
    return torch.cat(written, dim=1)


@torch.no_grad()
def read_off(
    sharer: PreTrainedModel, world: sw.World, entities: Tensor, attributes: Tensor
) -> Tensor:
    """What one prefill of the sharer's question gives at the `?`, and a full stop: [Q, 2].

    Text without writing, which one-word values allow: it costs the sharer what C2C costs it.
    """
    ids = read_by_sharer(world, entities, attributes)
    value = sharer(input_ids=ids, logits_to_keep=1).logits[:, -1].argmax(dim=1)
    return torch.stack([value, torch.full_like(value, sw.STOP)], dim=1)


# What the sharer says of a question, and how many tokens it writes one after the other.
TEXTS = {"t2t": (write, 2), "t2t_parallel": (read_off, 1)}


def others_with_another_value(world: sw.World, entities: Tensor, attributes: Tensor) -> Tensor:
    """For every question the next held-out entity whose value of the attribute is another."""
    others = entities.clone()
    for _ in world.held_out:
        same = world.facts[others, attributes] == world.facts[entities, attributes]
        following = (others + 1 - sw.NUM_TRAIN) % sw.NUM_HELD_OUT + sw.NUM_TRAIN
        others = torch.where(same, following, others)
    return others


def evaluate(seed: int, directory: Path, limit: int | None = None) -> list[Cell]:
    """All questions about held-out entities, or the first of each kind; a cell per kind."""
    world, models = load(seed, directory)
    return [all_modes(world, models, kind, seed, limit) for kind in range(len(sw.KINDS))]


def all_modes(
    world: sw.World, models: asking.Models, kind: int, seed: int, limit: int | None
) -> Cell:
    """One kind of questions under every mode and control.

    Mismatched caches are of other questions about train entities: among those each value is
    equally frequent.
    """
    entities, attributes = (t[:limit] for t in held_out_questions(world))
    task = task_of(world, kind, entities, attributes)
    kinds = torch.full_like(entities, kind)
    generator = torch.Generator().manual_seed(len(sw.KINDS) * seed + kind)
    strangers = torch.randint(sw.NUM_TRAIN, entities.shape, generator=generator)
    asked = torch.randint(sw.NUM_ATTRIBUTES, entities.shape, generator=generator)
    others = others_with_another_value(world, entities, attributes)
    texts = {}
    for mode, (say, count) in TEXTS.items():
        said = say(models.sharer, world, entities, attributes)
        prompt = facts_as_text(world, said, entities, attributes, kinds)
        texts[mode] = asking.Text(prompt, count)
    return asking.ask_all(
        sw.KINDS[kind],
        models,
        task,
        mismatched=read_by_sharer(world, strangers, asked),
        swapped=(
            read_by_sharer(world, others, attributes),
            world.answers(kinds, attributes, world.facts[others, attributes])[:, None],
        ),
        texts=texts,
        seed=len(sw.KINDS) * seed + kind,
    )


def latency(seed: int, directory: Path) -> list[dict[str, Any]]:
    """Times of one question of each kind."""
    world, models = load(seed, directory)
    return [row for kind in range(len(sw.KINDS)) for row in times(world, models, kind)]


def times(world: sw.World, models: asking.Models, kind: int) -> list[dict[str, Any]]:
    """Rows of one question of a kind."""
    entities, attributes = (t[:1] for t in held_out_questions(world))
    kinds = torch.full_like(entities, kind)
    task = task_of(world, kind, entities, attributes)

    def text(say: Callable[..., Tensor], watch: timing.Watch) -> None:
        said = say(models.sharer, world, entities, attributes)
        watch("writing")
        prompt = facts_as_text(world, said, entities, attributes, kinds)
        asking.ask_receiver(models, task, prompt)
        watch("reading")

    modes = {
        "receiver": lambda watch: asking.ask_receiver(models, task),
        **{mode: partial(text, say) for mode, (say, _) in TEXTS.items()},
        "c2c": partial(timing.c2c_by_parts, models, task),
    }
    return timing.measure(sw.KINDS[kind], modes)

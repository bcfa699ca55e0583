"""Training, asking and timing of the syllable worlds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.evidence import timing
from benchmarks.evidence.asking import Models, Task, ask_receiver
from benchmarks.evidence.learning import train_fuser
from benchmarks.evidence.outcomes import Cell
from c2c_ext import Fuser
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import train as demo
from c2c_ext.demo import world as w
from c2c_ext.training.recipes import load_recipe

from . import syllable_asking as asking
from . import syllable_fusers as fusers
from . import syllable_training as training

HEADS = "heads.safetensors"  # beside the sharer; nothing but the baseline `t2t_heads` reads them

SOURCES = {"fuser": "sharer", "identical": "receiver"}  # whose cache each fuser reads


def _seconds(started: float) -> float:
    return round(time.perf_counter() - started, 1)


def load_model(directory: Path) -> PreTrainedModel:
    """A saved model in float32, frozen."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def load_heads(
    directory: Path, sharer: PreTrainedModel, recipe: training.Recipe
) -> nn.ModuleList | None:
    """The sharer's heads for the syllables after the first; None where it was trained without."""
    if not recipe.ahead:
        return None
    heads = training.new_heads(sharer.config.hidden_size, recipe.ahead)
    heads.load_state_dict(load_file(directory / HEADS))
    return heads.requires_grad_(False)


def train_models(seed: int, directory: Path, recipe: training.Recipe) -> dict[str, Any]:
    """Trains and saves sharer and receiver, in half precision as the shipped pair is."""
    world, log = w.make_world(seed), demo.Log(seed, recipe)
    started = time.perf_counter()
    sharer, heads = training.train_sharer(world, recipe, seed, log)
    log.done("sharer", _seconds(started), sharer.num_parameters())
    sharer.half().save_pretrained(directory / "sharer")
    if recipe.ahead:
        save_file(heads.state_dict(), directory / HEADS)
    started = time.perf_counter()
    receiver = training.train_receiver(world, recipe, seed, log)
    log.done("receiver", _seconds(started), receiver.num_parameters())
    receiver.half().save_pretrained(directory / "receiver")
    return {
        "world": log.data["world"],
        "recipe": log.data["recipe"],
        "stages": log.data["training"],
    }


def train_fusers(seed: int, directory: Path, recipe: training.Recipe) -> dict[str, Any]:
    """Trains and saves the fuser, and the one that reads the receiver's own cache."""
    world, receiver = w.make_world(seed), load_model(directory / "receiver")
    found = {}
    for name in recipe.fusers:
        shared = load_model(directory / SOURCES[name])
        layers = [shared.config.num_hidden_layers - 1] * receiver.config.num_hidden_layers
        settings = {"seed": seed, "layer_map": layers, **recipe.fuser}
        own = load_recipe("tiny").changed(settings)
        draw = fusers.drawing(world, own.batch, seed + 2, itself=name == "identical")
        fuser, found[name] = train_fuser(receiver, shared, own, draw, _printed(name))
        fuser.save_pretrained(directory / name)
    return found


def _printed(name: str) -> Callable[[int, float], None]:
    """Prints the loss now and then."""

    def report(step: int, loss: float) -> None:
        if step % demo.LOG_EVERY == 0:
            print(f"{name}  step {step}: loss {loss:.4f}", flush=True)

    return report


def train(seed: int, directory: Path, recipe: training.Recipe) -> dict[str, Any]:
    """Everything for a seed."""
    found = train_models(seed, directory, recipe)
    found["stages"] |= train_fusers(seed, directory, recipe)
    return found


def load(directory: Path, recipe: training.Recipe) -> tuple[Models, nn.ModuleList | None]:
    """What `train` saved."""
    receiver, sharer = (load_model(directory / name) for name in ("receiver", "sharer"))
    fusers = {
        name: Fuser.from_pretrained(directory / name).float().eval().requires_grad_(False)
        for name in recipe.fusers
    }
    return Models(receiver, sharer, **fusers), load_heads(directory, sharer, recipe)


def evaluate(seed: int, directory: Path, recipe: training.Recipe) -> list[Cell]:
    """All 960 questions about held-out entities for every kind and form size."""
    world, (models, heads) = w.make_world(seed), load(directory, recipe)
    return [
        asking.ask(world, models, heads, ev.held_out_questions(world, kind, size, seed))
        for size in ev.FORM_SIZES
        for kind in w.KINDS
    ]


def first(questions: ev.Questions) -> ev.Questions:
    """The first question alone."""
    return ev.Questions(*(part[:1] for part in vars(questions).values()))


def latency(seed: int, directory: Path, recipe: training.Recipe) -> list[dict[str, Any]]:
    """One question of each form size."""
    world, (models, heads) = w.make_world(seed), load(directory, recipe)
    rows = []
    for size in ev.FORM_SIZES:
        questions = first(ev.held_out_questions(world, "is", size, seed))
        task = asking.make_task(world, questions)

        def by_text(write, questions=questions, task=task):
            def answer(watch: timing.Watch) -> None:
                prompt = asking.text_prompt(world, questions, write)
                watch("writing")
                ask_receiver(models, task, prompt)
                watch("answering")

            return answer

        def by_cache(watch: timing.Watch, task: Task = task) -> None:
            timing.c2c_by_parts(models, task, watch)

        def alone(watch: timing.Watch, task: Task = task) -> None:
            ask_receiver(models, task)

        modes = {"receiver": alone, "c2c": by_cache}
        modes |= {mode: by_text(write) for mode, write in asking.writers(models, heads).items()}
        rows += timing.measure(f"is, K = {size}", modes)
    return rows

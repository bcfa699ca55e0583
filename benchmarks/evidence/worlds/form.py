"""The form world: the sharer knows facts by heart, the receiver knows questions and rivals.

World, models and fuser are those of `c2c demo` (`c2c_ext.demo`), trained anew for every seed as
`make tiny-pair` does. A second fuser is trained by the same recipe with the receiver as its own
sharer. Beside the modes of all worlds there is text that stops early, after k of a form's facts,
to compare accuracies at equal times.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.asking import Models, Task, Text, ask_all, ask_receiver
from benchmarks.evidence.outcomes import Cell
from benchmarks.evidence.timing import Watch, c2c_by_parts, measure
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.fuser import Fuser

NAME = "form"
TITLE = "The form world: twelve attributes, one-word values"

ROOT = Path(__file__).resolve().parents[3]
FUSERS = ("fuser", "identical")


def train(seed: int, directory: Path) -> dict:
    """Trains sharer, receiver, the fuser between them and the receiver's with itself.

    Each is a process of its own with one thread, so that the same seed gives the same bits.

    Args:
        seed: of the world and of all trainings.
        directory: gets receiver, sharer, fuser, identical, and the fusers' data.

    Returns:
        ``world`` (its digest), ``models`` (their recipe), ``cpu_seconds``, and by stage seconds,
        parameters and, of fusers, the recipe.

    Raises:
        subprocess.CalledProcessError: a training failed; it has said why.
    """
    result = train_models(seed, directory)
    for name in FUSERS:
        stage = result["stages"][name] = train_fuser(name, seed, directory)
        result["cpu_seconds"] = round(result["cpu_seconds"] + stage["cpu_seconds"], 1)
    return result


def train_models(seed: int, directory: Path) -> dict:
    """The first part of `train`: the two models and the fusers' data."""
    made = directory.resolve() / "models"
    cpu_seconds = _python("-m", "c2c_ext.demo.train", "--seed", seed, "--output", made)
    cpu_seconds += _python("-m", "c2c_ext.demo.export", made.parent, "--pair", made, "--seed", seed)
    log = json.loads((made / "log.json").read_text())
    stages = {
        name: {key: stage[key] for key in ("seconds", "parameters")}
        for name, stage in log["training"].items()
    }
    return {
        "cpu_seconds": round(cpu_seconds, 1),
        "world": log["world"],
        "models": log["recipe"],
        "stages": stages,
    }


def train_fuser(name: str, seed: int, directory: Path) -> dict:
    """One of `FUSERS`, and its part of what `train` returns."""
    directory = directory.resolve()
    shutil.rmtree(directory / name, ignore_errors=True)  # `c2c train` overwrites none
    settings, sharer = [f"seed={seed}"], "sharer"
    if name == "identical":
        # The recipe reads the sharer's last layer; the receiver's own has another number.
        sharer = "receiver"
        layers = json.loads((directory / sharer / "config.json").read_text())["num_hidden_layers"]
        settings.append(f"layer_map={[layers - 1] * layers}")
    cpu_seconds = _python(
        *("-m", "c2c_ext.cli", "train", "--data", directory / "train.jsonl"),
        *("--receiver", directory / "receiver", "--sharer", directory / sharer),
        *("--config", "tiny", "--set", *settings, "--output", directory / name),
    )
    log = json.loads((directory / name / "training_log.json").read_text())
    return {
        **{key: log[key] for key in ("seconds", "train_loss", "recipe")},
        "cpu_seconds": round(cpu_seconds, 1),
        "parameters": sum(p.numel() for p in Fuser.from_pretrained(directory / name).parameters()),
    }


def _python(*arguments: object) -> float:
    """Runs Python with one thread; the seconds of CPU time that took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = os.times()
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, check=True)
    after = os.times()
    return sum(
        getattr(after, field) - getattr(before, field)
        for field in ("children_user", "children_system")
    )


def evaluate(seed: int, directory: Path) -> list[Cell]:
    """Every mode on all held-out questions; for `is`, text that stops after 0 to 12 facts too."""
    world, models = w.make_world(seed), load(seed, directory)
    cells = []
    for size in ev.FORM_SIZES:
        for kind in w.KINDS:
            questions = ev.held_out_questions(world, kind, size, seed)
            cells.append(all_modes(f"{kind}, K = {size}", models, world, questions, seed))
    kind = w.KINDS[w.IS]
    questions = ev.held_out_questions(world, kind, w.NUM_ATTRIBUTES, seed)
    cells += stopped_text(f"{kind}, K = {w.NUM_ATTRIBUTES}", models, world, questions)
    return cells


def load(seed: int, directory: Path) -> Models:
    """What `train` saved, in float32."""
    pair = ev.load_pair(directory, seed)
    own = Fuser.from_pretrained(directory / "identical").float().eval().requires_grad_(False)
    return Models(pair.receiver, pair.sharer, pair.fuser, own)


def task_of(world: w.World, questions: ev.Questions) -> Task:
    """Both models read the blank form, the receiver the question too; the attributes are fused."""
    form = world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    token_map = torch.full((prompt.shape[1] - 1,), -1)
    fused = ev.form_positions(questions.size)
    token_map[fused] = torch.arange(fused.start, fused.stop)
    values = w.value_ids(questions.asked[:, None], torch.arange(w.NUM_VALUES))
    truth = questions.answers(world)
    return Task(prompt, form, token_map, values[:, None], truth[:, None], alone=prompt)


def read_text(world: w.World, questions: ev.Questions, values: Tensor) -> Tensor:
    """What the receiver reads in T2T: token ids of the form filled in with values [Q, K]."""
    form = world.filled_form(questions.entities, questions.attributes, values)
    return torch.cat([form, questions.question()], dim=1)


def only_the_asked(questions: ev.Questions) -> ev.Questions:
    """The same questions with forms of the asked attribute alone: the sharer sees the question."""
    return replace(questions, attributes=questions.asked[:, None])


def first_facts(questions: ev.Questions, count: int) -> ev.Questions:
    """The same questions with what stands first in their forms; maybe not what is asked."""
    return replace(questions, attributes=questions.attributes[:, :count])


def write(model: torch.nn.Module, world: w.World, questions: ev.Questions) -> Tensor:
    """The values [Q, K] that the sharer writes into the form, none into an empty one."""
    if questions.size == 0:
        return questions.attributes
    return ev.write_form(model, world, questions.entities, questions.attributes)


def all_modes(
    name: str, models: Models, world: w.World, questions: ev.Questions, seed: int
) -> Cell:
    """One cell: questions of a kind and a form size under every mode and control."""
    sharer, size, asked = models.sharer, questions.size, only_the_asked(questions)
    at_once = ev.read_values(sharer, world, questions.entities, questions.attributes)
    texts = {
        "t2t": Text(read_text(world, questions, write(sharer, world, questions)), size),
        "t2t_parallel": Text(read_text(world, questions, at_once), size),
        "t2t_asked": Text(read_text(world, asked, write(sharer, world, asked)), 1),
    }
    others = ev.other_entities(world, questions)
    draw = 1000 * seed + size  # as `c2c_ext.demo.evaluate.evaluate` has it
    return ask_all(
        name,
        models,
        task_of(world, questions),
        mismatched=ev.other_forms(world, questions, draw),
        swapped=(
            world.blank_form(others, questions.attributes),
            questions.answers(world, others)[:, None],
        ),
        texts=texts,
        seed=draw,
    )


def stopped_text(name: str, models: Models, world: w.World, questions: ev.Questions) -> list[Cell]:
    """Text that stops after 0 to K facts: a cell for each number of facts.

    They are the first of the form, whose order is random: the sharer does not know the question.
    """
    task = task_of(world, questions)
    values = write(models.sharer, world, questions)
    cells = []
    for count in range(questions.size + 1):
        # Greedy, one after the other: who stops early has written the same.
        prompt = read_text(world, first_facts(questions, count), values[:, :count])
        right = {"t2t": ask_receiver(models, task, prompt).right(task.truth)}
        cells.append(Cell(facts_name(name, count), w.NUM_VALUES, right, {"t2t": count}))
    return cells


def facts_name(name: str, count: int) -> str:
    """Of the cell in which text stops after so many facts."""
    return f"{name}, {count} fact{'s' * (count != 1)} written"


def latency(seed: int, directory: Path) -> list[dict[str, Any]]:
    """Times of one question by form size, and of text that stops after k facts of the largest."""
    world, models = w.make_world(seed), load(seed, directory)
    rows = []
    for size in ev.FORM_SIZES:
        every = ev.held_out_questions(world, w.KINDS[w.IS], size, seed)
        one = ev.Questions(*(t[:1] for t in vars(every).values()))
        rows += times(f"{w.KINDS[w.IS]}, K = {size}", models, world, one)
    return rows


def times(
    name: str, models: Models, world: w.World, question: ev.Questions
) -> list[dict[str, Any]]:
    """Rows of one cell, and of stopped text in cells of their own where the form is full."""
    task = task_of(world, question)

    def text(wrote: ev.Questions, how: Callable[..., Tensor], watch: Watch) -> None:
        values = how(models.sharer, world, wrote)
        watch("writing")
        ask_receiver(models, task, read_text(world, wrote, values))
        watch("reading")

    def at_once(sharer: torch.nn.Module, world: w.World, wrote: ev.Questions) -> Tensor:
        return ev.read_values(sharer, world, wrote.entities, wrote.attributes)

    modes: dict[str, Callable[[Watch], Any]] = {
        "receiver": lambda watch: ask_receiver(models, task),
        "t2t": partial(text, question, write),
        "t2t_parallel": partial(text, question, at_once),
        "t2t_asked": partial(text, only_the_asked(question), write),
        "c2c": partial(c2c_by_parts, models, task),
    }
    stopped = {}
    if question.size == w.NUM_ATTRIBUTES:
        counts = range(question.size + 1)
        stopped = {
            facts_name(name, k): partial(text, first_facts(question, k), write) for k in counts
        }
    rows = measure(name, modes | stopped)  # in the same rounds: they are compared
    return [
        row | {"cell": row["mode"], "mode": "t2t"} if row["mode"] in stopped else row
        for row in rows
    ]

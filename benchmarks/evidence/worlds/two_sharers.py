"""Two sharers that know different things, and a question that needs both (`two_sharers_world`).

The fusers are trained apart, each with its own sharer, and nothing of the other sharer is in that:
the other's attributes are blank, or have invented values in the receiver's text. Then both fusers
are used at once, each at its own sharer's attributes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import c2c_ext
from benchmarks.evidence.asking import noise_like, zeros_like
from benchmarks.evidence.outcomes import Cell
from benchmarks.evidence.timing import Watch, measure
from benchmarks.evidence.worlds import two_sharers_fusing as f
from benchmarks.evidence.worlds import two_sharers_training as tr
from benchmarks.evidence.worlds import two_sharers_world as t
from c2c_ext.demo import world as w
from c2c_ext.demo.evaluate import KV, prefill, read_values, write_form

NAME = "two_sharers"
TITLE = "Two sharers, each knows half, and the answer needs both"

RECIPE, FUSER_RECIPE = tr.Recipe(), f.FuserRecipe()
SIZES = (2, 6, 12)
MODELS = ("sharer_a", "sharer_b", "receiver")
FUSERS = ("fuser_a", "fuser_b", "identical")


@dataclass
class Models:
    """Everything that was trained for a seed, ready to answer."""

    world: t.TwoSharerWorld
    receiver: PreTrainedModel
    sharers: list[PreTrainedModel]
    fusers: list[c2c_ext.Fuser]  # one per sharer, trained alone
    identical: c2c_ext.Fuser  # of the receiver as its own sharer


def train(
    seed: int,
    directory: Path,
    recipe: tr.Recipe = RECIPE,
    fuser_recipe: f.FuserRecipe = FUSER_RECIPE,
) -> dict[str, Any]:
    """Trains everything for a seed into a directory; returns seconds, parameters and settings."""
    torch.set_num_threads(1)  # the order of additions, and so every bit, depends on it
    world, stages = t.make_world(seed), {}

    def timed(name: str, make: Callable[[tr.Report], Any]) -> Any:
        started, cpu, curve = time.perf_counter(), time.process_time(), []

        def report(step: int, **values: float) -> None:
            curve.append({"step": step, **{k: round(float(v), 4) for k, v in values.items()}})
            print(name, curve[-1], flush=True)

        made = make(report)
        made.save_pretrained(directory / name)
        stages[name] = {
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),  # whatever else the machine did
            "parameters": sum(p.numel() for p in made.parameters()),
            "curve": curve,
        }
        return made

    models = [
        timed(
            MODELS[k], lambda report, k=k: tr.train_sharer(world, k, recipe, 4 * seed + k, report)
        )
        for k in range(len(t.SHARERS))
    ]
    receiver = timed(
        "receiver", lambda report: tr.train_receiver(world, recipe, 4 * seed + 2, report)
    )
    for model in (*models, receiver):
        model.eval().requires_grad_(False)
    plans = {
        "fuser_a": (models[0], 0),
        "fuser_b": (models[1], 1),
        "identical": (receiver, None),
    }
    for place, (name, (sharer, about)) in enumerate(plans.items()):
        timed(
            name,
            lambda report, s=sharer, a=about, p=place: f.train_fuser(
                world, receiver, s, a, fuser_recipe, 4 * seed + p, report
            ),
        )
    return {
        "world": world.digest(),
        "recipe": asdict(recipe),
        "fuser_recipe": asdict(fuser_recipe),
        "stages": stages,
    }


def load(seed: int, directory: Path) -> Models:
    """What `train` saved."""
    receiver, *sharers = (
        LlamaForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
        for name in ("receiver", "sharer_a", "sharer_b")
    )
    fusers = [
        c2c_ext.Fuser.from_pretrained(directory / name).eval().requires_grad_(False)
        for name in FUSERS
    ]
    return Models(t.make_world(seed), receiver, sharers, fusers[:2], fusers[2])


def evaluate(seed: int, directory: Path) -> list[Cell]:
    """All held-out questions under every mode."""
    return evaluate_models(load(seed, directory))


def evaluate_models(
    models: Models, sizes: tuple[int, ...] = SIZES, limit: int | None = None
) -> list[Cell]:
    """All held-out questions, or the first ``limit`` of each cell, with forms of these sizes."""
    world, largest = models.world, max(sizes)
    cells = []
    for sharer, name in enumerate(t.SHARERS):
        questions = f.held_out_questions(world, t.IS, largest, sharer).first(limit)
        cells.append(_knowledge(models, questions, f"what {name} knows, read off the form"))
        cells.append(answer_all(models, questions, f"is, of what {name} knows, K = {largest}"))
    for size in sizes:
        questions = f.held_out_questions(world, t.WHICH_SUM, size).first(limit)
        cells.append(answer_all(models, questions, f"which, K = {size}"))
    return cells


def _candidates(questions: f.Questions) -> Tensor:
    """Token ids [Q, 8] of the possible answers."""
    eight = torch.arange(w.NUM_VALUES)
    if questions.kind == t.IS:
        return w.value_ids(questions.asked[:, :1], eight)
    return (t.FIRST_ANSWER + eight).expand(len(questions.entities), -1)


@torch.no_grad()
def _knowledge(models: Models, questions: f.Questions, name: str) -> Cell:
    """What each sharer itself says at the asked attribute of the blank form."""
    right, asked = {}, questions.asked[:, :1]
    truth = questions.facts(models.world)[:, 0]
    for key, sharer in zip(("sharer_a", "sharer_b"), models.sharers, strict=True):
        said = read_values(sharer, models.world, questions.entities, questions.forms)
        right[key] = said[questions.forms == asked] == truth
    return Cell(name, w.NUM_VALUES, right)


class _Asking:
    """One batch of questions and what all modes share of it."""

    def __init__(self, models: Models, questions: f.Questions) -> None:
        self.models, self.questions = models, questions
        self.entities, self.forms = questions.entities, questions.forms
        self.candidates = _candidates(questions)
        self.ids = questions.ids()
        self.form = models.world.blank_form(self.entities, self.forms)
        self.clean = prefill(models.receiver, self.form)
        self.own = [f.token_map(self.forms, k) for k in range(len(t.SHARERS))]
        self.everywhere = f.token_map(self.forms)

    def caches(self, *entities: Tensor, forms: Tensor | None = None) -> list[KV]:
        """What both sharers make of the form, each about entities [Q] of its own."""
        forms = self.forms if forms is None else forms
        return [
            prefill(sharer, self.models.world.blank_form(about, forms))
            for sharer, about in zip(self.models.sharers, entities, strict=True)
        ]

    def of(self, logits: Tensor) -> Tensor:
        """Log-probabilities [Q, 8] of the candidates, from logits [Q, 1, V]."""
        return logits[:, -1].double().gather(1, self.candidates).log_softmax(dim=1)

    def read(self, model: PreTrainedModel, form: Tensor) -> Tensor:
        """What a model makes of a form as text [Q, N] and the question."""
        return self.of(model(input_ids=torch.cat([form, self.ids], 1), logits_to_keep=1).logits)

    def fused(
        self,
        caches: list[KV],
        maps: list[Tensor],
        fusers: list[c2c_ext.Fuser] | None = None,
        fusion: str = "parallel",
    ) -> Tensor:
        """The receiver's answer over the fused form."""
        fusers = self.models.fusers if fusers is None else fusers
        cache = c2c_ext.fuse(self.clean, caches, fusers, token_map=maps, fusion=fusion)
        return self.of(f.read_on(self.models.receiver, cache, self.ids))

    def written(self, one_by_one: bool) -> Tensor:
        """The values [Q, K] that the sharers write, each at its own attributes."""
        values = torch.zeros_like(self.forms)
        for k, sharer in enumerate(self.models.sharers):
            own = t.owner(self.forms) == k
            if one_by_one:
                form = self.forms[own].view(len(self.forms), -1)
                said = write_form(sharer, self.models.world, self.entities, form).flatten()
            else:
                said = read_values(sharer, self.models.world, self.entities, self.forms)[own]
            values[own] = said
        return values

    def another(self, differs: Callable[[Tensor], Tensor]) -> Tensor:
        """For every question the next held-out entity [Q] that differs."""
        held_out = self.models.world.held_out
        others = self.entities.clone()
        for _ in held_out:
            following = (others + 1 - held_out[0]) % len(held_out) + held_out[0]
            others = torch.where(differs(others), others, following)
        return others


@torch.no_grad()
def answer_all(models: Models, questions: f.Questions, name: str) -> Cell:
    """Every mode and control on one kind of questions."""
    world, asking = models.world, _Asking(models, questions)
    entities, forms, own = asking.entities, asking.forms, asking.own
    alone = [asking.read(m, asking.form) for m in (models.receiver, *models.sharers)]
    found = dict(zip(("receiver", "sharer_a", "sharer_b"), alone, strict=True))
    stacked = torch.stack(alone)
    surest = stacked.amax(dim=2).argmax(dim=0)
    found["routing"] = stacked[surest, torch.arange(len(entities))]
    found["ensemble"] = stacked.mean(dim=0)

    def reading(values: Tensor, given: Tensor | None = None) -> Tensor:
        return asking.read(models.receiver, world.form(entities, forms, values, given))

    values, size = asking.written(one_by_one=True), forms.shape[1]
    found["t2t"] = reading(values)
    found["t2t_parallel"] = reading(asking.written(one_by_one=False))
    for k, key in enumerate(("t2t_a", "t2t_b")):
        found[key] = reading(values, t.owner(forms) == k)
    halves = ("t2t_a", "t2t_b")
    written = {"t2t": size, "t2t_parallel": size, **dict.fromkeys(halves, size / 2)}

    caches = asking.caches(entities, entities)
    for k, key in enumerate(("c2c_a", "c2c_b")):
        found[key] = asking.fused(caches[k : k + 1], own[k : k + 1], models.fusers[k : k + 1])
    found["c2c"] = asking.fused(caches, own)
    found["c2c_sequential"] = asking.fused(caches, own, fusion="sequential")
    everywhere = [asking.everywhere] * 2
    found["c2c_everywhere"] = asking.fused(caches, everywhere)
    found["c2c_everywhere_a_b"] = asking.fused(caches, everywhere, fusion="sequential")
    found["c2c_everywhere_b_a"] = asking.fused(
        caches[::-1], everywhere, models.fusers[::-1], "sequential"
    )

    generator = torch.Generator().manual_seed(world.seed)
    others = torch.randint(len(world.train), (len(entities),), generator=generator)
    none_asked = entities[:, None][:, :0]
    other_forms = f.forms_with(none_asked, size, generator)
    wrong = asking.caches(others, others, forms=other_forms)
    found["mismatched"] = asking.fused(wrong, own)
    found["mismatched_a"] = asking.fused([wrong[0], caches[1]], own)
    found["mismatched_b"] = asking.fused([caches[0], wrong[1]], own)
    found["zero"] = asking.fused([zeros_like(cache) for cache in caches], own)
    found["noise"] = asking.fused([noise_like(cache, k) for k, cache in enumerate(caches)], own)
    found["identical"] = asking.fused([asking.clean], [asking.everywhere], [models.identical])

    def says(logits: Tensor, truth: Tensor) -> Tensor:
        chosen = logits.argmax(dim=1, keepdim=True)
        return asking.candidates.gather(1, chosen)[:, 0] == truth

    truth = questions.answers(world)
    right = {mode: says(logits, truth) for mode, logits in found.items()}

    def swapped(which: tuple[int, ...]) -> Tensor:
        """With what these sharers say of another entity: whether the answer is true of that."""

        def mixed(other: Tensor, sharer: Tensor) -> Tensor:
            return torch.where(torch.isin(sharer, torch.tensor(which)), other, entities)

        def answers(other: Tensor) -> Tensor:
            owners = t.owner(questions.asked)
            return questions.answers(world, *(mixed(other, owners[:, i]) for i in range(2)))

        other = asking.another(lambda other: answers(other) != truth)
        about = [mixed(other, torch.tensor(k)) for k in range(len(t.SHARERS))]
        return says(asking.fused(asking.caches(*about), own), answers(other))

    right["swapped"] = swapped((0, 1))
    if questions.kind == t.WHICH_SUM:
        right["swapped_a"], right["swapped_b"] = swapped((0,)), swapped((1,))
    return Cell(name, w.NUM_VALUES, right, written)


@torch.no_grad()
def latency(seed: int, directory: Path) -> list[dict[str, Any]]:
    """Times of one answer, all models on one thread one after the other."""
    models, rows = load(seed, directory), []
    for size in SIZES:
        questions = f.held_out_questions(models.world, t.WHICH_SUM, size).first(1)
        rows += measure(f"which, K = {size}", _timed_modes(models, questions))
    return rows


def _timed_modes(models: Models, questions: f.Questions) -> dict[str, Callable[[Watch], Any]]:
    asking, world = _Asking(models, questions), models.world

    def text(one_by_one: bool) -> Callable[[Watch], Any]:
        def answer(watch: Watch) -> None:
            values = asking.written(one_by_one)
            watch("sharers_write")
            asking.read(models.receiver, world.form(asking.entities, asking.forms, values))
            watch("receiver_reads")

        return answer

    def c2c(watch: Watch) -> None:
        caches = asking.caches(asking.entities, asking.entities)
        watch("sharer_prefill")
        clean = prefill(models.receiver, asking.form)
        watch("receiver_prefill")
        cache = c2c_ext.fuse(clean, caches, models.fusers, token_map=asking.own, inplace=True)
        watch("fusing")
        asking.of(f.read_on(models.receiver, cache, asking.ids))
        watch("decode")

    return {
        "receiver": lambda watch: asking.read(models.receiver, asking.form),
        "t2t": text(True),
        "t2t_parallel": text(False),
        "c2c": c2c,
    }

"""The form world with two tokenizers: sharer and receiver read the same text in other tokens.

The receiver is the demo's, one token a word. The sharer's tokenizer (`word_pieces`) has another
vocabulary and cuts names and attributes into two or three pieces, so that the same word stands
elsewhere for the two models, and elsewhere in every form. `c2c_ext.TokenAligner` says which of the
sharer's tokens goes with which of the receiver's, in training and afterwards. T2T passes text:
written in the sharer's tokens, decoded, and read in the receiver's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from benchmarks.evidence.asking import Models, Task, noise_like, zeros_like
from benchmarks.evidence.learning import Batch, train_fuser
from benchmarks.evidence.outcomes import Cell
from benchmarks.evidence.timing import Watch, c2c_by_parts, measure
from benchmarks.evidence.worlds import pieces_sharer as ps
from benchmarks.evidence.worlds import word_pieces
from c2c_ext import Fuser, TokenAligner, fuse
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import train as demo
from c2c_ext.demo import world as w
from c2c_ext.demo.export import tokenizer as word_tokenizer
from c2c_ext.training.recipes import Recipe, load_recipe

NAME = "tokenizers"
TITLE = "Two tokenizers"

FUSER_STEPS, FUSER_BATCH = 500, 128
_OF_DEMOS_SHARER = ("sharer_model", "sharer", "omission", "other_words", "early_exit")


@dataclass(frozen=True)
class Reader:
    """Reads texts for both models, each by its own tokenizer."""

    aligner: TokenAligner

    def __call__(self, form: Tensor) -> tuple[Tensor, Tensor]:
        """What the sharer reads where the receiver reads a form ``[B, N]``.

        Returns:
            ids ``[B, M]``, padded on the right, where no token sees it, and the token map
            ``[B, N]``.
        """
        batch = self.aligner([w.decode(row) for row in form], padding_side="right")
        if not torch.equal(batch.receiver["input_ids"], form):
            raise ValueError("the receiver's tokenizer does not make these tokens of their text")
        return batch.sharer_inputs["input_ids"], batch.sharer_inputs["token_map"]

    def as_text(self, ids: Tensor) -> Tensor:
        """Texts in the sharer's ids [B, M], which it has written, in the receiver's, [B, N]."""
        rows = [row[row != word_pieces.PAD] for row in ids]
        texts = [self.aligner.sharer.decode(row) for row in rows]
        return torch.tensor([self.aligner.receiver(text)["input_ids"] for text in texts])


def new_reader() -> Reader:
    """Of the demo's tokenizer, the receiver's, and the sharer's."""
    return Reader(TokenAligner(word_tokenizer(), word_pieces.tokenizer()))


@dataclass(frozen=True)
class Pair:
    """Everything of one seed; `models.identical` is the receiver's fuser with itself."""

    world: w.World
    models: Models
    reader: Reader


def train(seed: int, directory: Path) -> dict:
    """Trains sharer, receiver, the fuser between them and the receiver's with itself.

    Args:
        seed: of the world and of all trainings.
        directory: gets sharer, receiver, fuser and identical.

    Returns:
        the world's digest, and by stage seconds, parameters and settings.
    """
    torch.set_num_threads(1)
    world, log = w.make_world(seed), demo.Log(seed, demo.Recipe())
    stages = {}
    for name, make, recipe in (
        ("sharer", ps.train_sharer, ps.Recipe()),
        ("receiver", demo.train_receiver, demo.Recipe()),
    ):
        started, model = time.perf_counter(), make(world, recipe, seed, log)
        seconds = round(time.perf_counter() - started, 1)
        parameters = sum(p.numel() for p in model.parameters())
        settings = asdict(recipe)
        if name == "receiver":  # the demo's recipe has its own sharer's too
            settings = {k: v for k, v in settings.items() if k not in _OF_DEMOS_SHARER}
        stages[name] = {"seconds": seconds, "parameters": parameters, "recipe": settings}
        model.save_pretrained(directory / name)
    receiver, sharer = load_models(directory, "receiver", "sharer")
    for name, other, reader in (("fuser", sharer, new_reader()), ("identical", None, None)):
        other = other or load_models(directory, "receiver")[0]  # one that shares no weight with it
        fuser, stages[name] = train_fuser(
            receiver,
            other,
            fuser_recipe(seed, other),
            draw_batches(world, seed, reader),
            lambda step, loss, name=name: step % 25 or log.point(name, step, loss=loss),
        )
        fuser.save_pretrained(directory / name)
    return {"world": world.digest(), "stages": stages}


def load_models(directory: Path, *names: str) -> list[PreTrainedModel]:
    """Models by the names under which `train` saved them, frozen."""
    loaded = [LlamaForCausalLM.from_pretrained(directory / n, dtype=torch.float32) for n in names]
    return [model.eval().requires_grad_(False) for model in loaded]


def fuser_recipe(seed: int, sharer: PreTrainedModel) -> Recipe:
    """`c2c train`'s recipe for the demo: every receiver layer reads the sharer's last."""
    last = sharer.config.num_hidden_layers - 1
    changes = {"seed": seed, "layer_map": [last] * 3, "max_steps": FUSER_STEPS}
    changes |= {"anneal_steps": FUSER_STEPS, "batch": FUSER_BATCH, "micro_batch": FUSER_BATCH}
    return load_recipe("tiny").changed(changes)


def draw_batches(
    world: w.World, seed: int, reader: Reader | None, rows: int = FUSER_BATCH
) -> Callable[[int], Batch]:
    """What gives the batch of a step: random questions about train entities, one form size each.

    Without a reader the sharer reads the receiver's own tokens.
    """
    generator = torch.Generator().manual_seed(seed + 2)  # the models were trained with the others

    def number(count: int, rows: int = rows) -> Tensor:
        return torch.randint(count, (rows,), generator=generator)

    def draw(_step: int) -> Batch:
        size = ev.FORM_SIZES[int(number(len(ev.FORM_SIZES), 1))]
        entities = world.train[number(len(world.train))]
        asked, kinds = number(w.NUM_ATTRIBUTES), number(len(w.KINDS))
        questions = ev.Questions(entities, ev.random_forms(asked, size, generator), asked, kinds)
        form = world.blank_form(entities, questions.attributes)
        answers = w.value_ids(asked, questions.answers(world))
        ids = torch.cat([form, questions.question(), answers[:, None]], dim=1)
        labels = torch.full_like(ids, demo.IGNORE)
        labels[:, -1] = answers
        fused = torch.zeros_like(ids, dtype=torch.bool)
        fused[:, ev.form_positions(size)] = True
        if reader is None:
            return Batch(ids, labels, fused)
        shared, places = reader(form)
        token_map = torch.full_like(ids, -1)
        token_map[:, : form.shape[1]] = places
        return Batch(ids, labels, fused, shared, token_map)

    return draw


def load(seed: int, directory: Path) -> Pair:
    """What `train` has saved for a seed."""
    fusers = [
        Fuser.from_pretrained(directory / name).eval().requires_grad_(False)
        for name in ("fuser", "identical")
    ]
    models = Models(*load_models(directory, "receiver", "sharer"), *fusers)
    return Pair(w.make_world(seed), models, new_reader())


def evaluate(seed: int, directory: Path) -> list[Cell]:
    """Every mode on all held-out questions."""
    pair = load(seed, directory)
    return [
        ask(f"{kind}, K = {size}", pair, ev.held_out_questions(pair.world, kind, size, seed), seed)
        for size in ev.FORM_SIZES
        for kind in w.KINDS
    ]


@torch.no_grad()
def ask(name: str, pair: Pair, questions: ev.Questions, seed: int) -> Cell:
    """One cell under every mode and control."""
    world, models, size = pair.world, pair.models, questions.size
    form = world.blank_form(questions.entities, questions.attributes)
    shared, token_map = pair.reader(form)
    cache = ev.prefill(models.sharer, shared)
    attributes = ev.form_positions(size)
    places = token_map[:, attributes]
    receiver = ev.answer_alone(models.receiver, world, questions)
    sharer = sharer_alone(pair, questions)
    logs = [logits.log_softmax(dim=1) for logits in (receiver, sharer)]
    surer = logs[0].amax(dim=1) >= logs[1].amax(dim=1)
    draw = 1000 * seed + size
    logits = {
        "receiver": receiver,
        "sharer": sharer,
        "routing": torch.where(surer[:, None], receiver, sharer),
        "ensemble": logs[0] + logs[1],
        "t2t": answer_text(pair, questions, ps.write_form),
        "t2t_parallel": answer_text(pair, questions, ps.read_values),
        "t2t_asked": answer_text(pair, only_the_asked(questions), ps.write_form),
        "c2c": answer_c2c(pair, questions, cache, places),
        "mismatched": answer_c2c(pair, questions, *other_questions(pair, size, len(form), draw)),
        "zero": answer_c2c(pair, questions, zeros_like(cache), places),
        "noise": answer_c2c(pair, questions, noise_like(cache, draw), places),
        **{
            mode: answer_c2c(pair, questions, cache, wrong)
            for mode, wrong in wrong_maps(places).items()
        },
        "identical": answer_c2c(
            pair, questions, ev.prefill(models.receiver, form), None, models.identical
        ),
    }
    truth = questions.answers(world)
    right = {mode: given.argmax(dim=1) == truth for mode, given in logits.items()}
    others = other_entities(world, questions)
    of_others, places = pair.reader(world.blank_form(others, questions.attributes))
    swapped = answer_c2c(
        pair, questions, ev.prefill(models.sharer, of_others), places[:, attributes]
    )
    right["swapped"] = swapped.argmax(dim=1) == questions.answers(world, others)
    written = {"t2t": size, "t2t_parallel": size, "t2t_asked": 1}
    return Cell(name, w.NUM_VALUES, right, written)


def only_the_asked(questions: ev.Questions) -> ev.Questions:
    """The same questions with forms of what is asked alone: the sharer was told."""
    return replace(questions, attributes=questions.asked[:, None])


def wrong_maps(places: Tensor) -> dict[str, Tensor]:
    """What must not work, given the right places ``[Q, K]`` of the form's attributes.

    "wrong_map" fuses every attribute with the last token of the form's next one (the last with
    the first's), "index_map" with the sharer's token of the receiver's own place, as if the
    tokenizers were equal.
    """
    same = torch.arange(w.FORM_START, w.FORM_START + places.shape[1])
    return {"wrong_map": places.roll(-1, dims=1), "index_map": same.expand_as(places)}


def answer_c2c(
    pair: Pair,
    questions: ev.Questions,
    cache: ev.KV,
    places: Tensor | None,
    fuser: Fuser | None = None,
) -> Tensor:
    """The receiver on its cache fused with another one: logits [Q, 8].

    Args:
        places: in the other cache, of every attribute of the form, ``[K]`` or ``[Q, K]``; None:
            the same as in the receiver's.
        fuser: in place of the pair's.
    """
    models, part = pair.models, ev.form_positions(questions.size)
    form = pair.world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    fused = fuse(
        ev.prefill(models.receiver, prompt[:, :-1]),
        cache,
        fuser or models.fuser,
        start=part.start,
        end=part.stop,
        token_map=places,
        inplace=True,
    )
    logits = ev.continue_from(models.receiver, fused, prompt[:, -1:])
    return ev.of_values(logits, questions.asked)


def sharer_alone(pair: Pair, questions: ev.Questions) -> Tensor:
    """The sharer reads form and question in its own tokens: logits [Q, 8]."""
    form = pair.world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    logits = ps.word_logits(pair.models.sharer, prompt, slice(-1, None))[:, 0]
    values = word_pieces.value_ids(questions.asked[:, None], torch.arange(w.NUM_VALUES))
    return logits.gather(1, values)


def answer_text(
    pair: Pair,
    questions: ev.Questions,
    write: Callable[..., Tensor],
    watch: Callable[[str], None] = lambda part: None,
) -> Tensor:
    """The sharer fills in the form, the receiver reads the text and answers: logits [Q, 8].

    Args:
        write: `write_form`, as text is written, or `read_values`, all slots from one prefill.
        watch: is called after each part, with its name.
    """
    entities, forms = questions.entities, questions.attributes
    values = write(pair.models.sharer, pair.world, entities, forms)
    watch("sharer_writing")
    written, _ = word_pieces.pieces_of(pair.world.filled_form(entities, forms, values))
    prompt = torch.cat([pair.reader.as_text(written), questions.question()], dim=1)
    watch("text")
    logits = pair.models.receiver(input_ids=prompt, logits_to_keep=1).logits[:, -1]
    watch("receiver")
    return ev.of_values(logits, questions.asked)


def other_questions(pair: Pair, size: int, count: int, seed: int) -> tuple[ev.KV, Tensor]:
    """The caches of other forms about train entities, and the places of their attributes.

    Train entities, as `c2c_ext.demo.evaluate.answer_mismatched` says.
    """
    generator = torch.Generator().manual_seed(seed)
    entities = torch.randint(w.NUM_TRAIN, (count,), generator=generator)
    asked = torch.randint(w.NUM_ATTRIBUTES, (count,), generator=generator)
    form = pair.world.blank_form(entities, ev.random_forms(asked, size, generator))
    shared, places = pair.reader(form)
    return ev.prefill(pair.models.sharer, shared), places[:, ev.form_positions(size)]


def other_entities(world: w.World, questions: ev.Questions) -> Tensor:
    """For every question [Q] the next held-out entity with another value of what is asked."""
    asked, others = questions.asked, questions.entities
    for _ in world.held_out:
        same = world.facts[others, asked] == world.facts[questions.entities, asked]
        following = (others + 1 - w.NUM_TRAIN) % w.NUM_HELD_OUT + w.NUM_TRAIN
        others = torch.where(same, following, others)
    return others


@torch.no_grad()
def latency(seed: int, directory: Path) -> list[dict]:
    """Times of one question for every form size; aligning, decoding and encoding text count."""
    pair, rows = load(seed, directory), []
    for size in ev.FORM_SIZES:
        questions = ev.held_out_questions(pair.world, w.KINDS[w.IS], size, seed)
        rows += measure(f"{w.KINDS[w.IS]}, K = {size}", modes_of_one(pair, questions))
    return rows


def modes_of_one(pair: Pair, questions: ev.Questions) -> dict[str, Callable[[Watch], Any]]:
    """By mode what answers the first of the questions and names its parts to a watch."""
    one = ev.Questions(*(t[:1] for t in vars(questions).values()))

    def by_cache(watch: Watch) -> None:
        task = as_task(pair, one)
        watch("alignment")
        c2c_by_parts(pair.models, task, watch)

    return {
        "receiver": lambda _: ev.answer_alone(pair.models.receiver, pair.world, one),
        "t2t": lambda watch: answer_text(pair, one, ps.write_form, watch),
        "t2t_parallel": lambda watch: answer_text(pair, one, ps.read_values, watch),
        "t2t_asked": lambda watch: answer_text(pair, only_the_asked(one), ps.write_form, watch),
        "c2c": by_cache,
    }


def as_task(pair: Pair, question: ev.Questions) -> Task:
    """One question as `ask_c2c` and `c2c_by_parts` take it."""
    form = pair.world.blank_form(question.entities, question.attributes)
    shared, places = pair.reader(form)
    prompt = torch.cat([form, question.question()], dim=1)
    token_map = torch.full((prompt.shape[1] - 1,), -1)
    part = ev.form_positions(question.size)
    token_map[part] = places[0, part]
    candidates = w.value_ids(question.asked[:, None], torch.arange(w.NUM_VALUES))[:, None]
    return Task(prompt, shared, token_map, candidates, question.answers(pair.world)[:, None])

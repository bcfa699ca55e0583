"""The worlds of benchmarks/evidence whose values are of several tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import timing
from benchmarks.evidence.asking import Models
from benchmarks.evidence.worlds import (
    syllable_asking,
    syllable_forms,
    syllable_fusers,
    syllable_training,
    syllables,
)
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import train as demo
from c2c_ext.demo import world as w
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.run import new_fuser

VALUES = torch.arange(w.NUM_VALUES)
LENGTH = syllable_forms.LENGTH
SHARER = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
}
RECEIVER = {**SHARER, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.make_world(0)


def sample(world: w.World, kind: str = "is", size: int = 3, count: int = 5) -> ev.Questions:
    questions = ev.held_out_questions(world, kind, size)
    return ev.Questions(*(part[:count] for part in vars(questions).values()))


def models_and_heads() -> tuple[Models, torch.nn.ModuleList]:
    torch.manual_seed(0)
    receiver, sharer = (demo.new_model(shape, 0.05).eval() for shape in (RECEIVER, SHARER))
    recipe = load_recipe("tiny").changed({"hidden_size": 8, "zero_output": False})
    fuser = new_fuser(recipe, receiver.config, sharer.config).eval().requires_grad_(False)
    return Models(receiver, sharer, fuser), syllable_training.new_heads(16, 1.0)


def test_no_syllable_alone_tells_the_value() -> None:
    rows = syllable_forms.syllables(VALUES).tolist()
    every = itertools.product(*map(range, syllable_forms.CHOICES))
    assert sorted(map(tuple, rows)) == sorted(every) and len(rows) == w.NUM_VALUES
    assert (
        min(syllable_forms.CHOICES) > 1
    )  # whatever is left out at one place leaves at least two values


def test_syllables_are_tokens_of_their_own() -> None:
    attributes = torch.arange(w.NUM_ATTRIBUTES)[:, None].expand(-1, w.NUM_VALUES)
    ids = syllable_forms.syllable_ids(attributes, VALUES.expand_as(attributes))
    assert ids.shape == (w.NUM_ATTRIBUTES, w.NUM_VALUES, LENGTH)
    assert ids.flatten(0, 1).unique(dim=0).shape[0] == w.NUM_ATTRIBUTES * w.NUM_VALUES
    seen = [set(ids[a, :, place].tolist()) for a in range(12) for place in range(LENGTH)]
    assert all(not (a & b) for a, b in itertools.combinations(seen, 2))
    words = w.NUM_ATTRIBUTES * w.NUM_VALUES
    assert min(map(min, seen)) >= w.FIRST_VALUE and max(map(max, seen)) < w.FIRST_VALUE + words


def test_guessing_is_right_one_time_in_eight(world: w.World) -> None:
    questions = ev.held_out_questions(world, "rivals", 3)
    task = syllable_asking.make_task(world, questions)
    ids = task.candidates.gather(2, task.truth[..., None])[..., 0]
    spelled = syllable_forms.syllable_ids(questions.asked, questions.answers(world))
    assert torch.equal(ids, spelled)
    for a in range(w.NUM_ATTRIBUTES):
        _, counts = spelled[questions.asked == a].unique(dim=0, return_counts=True)
        assert counts.tolist() == [10] * w.NUM_VALUES
    for place, choices in enumerate(syllable_forms.CHOICES):
        offered = task.candidates[:, place]
        repeated = offered.view(len(offered), -1, choices)
        assert (repeated == repeated[:, :1]).all()
        assert all(len(set(row)) == choices for row in repeated[:, 0].tolist())
        assert task.truth[:, place].max() < choices  # the first of equal ones is chosen


def test_forms_hold_as_much_of_each_value_as_said(world: w.World) -> None:
    entities, forms = torch.tensor([3, 4]), torch.tensor([[2, 0, 7], [1, 5, 3]])
    spelled = syllable_forms.syllable_ids(forms, world.facts[entities[:, None], forms])
    ids = syllable_forms.form(world, entities, forms, spelled, [2, 0, 1])
    words = forms + w.FIRST_ATTRIBUTE
    expected = [words[:, :1], spelled[:, 0], words[:, 1:], spelled[:, 2, :1]]
    assert torch.equal(ids, torch.cat([world.blank_form(entities, forms[:, :0]), *expected], 1))


@pytest.mark.parametrize("omission", [0.0, 0.5, 1.0])
def test_the_sharer_is_asked_for_what_stands_there(world: w.World, omission: float) -> None:
    ids, values, rest, whole = syllable_training.sharer_batch(
        world, omission, 4, torch.Generator().manual_seed(1)
    )
    following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=demo.IGNORE)
    is_value = (following >= w.FIRST_VALUE) & (following < w.FIRST_VALUE + 96)
    assert torch.equal(values, following.masked_fill(~is_value, demo.IGNORE))
    is_attribute = (ids >= w.FIRST_ATTRIBUTE) & (ids < w.FIRST_VALUE)
    assert (rest[is_attribute] == demo.IGNORE).all()  # a blank slot has no target at all
    told = whole[..., 0] != demo.IGNORE
    assert torch.equal(told, is_attribute & is_value)
    assert torch.equal(whole[..., 0][told], following[told])
    assert torch.equal(
        whole[:, :-2][told[:, :-2]], torch.stack([ids[:, 1:-1], ids[:, 2:]], -1)[told[:, :-2]]
    )


@pytest.mark.parametrize("count", [1, 3])
def test_the_receivers_targets_are_the_syllables_after_each_question(
    world: w.World, count: int
) -> None:
    ids, targets, _ = syllable_training.receiver_batch(
        world, 3, count, False, 4, torch.Generator().manual_seed(1)
    )
    names = set(world.name_ids[world.others].tolist())
    assert set(ids[:, 1].tolist()) <= names  # it never reads about who has facts
    following = torch.cat([ids[:, 1:], targets[:, -1, -1:]], dim=1)
    logits = torch.nn.functional.one_hot(following, len(w.VOCABULARY))
    read = syllable_training.answer_logits(logits, count).argmax(-1)
    assert torch.equal(read, targets)


@pytest.mark.parametrize("itself", [False, True])
def test_fusers_are_trained_on_train_entities_and_whole_answers(
    world: w.World, itself: bool
) -> None:
    draw = syllable_fusers.drawing(world, 64, 5, itself=itself)
    train = set(world.name_ids[world.train].tolist())
    sizes = set()
    for step in range(12):
        batch = draw(step)
        assert set(batch.input_ids[:, 1].tolist()) <= train
        size = int(batch.fused_mask[0].sum())
        sizes.add(size)
        assert (batch.labels != demo.IGNORE).sum(dim=1).eq(2).all()
        assert torch.equal(batch.labels[:, -2:], batch.input_ids[:, -2:])
        if not itself:
            assert torch.equal(batch.sharer_ids, batch.input_ids[:, : 3 + size])
            mapped = batch.token_map[0, : batch.input_ids.shape[1] - 3]
            assert torch.equal(mapped, syllable_asking.token_map(size))
    assert sizes == set(ev.FORM_SIZES)


class Knowing:
    """In place of a sharer: at every token it expects the syllable that a list has for it."""

    def __init__(self, world: w.World) -> None:
        self.world, self.passes = world, 0

    def __call__(self, input_ids, past_key_values=None, logits_to_keep=0):
        self.passes += 1
        seen = getattr(past_key_values, "ids", None)
        ids = input_ids if seen is None else torch.cat([seen, input_ids], dim=1)
        if past_key_values is not None:
            past_key_values.ids = ids
        logits = torch.zeros(*ids.shape, len(w.VOCABULARY))
        names = {int(token): entity for entity, token in enumerate(self.world.name_ids)}
        for row, tokens in enumerate(ids.tolist()):
            entity, attribute, place = names[tokens[1]], -1, 0
            for at, token in enumerate(tokens):
                if w.FIRST_ATTRIBUTE <= token < w.FIRST_VALUE:
                    attribute, place = torch.tensor(token - w.FIRST_ATTRIBUTE), 0
                elif token >= w.FIRST_VALUE and attribute != -1:
                    place += 1
                if attribute != -1 and place < LENGTH:
                    value = self.world.facts[entity, attribute]
                    spelled = syllable_forms.syllable_ids(attribute, value)
                    logits[row, at, spelled[place]] = 1.0
        logits = logits[:, -input_ids.shape[1] :]
        return type(
            "Out", (), {"logits": logits[:, -logits_to_keep:] if logits_to_keep else logits}
        )


def test_text_takes_as_many_passes_as_it_must(world: w.World) -> None:
    questions = sample(world, size=6)
    entities, forms = questions.entities, questions.attributes
    truth = syllable_forms.syllable_ids(forms, world.facts[entities[:, None], forms])
    for write, passes in (
        (syllable_asking.write_serially, 6 * LENGTH),
        (syllable_asking.write_in_passes, LENGTH),
    ):
        sharer = Knowing(world)
        assert torch.equal(write(sharer, world, entities, forms), truth)
        assert sharer.passes == passes
    sharer = Knowing(world)
    at_once = syllable_asking.write_at_once(sharer, world, entities, forms)
    assert sharer.passes == 1
    assert torch.equal(at_once[..., 0], truth[..., 0])
    assert not torch.equal(at_once, truth)


def test_swapped_entities_have_another_value(world: w.World) -> None:
    questions = ev.held_out_questions(world, "is", 3)
    other = syllable_asking.others(world, questions)
    assert (other >= w.NUM_TRAIN).all() and (other < w.NUM_TRAIN + w.NUM_HELD_OUT).all()
    facts = world.facts[torch.stack([other, questions.entities]), questions.asked]
    assert (facts[0] != facts[1]).all()


def test_mismatched_forms_are_about_train_entities(world: w.World) -> None:
    forms = syllable_asking.mismatched(world, ev.held_out_questions(world, "is", 3), 1)
    assert set(forms[:, 1].tolist()) <= set(world.name_ids[world.train].tolist())


def test_every_mode_answers(world: w.World) -> None:
    models, heads = models_and_heads()
    cell = syllable_asking.ask(world, models, heads, sample(world))
    assert cell.name == "is, K = 3" and cell.candidates == 8 and cell.questions == 5
    texts = ("t2t", "t2t_parallel", "t2t_passes", "t2t_heads")
    assert cell.written == dict.fromkeys(texts, 3 * LENGTH)
    assert {"receiver", "sharer", "c2c", "mismatched", "zero", "noise", "swapped"} < set(cell.right)


@pytest.mark.parametrize("ahead", [1.0, 0.0])
def test_a_seed_is_trained_asked_and_timed(
    ahead: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread
) -> None:
    short = demo.Training(steps=2, lr=1e-3, batch=8, warm_up=1)
    recipe = syllable_training.Recipe(
        sharer_model=SHARER,
        receiver_model=RECEIVER,
        sharer=short,
        receiver=short,
        fuser={"max_steps": 2, "batch": 8, "hidden_size": 8},
    )
    recipe = replace(recipe, ahead=ahead, fusers=("fuser", "identical") if ahead else ("fuser",))
    monkeypatch.setattr(syllables, "RECIPE", recipe)
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    few = {kind: sample(w.make_world(1), kind) for kind in w.KINDS}
    monkeypatch.setattr(ev, "held_out_questions", lambda world, kind, size, seed: few[kind])
    measure = timing.measure
    monkeypatch.setattr(timing, "measure", lambda cell, modes: measure(cell, modes, rounds=2))
    found = syllables.train(1, tmp_path)
    assert found["world"] == w.WORLD_DIGESTS[1]
    for stage in ("sharer", "receiver", *recipe.fusers):
        assert {"seconds", "parameters"} < set(found["stages"][stage])
    cells = syllables.evaluate(1, tmp_path)
    assert [cell.name for cell in cells] == ["is, K = 3", "rivals, K = 3"]
    kept = {"identical", "t2t_heads"} & set(cells[0].right)
    assert kept == ({"identical", "t2t_heads"} if ahead else set())
    rows = syllables.latency(1, tmp_path)
    assert {row["mode"] for row in rows} >= {"receiver", "c2c", "t2t", "t2t_parallel"}

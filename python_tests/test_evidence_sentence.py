"""The sentence world: what it tells whom, and that untrained models are asked under every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.evidence import asking
from benchmarks.evidence.worlds import sentence, sentence_models
from benchmarks.evidence.worlds import sentence_world as sw
from benchmarks.evidence.worlds.sentence_fuser import train_fuser
from c2c_ext import fuse
from c2c_ext.demo.evaluate import continue_from, prefill
from c2c_ext.demo.train import Training
from c2c_ext.training.run import new_fuser

DIGESTS = {  # facts and splits were fixed by these lines before any model was trained on them
    0: "9f030b887db466fb3f60d1cdcf8300303eb57ae9e8b938af68f099767f488345",
    1: "b61cb223f4cd2a6ef395d4b167d6b3db41d87404b92138d6592b4e4a050d2a6b",
    2: "7c196f724abea0f4379538d8028df9f12f402d9b4c4e6cda84cb74998ab1c63b",
    3: "416422da545d6b595031ebeff6f6969f85b503cac777130aca7bd68d401a7cb0",
}
ONE = torch.tensor([200]), torch.tensor([2])  # an entity and an attribute


def names_in(ids: torch.Tensor) -> set[tuple[int, int]]:
    """All pairs of adjacent syllables in token ids [B, N]."""
    syllables = ids - sw.FIRST_SYLLABLE
    pairs = torch.stack([syllables[:, :-1], syllables[:, 1:]], dim=-1).flatten(0, 1)
    return {tuple(pair) for pair in pairs.tolist() if min(pair) >= 0}


def names_of(world: sw.World, entities: torch.Tensor) -> set[tuple[int, int]]:
    return {tuple(name) for name in world.names[entities].tolist()}


@pytest.mark.parametrize("seed", DIGESTS)
def test_a_seed_gives_its_world_and_guessing_is_right_one_time_in_eight(seed: int) -> None:
    world = sw.make_world(seed)
    assert world.digest() == DIGESTS[seed]
    assert len(sw.VOCABULARY) == len(set(sw.VOCABULARY)) == 89
    assert len(names_of(world, torch.arange(1560))) == 1560
    for entities in (world.train, world.held_out):
        for attribute in range(sw.NUM_ATTRIBUTES):
            facts = world.facts[entities, attribute]
            for answers in (facts, world.rival_of[attribute, facts]):
                assert set(answers.bincount(minlength=8).tolist()) == {len(entities) // 8}
    for cycle in world.rival_of.tolist():
        value, seen = 0, []
        while value not in seen:
            seen.append(value)
            value = cycle[value]
        assert len(seen) == 8


def test_sentences_say_the_fact_and_ask_for_it() -> None:
    world = sw.make_world(0)
    values, rivals = world.facts[ONE], torch.tensor([sw.RIVALS])
    assert [sw.decode(world.sentence(t, *ONE, values)[0]) for t in sw.STATEMENTS] == [
        "the metal of bi mo is copper .",
        "bi mo 's metal is the copper .",
        "what is the metal of bi mo ? copper .",
    ]
    asked = world.sentence(sw.QUESTION, *ONE, kinds=rivals)
    assert sw.decode(asked[0]) == "question : what is the metal of bi mo ? rivals answer :"
    assert asked.shape[1] == sw.QUESTION_TOKENS
    assert sw.VOCABULARY[sw.opened(asked)[0, sentence.FUSED]] == "?"


@pytest.mark.parametrize("itself", [False, True])
def test_fusers_are_trained_on_every_question_about_train_entities_alone(itself: bool) -> None:
    world = sw.make_world(0)
    samples = sentence.samples_of(world, itself=itself)
    assert names_in(samples.prompt) == names_in(samples.shared) == names_of(world, world.train)
    assert len(set(map(tuple, samples.prompt.tolist()))) == len(samples.answer) == 960
    for row in range(0, 960, 7):
        *_, attribute, _, first, second, _, kind, _, _ = samples.prompt[row].tolist()
        name = torch.tensor([first, second]) - sw.FIRST_SYLLABLE
        entity = (world.names == name).all(dim=1).nonzero()[:, 0]
        attribute = torch.tensor([attribute - sw.FIRST_ATTRIBUTE])
        kind = torch.tensor([sw.KINDS.index(sw.VOCABULARY[kind])])
        answer = world.answers(kind, attribute, world.facts[entity, attribute])
        assert samples.answer[row] == sw.value_ids(attribute, answer)
    question_mark = sw.VOCABULARY.index("?")
    assert (samples.prompt[:, samples.fused] == question_mark).all()
    assert (samples.shared[:, samples.read] == question_mark).all()


def test_the_receiver_learns_from_names_without_facts() -> None:
    world = sw.make_world(0)
    generator = torch.Generator().manual_seed(0)
    told = set()
    for silent in (False, True):
        ids, _, _ = sentence_models.receiver_batch(world, 2, 4, 64, generator, silent=silent)
        told |= names_in(ids)
    assert told <= names_of(world, world.others)


def test_the_receiver_is_told_what_it_is_asked_unless_silent() -> None:
    world, generator = sw.make_world(0), torch.Generator().manual_seed(1)
    for silent in (False, True):
        for _ in range(4):
            ids, targets, is_fact = sentence_models.receiver_batch(
                world, 2, 2, 32, generator, silent=silent
            )
            for row, answers, direct in zip(ids, targets, is_fact, strict=True):
                told = row[: -2 * sw.QUESTION_TOKENS]
                assert silent is (told.tolist() == [sw.BOS])
                for k, (answer, plain) in enumerate(zip(answers, direct, strict=True)):
                    question = row[len(told) :].unflatten(0, (2, -1))[k]
                    assert silent or names_in(told[None]) >= names_in(question[None])
                    attribute, value = divmod(int(answer) - sw.FIRST_VALUE, sw.NUM_VALUES)
                    if not plain:
                        value = world.rival_of[attribute].tolist().index(value)
                    fact = sw.value_ids(torch.tensor(attribute), torch.tensor(value))
                    assert silent or fact in told


def test_a_fusers_first_loss_is_that_of_the_answers_it_is_asked_for(one_thread) -> None:
    world, recipe = sw.make_world(0), sentence_models.Recipe()
    torch.manual_seed(0)
    receiver, sharer = (
        sentence_models.new_model(shape, 0.3).eval().requires_grad_(False)
        for shape in (recipe.receiver_model, recipe.sharer_model)
    )
    changes = {"batch": 960, "max_steps": 1, "anneal_steps": 1, "zero_output": False}
    cold = {"temperature_start": 1e-3, "temperature_end": 1e-3}  # gates as good as hard
    settings = sentence.fuser_recipe(receiver, sharer, 0).changed(changes | cold)
    samples, losses = sentence.samples_of(world), []
    train_fuser(
        receiver, sharer, settings, samples, iter(range(960)), lambda _, x: losses.append(x)
    )
    fuser = new_fuser(settings, receiver.config, sharer.config).eval().requires_grad_(False)
    task = sentence.task_of(world, sw.IS, *sentence.every_question(world.train)[:2])
    task = replace(
        task,
        prompt=samples.prompt,
        candidates=torch.arange(len(sw.VOCABULARY)).expand(960, 1, -1),
    )
    asked = [
        answers.confidence[answers.chosen[:, 0] == samples.answer]
        for answers in [asking.ask_c2c(asking.Models(receiver, sharer, fuser), task)]
    ]
    assert sw.decode(task.prompt[0, -task.tail :]) == "is answer :"
    caches = prefill(receiver, samples.prompt[:, : -task.tail])
    fused = fuse(caches, prefill(sharer, samples.shared), fuser, token_map=task.token_map)
    logits = continue_from(receiver, fused, samples.prompt[:, -task.tail :])
    assert losses == [pytest.approx(F.cross_entropy(logits, samples.answer).item(), rel=1e-4)]
    said = logits.argmax(dim=1) == samples.answer
    sure = logits.double().log_softmax(dim=1).amax(dim=1)[said]
    assert len(sure) and torch.allclose(asked[0], sure, atol=1e-5)
    plain = continue_from(receiver, caches, samples.prompt[:, -task.tail :])
    assert abs(F.cross_entropy(plain, samples.answer).item() - losses[0]) > 1e-2


def test_the_receiver_is_first_asked_for_facts_alone_and_told_one_per_attribute() -> None:
    world, generator = sw.make_world(0), torch.Generator().manual_seed(0)
    ids, _, is_fact = sentence_models.receiver_batch(world, 2, 4, 64, generator, kinds=1)
    assert is_fact.all()
    told = ids[:, : -4 * sw.QUESTION_TOKENS] - sw.FIRST_ATTRIBUTE
    for row in told.tolist():
        attributes = [word for word in row if 0 <= word < sw.NUM_ATTRIBUTES]
        assert len(attributes) == len(set(attributes)) == 2


class Says:
    """A sharer that goes on with given tokens, whatever it reads."""

    def __init__(self, *words: str) -> None:
        self.words = [sw.VOCABULARY.index(word) for word in words]

    def __call__(self, input_ids: torch.Tensor, **_: object) -> object:
        logits = torch.zeros(len(input_ids), 1, len(sw.VOCABULARY))
        logits[:, -1, self.words.pop(0)] = 1.0
        return type("Output", (), {"logits": logits, "past_key_values": None})


def test_text_is_what_the_sharer_says_before_the_question() -> None:
    world, kinds = sw.make_world(0), torch.tensor([sw.IS])
    for say, words in ((sentence.write, ("gold", ".")), (sentence.read_off, ("gold",))):
        written = say(Says(*words), world, *ONE)
        text = sw.decode(sentence.facts_as_text(world, written, *ONE, kinds)[0])
        question = "question : what is the metal of bi mo ? is answer :"
        assert text == f"<bos> the metal of bi mo is gold . {question}"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, one_thread) -> None:
    """Trainings of three steps."""
    recipe = replace(
        sentence_models.Recipe(),
        sharer=Training(steps=3, lr=2e-3, batch=8, warm_up=1),
        receiver=Training(steps=3, lr=3e-3, batch=8, warm_up=1),
    )
    monkeypatch.setattr(sentence_models, "Recipe", lambda: recipe)
    for name, value in (("max_steps", 3), ("batch", 8)):
        monkeypatch.setitem(sentence.FUSER_CHANGES, name, value)


def test_a_short_run_is_asked_and_timed_in_every_mode(short, tmp_path: Path, monkeypatch) -> None:
    made = sentence.train(0, tmp_path)
    assert made["world"] == DIGESTS[0]
    assert list(made["stages"]) == ["sharer", "receiver", "fuser", "identical"]
    assert all(stage["parameters"] and stage["seconds"] >= 0 for stage in made["stages"].values())
    modes = {"receiver", "sharer", "routing", "ensemble", "t2t", "t2t_parallel", "c2c"}
    modes |= {"mismatched", "zero", "noise", "identical", "swapped"}
    for cell, kind in zip(sentence.evaluate(0, tmp_path, limit=5), sw.KINDS, strict=True):
        assert (cell.name, cell.questions, cell.candidates) == (kind, 5, 8)
        assert set(cell.right) == modes and cell.written == {"t2t": 2, "t2t_parallel": 1}
    monkeypatch.setattr(sentence.timing.measure, "__defaults__", (2,))
    rows = sentence.latency(0, tmp_path)
    assert {row["mode"] for row in rows} == {"receiver", "t2t", "t2t_parallel", "c2c"}
    assert len(rows) == 8


def test_another_entity_for_swapping_is_held_out_and_has_another_value() -> None:
    world = sw.make_world(0)
    entities, attributes = sentence.held_out_questions(world)
    others = sentence.others_with_another_value(world, entities, attributes)
    assert len(entities) == 240 and set(others.tolist()) <= set(world.held_out.tolist())
    assert (world.facts[others, attributes] != world.facts[entities, attributes]).all()

"""The demo's form world, and the pair that ships with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import c2c_ext.demo
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.training.recipes import RECIPES, load_recipe

ASSETS = Path(c2c_ext.demo.__file__).parent / "assets"
SHIPPED_SEED = 0


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.make_world(SHIPPED_SEED)


@pytest.fixture(scope="module")
def pair() -> ev.Pair:
    return ev.load_pair(ASSETS / "seed0", SHIPPED_SEED)


@pytest.mark.parametrize("seed", w.WORLD_DIGESTS)
def test_make_world_gives_the_recorded_world(seed: int) -> None:
    assert w.make_world(seed).digest() == w.WORLD_DIGESTS[seed]


def test_make_world_differs_between_seeds() -> None:
    assert len(set(w.WORLD_DIGESTS.values())) == len(w.WORLD_DIGESTS)


def test_vocabulary_has_every_word_once() -> None:
    assert len(set(w.VOCABULARY)) == len(w.VOCABULARY) == 6 + 12 + 96 + 400


def test_splits_are_disjoint_and_complete(world: w.World) -> None:
    splits = torch.cat([world.train, world.held_out, world.others])
    assert splits.tolist() == list(range(400))
    assert sorted(world.names) == sorted(w.NAMES)
    assert len(world.facts) == len(world.train) + len(world.held_out) == 240


@pytest.mark.parametrize(("split", "each"), [("train", 20), ("held_out", 10)])
def test_values_are_equally_frequent(world: w.World, split: str, each: int) -> None:
    for column in world.facts[getattr(world, split)].T:
        assert column.bincount(minlength=8).tolist() == [each] * 8


def test_rivals_are_one_cycle_of_eight(world: w.World) -> None:
    for rival in world.rival_of.tolist():
        value, seen = 0, []
        for _ in rival:
            value = rival[value]
            seen.append(value)
        assert sorted(seen) == list(range(8))
        assert value == 0
        assert all(rival[v] != v for v in range(8))


def test_answers_are_the_fact_or_its_rival(world: w.World) -> None:
    kinds, asked = torch.tensor([w.IS, w.RIVALS]), torch.tensor([4, 4])
    facts = world.facts[[7, 7], asked]
    rival = world.rival_of[4, facts[1]]
    assert world.answers(kinds, asked, facts).tolist() == [facts[0].item(), rival.item()]


def test_encode_decode_round_trip() -> None:
    text = " ".join(w.VOCABULARY)
    assert w.decode(w.encode(text)) == text
    assert w.encode(text) == list(range(len(w.VOCABULARY)))


def test_builders_write_what_they_say(world: w.World) -> None:
    entity = world.entity("Corbin")
    forms = torch.tensor([[w.attribute("metal"), w.attribute("drink")]])
    values = torch.tensor([[3, 0]])
    blank = world.blank_form(torch.tensor([entity]), forms)
    filled = world.filled_form(torch.tensor([entity]), forms, values)
    question = w.question(torch.tensor([w.RIVALS]), forms[:, 0])
    assert w.decode(blank[0]) == "<bos> Corbin : metal drink"
    assert w.decode(filled[0]) == "<bos> Corbin : metal gold drink tea"
    assert w.decode(question[0]) == "question : rivals metal"


def test_encode_refuses_unknown_word() -> None:
    with pytest.raises(ValueError, match=r"vocabulary: Waldo;.*colour.*shape"):
        w.encode("<bos> Waldo : colour")


def test_entity_refuses_unknown_name_and_lists_the_known(world: w.World) -> None:
    without_facts = world.names[-1]
    for name in ("Waldo", without_facts):
        with pytest.raises(ValueError, match=f"unknown entity '{name}'.*{world.names[0]}"):
            world.entity(name)


def test_attribute_refuses_unknown_name_and_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown attribute 'height'.*colour.*shape"):
        w.attribute("height")


def test_chance_interval_is_the_exact_one() -> None:
    # Guessing 8 questions: none right 0.344, one 0.393, two 0.196, three 0.056, four or more 0.011.
    assert ev.chance_interval(8, level=0.95) == (0, 3)
    assert ev.chance_interval(960) == (100, 140)


def test_held_out_questions_ask_everything_once(world: w.World) -> None:
    questions = ev.held_out_questions(world, "is", 3)
    pairs = set(zip(questions.entities.tolist(), questions.asked.tolist(), strict=True))
    assert pairs == {(e, a) for e in world.held_out.tolist() for a in range(12)}
    assert (questions.attributes == questions.asked[:, None]).sum(dim=1).eq(1).all()
    assert all(len(set(form)) == 3 for form in questions.attributes.tolist())
    again = ev.held_out_questions(world, "is", 3)
    assert torch.equal(questions.attributes, again.attributes)


@pytest.mark.parametrize("kind", w.KINDS)
def test_shipped_pair_answers_through_the_cache_only(pair: ev.Pair, kind: str) -> None:
    questions = ev.held_out_questions(pair.world, kind, 6)
    truth = questions.answers(pair.world)
    low, high = ev.chance_interval(len(truth), level=0.999)
    right = {
        "C2C": ev.answer_c2c(pair, questions),
        "mismatched": ev.answer_mismatched(pair, questions, seed=6),
        "zero": ev.answer_zero(pair, questions),
        "receiver": ev.answer_alone(pair.receiver, pair.world, questions),
    }
    right = {mode: int((logits.argmax(dim=1) == truth).sum()) for mode, logits in right.items()}
    assert right["C2C"] >= 0.97 * len(truth)
    for mode in ev.AT_CHANCE:
        assert low <= right[mode] <= high, mode


def test_shipped_pair_follows_the_cache_it_is_given(pair: ev.Pair) -> None:
    questions = ev.held_out_questions(pair.world, "is", 3)
    logits, others_truth = ev.answer_swapped(pair, questions)
    assert (others_truth != questions.answers(pair.world)).all()
    assert (logits.argmax(dim=1) == others_truth).float().mean() >= 0.97


def test_shipped_fuser_was_trained_with_the_recipe_of_its_name() -> None:
    """Whoever changes the recipe `tiny` trains the shipped fuser anew (`make train-tiny`)."""
    shipped = ASSETS / "seed0" / "fuser"
    assert load_recipe(shipped / "recipe.yaml") == RECIPES["tiny"]
    log = json.loads((shipped / "training_log.json").read_text())
    # What recipes learnt to say since then has its default.
    assert RECIPES["published"].changed(log["recipe"]) == RECIPES["tiny"]
    assert log["steps"] == RECIPES["tiny"].max_steps


@pytest.mark.parametrize("kind", w.KINDS)
def test_recorded_figures_are_the_shipped_pairs(pair: ev.Pair, kind: str) -> None:
    results = Path(__file__).parent.parent / "benchmarks" / "results" / "demo.json"
    (recorded,) = (
        row
        for row in json.loads(results.read_text())["held_out"]
        if (row["size"], row["kind"]) == (3, kind)
    )
    measured = ev.evaluate(pair, kind, 3, SHIPPED_SEED)
    assert set(ev.MODES) < set(measured)
    for mode in measured.keys() & recorded.keys():
        # Another machine's sums may turn an answer where two values are as likely.
        assert measured[mode] == pytest.approx(recorded[mode], abs=4), mode


def test_shipped_weights_are_of_the_recorded_world() -> None:
    log = json.loads((ASSETS / "seed0" / "log.json").read_text())
    assert log["world"] == w.WORLD_DIGESTS[SHIPPED_SEED]
    size = sum(file.stat().st_size for file in ASSETS.rglob("*.safetensors"))
    assert size < 3_000_000

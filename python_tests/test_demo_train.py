"""Making the demo's two models from nothing, of any seed, and questions for their fuser."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from c2c_ext.demo import export, train
from c2c_ext.demo import world as w

SEED = 1
NAMES = ("receiver", "sharer")


def make(directory: Path) -> Path:
    train.main(["--seed", str(SEED), "--output", str(directory)])
    return directory


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, one_thread) -> None:
    """Trainings of 20 small steps."""
    recipe = train.Recipe()
    sharer, receiver = (
        replace(t, steps=20, batch=16, warm_up=5) for t in (recipe.sharer, recipe.receiver)
    )
    recipe = replace(recipe, sharer=sharer, receiver=receiver)
    monkeypatch.setattr(train, "Recipe", lambda: recipe)


def test_a_seed_gives_two_models_that_learn_the_same_bits_again(short, tmp_path: Path) -> None:
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    log = json.loads((first / "log.json").read_text())
    assert log["seed"] == SEED and log["world"] == w.WORLD_DIGESTS[SEED]
    for name in NAMES:
        losses = [point["loss"] for point in log["training"][name]["curve"]]
        assert losses[-1] < 0.9 * losses[0]
        file = Path(name, "model.safetensors")
        digests = {hashlib.sha256((d / file).read_bytes()).digest() for d in (first, second)}
        assert len(digests) == 1
        model = LlamaForCausalLM.from_pretrained(first / name)
        assert model.config.vocab_size == len(w.VOCABULARY)
        assert log["training"][name]["parameters"] == model.num_parameters()


def test_questions_can_be_of_another_pair_and_its_world(tmp_path: Path) -> None:
    pair, output = tmp_path / "pair", tmp_path / "export"
    for name in NAMES:
        (pair / name).mkdir(parents=True)
        (pair / name / "config.json").write_text(json.dumps({"of": name}))
    export.main([str(output), "--rows", "48", "--pair", str(pair), "--seed", str(SEED)])
    for name in NAMES:
        assert json.loads((output / name / "config.json").read_text()) == {"of": name}
        assert (output / name / "tokenizer.json").exists()
    world = w.make_world(SEED)
    for line in (output / "train.jsonl").read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        name, *_, kind, asked = user["content"].split()
        attribute = torch.tensor(w.attribute(asked))
        kinds = torch.tensor(w.KINDS.index(kind))
        fact = world.facts[world.names.index(name), attribute]
        value = world.answers(kinds, attribute, fact)
        assert assistant["content"] == w.decode([w.value_ids(attribute, value)])

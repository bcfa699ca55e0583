"""The demo's questions as training data: what is in them, and that they can be learnt from."""

import json
from pathlib import Path

import pytest
import torch

from c2c_ext.cli import main
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import export
from c2c_ext.demo import world as w
from c2c_ext.training.collator import ChatDataset, Encoder
from c2c_ext.training.data import read_conversations

ROWS = 384


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    export.main([str(place), "--rows", str(ROWS)])
    return place


def test_questions_are_about_train_entities_and_right(exported: Path) -> None:
    world = w.make_world(export.SEED)
    rows = [json.loads(line) for line in (exported / "train.jsonl").read_text().splitlines()]
    assert len(rows) == ROWS
    seen = set()
    for row in rows:
        user, assistant = row["messages"]
        words = user["content"].split()
        name, form, kind, asked = words[0], words[2:-4], words[-2], words[-1]
        entity = world.names.index(name)
        assert entity < w.NUM_TRAIN and asked in form and len(set(form)) == len(form)
        attribute = torch.tensor(w.ATTRIBUTES.index(asked))
        kinds = torch.tensor(w.KINDS.index(kind))
        value = world.answers(kinds, attribute, world.facts[entity, attribute])
        assert assistant["content"] == w.decode([w.value_ids(attribute, value)])
        assert row["positions"] == [w.FORM_START, w.FORM_START + len(form)]
        seen.add((kind, len(form)))
    assert seen == {(kind, size) for kind in w.KINDS for size in ev.FORM_SIZES}


def test_samples_are_the_prompts_that_are_evaluated(exported: Path) -> None:
    dataset = ChatDataset(
        *read_conversations(exported / "train.jsonl"), Encoder(export.tokenizer())
    )
    for sample in dataset.samples[:20]:
        ids = sample.input_ids.tolist()
        assert ids[0] == w.BOS and sample.prompt_length == len(ids) - 1
        form, question = ids[: sample.positions[1]], ids[sample.positions[1] : -1]
        names = w.make_world(export.SEED).name_ids.tolist()
        attributes = torch.tensor([form[w.FORM_START :]]) - w.FIRST_ATTRIBUTE
        entity = torch.tensor([names.index(form[1])])
        assert w.make_world(export.SEED).blank_form(entity, attributes).tolist() == [form]
        kind = torch.tensor([question[2] - w.FIRST_KIND])
        asked = torch.tensor([question[3] - w.FIRST_ATTRIBUTE])
        assert w.question(kind, asked).tolist() == [question]
        assert range(*sample.positions) == range(
            *ev.form_positions(attributes.shape[1]).indices(99)
        )


def test_the_command_learns_from_them(exported: Path, tmp_path: Path) -> None:
    models = ["--receiver", str(exported / "receiver"), "--sharer", str(exported / "sharer")]
    data = ["--data", str(exported / "train.jsonl"), "--config", "tiny"]
    changes = ["batch=64", "micro_batch=64", "max_steps=24", "log_steps=6", "anneal_steps=24"]
    output = ["--output", str(tmp_path / "fuser")]
    assert main(["train", *models, *data, *output, "--set", *changes]) == 0
    log = json.loads((tmp_path / "fuser" / "training_log.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]


def test_the_shipped_pairs_table_is_printed(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    ev.main([str(export.ASSETS)])
    assert "| C2C | " in capsys.readouterr().out

"""`c2c train` end to end on tiny models: output, data, dry run, sweep."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from local_tokenizers import letter_tokenizer, turns, write_lines
from test_training_checkpoint import same
from train_command import place, train

import c2c_ext
from c2c_ext.estimate import Ceilings
from c2c_ext.training import dry_run
from c2c_ext.training.checkpoint import checkpoint_path
from c2c_ext.training.model import C2CTrainingModel
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.run import load_setup

__all__ = ["place"]


def test_a_trained_fuser_is_ready_to_attach(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "fuser"
    assert train(place, output) == 0
    captured = capsys.readouterr()
    assert "talks.jsonl: 10 conversations, 0 bad lines" in captured.err
    assert re.search(r"^4 steps in \d+ s, training loss", captured.out, re.M)
    assert f"Fuser.from_pretrained({str(output)!r})" in captured.out
    fuser = c2c_ext.Fuser.from_pretrained(output)
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()
    with c2c_ext.attached(receiver, sharer, fuser):
        receiver.generate(torch.tensor([[4, 8, 9, 5]]), max_new_tokens=2, do_sample=False)
    last = c2c_ext.Fuser.from_pretrained(checkpoint_path(output, 4))
    assert same(dict(fuser.state_dict()), dict(last.state_dict()))
    log = json.loads((output / "training_log.json").read_text())
    assert log["steps"] == 4 and len([e for e in log["log"] if "loss" in e]) == 4
    assert yaml.safe_load((output / "recipe.yaml").read_text())["lr"] == 0.01
    card = (output / "README.md").read_text()
    assert "0.01" in card and str(place) not in card


def test_unknown_tokens_are_counted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = [turns("w1", "w2"), turns("what w1", "w2"), turns("so so", "w1 this")]
    write_lines(tmp_path / "x.jsonl", [{"messages": messages} for messages in records])
    options = ("--data", str(tmp_path / "x.jsonl"), "--set", "max_steps=1")
    assert train(place, tmp_path / "x", *options) == 0
    message = capsys.readouterr().err
    assert "warning: 4 tokens of 2 conversations are <unk>" in message
    assert "1 of them are learnt as responses (first: line 2)" in message
    assert train(place, tmp_path / "y", "--set", "max_steps=1") == 0
    assert "warning: " not in capsys.readouterr().err


def test_a_dataset_of_the_hub_trains_by_name(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": turns(f"w{i} w{i + 1}", f"w{i + 2}")} for i in range(10)]
    asked = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    options = ("--data", "org/chats", "--set", "max_steps=2", "split=part")
    assert train(place, tmp_path / "x", *options, "--eval-data", "org/others") == 0
    assert asked == [("org/chats", "part"), ("org/others", "part")]
    assert "org/chats: 10 conversations, 0 bad rows" in capsys.readouterr().err
    card = (tmp_path / "x" / "README.md").read_text()
    assert "org/chats" in card
    assert train(place, tmp_path / "y", *options) == 0  # as the file of the same conversations
    assert train(place, tmp_path / "z", "--set", "max_steps=2") == 0
    fusers = [c2c_ext.Fuser.from_pretrained(tmp_path / n).state_dict() for n in "yz"]
    assert same(*map(dict, fusers))
    assert train(place, tmp_path / "q", *options, "--dry-run") == 0
    assert "rows of a dataset of the Hub are not counted" in capsys.readouterr().err


def test_the_recipes_seed_decides_what_is_trained(place: Path, tmp_path: Path) -> None:
    fusers = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(fusers))
        options = ("--set", f"seed={seed}", "max_steps=1")
        assert train(place, tmp_path / name, *options) == 0
        fusers.append(dict(c2c_ext.Fuser.from_pretrained(tmp_path / name).state_dict()))
    assert same(fusers[0], fusers[1]) and not same(fusers[0], fusers[2])


def test_part_of_the_data_is_held_back_for_evaluation(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(place, tmp_path / "x", "--set", "eval_part=0.2", "eval_steps=2") == 0
    assert "evaluation loss" in capsys.readouterr().out
    log = json.loads((tmp_path / "x" / "training_log.json").read_text())
    losses = [entry["eval_loss"] for entry in log["log"] if "eval_loss" in entry]
    assert log["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    state = json.loads((checkpoint_path(tmp_path / "x", 4) / "training_state.json").read_text())
    assert state["run"]["samples"] == 8


def test_prompt_caches_are_written_once_and_take_the_place_of_prefills(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(place / "talks.jsonl", tmp_path / "eval.jsonl")  # the same line numbers
    options = ("--eval-data", str(tmp_path / "eval.jsonl"))
    cached = (*options, "--prompt-caches", str(tmp_path / "caches"))
    assert train(place, tmp_path / "plain", *options) == 0
    assert train(place, tmp_path / "first", *cached) == 0
    assert "of prompt caches" in capsys.readouterr().err

    def prefill(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model prefills")

    monkeypatch.setattr("c2c_ext.training.model.prefill", prefill)
    assert train(place, tmp_path / "second", *cached) == 0
    assert "of prompt caches" not in capsys.readouterr().err
    plain, first, second = (
        dict(c2c_ext.Fuser.from_pretrained(tmp_path / n).state_dict())
        for n in ("plain", "first", "second")
    )
    assert same(first, second)
    for name, tensor in plain.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
    other = write_lines(tmp_path / "other.jsonl", [{"messages": turns("w7", "w8")}] * 10)
    assert train(place, tmp_path / "third", *cached, "--data", str(other)) == 2
    assert "caches/" in capsys.readouterr().err


def test_a_dry_run_loads_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("receiver", "sharer"):  # configurations alone
        (tmp_path / side).mkdir()
        shutil.copy(place / side / "config.json", tmp_path / side)
    for name in ("talks.jsonl", "recipe.yaml"):
        shutil.copy(place / name, tmp_path)
    ceilings = Ceilings("cpu", 1e9, {torch.float32: 1e9})
    monkeypatch.setattr(dry_run, "measured_ceilings", lambda recipe: ceilings)
    assert train(tmp_path, tmp_path / "x", "--dry-run") == 0
    assert not (tmp_path / "x").exists()
    out = capsys.readouterr().out
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()
    config = c2c_ext.FuserConfig.for_models(receiver.config, sharer.config, hidden_size=16)
    assert f"{config.num_parameters():,} parameters in 6 streams" in out
    assert f"receiver {receiver.num_parameters():,}, sharer {sharer.num_parameters():,}" in out
    assert "10 samples, 4 steps of 4" in out and "2 x 2 samples on each of 1 processes" in out
    for line in ("memory  ", "  AdamW state", "time of a step", "time in all"):
        assert f"\n{line}" in out
    assert "unknown" not in out


def test_a_plan_counts_what_training_allocates() -> None:
    """Against the tensors themselves: parameters, gradients, optimizer."""
    from c2c_ext.facts import read_model
    from c2c_ext.training.recipes import PUBLISHED

    golden = Path(__file__).parent / "golden" / "e2e"
    facts = {
        side: read_model(golden / n)
        for side, n in (("receiver", "receiver"), ("sharer", "sharer1"))
    }
    recipe = PUBLISHED.changed({"hidden_size": 16, "dtype": "fp32", "max_tokens": 32})
    config = recipe.fuser_config(facts["receiver"].config, facts["sharer"].config)
    planned = dry_run.plan(recipe, config, **facts, samples=1000)
    fuser = c2c_ext.Fuser(config)
    own = sum(p.nbytes for p in fuser.parameters())
    assert planned["memory_bytes"]["fuser parameters"] == own
    assert planned["memory_bytes"]["AdamW state"] == 2 * own
    assert (planned["steps"], planned["passes_per_step"]) == (4, 32)
    assert planned["seconds"] is None
    slow, fast = (
        dry_run.plan(
            recipe, config, **facts, samples=1000, ceilings=Ceilings("x", 1.0, {torch.float32: r})
        )
        for r in (1e6, 1e9)
    )
    assert slow["seconds"] == pytest.approx(1000 * fast["seconds"])
    assert slow["seconds"] == pytest.approx(4 * slow["seconds_per_step"])


def test_a_sweep_compares_every_combination(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = ("lr=[1e-3, 0.3]", "layer_map=[last_aligned, [0, 0, 4]]")
    options = ("--set", "eval_part=0.2", "max_steps=2", "--sweep", *grid)
    assert train(place, tmp_path / "x", *options) == 0
    rows = json.loads((tmp_path / "x" / "sweep.json").read_text())["runs"]
    settings = [(row["settings"]["lr"], str(row["settings"]["layer_map"])) for row in rows]
    assert len(set(settings)) == 4
    losses = [row["eval_loss"] for row in rows]
    assert losses == sorted(losses) and len(set(losses)) == 4
    table = (tmp_path / "x" / "sweep.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("| run | lr | layer_map | evaluation loss |")
    for row in rows:
        fuser = c2c_ext.Fuser.from_pretrained(tmp_path / "x" / row["run"])
        assert row["settings"]["layer_map"] in ("last_aligned", list(fuser.config.layer_map))


def test_a_sweep_trains_the_named_variants_of_a_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text(
        "as it is: {}\nvalues only: {kinds: [value], gate: false}\n"
        "plain: {weighting: false, integration: replacement, reads: sharer}\n"
    )
    assert train(place, tmp_path / "x", "--set", "max_steps=1", "--sweep", str(file)) == 0
    table = (tmp_path / "x" / "sweep.md").read_text()
    assert table in capsys.readouterr().out and table.startswith("| run | name | evaluation loss |")
    rows = json.loads((tmp_path / "x" / "sweep.json").read_text())["runs"]
    variants = {
        row["name"]: c2c_ext.Fuser.from_pretrained(tmp_path / "x" / row["run"]).config.variant()
        for row in rows
    }
    assert variants == {
        "as it is": {},
        "values only": {"kinds": ("value",), "gate": False},
        "plain": {"weighting": False, "integration": "replacement", "reads": "sharer"},
    }


def test_the_published_device_and_dtype_train_where_there_is_no_gpu(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    options = ("--set", "max_steps=1", "dtype=bf16", "device=auto")
    assert train(place, tmp_path / "x", *options) == 0


def test_every_set_option_counts(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "x", "--set", "max_steps=1", "--set", "lr=0.5") == 0
    log = json.loads((tmp_path / "x" / "training_log.json").read_text())
    assert (log["recipe"]["lr"], log["steps"]) == (0.5, 1)


def test_a_diverging_loss_ends_with_status_1(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = C2CTrainingModel.forward

    def spoilt(self: C2CTrainingModel, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        if self.step == 2:
            output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(C2CTrainingModel, "forward", spoilt)
    assert train(place, tmp_path / "x") == 1
    message = capsys.readouterr().err
    assert "training stopped in step 3: the loss is nan" in message
    assert "talks.jsonl, line " in message and "checkpoint-2" in message
    assert train(place, tmp_path / "y", "--sweep", "lr=[0.1, 0.2]") == 1
    assert "diverged in step 3" in capsys.readouterr().out


def test_models_of_different_tokenizers_are_trained_on_aligned_tokens(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "sharer"
    shutil.copytree(place / "sharer", other)
    letter_tokenizer().save_pretrained(other)
    options = ("--sharer", str(other), "--set", "max_steps=30", "lr=0.05", "log_steps=10")
    assert train(place, tmp_path / "x", *options) == 0
    assert re.search(r"^the tokenizers differ in \d+ tokens: each", capsys.readouterr().err, re.M)
    log = json.loads((tmp_path / "x" / "training_log.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1, losses
    setup = load_setup(
        load_recipe(place / "recipe.yaml"),
        *(str(place / "receiver"), str(other), str(place / "talks.jsonl")),
    )
    batch = setup.collator([setup.train.samples[0]])
    #                               <s> <user> w0 w1 </s> w0 <bot>, then the response
    assert batch["token_map"].tolist() == [[-1, -1, 3, 5, 5, 5, 5, *[-1] * 2]]
    letters = letter_tokenizer().convert_ids_to_tokens(batch["sharer_input_ids"][0].tolist())
    assert " ".join(letters) == "<s> <user> w 0 w 1 </s> w 0 <bot>"
    assert setup.fixed["aligner"] == "span"

"""`c2c train --resume`: what is gone on with, bit for bit, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from local_tokenizers import turns, word_tokenizer, write_lines
from safetensors.torch import load_file, save_file
from test_training_checkpoint import same
from train_command import place, train

import c2c_ext
from c2c_ext.training.arguments import training_arguments
from c2c_ext.training.checkpoint import checkpoint_path
from c2c_ext.training.collator import ChatCollator, ChatDataset, Encoder
from c2c_ext.training.data import read_conversations
from c2c_ext.training.gates import GateSampler
from c2c_ext.training.model import C2CTrainingModel
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.trainer import C2CTrainer

__all__ = ["place"]


def test_a_run_is_resumed_only_where_asked_and_as_it_was(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "fuser"
    assert train(place, output) == 0
    first = c2c_ext.Fuser.from_pretrained(output).state_dict()
    assert train(place, output) == 2
    assert "holds a training run (recipe.yaml); --resume goes on with it" in capsys.readouterr().err
    shutil.rmtree(checkpoint_path(output, 4))
    assert train(place, output, "--resume", "--set", "lr=0.02") == 2
    assert "its lr was 0.01, now it is 0.02" in capsys.readouterr().err
    assert train(place, output, "--resume", "--set", "max_steps=8") == 2
    assert "its max_steps was 4, now it is 8" in capsys.readouterr().err
    assert train(place, output, "--resume", data="bad.jsonl") == 2
    lines = (place / "talks.jsonl").read_bytes().splitlines()
    changed = write_lines(tmp_path / "x.jsonl", [*lines[:-1], lines[-1].replace(b"w11", b"w12")])
    assert train(place, output, "--resume", data=str(changed)) == 2
    assert "its data was" in capsys.readouterr().err
    assert yaml.safe_load((output / "recipe.yaml").read_text())["lr"] == 0.01
    # The same conversations: what is skipped does not count.
    again = ("--set", "log_steps=2", "--bad-data", "skip")
    assert train(place, output, "--resume", *again, data="bad.jsonl") == 0
    assert same(dict(first), dict(c2c_ext.Fuser.from_pretrained(output).state_dict()))


def test_a_new_process_goes_on_bit_for_bit_with_every_option(place: Path, tmp_path: Path) -> None:
    """Caches, skipped lines, evaluation, dropout, noise per token, passes; within an epoch."""
    given = ["--bad-data", "skip", "--prompt-caches", str(tmp_path / "caches")]
    given += ["--eval-data", str(place / "talks.jsonl"), "--set", "max_steps=4", "keep=9"]
    given += ["dropout=0.2", "gate_per=token", "micro_batch=1", "schedule=cosine", "lr_end=0.1"]
    given += ["recompute=true", "gradient_checkpointing=true", "padding=left", "dtype=bf16"]
    assert train(place, tmp_path / "straight", *given, data="bad.jsonl") == 0
    shutil.copytree(tmp_path / "straight", tmp_path / "parts")
    shutil.rmtree(checkpoint_path(tmp_path / "parts", 4))
    for path in tmp_path.glob("parts/*"):  # as it was after two of the three steps of an epoch
        if path.is_file() and path.name != "recipe.yaml":
            path.unlink()
    models = [x for s in ("receiver", "sharer") for x in (f"--{s}", str(place / s))]
    command = [sys.executable, "-m", "c2c_ext.cli", "train", *models, "--data"]
    command += [str(place / "bad.jsonl"), "--output", str(tmp_path / "parts"), "--resume"]
    command += ["--config", str(place / "recipe.yaml"), *given]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    logs = []
    for name in ("straight", "parts"):
        log = json.loads((tmp_path / name / "training_log.json").read_text())
        wanted = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "temperature")
        logs.append([[entry.get(key) for key in wanted] for entry in log["log"]])
    assert logs[0] == logs[1] and len(logs[0]) >= 6
    for name in ("fuser.safetensors", "training_state.safetensors", "training_state.json"):
        files = [checkpoint_path(tmp_path / d, 4) / name for d in ("straight", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_other_models_of_the_same_name_are_not_resumed_and_moved_ones_are(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(place, here := tmp_path / "here")
    output, end = tmp_path / "fuser", ("--set", "max_steps=2", "save_steps=1")
    assert train(here, output, *end) == 0
    first = c2c_ext.Fuser.from_pretrained(output).state_dict()
    for side in ("receiver", "sharer"):
        shutil.rmtree(checkpoint_path(output, 2), ignore_errors=True)
        file = here / side / "model.safetensors"
        before = load_file(file)
        save_file({n: t * 1.01 for n, t in before.items()}, file, {"format": "pt"})
        assert train(here, output, *end, "--resume") == 2
        message = f"its hash of the {side}'s configuration and weights was "
        assert message in capsys.readouterr().err
        save_file(before, file, {"format": "pt"})
    for side in ("receiver", "sharer"):
        (here / side).rename(here / f"moved-{side}")
    moved = [x for s in ("receiver", "sharer") for x in (f"--{s}", str(here / f"moved-{s}"))]
    assert train(here, output, *end, *moved, "--resume") == 0
    assert same(dict(first), dict(c2c_ext.Fuser.from_pretrained(output).state_dict()))


def test_other_evaluation_data_is_not_resumed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write_lines(tmp_path / "eval.jsonl", [{"messages": turns("w1", "w2")}] * 4)
    options = ("--set", "max_steps=1", "--eval-data", str(data))
    assert train(place, tmp_path / "x", *options) == 0
    write_lines(data, [{"messages": turns("w1", "w3")}] * 4)
    assert train(place, tmp_path / "x", *options, "--resume") == 2
    assert "its eval_data was " in capsys.readouterr().err
    assert train(place, tmp_path / "x", *options[:2], "--resume") == 2


def test_a_trainer_of_ones_own_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    """As docs/training.md has it."""
    recipe = load_recipe(place / "recipe.yaml")
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()
    tokenizer = word_tokenizer()

    def trained(steps: int) -> C2CTrainer:
        fuser = tiny_models.fuser_between(receiver, sharer)
        model = C2CTrainingModel(receiver, sharer, fuser.float(), sampler=GateSampler(steps=1000))
        dataset = ChatDataset(*read_conversations(place / "talks.jsonl"), Encoder(tokenizer))
        arguments = training_arguments(recipe, tmp_path, samples=len(dataset), max_steps=steps)
        trainer = C2CTrainer(model, arguments, dataset, None, ChatCollator(tokenizer.pad_token_id))
        trainer.train(resume_from_checkpoint=True)
        return trainer

    first = trained(4)
    again = trained(4)
    assert first.state.global_step == again.state.global_step == 4
    assert same(dict(first.fuser.state_dict()), dict(again.fuser.state_dict()))


def test_an_interrupted_run_says_how_to_go_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    forward, stop_at = C2CTrainingModel.forward, 3

    def some(self: C2CTrainingModel, *args: object, **kwargs: object) -> object:
        return interrupted() if self.step == stop_at else forward(self, *args, **kwargs)

    monkeypatch.setattr(C2CTrainingModel, "forward", some)
    assert train(place, tmp_path / "x") == 130
    message = f"c2c train: stopped; --resume goes on from the last checkpoint in {tmp_path / 'x'}"
    assert message in capsys.readouterr().err
    stop_at = 0
    assert train(place, tmp_path / "y") == 130
    assert capsys.readouterr().err.endswith("c2c train: stopped\n")


def test_what_another_run_left_in_the_output_stays(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = ("--set", "max_steps=1", "--sweep", "lr=[0.1]")
    assert train(place, tmp_path / "x", *grid) == 0
    files = {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    for again in (grid, ("--set", "max_steps=1"), ("--resume",)):
        assert train(place, tmp_path / "x", *again) == 2
        assert "x holds a sweep (sweep.md), which stays" in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    for name in ("sweep.md", "sweep.json"):  # stopped before its end
        (tmp_path / "x" / name).unlink()
    assert train(place, tmp_path / "x", *grid) == 2
    assert "x holds runs of a sweep (run-00), which stay" in capsys.readouterr().err
    c2c_ext.Fuser.from_pretrained(tmp_path / "x" / "run-00").save_pretrained(tmp_path / "y")
    for options in ((), ("--resume",)):
        assert train(place, tmp_path / "y", *options) == 2
        assert "y holds a fuser that no run here has trained" in capsys.readouterr().err


def test_resuming_a_finished_run_leaves_its_log(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, options = tmp_path / "x", ("--set", "max_steps=1", "log_steps=9")
    assert train(place, output, *options) == 0
    log = (output / "training_log.json").read_bytes()
    assert train(place, output, *options, "--resume") == 0
    assert (output / "training_log.json").read_bytes() == log
    assert "nan" not in capsys.readouterr().out
    (output / "training_log.json").unlink()
    assert train(place, output, *options, "--resume") == 0
    assert json.loads((output / "training_log.json").read_text())["train_loss"] is None


def test_a_run_that_starts_anew_writes_its_own_recipe(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "x"
    assert train(place, output, "--set", "max_steps=1") == 0
    for path in output.iterdir():  # as if stopped before the first checkpoint
        if path.name != "recipe.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(place, output, "--resume", "--set", "max_steps=1", "lr=0.5") == 0
    assert yaml.safe_load((output / "recipe.yaml").read_text())["lr"] == 0.5

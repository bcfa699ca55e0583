"""`c2c train` on bad input: one clear error, before models load where it can be."""

import errno
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from local_tokenizers import word_tokenizer
from safetensors.torch import load_file, save_file
from train_command import place, train

__all__ = ["place"]


def test_bad_data_is_refused_or_skipped(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(place, tmp_path / "x", data="bad.jsonl") == 2
    message = capsys.readouterr().err
    assert "10 conversations, 2 bad lines (--bad-data skip leaves them out)" in message
    assert "bad.jsonl, line 11: the line is not valid JSON" in message
    assert "bad.jsonl, line 12: no message is the assistant's" in message
    assert not (tmp_path / "x").exists()
    options = ("--bad-data", "skip", "--set", "max_steps=1")
    assert train(place, tmp_path / "x", *options, data="bad.jsonl") == 0
    assert "10 conversations, 2 bad lines skipped" in capsys.readouterr().err


def test_a_model_without_some_of_its_weights_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "sharer"
    shutil.copytree(place / "sharer", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "layers.1" in name)
    del weights[name]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert train(place, tmp_path / "x", "--sharer", str(other)) == 2
    message = f"--sharer: the model in {other} lacks 1 of the weights that its config.json speaks"
    assert f"{message} of: {name}" in capsys.readouterr().err


def test_weights_that_cannot_be_read_are_one_clear_error(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "sharer"
    shutil.copytree(place / "sharer", broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert train(place, tmp_path / "x", "--sharer", str(broken)) == 2
    assert f"--sharer: the model in {broken} cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "best"], "--config: there is no file best, and no recipe of that name"),
        (["--set", "lr"], "--set: must be KEY=VALUE, got 'lr'"),
        (["--set", "lr=x"], "--set: recipe: lr must be of type float, got 'x'"),
        (["--set", "lr=["], "--set: lr: '[' is not a value"),
        (["--set", "rate=1"], "--set: unknown key rate; known are"),
        (["--set", "layer_map=[0, 9, 0]"], "9"),
        (["--set", "micro_batch=3"], "batch (4) must be a multiple of micro_batch (3)"),
        (["--set", "max_tokens=5"], "must have at most 5 tokens, has 9"),
        (["--set", "eval_part=0.01"], "eval_part 0.01 of 10 samples leaves 0 to evaluate on"),
        (["--sweep", "lr=0.1"], "--sweep: lr must be a list of values, got 0.1"),
        (["--sweep", "lr=[]"], "--sweep: lr must be a list of values, got []"),
        (["--sweep", "dtype=[fp32]"], "--sweep: 'dtype' cannot be swept; what can is lr,"),
        (["--sweep", "lr=[0.1, x]"], "--sweep: recipe: lr must be of type float, got 'x'"),
        (["--sweep", f"seed={list(range(65))}"], "must be at most 64 runs, these are 65"),
        (["--sweep", "variants"], "--sweep: 'variants' is no KEY=[VALUE, ...] and no file"),
        (["--sweep", "lr=[0.1]", "--resume"], "--resume goes on with one run, not with a --sweep"),
        (["--sweep", "lr=[0.1]", "lr=[0.2]"], "--sweep: lr is given twice"),
        (["--sweep", "batch=[4, 3]"], "--sweep: recipe: batch (3) must be a multiple of micro"),
        (["--sweep", "layer_map=[depth, [0, 9, 0]]"], "--sweep: c2c_ext.layer_map: "),
        (["--set", "lr=1", "--set", "lr=2"], "--set: lr is given twice"),
        (["--set", "shard_models=true"], "shard_models needs several processes"),
        (["--receiver", "/nowhere"], "--receiver: no model at /nowhere"),
        (["--data", "/nowhere.jsonl"], "--data: /nowhere.jsonl is missing or not a regular file"),
        (["--eval-data", "/no.jsonl"], "--eval-data: /no.jsonl is missing or not a regular file"),
        (["--data", "/no.jsonl", "--dry-run"], "--data: /no.jsonl is missing or not a regular"),
        (["--eval-data", "/no.jsonl", "--dry-run"], "--eval-data: /no.jsonl is missing or not a"),
        (["--set", "chat_template=tokenizer", "labels=all", "max_tokens=5"], "must have at most 5"),
    ],
)
def test_bad_input_is_one_clear_error(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert train(place, tmp_path / "x", *options) == 2
    captured = capsys.readouterr()
    assert "c2c train: " in captured.err and message in captured.err
    assert not (tmp_path / "x").exists()


def test_a_missing_chat_template_names_the_option_to_do_without(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(place, here := tmp_path / "here")
    for side in ("receiver", "sharer"):
        (here / side / "chat_template.jinja").unlink(missing_ok=True)
        word_tokenizer(chat_template=None).save_pretrained(here / side)
    assert train(here, tmp_path / "x") == 2
    assert "--set chat_template=plain takes the messages' contents" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "sharer"
    shutil.copytree(place / "sharer", other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    assert train(place, tmp_path / "x", "--sharer", str(other)) == 2
    assert f"--sharer: {other} has no tokenizer that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--prompt-caches"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("file", "must be a directory, it is a file"),
        ("file/below", "cannot be written to: Not a directory"),
        ("/proc/nowhere", "cannot be written to: "),
        ("n" * 300, "cannot be written to: File name too long"),
        ("/".join(["n" * 200] * 20), "cannot be written to: File name too long"),
        ("deep", "cannot be written to: File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_models_load(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    where: str,
    message: str,
) -> None:
    monkeypatch.setattr("c2c_ext.training.command.load_setup", None)
    (tmp_path / "file").write_text("")
    if where == "deep":  # itself short enough, what is written there is not
        path = tmp_path / "/".join(["n" * 99] * 41)
        path = Path(str(path)[: os.pathconf(tmp_path, "PC_PATH_MAX") - 20].rstrip("/"))
    else:
        path = tmp_path / where
    before = sorted(tmp_path.rglob("*"))
    output = path if option == "--output" else tmp_path / "out"
    extra = () if option == "--output" else (option, str(path))
    assert train(place, output, *extra) == 2
    assert re.search(
        f"c2c train: {option}: {re.escape(str(path))} {message}", capsys.readouterr().err
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_read_only_place_is_refused_before_models_load(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr("c2c_ext.training.command.load_setup", None)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert train(place, tmp_path / "x") == 2
    assert "--output: " in (message := capsys.readouterr().err)
    assert "x cannot be written to: Read-only file system" in message


def test_prompt_caches_that_cannot_be_read_are_refused_before_models_load(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("c2c_ext.training.command.load_setup", None)
    options = ("--prompt-caches", str(tmp_path / "caches"))
    (tmp_path / "caches" / "receiver").mkdir(parents=True)
    assert train(place, tmp_path / "x", *options) == 2
    assert "caches/receiver must be a directory of prompt caches, it hol" in capsys.readouterr().err
    (tmp_path / "caches" / "receiver" / "index.json").write_text("{")
    assert train(place, tmp_path / "x", *options) == 2
    assert "caches/receiver/index.json is not valid JSON" in capsys.readouterr().err


def test_training_says_that_accelerate_is_missing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert train(place, tmp_path / "x") == 2
    assert "training needs the accelerate library: pip install" in capsys.readouterr().err


def test_a_report_without_its_package_is_refused_at_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("c2c_ext.training.command.find_spec", lambda name: None)
    assert train(place, tmp_path / "x", "--set", "report_to=[wandb]") == 2
    assert "report_to wandb needs the wandb package, not installed" in capsys.readouterr().err

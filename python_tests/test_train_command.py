"""`c2c train` end to end on tiny models: output, resuming, dry run, sweep, bad input."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from local_tokenizers import letter_tokenizer, turns, word_tokenizer, write_lines
from safetensors.torch import load_file, save_file
from test_training_checkpoint import same

import c2c_ext
from c2c_ext.cli import main
from c2c_ext.estimate import Ceilings
from c2c_ext.training import dry_run
from c2c_ext.training.arguments import training_arguments
from c2c_ext.training.checkpoint import checkpoint_path
from c2c_ext.training.collator import ChatCollator, ChatDataset, Encoder
from c2c_ext.training.data import read_conversations
from c2c_ext.training.gates import GateSampler
from c2c_ext.training.model import C2CTrainingModel
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.run import load_setup
from c2c_ext.training.trainer import C2CTrainer

SETTINGS = {
    "hidden_size": 16,
    "batch": 4,
    "micro_batch": 2,
    "max_steps": 4,
    "save_steps": 2,
    "lr": 0.01,
    "dropout": 0.0,
    "dtype": "fp32",
    "device": "cpu",
    "log_steps": 1,
    "anneal_steps": 4,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """receiver, sharer, talks.jsonl and recipe.yaml."""
    place = tmp_path_factory.mktemp("train")
    for side in ("receiver", "sharer"):
        getattr(tiny_models, f"{side}_model")().save_pretrained(place / side)
        word_tokenizer().save_pretrained(place / side)
    records = [{"messages": turns(f"w{i} w{i + 1}", f"w{i + 2}")} for i in range(10)]
    write_lines(place / "talks.jsonl", records)
    write_lines(place / "bad.jsonl", [*records, "{", {"messages": turns("w1")}])
    (place / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS))
    return place


def train(place: Path, output: Path, *options: str, data: str = "talks.jsonl") -> int:
    given = ["--receiver", str(place / "receiver"), "--sharer", str(place / "sharer")]
    given += ["--data", str(place / data), "--output", str(output)]
    return main(["train", *given, "--config", str(place / "recipe.yaml"), *options])


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


def test_the_published_device_and_dtype_train_where_there_is_no_gpu(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    options = ("--set", "max_steps=1", "dtype=bf16", "device=auto")
    assert train(place, tmp_path / "x", *options) == 0


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


def test_every_set_option_counts(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "x", "--set", "max_steps=1", "--set", "lr=0.5") == 0
    log = json.loads((tmp_path / "x" / "training_log.json").read_text())
    assert (log["recipe"]["lr"], log["steps"]) == (0.5, 1)


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


def test_weights_that_cannot_be_read_are_one_clear_error(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "sharer"
    shutil.copytree(place / "sharer", broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert train(place, tmp_path / "x", "--sharer", str(broken)) == 2
    assert f"--sharer: the model in {broken} cannot be loaded: " in capsys.readouterr().err


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

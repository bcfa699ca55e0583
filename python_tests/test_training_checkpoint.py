"""Checkpoints: whole or not there, whenever the process is killed; read as data."""

import json
import os
import random
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_fuser
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from c2c_ext import Fuser
from c2c_ext.training.checkpoint import (
    STATE_NAME,
    TENSORS_NAME,
    TrainingState,
    check_checkpoint,
    checkpoint_path,
    checkpoints,
    generator_state,
    load_optimizer,
    recover,
    restore_generators,
    rotate,
    write_checkpoint,
)
from c2c_ext.training.model import parameter_groups
from c2c_ext.training.trainer_state import _TRAINER_FIELDS, read_trainer_state


def stepped(fuser: Fuser, steps: int) -> tuple[torch.optim.Optimizer, object]:
    """An optimizer and a scheduler after a few steps of made-up gradients."""
    optimizer = torch.optim.AdamW(parameter_groups(fuser, 0.1), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in fuser.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return optimizer, scheduler


def save(path: Path, steps: int = 3, run: dict | None = None) -> tuple[Fuser, object, object]:
    fuser = make_fuser()
    optimizer, scheduler = stepped(fuser, steps)

    def write(directory: Path) -> None:
        fuser.save_pretrained(directory)
        TrainingState(
            steps, optimizer.state_dict(), scheduler.state_dict(), [generator_state()], run or {}
        ).save(directory)

    write_checkpoint(path, write)
    return fuser, optimizer, scheduler


def same(a: object, b: object) -> bool:
    """Equality of nested states, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    fuser, optimizer, scheduler = save(path)
    again = Fuser.from_pretrained(path)
    assert same(dict(again.state_dict()), dict(fuser.state_dict()))
    other, schedule = stepped(make_fuser(), 0)
    load_optimizer(path, other, schedule)
    assert same(other.state_dict(), optimizer.state_dict())
    assert same(schedule.state_dict(), scheduler.state_dict())
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["README.md", "fuser.safetensors", "fuser_config.json", STATE_NAME, TENSORS_NAME]
    )


def test_generators_come_back(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.normal(), float(torch.randn(()))]

    random.gauss(0, 1), np.random.normal()  # each of the two keeps a second number
    before = generator_state()
    save(path)
    restore = generator_state()
    expected = draw()
    draw()
    assert restore_generators(path, 0) and draw() == expected
    assert not restore_generators(path, 1)
    assert same(before["numbers"], restore["numbers"])


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    save(path)
    for file in path.iterdir():
        start = file.read_bytes()[:2]
        assert start != b"PK" and not start.startswith(b"\x80"), file


def test_checkpoints_are_listed_by_step_and_rotated(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        write_checkpoint(checkpoint_path(tmp_path, step), lambda d: (d / "x").write_text("x"))
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path)] == [
        *("checkpoint-5", "checkpoint-20", "checkpoint-100")
    ]
    rotate(tmp_path, 1, best=checkpoint_path(tmp_path, 5))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-100"]
    assert len(list(tmp_path.iterdir())) == 4
    assert checkpoints(tmp_path / "nowhere") == []


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    save(path)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(path, fail)
    assert list(tmp_path.iterdir()) == [path]
    assert check_checkpoint(path, {}) == 3


def test_recover_gives_a_replaced_checkpoint_its_name_back(tmp_path: Path) -> None:
    path, mark = checkpoint_path(tmp_path, 3), "0123456789abcdef"
    save(path)
    os.rename(path, tmp_path / f".checkpoint-3.{mark}.aside")
    (tmp_path / f".checkpoint-3.{mark}.new").mkdir()
    (tmp_path / f".checkpoint-2.{mark}.old").mkdir()
    (tmp_path / ".hidden").mkdir()
    recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "checkpoint-3"]
    assert check_checkpoint(path, {}) == 3


KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_training_checkpoint as tests
from c2c_ext.training.checkpoint import *

tests.torch.set_num_threads(1)
output, steps = Path(sys.argv[1]), [3, 3]  # one goes, one is saved twice
os.fsync = lambda file: None  # slow; what a killed process has written is not lost
tests.save(checkpoint_path(output, 2), 2)
events, limit = 0, None

def count(event, arguments):
    global events
    if limit is not None and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        events += 1
        if events == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
kills, alive = 0, False
while not alive:  # one more event each time
    child = os.fork()
    if child == 0:
        limit = kills + 1
        for step in steps:
            tests.save(checkpoint_path(output, step), step)
            rotate(output, 1)
        os._exit(0)
    alive = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    kills += not alive
    recover(output)
    found = checkpoints(output)
    assert found, (kills, os.listdir(output))
    step = check_checkpoint(found[-1], {})
    assert found[-1].name == f"checkpoint-{step}"
    fuser = tests.Fuser.from_pretrained(found[-1])
    optimizer, scheduler = tests.stepped(tests.make_fuser(), 0)
    load_optimizer(found[-1], optimizer, scheduler)
    assert all(int(s["step"]) == step for s in optimizer.state_dict()["state"].values())
    assert not [n for n in os.listdir(output) if n.startswith(".")], os.listdir(output)
print(kills, found[-1].name)
"""


def test_a_checkpoint_for_which_there_is_no_more_room_is_one_clear_error(tmp_path: Path) -> None:
    save(checkpoint_path(tmp_path, 1))
    size = os.path.getsize(checkpoint_path(tmp_path, 1) / TENSORS_NAME)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        with pytest.raises(OSError, match=f"{TENSORS_NAME} cannot be written: "):
            save(checkpoint_path(tmp_path, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Killed at every single file operation of two saves in turn."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, last = done.stdout.split()
    assert int(kills) > 40 and last == "checkpoint-3"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = checkpoint_path(tmp_path, 3)
    save(path, run={"seed": 1, "gates": {"kind": "logistic"}})
    return path


def changed(path: Path, **changes: object) -> None:
    """Replaces entries of the state, by dotted name."""
    data = json.loads((path / STATE_NAME).read_text())
    for name, value in changes.items():
        *keys, last = name.split("__")
        place = data
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (path / STATE_NAME).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"seed": 2}, "cannot be resumed: its seed was 1, now it is 2"),
        ({"gates": {"kind": "gumbel"}}, "its gates was {'kind': 'logistic'}, now it is"),
        ({"lr": 0.1}, "its lr was None, now it is 0.1"),
    ],
)
def test_another_run_is_refused(saved: Path, run: dict, message: str) -> None:
    assert check_checkpoint(saved, {"seed": 1, "gates": {"kind": "logistic"}}) == 3
    with pytest.raises(ValueError, match=message):
        check_checkpoint(saved, run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "this version of c2c_ext: format_version must be 1, got 2"),
        ({"step": -1}, "step must be a number of steps, got -1"),
        ({"step": "x"}, "step must be a number of steps, got 'x'"),
        ({"step": 10**400}, "step must be a number of steps, got 1000"),
        ({"scheduler__last_epoch": 10**400}, "scheduler.last_epoch must be like"),
        ({"optimizer__numbers": {"0.step": 10**400}}, "optimizer.numbers.0.step is not a number"),
        ({"scheduler": None}, "scheduler is missing"),
        ({"scheduler": []}, "scheduler must be an object"),
        ({"scheduler__last_epoch": None}, "scheduler.last_epoch is missing"),
        ({"scheduler__last_epoch": "x"}, "scheduler.last_epoch must be like"),
        ({"scheduler__base_lrs": [1.0]}, "scheduler.base_lrs must have 2 numbers, has 1"),
        ({"optimizer": 1}, "optimizer must hold groups and numbers"),
        ({"optimizer__groups": []}, "optimizer.groups must be 2 groups"),
        ({"optimizer__groups__0": "x"}, "optimizer.groups must be 2 groups|lr must be a number"),
        ({"optimizer__groups__1__lr": 1e308}, "lr must be a number in 0..1000, got 1e.308"),
        ({"optimizer__numbers": {"0.step": "x"}}, "optimizer.numbers.0.step is not a number"),
        ({"optimizer__numbers": {"99.step": 1}}, "optimizer.numbers.99.step is not a number"),
    ],
)
def test_a_wrong_state_is_named(saved: Path, changes: dict, message: str) -> None:
    if "optimizer__groups__0" in changes:
        changes = {"optimizer__groups": ["x", "x"]}
    changed(saved, **changes)
    optimizer, scheduler = stepped(make_fuser(), 0)
    before = optimizer.state_dict(), scheduler.state_dict()
    with pytest.raises(ValueError, match=message):
        load_optimizer(saved, optimizer, scheduler)
    assert same(before, (optimizer.state_dict(), scheduler.state_dict()))


def test_another_optimizer_setting_is_named(saved: Path) -> None:
    fuser = make_fuser()
    optimizer = torch.optim.AdamW(parameter_groups(fuser, 0.2), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"the optimizer's weight_decay was 0.1, now it is 0.2"):
        load_optimizer(saved, optimizer, scheduler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("optimizer.0.exp_avg"), "the same state for each of"),
        (lambda t: t.update({"optimizer.99.exp_avg": torch.ones(1)}), "surplus tensor optimizer."),
        (lambda t: t.update({"optimizer.x.exp_avg": torch.ones(1)}), "surplus tensor optimizer."),
        (lambda t: t.update({"optimizer.0.exp_avg": torch.ones(3)}), "0.exp_avg must be floating"),
        (lambda t: t["optimizer.0.exp_avg"].fill_(torch.nan), "0.exp_avg holds NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_named(saved: Path, change: object, message: str) -> None:
    tensors = load_file(saved / TENSORS_NAME)
    change(tensors)
    save_file(tensors, saved / TENSORS_NAME)
    optimizer, scheduler = stepped(make_fuser(), 0)
    with pytest.raises(ValueError, match=message):
        load_optimizer(saved, optimizer, scheduler)
    assert not optimizer.state


def test_damaged_files_are_one_clear_error(saved: Path) -> None:
    optimizer, scheduler = stepped(make_fuser(), 0)
    tensors = saved / TENSORS_NAME
    whole = tensors.read_bytes()
    for part in (b"", whole[:50], whole[:-1], b"\x80\x04" + whole):
        tensors.write_bytes(part)
        for load in (
            lambda: load_optimizer(saved, optimizer, scheduler),
            lambda: restore_generators(saved, 0),
        ):
            with pytest.raises(ValueError, match="is not a whole safetensors file"):
                load()
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=TENSORS_NAME):
        load_optimizer(saved, optimizer, scheduler)
    (saved / STATE_NAME).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        check_checkpoint(saved, {})


def test_a_wrong_generator_state_changes_no_generator(saved: Path) -> None:
    tensors = load_file(saved / TENSORS_NAME)
    tensors["generator.0.cpu"] = torch.ones(7, dtype=torch.uint8)
    save_file(tensors, saved / TENSORS_NAME)
    before = generator_state()
    with pytest.raises(ValueError, match=r"generator.0 is not a generator's state"):
        restore_generators(saved, 0)
    assert same(generator_state(), before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must be an object, got list"),
        ('{"global_step": 1, "other": 2}', "unknown keys other"),
        ('{"global_step": -1}', "global_step must be a number of steps, got -1"),
        ("{}", "global_step must be a number of steps, got None"),
        ('{"global_step": 1, "best_global_step": "/x"}', "best_global_step must be a number of"),
        ('{"global_step": 1, "best_metric": "x"}', "best_metric must be a number or null, got 'x'"),
        ('{"global_step": 1, "log_history": [1]}', "log_history must be a list of objects"),
        ('{"global_step": 1, "log_history": 7}', "log_history must be a list of objects,"),
        (
            '{"global_step": 1, "log_history": [{}, {"loss": "low"}]}',
            r"log_history\[1\].loss must be a number, got 'low'",
        ),
        (
            f'{{"global_step": 1, "log_history": [{{"eval_loss": 1{"0" * 400}}}]}}',
            r"log_history\[0\].eval_loss must be a number, got 10",
        ),
        (f'{{"global_step": 1{"0" * 400}}}', "global_step must be a number of steps, got 10"),
        ('{"global_step": 1, "save_steps": null}', "save_steps must be a number, got None"),
        ('{"global_step": 1, "epoch": [2]}', r"epoch must be a number or null, got \[2\]"),
        ('{"global_step": 1, "total_flos": NaN}', "total_flos must be a number, got nan"),
        ('{"global_step": 1, "best_model_checkpoint": 3}', "point must be a string or null"),
        (
            '{"global_step": 1, "stateful_callbacks": [1]}',
            "callbacks must be an object or null",
        ),
        ('{"global_step": 1, "is_world_process_zero": 1}', "process_zero must be true or false"),
    ],
)
def test_a_wrong_trainer_state_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    known = [field.name for field in fields(TrainerState)]
    with pytest.raises(ValueError, match=message) as error:
        read_trainer_state(tmp_path, known)
    assert str(tmp_path / "trainer_state.json") in str(error.value)


def test_every_field_of_the_trainers_state_is_checked() -> None:
    checked = {"global_step", "best_global_step", *_TRAINER_FIELDS}
    assert {field.name for field in fields(TrainerState)} <= checked

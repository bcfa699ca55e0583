"""Checkpoint directories: whole or not there at all, and read as data.

A checkpoint is a fuser directory (`Fuser.from_pretrained` loads it) with what resuming needs beside
it: the optimizer's and the random generators' tensors in a safetensors file, numbers as JSON, and
the Trainer's own trainer_state.json. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import open_regular, read_json
from ..messages import shown, shown_name
from .trainer_state import MAX_STEPS, is_number

STATE_NAME = "training_state.json"
TENSORS_NAME = "training_state.safetensors"
FORMAT_VERSION = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_LEFTOVER = re.compile(r"\.(checkpoint-\d{1,18})\.[0-9a-f]{16}\.(new|aside|old)")
_MAX_TENSOR_BYTES_PER_PARAMETER = 64  # eight float64 of state
_MAX_RATE = 1e3  # as of a recipe
_MAX_OTHER_BYTES = 1 << 30  # generators of all processes


class OtherRunError(ValueError):
    """A checkpoint is whole, but of a run with other settings, data or models."""


def checkpoint_path(output: str | Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps stands."""
    return Path(output) / f"checkpoint-{step}"


def checkpoints(output: str | Path) -> list[Path]:
    """Every checkpoint of a training directory, by step."""
    path = Path(output)
    entries = path.iterdir() if path.is_dir() else ()
    found = [(m, p) for p in entries if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()]
    return [p for m, p in sorted(found, key=lambda item: int(item[0].group(1)))]


def write_checkpoint(path: Path, write: Callable[[Path], Any]) -> None:
    """Makes a checkpoint directory that appears whole, on the disk, or not at all.

    ``write`` is called with an empty directory beside it. A checkpoint that is replaced stays,
    under another name, until the new one is in place: `recover` finds it should the process be
    killed between the two.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, aside = (_beside(path, end) for end in ("new", "aside"))
    try:
        new.mkdir()
        write(new)
        for file in new.iterdir():
            _sync(file)
        _sync(new)
        replaced = path.exists()
        if replaced:
            os.rename(path, aside)
        try:
            os.rename(new, path)
        except OSError:
            if replaced:
                os.rename(aside, path)
            raise
        _sync(path.parent)
        if replaced:
            _discard(aside)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def recover(output: str | Path) -> None:
    """Puts a training directory in order after its process was killed; nothing may train there.

    A checkpoint that was being replaced gets its name back, unfinished ones go.
    """
    path = Path(output)
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or entry.is_symlink() or not entry.is_dir():
            continue
        place = path / match.group(1)
        if match.group(2) == "aside" and not place.exists():
            os.rename(entry, place)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def rotate(output: str | Path, keep: int, best: Path | None = None) -> None:
    """Deletes all but the last ``keep`` checkpoints; the best one stays."""
    for path in checkpoints(output)[:-keep]:
        if path != best:
            _discard(path)


@dataclass
class TrainingState:
    """What a checkpoint holds beside the fuser.

    Attributes:
        step: optimizer steps done.
        optimizer, scheduler: their state dicts.
        generators: of every process, `generator_state`.
        run: numbers and strings that must be the same when the run is resumed.
    """

    step: int
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    generators: Sequence[dict[str, Any]]
    run: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Writes both files."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for index, state in self.optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = _host(value)
                else:
                    numbers[f"{index}.{name}"] = value
        generators = []
        for rank, state in enumerate(self.generators):
            for name, value in state["tensors"].items():
                tensors[f"generator.{rank}.{name}"] = _host(value)
            generators.append(state["numbers"])
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer["param_groups"]
        ]
        data = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "run": self.run,
            "optimizer": {"groups": groups, "numbers": numbers},
            "scheduler": _numbers_of(self.scheduler),
            "generators": generators,
        }
        try:
            save_file(tensors, directory / TENSORS_NAME)
        except SafetensorError as error:  # a full disk is no OSError to safetensors
            raise OSError(f"{directory / TENSORS_NAME} cannot be written: {error}") from error
        (directory / STATE_NAME).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def check_checkpoint(directory: Path, run: Mapping[str, Any]) -> int:
    """The number of steps of a checkpoint that a run may go on from.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no checkpoint.
        OtherRunError: it is one of another run; names what differs.
    """
    data = _read_state(directory)
    if not isinstance(data["run"], dict):
        raise ValueError(f"{directory / STATE_NAME}: run must be an object")
    now = json.loads(json.dumps(run))
    for key, value in now.items():
        if data["run"].get(key) != value:
            raise OtherRunError(
                f"{directory} cannot be resumed: its {key} was {shown(data['run'].get(key))}, now "
                f"it is {shown(value)}"
            )
    return data["step"]


def load_optimizer(directory: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Puts a checkpoint's state into a fresh optimizer and scheduler of the same settings.

    Raises:
        FileNotFoundError, ValueError: as `check_checkpoint`; or a tensor is missing, misshapen or
            not finite, or the settings differ; names it. Nothing is changed then.
    """
    data, where = _read_state(directory), directory / STATE_NAME
    fresh = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = data["optimizer"]
    if not isinstance(saved, dict) or set(saved) != {"groups", "numbers"}:
        raise ValueError(f"{where}: optimizer must hold groups and numbers")
    groups = _merged_groups(fresh["param_groups"], saved["groups"], where)
    state: dict[int, dict[str, Any]] = {}
    limit = _MAX_OTHER_BYTES + _MAX_TENSOR_BYTES_PER_PARAMETER * sum(p.numel() for p in parameters)
    for name, tensor in _read_tensors(directory / TENSORS_NAME, "optimizer.", limit).items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters) or not key:
            raise ValueError(
                f"{directory / TENSORS_NAME}: surplus tensor optimizer.{shown_name(name)}"
            )
        shape = parameters[int(index)].shape
        if tensor.shape not in (shape, torch.Size([])) or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{directory / TENSORS_NAME}: optimizer.{name} must be floating-point of shape "
                f"{list(shape)} or [], got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{directory / TENSORS_NAME}: optimizer.{name} holds NaN or infinity")
        state.setdefault(int(index), {})[key] = tensor
    numbers = saved["numbers"]
    for name, value in numbers.items() if isinstance(numbers, dict) else ():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters) or not is_number(value):
            raise ValueError(f"{where}: optimizer.numbers.{shown_name(name)} is not a number")
        state.setdefault(int(index), {})[key] = value
    kinds = {frozenset(entry) for entry in state.values()}
    if data["step"] > 0 and (len(state) != len(parameters) or len(kinds) > 1):
        raise ValueError(
            f"{directory / TENSORS_NAME}: must hold the same state for each of {len(parameters)} "
            f"parameters, holds some for {len(state)}"
        )
    schedule = _merged_numbers(scheduler.state_dict(), data["scheduler"], f"{where}: scheduler")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(schedule)


def generator_state() -> dict[str, Any]:
    """This process's random generators: Python's, NumPy's, torch's on the CPU and on its GPU."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numbers = {
        "python": [version, gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }
    return {"tensors": tensors, "numbers": numbers}


def restore_generators(directory: Path, rank: int) -> bool:
    """Sets this process's generators to a checkpoint's; False if it has none for ``rank``.

    Raises:
        FileNotFoundError, ValueError: it is no checkpoint, or a state that no generator takes.
    """
    data, path = _read_state(directory), directory / TENSORS_NAME
    if not isinstance(data["generators"], list) or rank >= len(data["generators"]):
        return False
    tensors = _read_tensors(path, f"generator.{rank}.", None)
    before = generator_state()
    try:
        _set_generators({"tensors": tensors, "numbers": data["generators"][rank]})
    except Exception as error:  # each generator has errors of its own
        _set_generators(before)
        text = shown_name(str(error), 200)
        raise ValueError(f"{path}: generator.{rank} is not a generator's state: {text}") from error
    return True


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / STATE_NAME
    data = read_json(path)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} is not a training state of this version of c2c_ext: format_version must be "
            f"{FORMAT_VERSION}, got {shown(version)}"
        )
    for key in ("step", "run", "optimizer", "scheduler", "generators"):
        if key not in data:
            raise ValueError(f"{path}: {key} is missing")
    if type(data["step"]) is not int or not 0 <= data["step"] <= MAX_STEPS:
        raise ValueError(f"{path}: step must be a number of steps, got {shown(data['step'])}")
    return data


def _read_tensors(path: Path, prefix: str, limit: int | None) -> dict[str, Tensor]:
    """The tensors under a prefix, in memory of their own."""
    with open_regular(path, limit or 1 << 50) as file:
        own = f"/proc/self/fd/{file.fileno()}"  # the file whose size was checked
        try:
            with safe_open(own, framework="pt") as opened:
                names = [name for name in opened.keys() if name.startswith(prefix)]
                return {n.removeprefix(prefix): opened.get_tensor(n).clone() for n in names}
        except (SafetensorError, UnicodeError) as error:
            text = shown_name(str(error), 200)
            raise ValueError(f"{path} is not a whole safetensors file: {text}") from error


def _merged_groups(fresh: list[dict], saved: Any, where: Path) -> list[dict]:
    """The fresh optimizer's groups with the saved learning rates; all else must be the same."""
    if not isinstance(saved, list) or len(saved) != len(fresh):
        raise ValueError(f"{where}: optimizer.groups must be {len(fresh)} groups")
    merged = []
    for own, other in zip(fresh, saved, strict=True):
        rate = other.get("lr") if isinstance(other, dict) else None
        if not is_number(rate) or not 0 <= rate <= _MAX_RATE:
            raise ValueError(
                f"{where}: optimizer.groups: lr must be a number in 0..{_MAX_RATE:g}, got "
                f"{shown(rate)}"
            )
        for key in (own.keys() & other.keys()) - {"params", "lr"}:
            now = json.loads(json.dumps(own[key]))
            if now != other[key]:
                raise OtherRunError(
                    f"{where}: the optimizer's {key} was {shown(other[key])}, now it is "
                    f"{shown(now)}"
                )
        merged.append({**own, "lr": other["lr"]})
    return merged


def _merged_numbers(fresh: dict[str, Any], saved: Any, where: str) -> dict[str, Any]:
    """``fresh`` with the numbers, and lists of numbers, that were saved."""
    if not isinstance(saved, dict):
        raise ValueError(f"{where} must be an object, got {shown(saved)}")
    merged = dict(fresh)
    for key in _numbers_of(fresh):
        if key not in saved:
            raise ValueError(f"{where}.{key} is missing")
        value, is_list = saved[key], isinstance(fresh[key], list)
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) != is_list or not all(is_number(v) for v in values):
            raise ValueError(f"{where}.{key} must be like {fresh[key]}, got {shown(value)}")
        if is_list and len(value) != len(fresh[key]):
            raise ValueError(f"{where}.{key} must have {len(fresh[key])} numbers, has {len(value)}")
        merged[key] = value
    return merged


def _numbers_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers or lists of numbers: what changes; functions do not."""
    return {
        key: value
        for key, value in state.items()
        if is_number(value) or (isinstance(value, list) and value and all(map(is_number, value)))
    }


def _set_generators(state: dict[str, Any]) -> None:
    tensors, numbers = state["tensors"], state["numbers"]
    version, gauss = numbers["python"]
    name, position, has_gauss, cached = numbers["numpy"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{end}")


def _discard(path: Path) -> None:
    """Deletes a checkpoint; its name is gone before any of its files is."""
    name = path.name.split(".")[1] if path.name.startswith(".") else path.name
    old = _beside(path.with_name(name), "old")
    with suppress(OSError):
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or directory has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

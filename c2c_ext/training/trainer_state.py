"""A checkpoint's trainer_state.json, of transformers' Trainer: data, every field checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import listed, open_regular
from ..messages import shown, shown_name

TRAINER_STATE_NAME = "trainer_state.json"
MAX_STEPS = 1 << 53
_MAX_BYTES = 1 << 30  # it holds the whole log
# What the Trainer calculates with or prints of trainer_state.json: what a value must be.
_NUMBER = ("a number", lambda v: is_number(v))
_NUMBER_OR_NULL = ("a number or null", lambda v: v is None or is_number(v))
_TEXT_OR_NULL = ("a string or null", lambda v: isinstance(v, str | None))
_FLAG = ("true or false", lambda v: isinstance(v, bool))
_TRAINER_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "best_metric": ("a number or null", lambda v: v is None or _is_logged(v)),
    "best_model_checkpoint": _TEXT_OR_NULL,
    "epoch": _NUMBER_OR_NULL,
    **dict.fromkeys(("max_steps", "logging_steps", "eval_steps", "save_steps"), _NUMBER),
    **dict.fromkeys(("num_train_epochs", "num_input_tokens_seen", "total_flos"), _NUMBER),
    "train_batch_size": _NUMBER_OR_NULL,
    "log_history": (
        "a list of objects",
        lambda v: isinstance(v, list) and all(isinstance(entry, dict) for entry in v),
    ),
    **dict.fromkeys(
        ("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search"), _FLAG
    ),
    "trial_name": _TEXT_OR_NULL,
    "trial_params": ("an object or null", lambda v: isinstance(v, dict | None)),
    "stateful_callbacks": ("an object or null", lambda v: isinstance(v, dict | None)),
}
_LOGGED_NUMBERS = {"step", "epoch", "loss", "train_loss", "eval_loss"}


def read_trainer_state(directory: Path, known: Sequence[str]) -> dict[str, Any]:
    """trainer_state.json, checked as far as the Trainer relies on it.

    Args:
        known: the keys that this version of the Trainer takes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none.
    """
    path = directory / TRAINER_STATE_NAME
    with open_regular(path, _MAX_BYTES) as file:
        text = file.read()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {shown_name(str(error))}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be an object, got {type(data).__name__}")
    unknown = set(map(str, data)) - set(known)
    if unknown:
        raise ValueError(f"{path}: unknown keys {listed(unknown)}; another version's?")
    for key, optional in (("global_step", False), ("best_global_step", True)):
        value = data.get(key)
        if value is None and optional:
            continue
        if type(value) is not int or not 0 <= value <= MAX_STEPS:
            raise ValueError(f"{path}: {key} must be a number of steps, got {shown(value)}")
    for key, (what, holds) in _TRAINER_FIELDS.items():
        if key in data and not holds(data[key]):
            raise ValueError(f"{path}: {key} must be {what}, got {shown(data[key])}")
    for i, entry in enumerate(data.get("log_history") or ()):
        for key in _LOGGED_NUMBERS & entry.keys():
            if not _is_logged(entry[key]):
                raise ValueError(
                    f"{path}: log_history[{i}].{key} must be a number, got {shown(entry[key])}"
                )
    return data


def _is_logged(value: Any) -> bool:
    """A number, or NaN or infinity, which a loss may be."""
    return isinstance(value, float) or is_number(value)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file can be calculated with: finite, also as a float."""
    # Compared and not converted: an integer of a file may be too large for a float.
    return isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max

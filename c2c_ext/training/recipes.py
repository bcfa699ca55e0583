"""Recipe: every number of a training run, with the write-ups' settings by name and YAML files."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import KINDS, FuserConfig
from ..files import MAX_JSON_BYTES, listed, open_regular
from ..messages import shown, shown_name
from .collator import CHAT_TEMPLATES, LABELS, PADDING
from .data import BAD_DATA
from .gates import GateSampler

SCHEDULES = ("linear", "cosine")
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu")
BACKENDS = ("op", "reference")
REPORTS = ("none", "tensorboard", "wandb")
LAYER_MAPS = ("last_aligned", "k_nearest", "depth")
_CHOICES = {
    "schedule": SCHEDULES,
    "dtype": tuple(TORCH_DTYPES),
    "device": DEVICES,
    "backend": BACKENDS,
    "labels": LABELS,
    "padding": PADDING,
    "chat_template": CHAT_TEMPLATES,
    "bad_data": BAD_DATA,
}
# (smallest, largest) of numbers; the fuser's and the gates' are checked by their own classes.
_RANGES: dict[str, tuple[float, float]] = {
    "lr": (0.0, 1e3),
    "warm_up": (0.0, 1.0),
    "lr_end": (0.0, 1.0),
    "weight_decay": (0.0, 1e3),
    "clip": (0.0, 1e9),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "batch": (1, 1 << 24),
    "micro_batch": (1, 1 << 24),
    "epochs": (0.0, 1e6),
    "max_steps": (0, 1 << 40),
    "max_tokens": (3, 1 << 24),
    "prefill_chunk": (0, 1 << 24),
    "eval_part": (0.0, 0.9),
    "eval_steps": (0, 1 << 40),
    "save_steps": (1, 1 << 40),
    "keep": (1, 1 << 20),
    "log_steps": (1, 1 << 40),
    "seed": (0, (1 << 32) - 1),
}


@dataclass(frozen=True)
class Recipe:
    """Every setting of a training run; the defaults are the published setting (arXiv 2510.03215).

    docs/training.md says what each one means. Values are checked when a recipe is made.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range; names it.
    """

    # The fuser (`FuserConfig.for_models`).
    layer_map: str | list[int] = "last_aligned"
    hidden_size: int = 1024
    intermediate_size: int | None = None
    depth: int = 3
    activation: str = "gelu"
    dropout: float = 0.1
    gate_init: float = 1.0
    projection: str = "mlp"
    reads: str | None = None
    integration: str = "residual"
    kinds: list[str] | None = None
    weighting: bool | None = None
    gate: bool = True
    zero_output: bool = False
    # The gates (`GateSampler`).
    gate_sampler: str = "logistic"
    gate_per: str | None = None
    temperature_schedule: str = "exponential"
    temperature_start: float = 1.0
    temperature_end: float = 0.001
    anneal_steps: int = 1929
    # The optimizer.
    lr: float = 1e-4
    schedule: str = "linear"
    lr_end: float = 0.0
    warm_up: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    batch: int = 256
    micro_batch: int = 8
    epochs: float = 1.0
    max_steps: int = 0
    seed: int = 42
    # What is read.
    max_tokens: int = 2048
    truncate: bool = False
    labels: str = "last"
    padding: str = "right"
    chat_template: str = "tokenizer"
    bad_data: str = "refuse"
    split: str = "train"
    eval_part: float = 0.0
    # How it runs.
    dtype: str = "bf16"
    device: str = "auto"
    backend: str = "op"
    recompute: bool = False
    gradient_checkpointing: bool = False
    shard_models: bool = False
    prefill_chunk: int = 0
    log_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 500
    keep: int = 2
    report_to: str | list[str] = "none"

    def __post_init__(self) -> None:
        for name, kinds in _types().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kinds))
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"recipe: {name} must be one of {', '.join(known)}, got {shown(value)}"
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"recipe: {name} must be in {low:g}..{high:g}, got {shown(value)}")
        if self.lr == 0 or (self.epochs == 0 and self.max_steps == 0):
            name = "lr" if self.lr == 0 else "epochs or max_steps"
            raise ValueError(f"recipe: {name} must be above 0, got 0")
        for name in ("beta1", "beta2"):
            if getattr(self, name) == 1:
                raise ValueError(f"recipe: {name} must be below 1, got 1")
        if isinstance(self.layer_map, str) and self.layer_map not in LAYER_MAPS:
            raise ValueError(
                f"recipe: layer_map must be one of {', '.join(LAYER_MAPS)} or a list with a sharer "
                f"layer per receiver layer, got {shown(self.layer_map)}"
            )
        reports = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        for name in reports:
            if name not in REPORTS:
                raise ValueError(
                    f"recipe: report_to must be of {', '.join(REPORTS)}, got {shown(name)}"
                )
        self.sampler()

    def changed(self, changes: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """This recipe with other values.

        Raises:
            ValueError: an unknown key, or a value of the wrong type or out of range; names it.
        """
        known = [f.name for f in fields(self)]
        unknown = [key for key in changes if key not in known]
        if unknown:
            listed = ", ".join(shown_name(str(key)) for key in unknown[:4])
            raise ValueError(f"{where}: unknown key {listed}; known are {', '.join(known)}")
        try:
            return replace(self, **changes)
        except (TypeError, ValueError) as error:
            text = str(error)
            raise ValueError(text if where == "recipe" else f"{where}: {text}") from error

    def fuser_config(self, receiver_config: Any, sharer_config: Any) -> FuserConfig:
        """What is trained, between two models of these transformers configurations."""
        return FuserConfig.for_models(
            receiver_config,
            sharer_config,
            layer_map=self.layer_map,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            depth=self.depth,
            activation=self.activation,
            dropout=self.dropout,
            gate_init=self.gate_init,
            projection=self.projection,
            reads=self.reads,
            integration=self.integration,
            kinds=KINDS if self.kinds is None else self.kinds,
            weighting=self.weighting,
            gate=self.gate,
        )

    def sampler(self) -> GateSampler:
        """The soft gates of training."""
        return GateSampler(
            kind=self.gate_sampler,
            per=self.gate_per,
            schedule=self.temperature_schedule,
            start=self.temperature_start,
            end=self.temperature_end,
            steps=self.anneal_steps,
        )

    def micro_batches(self, processes: int = 1) -> tuple[int, int]:
        """(samples per process and pass, passes per step) that make up ``batch``.

        Raises:
            ValueError: the batch cannot be divided so.
        """
        if self.batch % processes:
            raise ValueError(
                f"recipe: batch must be a multiple of the {processes} processes, got {self.batch}"
            )
        share = self.batch // processes
        micro = min(self.micro_batch, share)
        if share % micro:
            raise ValueError(
                f"recipe: batch ({self.batch}) must be a multiple of micro_batch ({micro}) times "
                f"the processes ({processes})"
            )
        return micro, share // micro

    def steps(self, samples: int) -> int:
        """Optimizer steps with that many training samples."""
        return self.max_steps or math.ceil(math.ceil(samples / self.batch) * self.epochs)

    def to_dict(self) -> dict[str, Any]:
        """Field -> value."""
        return asdict(self)


def load_recipe(place: str | Path) -> Recipe:
    """A recipe by its name in `RECIPES`, or from a YAML file: `published` with the file's changes.

    The file is a mapping of fields to values; ``base: NAME`` in it starts from another recipe.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: no YAML mapping, an unknown key, or a value that breaks a rule; names it.
    """
    if str(place) in RECIPES:
        return RECIPES[str(place)]
    path = Path(place)
    if not path.exists():
        raise FileNotFoundError(
            f"--config: there is no file {path}, and no recipe of that name ({', '.join(RECIPES)})"
        )
    data = read_mapping(path)
    base = data.pop("base", "published")
    if not isinstance(base, str) or base not in RECIPES:
        raise ValueError(f"{path}: base must be one of {', '.join(RECIPES)}, got {shown(base)}")
    return RECIPES[base].changed(data, str(path))


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file, as it is there.

    Raises:
        ValueError: no YAML, no mapping, or a key that is there twice; names the file.
        OSError: it cannot be read.
    """
    with open_regular(path, MAX_JSON_BYTES) as file:
        text = file.read()
    try:
        data = yaml.load(text.decode("utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeError, RecursionError, ValueError) as error:
        what = shown_name(" ".join(str(error).split()), 200)
        raise ValueError(f"{path} is not valid YAML: {what}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be a mapping of settings, got {type(data).__name__}")
    return data


def parse_value(text: str) -> Any:
    """A value written on the command line, read as YAML.

    Raises:
        ValueError: it is none.
    """
    try:
        return yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{shown(text)} is not a value") from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would take the last of several values of a key in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As of any loader; ValueError for a key that is there twice."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1 and name != "<<"})
        if twice:
            raise ValueError(f"duplicate keys: {listed(twice)}")
        return super().construct_mapping(node, deep)


def _types() -> dict[str, tuple[Any, ...]]:
    """Field -> the types it may have."""
    hints = typing.get_type_hints(Recipe)
    return {
        name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for name, hint in hints.items()
    }


def _typed(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """``value`` as one of its field's types, or TypeError."""
    if float in kinds and isinstance(value, str):
        try:  # YAML 1.1 takes 1e-4, without a point, for a string
            value = float(value)
        except ValueError:
            pass
    if float in kinds and type(value) is int:
        value = float(value)
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        item = (typing.get_args(kind) or (None,))[0]
        if type(value) is plain and (item is None or all(type(x) is item for x in value)):
            if type(value) is not float or math.isfinite(value):
                return value
    names = [("null" if k is types.NoneType else getattr(k, "__name__", k)) for k in kinds]
    names = [str(k) if typing.get_origin(k) else n for k, n in zip(kinds, names, strict=True)]
    raise TypeError(f"recipe: {name} must be of type {' or '.join(names)}, got {shown(value)}")


PUBLISHED = Recipe()
RECIPES: dict[str, Recipe] = {
    "published": PUBLISHED,
    # The secondary write-up's, see docs/differences.md.
    "write-up": replace(
        PUBLISHED,
        layer_map="depth",
        hidden_size=512,
        activation="relu",
        dropout=0.1,
        reads="sharer",
        lr=1e-3,
        batch=32,
    ),
    # The shipped pair's: every receiver layer reads the sharer's last layer, because the earlier
    # ones have not looked up the fact yet, and a fuser that reads them memorises.
    "tiny": replace(
        PUBLISHED,
        layer_map=[3, 3, 3],
        hidden_size=64,
        dropout=0.0,
        gate_init=4.0,
        zero_output=True,
        anneal_steps=500,
        lr=3e-3,
        schedule="cosine",
        lr_end=0.05,
        warm_up=0.04,
        weight_decay=0.1,
        batch=192,
        micro_batch=192,
        max_steps=500,
        seed=0,
        max_tokens=64,
        dtype="fp32",
        device="cpu",
        log_steps=25,
        save_steps=250,
    ),
}

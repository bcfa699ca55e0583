"""`c2c train`: two models and a file of conversations in, a fuser directory out."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import FuserConfig
from ..facts import MODEL_CONFIG_NAME, ModelFacts, read_model
from ..messages import shown_name
from ..model_card import HUB_ID
from . import dry_run
from .checkpoint import checkpoints
from .recipes import Recipe, load_recipe, parse_value
from .run import LOG_NAME, RECIPE_NAME, SIDES, is_first, load_setup, run_once
from .sweep import check_grid, run_sweep


def run_train(
    *,
    receiver: str,
    sharer: str,
    data: str,
    output: str,
    config: str = "published",
    changes: Sequence[str] = (),
    eval_data: str | None = None,
    bad_data: str | None = None,
    prompt_caches: str | None = None,
    resume: bool = False,
    dry: bool = False,
    sweep: Sequence[str] | None = None,
) -> int:
    """Trains a fuser and saves it in ``output``; returns the exit status (1: the loss diverged).

    Args:
        receiver, sharer: model directories, or names of models on the Hub.
        data, eval_data: files of conversations, or names of datasets (`read_conversations`).
        output: of the fuser, its checkpoints and the log.
        config: a recipe's name or a YAML file.
        changes: ``key=value`` of the recipe's fields.
        bad_data: the recipe's field of that name.
        prompt_caches: a directory of what both models prefill; written if it is not there.
        resume: go on from the last checkpoint in ``output``.
        dry: only say what it would take.
        sweep: ``key=[value, ...]``: train once for every combination and compare.

    Raises:
        ValueError, TypeError, OSError: bad input; says what and where.
    """
    recipe = load_recipe(config).changed(_parsed(changes, "--set"), "--set")
    if bad_data is not None:
        recipe = recipe.changed({"bad_data": bad_data}, "--bad-data")
    grid = None if sweep is None else check_grid(_parsed(sweep, "--sweep"), recipe)
    if resume and sweep is not None:
        raise ValueError("--resume goes on with one run, not with a --sweep")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.micro_batches(processes)
    facts = {side: _facts(place) for side, place in zip(SIDES, (receiver, sharer), strict=True)}
    for side, model in facts.items():
        if model.kv is None:
            raise ValueError(f"--{side}: {model.unsupported[0].removeprefix('c2c_ext: ')}")
    fuser_config = recipe.fuser_config(facts["receiver"].config, facts["sharer"].config)
    if dry:
        _print_plan(recipe, fuser_config, facts, data, processes)
        return 0
    _check_trainable(recipe, output, resume)
    try:
        setup = load_setup(recipe, receiver, sharer, data, eval_data, prompt_caches)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if grid is not None:
        return run_sweep(setup, recipe, grid, Path(output), run_once)
    from .trainer import NonFiniteError

    try:
        result = run_once(setup, recipe, Path(output), resume=resume)
    except NonFiniteError as error:
        if is_first():
            print(f"c2c train: {error}", file=sys.stderr)
        return 1
    if is_first():
        loss = result["eval_loss"] if result["eval_loss"] is not None else result["train_loss"]
        kind = "evaluation" if result["eval_loss"] is not None else "training"
        print(
            f"{result['steps']} steps in {result['seconds']:.0f} s, {kind} loss {loss:.4f}, "
            f"{result['open_streams']} of {result['streams']} streams open; the fuser is in "
            f"{output}:\n"
            f"  c2c_ext.attach(receiver, sharer, c2c_ext.Fuser.from_pretrained({output!r}))"
        )
    return 0


def _print_plan(
    recipe: Recipe,
    config: FuserConfig,
    facts: Mapping[str, ModelFacts],
    data: str,
    processes: int,
) -> None:
    samples = None
    if Path(data).is_file():
        with open(data, "rb") as file:
            samples = sum(bool(line.strip()) for line in file)
    ceilings = dry_run.measured_ceilings(recipe)
    planned = dry_run.plan(
        recipe, config, **facts, samples=samples, processes=processes, ceilings=ceilings
    )
    print("\n".join(dry_run.lines(planned, recipe.dtype)))


def _facts(place: str) -> ModelFacts:
    """A model's configuration, from a directory or from the Hub: one small file."""
    if Path(place).exists():
        return read_model(place)
    if not HUB_ID.fullmatch(place):
        raise FileNotFoundError(f"no model at {place}")
    from huggingface_hub import hf_hub_download

    try:
        return read_model(Path(hf_hub_download(place, MODEL_CONFIG_NAME)))
    except Exception as error:  # of the Hub's library, of many kinds
        text = shown_name(" ".join(str(error).split()), 300)
        raise ValueError(
            f"{place} is no directory, and not to be had from the Hub: {text}"
        ) from error


def _check_trainable(recipe: Recipe, output: str, resume: bool) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ValueError(
            "training needs the accelerate library: pip install 'c2c_ext[train]'"
        ) from None
    for name in ("tensorboard", "wandb"):
        if name in recipe.report_to and find_spec(name) is None:
            raise ValueError(f"recipe: report_to {name} needs the {name} package, not installed")
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--output: {path} must be a directory, it is a file")
    held = [n for n in (RECIPE_NAME, LOG_NAME) if (path / n).exists()]
    held += [p.name for p in checkpoints(path)]
    if held and not resume:
        raise FileExistsError(
            f"--output: {path} holds a training run ({held[0]}); --resume goes on with it"
        )


def _parsed(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """``key=value`` each, the value as YAML."""
    parsed = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"{option}: must be KEY=VALUE, got {pair!r}")
        try:
            parsed[key] = parse_value(text)
        except ValueError as error:
            raise ValueError(f"{option}: {key}: {error}") from error
    return parsed

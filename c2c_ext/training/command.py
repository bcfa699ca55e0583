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
from ..messages import shown, shown_name
from ..model_card import HUB_ID
from ..serialization import CONFIG_NAME, WEIGHTS_NAME
from . import dry_run
from .data import is_file_place
from .places import check_prompt_caches, check_writable
from .recipes import Recipe, load_recipe, parse_value
from .run import SIDES, Setup, check_no_run, is_first, leave_processes, load_setup, run_once
from .sweep import DATA_NAME, TABLE_NAME, check_grid, load_variants, run_sweep

SWEEP_NAMES = (TABLE_NAME, DATA_NAME)


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
        sweep: ``key=[value, ...]``: train once for every combination and compare; or a YAML file
            of named variants (`load_variants`).

    Raises:
        ValueError, TypeError, OSError: bad input; says what and where.
    """
    recipe = load_recipe(config).changed(_parsed(changes, "--set"), "--set")
    if bad_data is not None:
        recipe = recipe.changed({"bad_data": bad_data}, "--bad-data")
    grid, names = None, None
    if sweep is not None and len(sweep) == 1 and "=" not in sweep[0]:
        if not Path(sweep[0]).is_file():
            raise FileNotFoundError(
                f"--sweep: {shown(sweep[0])} is no KEY=[VALUE, ...] and no file"
            )
        variants = load_variants(Path(sweep[0]), recipe)
        grid, names = list(variants.values()), list(variants)
    elif sweep is not None:
        grid = check_grid(_parsed(sweep, "--sweep"), recipe)
    if resume and sweep is not None:
        raise ValueError("--resume goes on with one run, not with a --sweep")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.micro_batches(processes)
    places = zip(SIDES, (receiver, sharer), strict=True)
    facts = {side: _facts(side, place) for side, place in places}
    for side, model in facts.items():
        if model.kv is None:
            raise ValueError(f"--{side}: {model.unsupported[0].removeprefix('c2c_ext: ')}")
    configs = [facts[side].config for side in SIDES]
    fuser_config = recipe.fuser_config(*configs)
    for changes in grid or ():  # before the first of the runs
        own = recipe.changed(changes, "--sweep")
        try:
            own.micro_batches(processes)
            own.fuser_config(*configs)
        except ValueError as error:
            raise ValueError(f"--sweep: {error}") from error
    if dry:
        for option, place in (("--data", data), ("--eval-data", eval_data)):
            if place is not None and is_file_place(place) and not Path(place).is_file():
                raise FileNotFoundError(f"{option}: {place} is missing or not a regular file")
        _print_plan(recipe, fuser_config, facts, data, processes)
        return 0
    if recipe.shard_models and processes == 1:
        raise ValueError("recipe: shard_models needs several processes: start them by torchrun")
    _check_trainable(recipe, output, resume, sweep is not None)
    if prompt_caches is not None:
        check_prompt_caches(prompt_caches, SIDES, writes=is_first())
    try:
        setup = load_setup(recipe, receiver, sharer, data, eval_data, prompt_caches)
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        if grid is not None:
            return run_sweep(setup, recipe, grid, Path(output), run_once, names)
        return _run(setup, recipe, output, resume)
    finally:
        leave_processes()


def _run(setup: Setup, recipe: Recipe, output: str, resume: bool) -> int:
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
        measured = "" if loss is None else f"{kind} loss {loss:.4f}, "
        print(
            f"{result['steps']} steps in {result['seconds']:.0f} s, {measured}"
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
    else:
        print(
            f"--data: {data} is no file: the rows of a dataset of the Hub are not counted here",
            file=sys.stderr,
        )
    ceilings = dry_run.measured_ceilings(recipe)
    planned = dry_run.plan(
        recipe, config, **facts, samples=samples, processes=processes, ceilings=ceilings
    )
    print("\n".join(dry_run.lines(planned, recipe.dtype)))


def _facts(side: str, place: str) -> ModelFacts:
    """A model's configuration, from a directory or from the Hub: one small file."""
    if Path(place).exists():
        return read_model(place)
    if not HUB_ID.fullmatch(place):
        raise FileNotFoundError(f"--{side}: no model at {place}")
    from huggingface_hub import hf_hub_download

    try:
        return read_model(Path(hf_hub_download(place, MODEL_CONFIG_NAME)))
    except Exception as error:  # of the Hub's library, of many kinds
        text = shown_name(" ".join(str(error).split()), 300)
        raise ValueError(
            f"--{side}: {place} is no directory, and not to be had from the Hub: {text}"
        ) from error


def _check_trainable(recipe: Recipe, output: str, resume: bool, is_sweep: bool) -> None:
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
    if is_first():
        check_writable("--output", path)
    held = check_no_run(path, resume)
    others = (*SWEEP_NAMES, CONFIG_NAME, WEIGHTS_NAME)
    if not held and (found := next((n for n in others if (path / n).exists()), None)):
        what = "a sweep" if found in SWEEP_NAMES else "a fuser that no run here has trained"
        raise FileExistsError(
            f"--output: {path} holds {what} ({found}), which stays; choose another directory"
        )
    if is_sweep and (runs := sorted(path.glob("run-*"))):
        raise FileExistsError(
            f"--output: {path} holds runs of a sweep ({runs[0].name}), which stay; choose another "
            "directory"
        )


def _parsed(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """``key=value`` each, the value as YAML."""
    parsed = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ValueError(f"{option}: must be KEY=VALUE, got {pair!r}")
        if key in parsed:
            raise ValueError(f"{option}: {shown_name(key)} is given twice")
        try:
            parsed[key] = parse_value(text)
        except ValueError as error:
            raise ValueError(f"{option}: {key}: {error}") from error
    return parsed

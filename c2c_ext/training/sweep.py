"""`c2c train --sweep`: the same training with other settings each time, compared: for every
combination of a few, or for the named variants of a file."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..messages import shown, shown_name
from .recipes import Recipe, read_mapping

# Settings that differ between runs on the same loaded models and data.
SWEPT = (
    *("lr", "schedule", "warm_up", "weight_decay", "clip", "batch", "max_steps", "seed"),
    *("layer_map", "hidden_size", "intermediate_size", "depth", "activation", "dropout"),
    *("gate_init", "gate_sampler", "anneal_steps", "zero_output"),
    *("projection", "reads", "integration", "kinds", "weighting", "gate"),
)
MAX_RUNS = 64
TABLE_NAME, DATA_NAME = "sweep.md", "sweep.json"


def check_grid(grid: Mapping[str, Any], recipe: Recipe) -> list[dict[str, Any]]:
    """Every combination of ``key -> list of values``, each checked as a recipe.

    Raises:
        ValueError: a key that cannot be swept, no list, too many runs, or a value out of range.
    """
    if not grid:
        raise ValueError("--sweep: needs at least one KEY=[VALUE, ...]")
    for key, values in grid.items():
        _check_swept([key], "--sweep")
        if not isinstance(values, list) or not values:
            raise ValueError(f"--sweep: {key} must be a list of values, got {shown(values)}")
    runs = math.prod(len(values) for values in grid.values())
    if runs > MAX_RUNS:
        raise ValueError(f"--sweep: must be at most {MAX_RUNS} runs, these are {runs}")
    names, columns = list(grid), list(grid.values())
    combinations = [dict(zip(names, row, strict=True)) for row in itertools.product(*columns)]
    for combination in combinations:
        recipe.changed(combination, "--sweep")
    return combinations


def load_variants(path: Path, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The named variants of ``recipe`` in a YAML file, each ``name: {key: value, ...}``.

    Raises:
        ValueError: the file, a name, a key or a value is not in order; names the file and variant.
        OSError: the file cannot be read.
    """
    variants = read_mapping(path)
    if not 1 <= len(variants) <= MAX_RUNS:
        raise ValueError(f"{path}: must hold 1 to {MAX_RUNS} variants, these are {len(variants)}")
    for name, changes in variants.items():
        if not isinstance(name, str) or not name.isprintable() or not name.strip():
            raise ValueError(f"{path}: a variant must have a printable name, got {shown(name)}")
        if not isinstance(changes, dict):
            raise ValueError(
                f"{path}: {shown_name(name)} must be a mapping of settings, got {shown(changes)}"
            )
        _check_swept(changes, f"{path}: {shown_name(name)}")
        recipe.changed(changes, f"{path}: {shown_name(name)}")
    return variants


def _check_swept(keys: Iterable[Any], where: str) -> None:
    for key in keys:
        if key not in SWEPT:
            raise ValueError(
                f"{where}: {shown(key)} cannot be swept; what can is {', '.join(SWEPT)}"
            )


def run_sweep(
    setup: Any,
    recipe: Recipe,
    combinations: Sequence[dict[str, Any]],
    output: Path,
    run: Callable[..., dict[str, Any]],
    names: Sequence[str] | None = None,
) -> int:
    """Trains once per combination in ``output/run-00`` and so on; prints and saves a table.

    Args:
        setup, recipe: what all runs share.
        run: ``run(setup, recipe, directory)`` gives a result (`command.run_once`).
        names: of the combinations, in the table; None: their settings are.

    Returns:
        the exit status: 1 if no run came to its end.
    """
    from .trainer import NonFiniteError

    rows = []
    for number, changes in enumerate(combinations):
        directory = output / f"run-{number:02d}"
        own = recipe.changed(changes, "--sweep")
        try:
            result = run(setup, own, directory)
        except NonFiniteError as error:
            result = {"diverged_in_step": error.step}
        named = {} if names is None else {"name": names[number]}
        rows.append({"run": directory.name, **named, "settings": changes, **result})
    rows.sort(key=_order)
    text = table(rows)
    if os.environ.get("RANK", "0") == "0":
        data = json.dumps({"recipe": recipe.to_dict(), "runs": rows}, indent=1) + "\n"
        write_atomically(
            {
                output / TABLE_NAME: lambda path: Path(path).write_text(text + "\n", "utf-8"),
                output / DATA_NAME: lambda path: Path(path).write_text(data, "utf-8"),
            }
        )
        print(text)
    return 0 if any("diverged_in_step" not in row for row in rows) else 1


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, best first."""
    named = "name" in rows[0]
    names = ["name"] if named else list(rows[0]["settings"])
    heads = ["run", *names, "evaluation loss", "training loss", "open streams", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        said = row if named else row["settings"]
        cells = [row["run"], *(_cell(said[name]) for name in names)]
        if "diverged_in_step" in row:
            cells += [f"diverged in step {row['diverged_in_step']}", "", "", ""]
        else:
            cells += [_cell(row["eval_loss"]), _cell(row["train_loss"])]
            cells += [f"{row['open_streams']} of {row['streams']}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _order(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    loss = row.get("eval_loss")
    loss = row.get("train_loss") if loss is None else loss
    return loss is None, math.inf if loss is None else loss, row["run"]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

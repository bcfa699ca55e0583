"""`c2c train --sweep`: the same training for every combination of a few settings, compared."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..messages import shown
from .recipes import Recipe

# Settings that differ between runs on the same loaded models and data.
SWEPT = (
    *("lr", "schedule", "warm_up", "weight_decay", "clip", "batch", "max_steps", "seed"),
    *("layer_map", "hidden_size", "intermediate_size", "depth", "activation", "dropout"),
    *("gate_init", "gate_sampler", "anneal_steps", "zero_output"),
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
        if key not in SWEPT:
            raise ValueError(
                f"--sweep: {shown(key)} cannot be swept; what can is {', '.join(SWEPT)}"
            )
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


def run_sweep(
    setup: Any,
    recipe: Recipe,
    combinations: Sequence[dict[str, Any]],
    output: Path,
    run: Callable[..., dict[str, Any]],
) -> int:
    """Trains once per combination in ``output/run-00`` and so on; prints and saves a table.

    Args:
        setup, recipe: what all runs share.
        run: ``run(setup, recipe, directory)`` gives a result (`command.run_once`).

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
        rows.append({"run": directory.name, "settings": changes, **result})
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
    names = list(rows[0]["settings"])
    heads = ["run", *names, "evaluation loss", "training loss", "open streams", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["run"], *(_cell(row["settings"][name]) for name in names)]
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

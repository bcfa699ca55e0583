"""What `c2c analyze` prints: rows as tables, out of the data that its file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .retention import MEAN

Row = Mapping[str, Any]
SMALLEST = "<1e-300"  # a p that no float64 holds


def shown(what: str, data: Mapping[str, Any]) -> str:
    """The tables of an analysis.

    Args:
        what: a key of `ANALYSES`.
        data: with ``rows`` and what else its file holds.
    """
    if what == "attention":
        return _attention(data)
    if what == "solved":
        line = "no verdict: a mismatched cache needs another question"
        if data["verdict"] is not None:
            line = data["verdict"]["line"]
        modes = [row | ({"p": SMALLEST} if row["p"] == 0 else {}) for row in data["modes"]]
        return "\n\n".join([table(modes), line, table(data["patterns"])])
    return table(data["rows"])


def table(rows: Sequence[Row]) -> str:
    """Rows as a table for people, one line each, with a head; all rows have the same names."""
    if not rows:
        return "none"
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(n) for c, n in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def set_of_modes(modes: Sequence[str]) -> str:
    """A pattern's modes in words."""
    return " ".join(modes) or "none"


def _attention(data: Mapping[str, Any]) -> str:
    """Cosines per layer; per condition and per layer what they tell; what comparing them tells."""
    conditions = [
        {
            **{key: row[key] for key in ("condition", "cosine", "kept")},
            "AUC kept": _interval(row, "kept_auc", "kept"),
            "right": row["right"],
            "AUC right": _interval(row, "right_auc", "right"),
        }
        for row in data["conditions"]
    ]
    layers = [
        {
            "layer": row["layer"],
            "AUC kept": _interval(row, "kept_auc", "kept"),
            "AUC right": _interval(row, "right_auc", "right"),
        }
        for row in data["layers"]
        if row["condition"] == data["conditions"][0]["condition"]
    ]
    across = [
        {
            "conditions": f"{row['conditions']} ({row['count']})",
            "outcome": row["outcome"],
            "questions": row["questions"],
            "spearman": _interval(row, "spearman", "spearman"),
            "within": _interval(row, "within", "within"),
        }
        for row in data["across"]
        if row["layer"] == MEAN
    ]
    return "\n\n".join(map(table, (data["rows"], conditions, layers, across)))


def _interval(row: Row, value: str, prefix: str) -> str:
    if row[value] is None:
        return "-"
    low, high = (row[f"{prefix}_{end}"] for end in ("low", "high"))
    if low is None:
        return f"{row[value]:.3f}"
    return f"{row[value]:.3f} ({low:.3f} to {high:.3f})"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return set_of_modes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

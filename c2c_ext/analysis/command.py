"""`c2c analyze`: models and questions loaded, one analysis run, its rows printed and written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..chat.models import ChatModels, load_models
from ..chat.text import printable
from ..files import checked_target
from ..machine import environment
from ..measure import document, write_json, write_text
from . import solved
from .arguments import ANALYSES
from .attention_outputs import attention_rows
from .chart import Panel, bar_chart, line_chart, weight_map
from .curves import layer_rows, position_rows
from .effective_rank import rank_rows
from .questions import Questions, file_questions, shipped_questions
from .weight_maps import weight_rows

Row = dict[str, Any]


def run_analyze(
    what: str,
    *,
    receiver: str | None = None,
    sharer: str | None = None,
    fuser: str | None = None,
    questions: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    json_path: str | None = None,
    svg_path: str | None = None,
) -> int:
    """Prints one analysis as a table; returns the exit status.

    Args:
        what: a key of `ANALYSES`.
        receiver, sharer, fuser, dtype, device: see `load_models`; none: the shipped pair.
        questions: see `file_questions`; needed with models of one's own, and only with them.
        limit: questions at most, see `sample`; of the shipped pair's two kinds, of each.
        json_path: also write rows, arguments and environment to this file.
        svg_path: also draw them to this file.

    Raises:
        ValueError, OSError: an option or a file breaks a rule; names it. Nothing is written.
    """
    if what not in ANALYSES:
        raise ValueError(f"must be one of {', '.join(ANALYSES)}, got {what!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    own = any(place is not None for place in (receiver, sharer, fuser))
    if own and questions is None:
        raise ValueError("--questions: models of your own need a file of questions")
    if not own and questions is not None:
        raise ValueError(
            "--questions goes with models of your own: the shipped pair has its own questions"
        )
    targets = {
        option: checked_target(option, place)
        for option, place in (("--json", json_path), ("--svg", svg_path))
        if place is not None
    }
    if len(set(targets.values())) < len(targets):
        raise ValueError("--json and --svg must be different files")
    models = _loaded(receiver, sharer, fuser, dtype, device)
    asked = (
        shipped_questions(models, limit)
        if questions is None
        else file_questions(models, questions, limit)
    )
    rows, more = _rows(what, models, asked)
    count = sum(len(reading.last) for reading in asked.readings)
    print(table(more.get("patterns", rows)))
    print(f"\n{ANALYSES[what]}; {count} questions: {printable(asked.source)}")
    where = environment()
    if "--json" in targets:
        arguments = {
            "what": what,
            **{name: models.names[name] for name in ("receiver", "sharer", "fuser")},
            "questions": asked.source,
            "limit": limit,
        }
        data = document("analyze", arguments, where, None, rows, [], complete=True)
        write_json(targets["--json"], {**data, **more})
    if "--svg" in targets:
        commit = (where["commit"] or "no commit")[:10] + ("-dirty" if where["dirty"] else "")
        note = f"{count} questions, torch {where['torch']}, {where['date'][:10]}, {commit}"
        title = f"{ANALYSES[what]}: {models.names['fuser']}"
        write_text(targets["--svg"], DRAW[what](title, note, more.get("patterns", rows)))
    return 0


def _rows(what: str, models: ChatModels, asked: Questions) -> tuple[list[Row], dict[str, Any]]:
    """The rows of an analysis, and what else its file holds."""
    receiver, fuser, readings = models.receiver, models.fuser, asked.readings
    if what == "rank":
        return rank_rows(readings, fuser), {}
    if what == "weights":
        return weight_rows(readings, fuser), {}
    if what == "layers":
        return layer_rows(receiver, fuser, readings), {}
    if what == "positions":
        return position_rows(receiver, fuser, readings), {}
    if what == "attention":
        return attention_rows(receiver, fuser, readings), {}
    right = asked.solve()
    names = [name for reading in readings for name in reading.names]
    rows = [
        {"question": name, "solved_by": [mode for mode in right if bool(right[mode][i])]}
        for i, name in enumerate(names)
    ]
    totals = {mode: int(answers.sum()) for mode, answers in right.items()}
    return rows, {
        "right": totals,
        "patterns": solved.patterns(right),
        "pairs": solved.pairs(right),
    }


def _loaded(
    receiver: str | None, sharer: str | None, fuser: str | None, dtype: str, device: str
) -> ChatModels:
    """The models; transformers warns of nothing meanwhile."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return load_models(receiver, sharer, fuser, dtype=dtype, device=device)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def table(rows: Sequence[Row]) -> str:
    """Rows as a table for people, one line each, with a head; all rows have the same names."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(n) for c, n in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw_rank(title: str, note: str, rows: Sequence[Row]) -> str:
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    panels = [
        Panel(
            f"effective rank of {kind}s",
            "layer",
            {c: [(r["layer"], r[kind]) for r in rows if r["cache"] == c] for c in caches},
            low=0.0,
        )
        for kind in ("key", "value")
    ]
    return line_chart(title, note, panels)


def _draw_weights(title: str, note: str, rows: Sequence[Row]) -> str:
    streams: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        label = f"layer {row['layer']}, {row['kind']}"
        streams.setdefault(label, []).append((row["mean"], row["open"]))
    return weight_map(title, note, list(streams.items()))


def _draw_curve(x: str, label: str) -> Callable[[str, str, Sequence[Row]], str]:
    def draw(title: str, note: str, rows: Sequence[Row]) -> str:
        kinds = list(dict.fromkeys(row["which"] for row in rows))

        def lines(value: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
            return {k: [(r[x], value(r)) for r in rows if r["which"] == k] for k in kinds}

        panels = [
            Panel("fraction right", label, lines(lambda r: r["right"] / r["questions"]), 0.0, 1.0),
            Panel("KL to the whole fusion, nats", label, lines(lambda r: r["kl"]), 0.0),
        ]
        return line_chart(title, note, panels)

    return draw


def _draw_attention(title: str, note: str, rows: Sequence[Row]) -> str:
    lines = {name: [(r["layer"], r[name]) for r in rows] for name in ("min", "mean", "max")}
    return line_chart(title, note, [Panel("cosine, fused and plain", "layer", lines, -1.0, 1.0)])


def _draw_solved(title: str, note: str, rows: Sequence[Row]) -> str:
    return bar_chart(title, note, [(_cell(r["solved_by"]), r["questions"]) for r in rows])


DRAW: dict[str, Callable[[str, str, Sequence[Row]], str]] = {
    "rank": _draw_rank,
    "weights": _draw_weights,
    "layers": _draw_curve("layers", "layers fused from this end (only: the one layer)"),
    "positions": _draw_curve("part", "part of the positions fused, from this end"),
    "attention": _draw_attention,
    "solved": _draw_solved,
}

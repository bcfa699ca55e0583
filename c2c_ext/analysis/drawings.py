"""The drawing of every analysis, out of the data that its file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .chart import Panel, bar_chart, line_chart, weight_map
from .tables import Row, set_of_modes

Data = Mapping[str, Any]


def drawn(what: str, title: str, note: str, data: Data) -> str:
    """SVG of an analysis; arguments as for `tables.shown`."""
    return _DRAW[what](title, note, data)


def _rank(title: str, note: str, data: Data) -> str:
    rows = data["rows"]
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


def _weights(title: str, note: str, data: Data) -> str:
    streams: dict[str, list[tuple[float, bool]]] = {}
    for row in data["rows"]:
        label = f"layer {row['layer']}, {row['kind']}"
        streams.setdefault(label, []).append((row["mean"], row["open"]))
    return weight_map(title, note, list(streams.items()))


def _curve(x: str, label: str) -> Callable[[str, str, Data], str]:
    def draw(title: str, note: str, data: Data) -> str:
        rows = data["rows"]
        kinds = list(dict.fromkeys(row["which"] for row in rows))
        known = all(row["right"] is not None for row in rows)

        def lines(value: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
            return {k: [(r[x], value(r)) for r in rows if r["which"] == k] for k in kinds}

        panels = [Panel("KL to the whole fusion, nats", label, lines(lambda r: r["kl"]), 0.0)]
        if known:
            right = lines(lambda r: r["right"] / r["questions"])
            panels.insert(0, Panel("fraction right", label, right, 0.0, 1.0))
        return line_chart(title, note, panels)

    return draw


def _attention(title: str, note: str, data: Data) -> str:
    by_layer = {name: [(r["layer"], r[name]) for r in data["rows"]] for name in ("mean",)}
    spread = {name: [(r["layer"], r[name]) for r in data["rows"]] for name in ("min", "max")}
    rates = {
        f"answers {name}": [
            (row["cosine"], row[name] / row["questions"]) for row in data["conditions"]
        ]
        for name in ("kept", "right")
    }
    whole = data["conditions"][0]["condition"]
    told = {
        f"answers {name}": [
            (row["layer"], *(row[f"{name}_{part}"] for part in ("auc", "low", "high")))
            for row in data["layers"]
            if row["condition"] == whole and row[f"{name}_auc"] is not None
        ]
        for name in ("kept", "right")
    }
    values = {name: [(layer, auc) for layer, auc, *_ in points] for name, points in told.items()}
    ends = {
        name: [(layer, low, high) for layer, _, low, high in points]
        for name, points in told.items()
    }
    return line_chart(
        title,
        note,
        [
            Panel("cosine, fused and plain", "layer", spread | by_layer, -1.0, 1.0),
            Panel("a point per condition", "mean cosine", rates, 0.0, 1.0, joined=False),
            Panel("AUC of a layer's cosine, all fused", "layer", values, 0.0, 1.0, intervals=ends),
        ],
    )


def _solved(title: str, note: str, data: Data) -> str:
    bars = [(f"right: {row['mode']}", row["right"]) for row in data["modes"]]
    bars += [(_only(row["solved_by"]), row["questions"]) for row in data["patterns"]]
    return bar_chart(title, note, bars)


def _only(modes: Sequence[str]) -> str:
    return f"exactly: {set_of_modes(modes)}"


_DRAW: dict[str, Callable[[str, str, Data], str]] = {
    "rank": _rank,
    "weights": _weights,
    "layers": _curve("layers", "first, last: layers fused from this end; only, without: the layer"),
    "positions": _curve("part", "first, last: part fused; only, without: the range up to it"),
    "attention": _attention,
    "solved": _solved,
}

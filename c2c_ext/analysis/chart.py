"""Drawings of the analyses as SVG: lines on linear axes, bars, and a map of weights."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..chat.heat_map import FONT, weight_colour
from ..chat.text import printable

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#222222")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 300, 64, 16, 46, 46
BAR, CELL, LABELS = 22, 30, 220
INK, GREY = "#1a1a1a", "#888888"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot: a title, what the axes say, and lines by name."""

    title: str
    x: str
    lines: Mapping[str, Points]
    low: float | None = None  # of the y axis; None: from the points
    high: float | None = None
    joined: bool = True  # the points of a line
    # By line (x, low, high), inside of the y axis.
    intervals: Mapping[str, Sequence[tuple[float, float, float]]] = field(default_factory=dict)


def line_chart(title: str, note: str, panels: Sequence[Panel]) -> str:
    """SVG of panels side by side, with one legend."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width, body = WIDTH * len(panels), []
    for i, panel in enumerate(panels):
        body += [f"<g transform='translate({i * WIDTH} 20)'>", *_panel(panel, colours), "</g>"]
    for i, name in enumerate(names):
        x, y = LEFT + i * 150, HEIGHT + 34
        body.append(_line([(x, y - 4), (x + 22, y - 4)], colours[name], 2))
        body.append(_text(x + 28, y, name))
    width = max(width, LEFT + 150 * len(names))
    return _document(title, note, width, HEIGHT + 66, body)


def bar_chart(title: str, note: str, bars: Sequence[tuple[str, int]]) -> str:
    """SVG of one horizontal bar per (label, count)."""
    most = max((count for _, count in bars), default=0) or 1
    room, body = WIDTH, []
    longest = max((len(label) for label, _ in bars), default=0)
    left = max(LABELS, 16 + round(6.1 * longest))
    for i, (label, count) in enumerate(bars):
        y = 40 + i * BAR
        body.append(_text(left - 8, y + 14, label, "end"))
        width = count / most * room
        body.append(
            f"<rect x='{left}' y='{y}' width='{width:.1f}' height='{BAR - 6}' fill='{COLOURS[0]}'/>"
        )
        body.append(_text(left + width + 6, y + 14, str(count)))
    return _document(title, note, left + room + 60, 70 + BAR * len(bars), body)


def weight_map(
    title: str, note: str, rows: Sequence[tuple[str, Sequence[tuple[float, bool]]]]
) -> str:
    """SVG of a row per stream, a cell per head: (mean weight in 0..1, whether the gate is open)."""
    heads = max((len(cells) for _, cells in rows), default=0)
    body = [
        "<defs><pattern id='closed' width='6' height='6' patternUnits='userSpaceOnUse'>"
        "<rect width='6' height='6' fill='#f3f3f3'/>"
        "<path d='M0 6 6 0' stroke='#b0b0b0' stroke-width='1'/></pattern></defs>"
    ]
    body += [_text(LABELS + (h + 0.5) * CELL, 44, str(h), "middle", 10) for h in range(heads)]
    body.append(_text(LABELS - 8, 44, "receiver head", "end", 10))
    for i, (label, cells) in enumerate(rows):
        y = 50 + i * BAR
        body.append(_text(LABELS - 8, y + 15, label, "end"))
        for h, (weight, is_open) in enumerate(cells):
            fill = weight_colour(weight) if is_open else "url(#closed)"
            said = f"{label}, head {h}: {weight:.3f}" + ("" if is_open else ", gate closed")
            body.append(
                f"<rect x='{LABELS + h * CELL}' y='{y}' width='{CELL - 1}' height='{BAR - 1}' "
                f"fill='{fill}' stroke='#d8dee6' stroke-width='0.5'>"
                f"<title>{html.escape(printable(said))}</title></rect>"
            )
            ink = "#ffffff" if is_open and weight > 0.5 else INK
            x = LABELS + (h + 0.5) * CELL - 0.5
            body.append(_text(x, y + 14, f"{weight:.2f}", "middle", 10, ink))
    y = 50 + BAR * len(rows) + 18
    body.append(_text(LABELS, y, "mean dynamic weight (0 to 1); hatched: gate closed", size=10))
    width = max(LABELS + heads * CELL + 20, WIDTH + LABELS)
    return _document(title, note, width, y + 34, body)


def _panel(panel: Panel, colours: Mapping[str, str]) -> list[str]:
    points = [p for line in panel.lines.values() for p in line if all(map(math.isfinite, p))]
    out = [_text(LEFT, TOP - 10, panel.title)]
    if not points:
        return [*out, _text(WIDTH / 2, HEIGHT / 2, "nothing to draw", "middle")]
    xs = sorted({x for x, _ in points})
    low = min(y for _, y in points) if panel.low is None else panel.low
    high = max(y for _, y in points) if panel.high is None else panel.high
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        part = (x - xs[0]) / (xs[-1] - xs[0]) if xs[-1] > xs[0] else 0.5
        return (
            LEFT + 8 + part * (right - LEFT - 16),
            bottom - 6 - (y - low) / (high - low) * (bottom - TOP - 12),
        )

    for i in range(5):
        value = low + (high - low) * i / 4
        y = at(xs[0], value)[1]
        out.append(_line([(LEFT, y), (right, y)], "#dddddd"))
        out.append(_text(LEFT - 6, y + 4, f"{value:.3g}", "end"))
    step = -(-len(xs) // 12)
    ticks = xs[::step] if panel.joined else [xs[0] + (xs[-1] - xs[0]) * i / 4 for i in range(5)]
    labels = {f"{x:.3g}": x for x in ticks}
    out += [_text(at(x, low)[0], bottom + 16, label, "middle") for label, x in labels.items()]
    out.append(_text((LEFT + right) / 2, bottom + 34, panel.x, "middle"))
    frame = [(LEFT, TOP), (right, TOP), (right, bottom), (LEFT, bottom), (LEFT, TOP)]
    out.append(_line(frame, GREY))
    for name, line in panel.lines.items():
        drawn = [at(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)]
        if len(drawn) > 1 and panel.joined:
            out.append(_line(drawn, colours[name], 2))
        for x, low_end, high_end in panel.intervals.get(name, ()):
            out.append(_line([at(x, low_end), at(x, high_end)], colours[name]))
        out += [
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colours[name]}'/>" for x, y in drawn
        ]
    return out


def _document(title: str, note: str, width: float, height: float, body: Sequence[str]) -> str:
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}' {FONT} font-size='12' fill='{INK}'>",
        "<rect width='100%' height='100%' fill='#ffffff'/>",
        _text(width / 2, 18, title, "middle", 14),
        *body,
        _text(width - 8, height - 8, note, "end", 10),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _line(points: Points, colour: str, width: float = 1) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'/>"


def _text(
    x: float, y: float, what: str, anchor: str = "start", size: int = 12, fill: str = INK
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' "
        f"fill='{fill}'>{html.escape(printable(what))}</text>"
    )

"""Draws results as SVG, from the JSON alone: time and fraction of the ceiling against tokens.

usage: python benchmarks/plot.py RESULTS.json... [--output DIRECTORY]

Writes one file per panel pair, beside the JSON unless told otherwise:
fuse.json -> fuse_real_float32_all_b1.svg, and so on. Bars are the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from c2c_ext.measure import FORMAT_VERSION, write_text

COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee", "#bbbbbb", "#222222")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 300, 70, 40, 12, 44
# What tells one drawing from another; within it, lines are told apart by the rest.
DRAWING = {
    "fuse": ("shape", "dtype", "gates", "batch"),
    "kernels": ("shape", "dtype", "provider"),
    "generate": ("shape", "dtype"),
}
LINE = {"fuse": "provider", "kernels": "kernel", "generate": "provider"}

Row = dict[str, Any]


@dataclass
class Line:
    """One line of a panel: (x, y, low, high), where low and high may be y itself."""

    name: str
    points: list[tuple[float, float, float, float]] = field(default_factory=list)


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is none, or of another version.
    """
    data = json.loads(path.read_text("utf-8"))
    if not isinstance(data, dict) or data.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is no results file of format version {FORMAT_VERSION}")
    if data.get("benchmark") not in DRAWING:
        raise ValueError(f"{path}: benchmark must be one of {', '.join(DRAWING)}")
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no list of rows")
    return data


def drawings(data: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name without suffix, SVG) of every drawing of a results file."""
    kind = data["benchmark"]
    groups: dict[tuple, list[Row]] = {}
    for row in data["rows"]:
        groups.setdefault(tuple(row[name] for name in DRAWING[kind]), []).append(row)
    machine = data["environment"]
    commit = (machine["commit"] or "no commit")[:10] + ("-dirty" if machine["dirty"] else "")
    note = f"{machine['cpu']}, torch {machine['torch']}, {machine['date'][:10]}, {commit}"
    for key, rows in groups.items():
        if kind == "generate":
            panels = [
                ("ms to the first token", _lines(rows, LINE[kind], "first_token")),
                ("ms in all", _lines(rows, LINE[kind], "seconds")),
            ]
        else:
            panels = [
                ("ms", _lines(rows, LINE[kind], "seconds")),
                ("fraction of the ceiling", _lines(rows, LINE[kind], "fraction_of_ceiling")),
            ]
        parts = [
            f"b{v}" if n == "batch" else str(v) for n, v in zip(DRAWING[kind], key, strict=True)
        ]
        yield "_".join([kind, *parts]), figure(f"{kind}: {', '.join(parts)}", note, panels)


def _lines(rows: Sequence[Row], name: str, value: str) -> list[Line]:
    lines: dict[str, Line] = {}
    for row in rows:
        if value not in row:  # a kernel of which it is not known what it does at least
            continue
        y = row[value]
        of_time = isinstance(y, dict)  # seconds, drawn as milliseconds
        triple = [1e3 * y[k] for k in ("median", "p20", "p80")] if of_time else [y, y, y]
        lines.setdefault(row[name], Line(row[name])).points.append((row["tokens"], *triple))
    for line in lines.values():
        line.points.sort()
    return list(lines.values())


def figure(title: str, note: str, panels: Sequence[tuple[str, list[Line]]]) -> str:
    """An SVG of panels side by side, with one legend for all of them; both axes logarithmic."""
    names = list(dict.fromkeys(line.name for _, lines in panels for line in lines))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    dashes = {name: "" if i < len(COLOURS) else "5 3" for i, name in enumerate(names)}
    width = WIDTH * len(panels)
    legend_rows = -(-len(names) // 5)
    height = HEIGHT + 22 * legend_rows + 22
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(width / 2, 16, title, "middle", size=14),
    ]
    for i, (label, lines) in enumerate(panels):
        out.append(f'<g transform="translate({i * WIDTH} 0)">')
        out += _panel(label, lines, colours, dashes)
        out.append("</g>")
    for i, name in enumerate(names):
        x, y = LEFT + (i % 5) * (width - LEFT) / 5, HEIGHT + 14 + 22 * (i // 5)
        out.append(_stroke([(x, y - 4), (x + 22, y - 4)], colours[name], dashes[name]))
        out.append(_text(x + 28, y, name))
    out += [_text(width - 8, height - 8, note, "end", size=10), "</svg>"]
    return "\n".join(out) + "\n"


def _panel(
    label: str, lines: Sequence[Line], colours: dict[str, str], dashes: dict[str, str]
) -> list[str]:
    points = [p for line in lines for p in line.points if min(p) > 0]  # for logarithms
    out = [_text(LEFT, TOP - 6, label)]
    if not points:
        return [*out, _text(WIDTH / 2, HEIGHT / 2, "nothing measured", "middle")]
    xs = sorted({p[0] for p in points})
    x_axis = _Axis(xs[0], xs[-1], LEFT + 8, WIDTH - RIGHT - 8)
    low, high = min(p[2] for p in points), max(p[3] for p in points)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM - 6, TOP + 6)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for y in y_axis.ticks():
        at = y_axis(y)
        out.append(_stroke([(LEFT, at), (right, at)], "#dddddd"))
        out.append(_text(LEFT - 6, at + 4, f"{y:.3g}", "end"))
    for x in xs:
        out.append(_text(x_axis(x), bottom + 16, f"{x:g}", "middle"))
    out.append(_text((LEFT + right) / 2, bottom + 34, "tokens", "middle"))
    frame = (LEFT, TOP), (right, TOP), (right, bottom), (LEFT, bottom), (LEFT, TOP)
    out.append(_stroke(frame, "#888888"))
    for line in lines:
        colour, drawn = colours[line.name], [p for p in line.points if min(p) > 0]
        if len(drawn) > 1:
            corners = [(x_axis(x), y_axis(y)) for x, y, _, _ in drawn]
            out.append(_stroke(corners, colour, dashes[line.name], 2))
        for x, y, p20, p80 in drawn:
            at = x_axis(x)
            out.append(f'<circle cx="{at:.1f}" cy="{y_axis(y):.1f}" r="3" fill="{colour}"/>')
            if p80 > p20:
                out.append(_stroke([(at, y_axis(p20)), (at, y_axis(p80))], colour))
    return out


@dataclass
class _Axis:
    """A logarithmic axis from ``low`` at pixel ``start`` to ``high`` at pixel ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high <= self.low:
            return (self.start + self.end) / 2
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten in the range, with 2 and 5 between them where the range is short."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if self.high > 1e3 * self.low else (1, 2, 5)
        candidates = [step * 10.0**decade for decade in decades for step in steps]
        inside = [c for c in candidates if self.low <= c <= self.high]
        return inside or [self.low, self.high]


def _stroke(
    points: Sequence[tuple[float, float]], colour: str, dash: str = "", width: float = 1
) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'
    )


def _text(x: float, y: float, what: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(what)}</text>"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY")
    options = parser.parse_args(argv)
    if options.output is not None and not options.output.is_dir():
        parser.error(f"--output: there is no directory {options.output}")
    for path in options.results:
        try:
            drawn = list(drawings(load(path)))
        except (OSError, ValueError) as error:
            print(f"plot.py: {error}", file=sys.stderr)
            return 2
        except KeyError as error:
            print(f"plot.py: {path}: a row or the environment lacks {error}", file=sys.stderr)
            return 2
        for name, svg in drawn:
            target = (options.output or path.parent) / f"{name}.svg"
            write_text(target, svg)
            print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())

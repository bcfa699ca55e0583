"""The heat map of a fusion as SVG: receiver tokens, what they are fused with, and how strongly."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from torch import Tensor

from ..config import KINDS, FuserConfig
from .fused_prompt import FusedPrompt
from .text import printable

VIEWS = HEADS, MEAN = ("every head", "mean over heads")
MAX_TOKENS = 160  # columns that are drawn
FEW_ROWS = 48  # up to which every head has a row unless asked otherwise
LOW, HIGH = (237, 244, 251), (8, 48, 107)  # of the colour scale, at weight 0 and 1
FONT = "font-family='system-ui, sans-serif'"
MARGIN, LABELS, HEADER, GAP = 16, 118, 92, 26  # pixels
NAMES = {"key": "Keys", "value": "Values"}


def usual_view(config: FuserConfig) -> str:
    """Which of `VIEWS` suits a pair: every head where that gives few rows."""
    rows = sum(shape.num_heads for shape in config.receiver.layers)
    return HEADS if rows <= FEW_ROWS else MEAN


def heat_map(prompt: FusedPrompt, view: str) -> str:
    """SVG of the weights; what models and users have written is escaped.

    Args:
        view: one of `VIEWS`.
    """
    rows = list(_rows(prompt, view))
    tokens = len(prompt.receiver_tokens)
    shown = min(tokens, MAX_TOKENS)
    first = tokens - shown
    cell = max(7, min(44, 960 // max(1, shown)))
    height = 16 if len(rows) <= FEW_ROWS else 8
    grid = height * len(rows)
    width = 2 * MARGIN + LABELS + shown * cell
    total = MARGIN + (HEADER + grid + GAP) * len(KINDS) + 62
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' role='img' width='{max(width, 640)}' "
        f"height='{total}' {FONT} font-size='12' fill='#1a1a1a' "
        "aria-label='dynamic weights per layer, head and prompt token'>",
        "<defs><pattern id='closed' width='6' height='6' patternUnits='userSpaceOnUse'>"
        "<rect width='6' height='6' fill='#f3f3f3'/>"
        "<path d='M0 6 6 0' stroke='#b0b0b0' stroke-width='1'/></pattern>"
        f"<linearGradient id='scale'><stop offset='0' stop-color='{weight_colour(0)}'/>"
        f"<stop offset='1' stop-color='{weight_colour(1)}'/></linearGradient></defs>",
        "<rect width='100%' height='100%' fill='#ffffff'/>",
    ]
    y = MARGIN
    for kind in KINDS:
        parts += _panel(prompt, kind, rows, y, first, cell, height)
        y += HEADER + grid + GAP
    parts += [*_legend(MARGIN, y), "</svg>"]
    return "".join(parts)


def caption(prompt: FusedPrompt) -> str:
    """One sentence on how much of the prompt is fused, and of it shown."""
    tokens = len(prompt.receiver_tokens)
    fused = sum(place >= 0 for place in prompt.token_map)
    text = f"{fused} of {tokens} prompt tokens are fused (the last one never is)"
    return text + (f"; the last {MAX_TOKENS} are shown." if tokens > MAX_TOKENS else ".")


def _rows(prompt: FusedPrompt, view: str) -> Iterator[tuple[str, int, int | None]]:
    """(label, layer, head or None for their mean) of every row."""
    for i, layer in enumerate(prompt.layers):
        weights = layer.key if layer.key is not None else layer.value
        if view == MEAN or weights is None:
            yield f"layer {i}", i, None
        else:
            for head in range(weights.shape[1]):
                yield f"layer {i}, head {head}", i, head


def _panel(
    prompt: FusedPrompt,
    kind: str,
    rows: list[tuple[str, int, int | None]],
    top: int,
    first: int,
    cell: int,
    height: int,
) -> Iterator[str]:
    left, bottom = MARGIN + LABELS, top + HEADER
    yield f"<text x='{MARGIN}' y='{top + 13}' font-size='14' font-weight='600'>{NAMES[kind]}</text>"
    yield (
        f"<text x='{left - 8}' y='{bottom - 22}' text-anchor='end' fill='#555'>"
        "receiver token</text>"
        f"<text x='{left - 8}' y='{bottom - 8}' text-anchor='end' fill='#555'>sharer token</text>"
    )
    for column, place in enumerate(prompt.token_map[first:]):
        x = left + column * cell + cell / 2
        own, theirs = _token(prompt.receiver_tokens[first + column]), "-"
        if place >= 0:
            theirs = _token(prompt.sharer_tokens[place])
        weight = "600" if place >= 0 else "400"
        if cell >= 14:
            yield (
                f"<text transform='translate({x - 2} {bottom - 26}) rotate(-38)' "
                f"font-weight='{weight}'>{own}</text>"
                f"<text x='{x}' y='{bottom - 8}' text-anchor='middle' font-size='9' "
                f"fill='#555'>{_short(theirs, cell)}</text>"
            )
    for number, (label, layer, head) in enumerate(rows):
        y = bottom + number * height
        if height >= 12 or head in (0, None):
            yield (
                f"<text x='{left - 8}' y='{y + height - 4}' text-anchor='end' font-size='11'>"
                f"{label}</text>"
            )
        weights: Tensor | None = getattr(prompt.layers[layer], kind)
        is_open = getattr(prompt.layers[layer], f"{kind}_open")
        for column, place in enumerate(prompt.token_map[first:]):
            value = math.nan
            if weights is not None and place >= 0:
                of_heads = weights[0, :, first + column].float()
                value = float(of_heads.mean() if head is None else of_heads[head])
            said, fill = "not fused", "#ffffff"
            if not math.isnan(value):
                said, fill = f"{value:.3f}", weight_colour(value)
                if not is_open:
                    said, fill = f"{value:.3f}, but the gate is closed", "url(#closed)"
            own = _token(prompt.receiver_tokens[first + column])
            yield (
                f"<rect x='{left + column * cell}' y='{y}' width='{cell - 1}' "
                f"height='{height - 1}' fill='{fill}' stroke='#d8dee6' stroke-width='0.5'>"
                f"<title>{label}, {kind}, {own}: {said}</title></rect>"
            )


def _legend(x: int, y: int) -> list[str]:
    entries = [
        f"<text x='{x}' y='{y + 2}' fill='#555'>dynamic weight (sigmoid, no unit)</text>",
        f"<rect x='{x}' y='{y + 10}' width='200' height='12' fill='url(#scale)' stroke='#999' "
        "stroke-width='0.5'/>",
    ]
    for i in range(5):
        at = x + 50 * i
        anchor = ("start", "middle", "middle", "middle", "end")[i]
        entries.append(
            f"<text x='{at}' y='{y + 36}' font-size='11' text-anchor='{anchor}'>{i / 4:g}</text>"
        )
    for dx, fill, text in (
        (236, "#ffffff", "token not fused"),
        (366, "url(#closed)", "gate closed: nothing is added"),
    ):
        entries.append(
            f"<rect x='{x + dx}' y='{y + 10}' width='18' height='12' fill='{fill}' stroke='#999' "
            f"stroke-width='0.5'/><text x='{x + dx + 24}' y='{y + 20}'>{text}</text>"
        )
    return entries


def weight_colour(weight: float) -> str:
    """The colour of a weight in 0..1, as ``#rrggbb``; what is outside is drawn as the next end."""
    mixed = (
        round(a + (b - a) * min(1.0, max(0.0, weight))) for a, b in zip(LOW, HIGH, strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _token(text: str) -> str:
    """A token's text, spaces and newlines made visible, cut and escaped."""
    seen = printable(text).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return html.escape(seen if len(seen) <= 14 else seen[:13] + "…")


def _short(escaped: str, cell: int) -> str:
    """What fits into a cell."""
    text = html.unescape(escaped)
    room = max(2, cell // 5)
    return html.escape(text if len(text) <= room else text[: room - 1] + "…")

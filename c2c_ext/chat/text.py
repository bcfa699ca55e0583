"""Text of models and strangers made fit for a terminal: no control characters, aligned columns."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

_PICTURES = 0x2400  # U+2400 .. U+241F show the control characters U+0000 .. U+001F
_SAFE = {"\n", "\t"}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def printable(text: str) -> str:
    """``text`` without anything that a terminal obeys.

    Newlines and tabs stay. Control characters, ESC among them, become their pictures, C1 controls,
    marks that reorder text, other invisible formatting and lone surrogates the replacement
    character. A piece of a stream may be given alone: every character is judged by itself.
    """
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character in _SAFE or character.isprintable() or character == "\u200d":  # joins emoji
        return character
    code = ord(character)
    if code < 0x20:
        return chr(_PICTURES + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    return " " if unicodedata.category(character) == "Zs" else _REPLACEMENT


def encodable(text: str, encoding: str | None) -> str:
    """``text`` with what an encoding lacks replaced by question marks."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def columns(rows: Sequence[Sequence[str]], width: int) -> str:
    """A table of texts that wrap within their columns.

    Args:
        rows: of as many texts each; control characters were removed.
        width: of the terminal, in cells.
    """
    gap, count = 2, len(rows[0])
    cells = max(12, (width - gap * (count - 1)) // count)
    lines = []
    for row in rows:
        for line in zip_longest(*(_wrap(text, cells) for text in row), fillvalue=""):
            padded = (text + " " * (cells + gap - _cells(text)) for text in line)
            lines.append("".join(padded).rstrip())
    return "\n".join(lines)


def _wrap(text: str, cells: int) -> list[str]:
    lines = []
    for line in text.expandtabs(4).split("\n"):
        # Wide characters count twice: a line of those alone is wrapped at half of the width.
        longest = cells
        while longest > 1:
            pieces = textwrap.wrap(line, longest, drop_whitespace=True) or [""]
            if max(map(_cells, pieces)) <= cells:
                break
            longest -= 1
        lines += pieces
    return lines


def _cells(text: str) -> int:
    """Cells that a terminal takes for it."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )

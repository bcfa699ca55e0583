"""`c2c align`: how two tokenizers cut a text, and which token goes with which, in colour."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .aligned import Alignment
from .alignment import TokenAligner
from .files import checked_target, write_atomically
from .model_card import HUB_ID
from .model_files import load_tokenizer
from .token_spans import TokenSpans

MAX_CHARACTERS = 1 << 16
MAX_WIDTH = 32  # of a token in the table
# Backgrounds of neighbouring sharer tokens, with a black foreground: readable on any terminal.
COLOURS = ("42", "43", "46", "45", "44", "41")
DIM, RESET = "\x1b[2m", "\x1b[0m"


def run_align(
    text: str,
    receiver: str,
    sharer: str,
    *,
    strategy: str = "span",
    chat: bool = False,
    json_path: str | None = None,
) -> int:
    """Prints both tokenizations and the map between them.

    Args:
        text: at most `MAX_CHARACTERS` characters.
        receiver, sharer: model directories or names on the Hub; only their tokenizers are loaded.
        strategy: of `TokenAligner`.
        chat: take the text as a user's message and put it into both chat templates.
        json_path: also write ids, tokens, offsets and map to this file.

    Returns:
        the exit status.

    Raises:
        ValueError, OSError: an option, the text or a tokenizer breaks a rule; names it.
    """
    if not text:
        raise ValueError("TEXT must not be empty")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"TEXT must have at most {MAX_CHARACTERS} characters, has {len(text)}")
    target = None if json_path is None else checked_target("--json", json_path)
    places = {"--receiver": receiver, "--sharer": sharer}
    for option, place in places.items():
        if not Path(place).is_dir() and (Path(place).exists() or not HUB_ID.fullmatch(place)):
            raise FileNotFoundError(f"{option}: no model at {place}")
    aligner = TokenAligner(*(load_tokenizer(*item) for item in places.items()), strategy)
    if chat:
        row = aligner.align_chat([{"role": "user", "content": text}])
    else:
        row = aligner.align(text)
    for side, ids in (("receiver", row.receiver_ids), ("sharer", row.sharer_ids)):
        if not ids:
            raise ValueError(f"TEXT has no tokens for the {side}")
    report = describe(aligner, row)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    for line in lines(report, coloured):
        print(line.encode(encoding, "backslashreplace").decode(encoding))
    if target is not None:
        whole = json.dumps(report, indent=1) + "\n"
        write_atomically({target: lambda path: Path(path).write_text(whole, "utf-8")})
    return 0


def describe(aligner: TokenAligner, row: Alignment) -> dict[str, Any]:
    """What ``--json`` writes: strategy, map, and per side text, ids, tokens and offsets.

    ``text``, and a token's ``start`` and ``end`` in it, are None where a token was made from
    another's text; ``token`` is its string in the vocabulary.
    """
    return {
        "strategy": aligner.strategy,
        "receiver": _side(aligner.receiver, row.receiver_ids, row.receiver),
        "sharer": _side(aligner.sharer, row.sharer_ids, row.sharer),
        "map": row.token_map,
    }


def _side(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: TokenSpans | None
) -> dict[str, Any]:
    offsets = [(None, None)] * len(ids) if spans is None else spans.offsets.tolist()
    return {
        "text": None if spans is None else spans.text,
        "tokens": [
            {"id": i, "token": token, "start": start, "end": end}
            for i, token, (start, end) in zip(
                ids, tokenizer.convert_ids_to_tokens(ids), offsets, strict=True
            )
        ],
    }


def lines(report: dict[str, Any], coloured: bool) -> list[str]:
    """The report for a terminal: each side's tokens in one paragraph, then the map as a table.

    A receiver token has the colour of the sharer token that it maps to, none if there is none.
    """
    own, other = (_shown_tokens(report[side]) for side in ("receiver", "sharer"))
    places = report["map"]

    def painted(text: str, place: int) -> str:
        if not coloured:
            return text
        if place < 0:
            return f"{DIM}{text}{RESET}"
        return f"\x1b[30;{COLOURS[place % len(COLOURS)]}m{text}{RESET}"

    between = "" if coloured else "|"
    paragraphs = [
        f"receiver, {len(own)} tokens",
        between.join(map(painted, own, places)),
        "",
        f"sharer, {len(other)} tokens",
        between.join(map(painted, other, range(len(other)))),
        "",
    ]
    rows = [("", "receiver", "", "sharer")]
    rows += [
        (str(i), _cut(token), *((str(place), _cut(other[place])) if place >= 0 else ("-", "")))
        for i, (token, place) in enumerate(zip(own, places, strict=True))
    ]
    widths = [max(_width(row[column]) for row in rows) for column in range(3)]
    table = []
    for number, (i, token, place, target) in enumerate(rows):
        at = places[number - 1] if number else -1
        left = token + " " * (widths[1] - _width(token))
        if number:
            left, target = painted(left, at), painted(target, at) if target else ""
        arrow = "->" if number else "  "
        table.append(f"{i:>{widths[0]}}  {left}  {arrow} {place:>{widths[2]}}  {target}".rstrip())
    mapped, read = sum(place >= 0 for place in places), len({*places} - {-1})
    summary = (
        f"{mapped} of {len(own)} receiver tokens mapped, to {read} of {len(other)} sharer tokens "
        f"(strategy {report['strategy']})"
    )
    return [*paragraphs, *table, "", summary]


def _shown_tokens(side: dict[str, Any]) -> list[str]:
    """Every token as its own part of the text, or its string where it has none to itself."""
    tokens = side["tokens"]
    shown = []
    for i, token in enumerate(tokens):
        start, end = token["start"], token["end"]
        neighbours = tokens[max(i - 1, 0) : i] + tokens[i + 1 : i + 2]
        shared = start is None or start == end
        shared = shared or any(t["start"] < end and start < t["end"] for t in neighbours)
        shown.append(printable(token["token"] if shared else side["text"][start:end]))
    return shown


def printable(text: str) -> str:
    """``text`` with everything escaped that a terminal could take for more than a character.

    Control characters, escapes, marks that turn the direction of text, and what is unassigned.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _cut(text: str) -> str:
    return text if len(text) <= MAX_WIDTH else text[: MAX_WIDTH - 3] + "..."


def _width(text: str) -> int:
    """Columns of a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)

"""What both user interfaces say: names of the modes, times, errors."""

from __future__ import annotations

from .session import Answer
from .text import printable

LABELS = {
    "receiver": "receiver alone",
    "sharer": "sharer alone",
    "t2t": "text to text",
    "c2c": "cache to cache",
}


def describe(answer: Answer) -> str:
    """What an answer took, in words."""
    parts = []
    if answer.stopped:
        parts.append("stopped")
    if answer.background_seconds:
        parts.append(f"sharer wrote for {_seconds(answer.background_seconds)}")
    if answer.first_token_seconds is not None:
        parts.append(f"first token {_seconds(answer.first_token_seconds)}")
    parts.append(f"total {_seconds(answer.seconds)}")
    parts.append(f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}")
    return ", ".join(parts)


def one_line(error: BaseException) -> str:
    """An error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text.removeprefix("c2c_ext: "))[:500]


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"

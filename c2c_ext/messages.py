"""Values of strangers in error messages: short, on one line, whatever they hold."""

from __future__ import annotations

from typing import Any

LIMIT = 80  # characters


def shown(value: Any, limit: int = LIMIT) -> str:
    """``ascii(value)``, cut to ``limit`` characters; never raises.

    A file's value may be as long as the file, nested so deeply that ``ascii`` gives up, or an
    integer with more digits than Python prints.
    """
    if isinstance(value, str | bytes):
        value = value[:limit]
    try:
        text = ascii(value)
    except (RecursionError, ValueError):
        bits = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        text = f"<{type(value).__name__}{bits}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_name(name: str, limit: int = LIMIT) -> str:
    """A name from a file, escaped and cut as `shown`, without quotes."""
    return shown(name, limit + 2)[1:-1]

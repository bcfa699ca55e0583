"""Directories that a run will write to: tried before anything is loaded."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .prompt_caches import INDEX_NAME, PromptCaches

# More than any file that a run writes adds to its directory's name.
_LONGEST_NAME = 160


def check_writable(option: str, directory: str | Path) -> None:
    """Raises OSError unless files can be written in a directory that is there or can be made.

    It is tried out: rights, quotas and read-only file systems show in no other way. Nothing stays.

    Args:
        option: what the message begins with.
    """
    path = Path(os.path.abspath(directory))
    made: list[Path] = []
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(f"{option}: {directory} must be a directory, it is a file")
        try:
            for place in reversed([p for p in (path, *path.parents) if not os.path.lexists(p)]):
                place.mkdir()
                made.append(place)
            os.listdir(path)
            probe = path / f".probe.{secrets.token_hex(8)}"
            file = probe / "x".rjust(_LONGEST_NAME - len(probe.name), "_")
            probe.mkdir()
            made.append(probe)
            try:
                file.write_bytes(b"x")
            finally:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise type(error)(
                f"{option}: {directory} cannot be written to: {error.strerror or error}"
            ) from error
    finally:
        for place in reversed(made):
            place.rmdir()


def check_prompt_caches(directory: str | Path, sides: tuple[str, ...], writes: bool) -> None:
    """Raises ValueError or OSError for prompt caches that can be neither read nor written.

    Args:
        sides: of the models, each in a directory of its own.
        writes: whether this process writes those that are missing.
    """
    missing = []
    for side in sides:
        place = Path(directory) / side
        if not os.path.lexists(place):
            missing.append(side)
        elif not place.is_dir() or not (place / INDEX_NAME).exists():
            raise ValueError(
                f"--prompt-caches: {place} must be a directory of prompt caches, it holds none; "
                "remove it to have them written"
            )
        else:
            PromptCaches(place)
    if missing and writes:
        check_writable("--prompt-caches", directory)

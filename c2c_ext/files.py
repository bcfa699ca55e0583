"""Single files: opened only if regular and small enough, JSON read strictly, written atomically."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .messages import shown_name

MAX_JSON_BYTES = 4 << 20


def existing_directory(directory: str | os.PathLike) -> Path:
    """The directory as a Path, or a clear error."""
    if not isinstance(directory, str | os.PathLike) or not isinstance(os.fspath(directory), str):
        raise TypeError(
            f"c2c_ext: a directory must be a str or os.PathLike, got {type(directory).__name__}"
        )
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"c2c_ext: no fuser directory at {path}")
    return path


def existing_file(path: Path) -> Path:
    """The path of a regular file, or a clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"c2c_ext: {path} is missing or not a regular file")
    return path


@contextmanager
def open_regular(path: Path, limit: int) -> Iterator[BinaryIO]:
    """A regular file of at most ``limit`` bytes, for reading; symbolic links are followed."""
    # Asked twice: opening a device can do something, and the name can change hands in between.
    existing_file(path)
    # Non-blocking, for a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"c2c_ext: {path} is missing or not a regular file")
        if status.st_size > limit:
            raise ValueError(f"c2c_ext: {path} must be at most {limit} bytes, got {status.st_size}")
        yield file


def read_json(path: Path) -> Any:
    """Parses a small JSON file strictly; see `parse_json`."""
    with open_regular(path, MAX_JSON_BYTES) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:  # it has grown since
        raise ValueError(f"c2c_ext: {path} must be at most {MAX_JSON_BYTES} bytes")
    return parse_json(text, str(path))


def parse_json(text: bytes, where: str) -> Any:
    """Parses JSON strictly: UTF-8 without a mark, no duplicate keys, no NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            once, twice = set(), {}
            for key, _ in pairs:
                if key in once:
                    twice[key] = None
                once.add(key)
            raise ValueError(f"duplicate keys: {listed(twice)}")
        return data

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if abs(float(number)) == float("inf"):
            raise ValueError(f"{shown_name(number)} is too large for a number")
        return float(number)

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=finite,
        )
    except RecursionError as error:
        raise ValueError(f"c2c_ext: {where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"c2c_ext: {where} is not valid JSON: {error}") from error


def checked_target(option: str, place: str) -> Path:
    """Where a command will write a file, asked before it does its work.

    A symbolic link is resolved: it stays, and what it points to is written.

    Raises:
        ValueError: no file can be written there; names the option.
    """
    target = Path(place).resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"{option}: {target} exists and is not a regular file")
    if not target.parent.is_dir():
        raise ValueError(f"{option}: there is no directory {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option}: nothing can be written to {target.parent}")
    return target


def write_atomically(files: Mapping[Path, Callable[[str], Any]]) -> None:
    """Writes files beside their places, then moves all of them there.

    Each value is called with the name of a temporary file to write. Contents reach the disk before
    names do. If any write fails, every file is as it was; only a crash between two moves can leave
    some new and some old, each of them whole. A symbolic link is replaced, not written through.
    """
    for path in files:
        if path.is_dir() and not path.is_symlink():  # the one move that is sure to fail
            raise IsADirectoryError(f"c2c_ext: {path} is a directory, not a file to replace")
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            # Exclusive, and with the permissions that any new file gets.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            temporaries[path] = temporary
            write(str(temporary))
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def listed(names: Iterable[str]) -> str:
    """The first few names, sorted."""
    names = sorted(names)
    return ", ".join(map(shown_name, names[:4])) + (", ..." if len(names) > 4 else "")

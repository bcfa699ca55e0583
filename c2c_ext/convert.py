"""`c2c convert`: a fuser directory from the published format into ours, or back, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

from .facts import read_model
from .files import existing_directory
from .fuser import Fuser
from .published import PROJECTOR_CONFIG_NAME, load_published
from .published_writer import save_published
from .serialization import CONFIG_NAME, load_fuser, save_fuser, write_directory

OURS, PUBLISHED = "c2c_ext", "published"
FORMATS = (OURS, PUBLISHED)


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str | None = None,
    receiver: str | os.PathLike | None = None,
    sharer: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> tuple[Fuser, str]:
    """Writes the fuser of one directory to another, in the other format.

    Args:
        source: a fuser directory in either format.
        destination: appears whole or not at all.
        to: ``"c2c_ext"`` or ``"published"``; needed only where ``source`` holds both formats.
        receiver, sharer: model directories, recorded in our format and compared with the
            projectors; the published format has no place for them.
        overwrite: replace a fuser that is at ``destination``.

    Returns:
        The fuser, and the format that it was written in.

    Raises:
        FileNotFoundError: ``source`` or a file of it is missing.
        FileExistsError: ``destination`` is ``source`` or holds files (see `Fuser.save_published`).
        ValueError: ``source`` is damaged, already in the format asked for, or cannot be expressed
            in it; names what.
    """
    path, target = existing_directory(source), Path(destination)
    to = _target_format(path, to)
    if target.resolve().is_relative_to(path.resolve()):
        raise FileExistsError(
            f"c2c_ext: destination must be another directory than source {path}, and not inside it"
        )
    if to == PUBLISHED:
        for name, value in (("receiver", receiver), ("sharer", sharer)):
            if value is not None:
                raise ValueError(
                    f"c2c_ext: {name} {value} cannot be recorded: the published format has no "
                    "place for the models"
                )
        fuser = load_fuser(path)
        save_published(fuser, target, overwrite=overwrite)
        return fuser, to
    models = {
        f"{name}_config": None if value is None else read_model(value).config
        for name, value in (("receiver", receiver), ("sharer", sharer))
    }
    fuser = load_published(path, **models)
    write_directory(target, lambda place: save_fuser(fuser, place), overwrite=overwrite)
    return fuser, to


def _target_format(source: Path, to: str | None) -> str:
    if to is not None and to not in FORMATS:
        raise ValueError(f"c2c_ext: to must be one of {', '.join(FORMATS)}, got {to!r:.80}")
    holds = {OURS: (source / CONFIG_NAME).exists()}
    holds[PUBLISHED] = (source / PROJECTOR_CONFIG_NAME).exists()
    if not any(holds.values()):
        raise FileNotFoundError(
            f"c2c_ext: {source} holds neither {CONFIG_NAME} nor {PROJECTOR_CONFIG_NAME}"
        )
    if all(holds.values()):
        if to is None:
            raise ValueError(f"c2c_ext: {source} holds both formats: say which to write with to")
        return to
    other = PUBLISHED if holds[OURS] else OURS
    if to not in (None, other):
        raise ValueError(f"c2c_ext: {source} is in the {to} format already")
    return other


def run_convert(
    source: str,
    destination: str,
    *,
    to: str | None,
    receiver: str | None,
    sharer: str | None,
    overwrite: bool,
) -> int:
    """Converts and prints what was written; returns the exit status."""
    fuser, written = convert(
        source, destination, to=to, receiver=receiver, sharer=sharer, overwrite=overwrite
    )
    config = fuser.config
    dtype = str(next(fuser.parameters()).dtype).removeprefix("torch.")
    print(f"{source} -> {destination} ({written} format)")
    print(
        f"{config.sharer.summary()} -> {config.receiver.summary()}; {config.num_parameters():,} "
        f"parameters, {dtype}"
    )
    if written == PUBLISHED:
        print("not in that format: the models' names, types and unread last layers, gate_init")
    return 0

"""What the tests of hostile files share: good directories of both formats and the one outcome."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from conftest import make_fuser

from c2c_ext import Fuser

E2E = Path(__file__).parent / "golden" / "e2e"
LOADERS = {"ours": Fuser.from_pretrained, "published": Fuser.from_published}
FILES = [
    ("ours", "fuser_config.json"),
    ("ours", "fuser.safetensors"),
    ("published", "projector_config.json"),
    ("published", "projector_1.json"),
    ("published", "projector_1.pt"),
]


def good_directories(place: Path) -> dict[str, Path]:
    """One good directory of each format, by name."""
    places = {name: place / name for name in LOADERS}
    make_fuser().save_pretrained(places["ours"])
    shutil.copytree(E2E / "fuser_s1_k_nearest", places["published"])
    return places


def load(directory: Path, kind: str) -> Fuser | str:
    """The fuser, or the message of the one clear error that is allowed instead."""
    try:
        return LOADERS[kind](directory)
    except (ValueError, OSError) as error:
        message = str(error)
        assert "c2c_ext: " in message and str(directory) in message
        assert message.isprintable() and len(message) < 600
        return message


def refused(directory: Path, kind: str) -> str:
    """The message; loading must fail."""
    message = load(directory, kind)
    assert isinstance(message, str), "was loaded"
    return message


def shapes(fuser: Fuser) -> dict[str, torch.Size]:
    """Of every parameter."""
    return {name: p.shape for name, p in fuser.state_dict().items()}

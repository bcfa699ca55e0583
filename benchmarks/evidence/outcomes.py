"""Which questions each mode answered right, and the files that keep it, one per world and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from c2c_ext.files import write_atomically

FILE_NAME = re.compile(r"([a-z_]+)_seed(\d+)\.json")


@dataclass(frozen=True)
class Cell:
    """One kind of questions under every mode, all modes in the same order of questions.

    Attributes:
        name: of the kind, e.g. ``"is, K = 12"``.
        candidates: among which an answer is chosen: guessing is right one time in so many.
        right: by mode, bool ``[Q]``: whether its answer is the right one.
        written: by mode, how many tokens the sharer wrote per question, where it wrote any.
    """

    name: str
    candidates: int
    right: Mapping[str, Tensor]
    written: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {tuple(bits.shape) for bits in self.right.values()}
        if len(sizes) != 1 or len(next(iter(sizes))) != 1:
            raise ValueError(f"{self.name}: every mode must have bits [Q], got {sorted(sizes)}")
        if any(bits.dtype != torch.bool for bits in self.right.values()):
            raise TypeError(f"{self.name}: answers are bool tensors")
        if unknown := set(self.written) - set(self.right):
            raise ValueError(f"{self.name}: written for modes that answered nothing: {unknown}")

    @property
    def questions(self) -> int:
        """How many there are."""
        return len(next(iter(self.right.values())))

    def count(self, mode: str) -> int:
        """Right answers of a mode."""
        return int(self.right[mode].sum())

    def to_json(self) -> dict[str, Any]:
        """Counts for people, bits (hexadecimal, first question first) for tests."""
        return {
            "cell": self.name,
            "questions": self.questions,
            "candidates": self.candidates,
            "modes": {
                mode: {
                    "right": self.count(mode),
                    **({"written": self.written[mode]} if mode in self.written else {}),
                    "bits": np.packbits(bits.cpu().numpy()).tobytes().hex(),
                }
                for mode, bits in self.right.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """What `to_json` wrote. Raises ValueError where counts and bits disagree."""
        right, count = {}, data["questions"]
        for mode, said in data["modes"].items():
            packed = np.frombuffer(bytes.fromhex(said["bits"]), dtype=np.uint8)
            bits = torch.from_numpy(np.unpackbits(packed)[:count].astype(bool))
            if len(bits) != count or int(bits.sum()) != said["right"]:
                raise ValueError(f"{data['cell']}, {mode}: its bits do not give its count")
            right[mode] = bits
        written = {m: d["written"] for m, d in data["modes"].items() if "written" in d}
        return cls(data["cell"], data["candidates"], right, written)


@dataclass(frozen=True)
class Run:
    """A result file: one world with one seed."""

    world: str
    seed: int
    path: Path
    document: Mapping[str, Any]

    @property
    def cells(self) -> list[Cell]:
        """Accuracy; none where it was not measured."""
        return [Cell.from_json(row) for row in self.document.get("accuracy", {}).get("cells", [])]

    @property
    def latency(self) -> list[dict[str, Any]]:
        """Rows of times; none where they were not measured."""
        return list(self.document.get("latency", {}).get("rows", []))


def read_runs(directory: Path, world: str | None = None) -> list[Run]:
    """All result files of a directory, or those of one world, by world and seed."""
    runs = []
    for path in directory.glob("*_seed*.json"):
        if (named := FILE_NAME.fullmatch(path.name)) and world in (None, named[1]):
            document = json.loads(path.read_text("utf-8"))
            runs.append(Run(named[1], int(named[2]), path, document))
    return sorted(runs, key=lambda run: (run.world, run.seed))


def update_run(directory: Path, world: str, seed: int, **sections: Mapping[str, Any]) -> Path:
    """Replaces sections (training, accuracy, latency) of a result file and keeps the others."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{world}_seed{seed}.json"
    document = json.loads(path.read_text("utf-8")) if path.exists() else {}
    document |= {"world": world, "seed": seed, **sections}
    text = json.dumps(document, indent=1) + "\n"
    write_atomically({path: lambda place: Path(place).write_text(text, "utf-8")})
    return path

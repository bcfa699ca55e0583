"""Reads directories that claim absurd sizes; prints what each did to this process's peak memory.

usage: python hostile_memory.py EMPTY_DIRECTORY   (run by test_hostile_fields.py)
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import make_fuser
from hostile import E2E

from c2c_ext import Fuser
from c2c_ext.config import MAX_DEPTH
from c2c_ext.info import read_model
from c2c_ext.model_kv import MAX_LAYERS, MAX_WIDTH

HEADROOM = 1 << 30  # of address space: a larger allocation fails, touched or not


def main(place: Path) -> None:
    # Everything that is loaded lazily, once, before memory is looked at.
    good = place / "good"
    make_fuser().save_pretrained(good)
    Fuser.from_pretrained(good)
    Fuser.from_published(E2E / "fuser_s1_k_nearest")
    read_model(E2E / "receiver")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + HEADROOM, hard))
    rows = {}
    for name, (source, damage, read) in CASES.items():
        directory = place / name.replace(" ", "_")
        shutil.copytree(good if source is None else E2E / source, directory)
        damage(directory)
        before = peak()
        try:
            read(directory)
            error = ""
        except (ValueError, OSError) as refusal:
            error = str(refusal)
        rows[name] = {"peak_mib": (peak() - before) / 1024, "error": error[:200]}
    print(json.dumps(rows))


def peak() -> int:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def change(name: str, **fields: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        data.update(fields)
        (directory / name).write_text(json.dumps(data))

    return apply


def arguments(**fields: object) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        for path in directory.glob("projector_*.json"):
            data = json.loads(path.read_text())
            if "init_args" in data:
                data["init_args"].update(fields)
                path.write_text(json.dumps(data))

    return apply


def largest(directory: Path) -> None:
    layers = {"kv_layers": [[1, MAX_WIDTH]] * MAX_LAYERS}
    change(
        "fuser_config.json",
        **{"receiver": layers, "sharer": layers, "layer_map": list(range(MAX_LAYERS))},
        **{"hidden_size": MAX_WIDTH, "intermediate_size": MAX_WIDTH, "depth": MAX_DEPTH},
    )(directory)


def largest_with_its_header(directory: Path) -> None:
    """The weights file claims the shapes that the configuration asks for."""
    change("fuser_config.json", hidden_size=MAX_WIDTH, intermediate_size=MAX_WIDTH)(directory)
    path = directory / "fuser.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    for name, entry in header.items():
        if name.endswith("_w1"):
            entry["shape"] = [d if d < 16 else MAX_WIDTH for d in entry["shape"]]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def header_length(length: int) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "fuser.safetensors"
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])

    return apply


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """Long, and no bytes on the disk."""
    return lambda directory: os.truncate(directory / name, size)


def pickled(data: bytes, compression: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        with zipfile.ZipFile(directory / "projector_0.pt", "w", compression) as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/data/0", b"\0" * 16)
            archive.writestr("archive/version", "3\n")

    return apply


def entries(count: int) -> Callable[[Path], None]:
    """Many names for the same few bytes."""

    def apply(directory: Path) -> None:
        path = directory / "projector_0.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data/0", b"\0" * 4096)
            for i in range(count):
                twin = zipfile.ZipInfo(f"archive/data/{i + 1}")
                for field in ("header_offset", "file_size", "compress_size", "CRC"):
                    setattr(twin, field, getattr(archive.filelist[0], field))
                archive.filelist.append(twin)

    return apply


def call(module: str, name: str, number: int) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"\x8a\x08" + struct.pack("<q", number) + b"\x85R."


def claimed_tensor(elements: int) -> bytes:
    """A state dict of one tensor that claims more elements than its storage has."""
    from io import BytesIO

    buffer = BytesIO()
    torch.save({"key_in.weight": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    return data.replace(b"K\x04\x85", b"\x8a\x08" + struct.pack("<q", elements) + b"\x85")


OURS, PUBLISHED = None, "fuser_s1_k_nearest"
CASES = {
    "largest configuration": (OURS, largest, Fuser.from_pretrained),
    "largest with its header": (OURS, largest_with_its_header, Fuser.from_pretrained),
    "header of 2^63": (OURS, header_length(1 << 63), Fuser.from_pretrained),
    "header of 2^34": (OURS, header_length(1 << 34), Fuser.from_pretrained),
    "sparse weights": (OURS, sparse("fuser.safetensors", 1 << 40), Fuser.from_pretrained),
    "sparse json": (OURS, sparse("fuser_config.json", 1 << 40), Fuser.from_pretrained),
    "sparse pt": (PUBLISHED, sparse("projector_0.pt", 1 << 32), Fuser.from_published),
    "sparse arguments": (PUBLISHED, sparse("projector_0.json", 1 << 32), Fuser.from_published),
    "largest arguments": (
        PUBLISHED,
        arguments(hidden_dim=MAX_WIDTH, intermediate_dim=MAX_WIDTH, num_layers=MAX_DEPTH),
        Fuser.from_published,
    ),
    "billion layers": (PUBLISHED, arguments(num_layers=10**9), Fuser.from_published),
    "most layers": (PUBLISHED, arguments(num_layers=MAX_WIDTH), Fuser.from_published),
    "bytearray": (PUBLISHED, pickled(call("builtins", "bytearray", 1 << 31)), Fuser.from_published),
    "tensor": (PUBLISHED, pickled(call("torch", "FloatTensor", 1 << 29)), Fuser.from_published),
    "storage": (PUBLISHED, pickled(call("torch", "FloatStorage", 1 << 29)), Fuser.from_published),
    "claimed tensor": (PUBLISHED, pickled(claimed_tensor(1 << 29)), Fuser.from_published),
    "many empty dicts": (PUBLISHED, pickled(b"}" * (3 << 20)), Fuser.from_published),
    "large memo": (PUBLISHED, pickled(b"}r\xff\xff\xff\x7f."), Fuser.from_published),
    "deflated": (PUBLISHED, pickled(b"}" * (1 << 28), zipfile.ZIP_DEFLATED), Fuser.from_published),
    "overlapping entries": (PUBLISHED, entries(30_000), Fuser.from_published),
    "model layers": ("receiver", change("config.json", num_hidden_layers=10**9), read_model),
    "model labels": ("receiver", change("config.json", num_labels=10**9), read_model),
    "sparse model": ("receiver", sparse("config.json", 1 << 40), read_model),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))

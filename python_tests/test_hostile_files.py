"""Damaged and hostile files in both fuser formats: refused by a clear error, and nothing runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_config, make_fuser
from hostile import E2E, FILES, LOADERS, good_directories, load, refused, shapes
from safetensors.torch import load_file, save_file

from c2c_ext import Fuser, files, published


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    return good_directories(tmp_path)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_empty_and_filled_files_are_refused(directories, kind, name):
    for content in (b"", b"\0" * 4096, b"\xff" * 4096, b" ", b"null", b"PK\x05\x06" + b"\0" * 18):
        (directories[kind] / name).write_bytes(content)
        refused(directories[kind], kind)


@pytest.mark.parametrize(("kind", "name"), [f for f in FILES if f[1].endswith(".json")])
def test_json_truncated_anywhere_is_refused(directories, kind, name):
    whole = (directories[kind] / name).read_bytes().rstrip()
    for cut in range(len(whole)):
        (directories[kind] / name).write_bytes(whole[:cut])
        assert "is not valid JSON" in refused(directories[kind], kind)


def test_published_weights_truncated_at_every_entry_are_refused(directories):
    path = directories["published"] / "projector_1.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        cuts = {entry.header_offset for entry in archive.infolist()}
        cuts |= {archive.start_dir, archive.start_dir + 46}
        cuts |= {entry.header_offset + 30 for entry in archive.infolist()}
        cuts |= {len(whole) - back for back in (1, 10, 21, 22)}
    assert len(cuts) > 80
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        assert "is not a state dict of plain tensors" in refused(
            directories["published"], "published"
        )


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_flipped_bits_load_to_the_same_shapes_or_are_refused(directories, kind, name, recwarn):
    """A flip in a safetensors number cannot be told; published archives have check sums."""
    expected = shapes(LOADERS[kind](directories[kind]))
    path = directories[kind] / name
    whole = path.read_bytes()
    rng = random.Random(name)
    seen = {True: 0, False: 0}
    for round_ in range(200):
        # Half of them where the structure is: the header or JSON, or a zip's directory.
        near = rng.randrange(min(len(whole), 2000))
        place = (
            (near if rng.random() < 0.5 else -1 - near) if round_ % 2 else rng.randrange(len(whole))
        )
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        result = load(directories[kind], kind)
        seen[isinstance(result, str)] += 1
        assert isinstance(result, str) or shapes(result) == expected
    assert seen[True] > 20


def test_swapped_files_are_refused(directories, tmp_path):
    other = make_fuser(make_config(depth=4))
    other.save_pretrained(tmp_path / "deeper")
    shutil.copy(tmp_path / "deeper" / "fuser.safetensors", directories["ours"])
    assert "must have shape" in refused(directories["ours"], "ours")
    # Equal shapes, another activation: only the fingerprint tells.
    make_fuser(make_config(activation="relu")).save_pretrained(tmp_path / "relu")
    shutil.copy(tmp_path / "relu" / "fuser.safetensors", directories["ours"])
    assert "come from different saves" in refused(directories["ours"], "ours")
    for stranger, message in (
        (E2E / "fuser_s2_last_aligned" / "projector_0.pt", "tensors: "),
        (directories["published"] / "projector_config.json", "not a whole zip archive"),
    ):
        shutil.copy(stranger, directories["published"] / "projector_1.pt")
        assert message in refused(directories["published"], "published")


def test_swapping_published_projectors_of_equal_shapes_cannot_be_seen(directories):
    """The format keeps nothing that ties a projector's weights to its layer: a known limit."""
    place = directories["published"]
    before = Fuser.from_published(place)
    (place / "projector_0.pt").rename(place / "spare")
    (place / "projector_1.pt").rename(place / "projector_0.pt")
    (place / "spare").rename(place / "projector_1.pt")
    after = Fuser.from_published(place)
    assert torch.equal(after.stream(0, "key").in_weight, before.stream(1, "key").in_weight)


# ---- safetensors headers -------------------------------------------------------------------------


def rewrite_header(path: Path, change: Callable[[str], str]) -> None:
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = change(whole[8 : 8 + size].decode().rstrip()).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])


def in_bias(**fields: object) -> Callable[[str], str]:
    def change(text: str) -> str:
        header = json.loads(text)
        header["groups.0.in_bias"].update(fields)
        return json.dumps(header)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_bias(data_offsets=[0, 256]), "not a whole safetensors file"),  # another's bytes
        (in_bias(data_offsets=[0, 2**64 - 1]), "not a whole safetensors file"),
        (in_bias(data_offsets=[256, 0]), "not a whole safetensors file"),
        (in_bias(data_offsets=[-256, 0]), "not a whole safetensors file"),
        (in_bias(shape=[2**32, 2**32, 2**32]), "not a whole safetensors file"),
        (in_bias(shape=[2**63, 2]), "not a whole safetensors file"),
        (in_bias(shape=[-4, -16]), "not a whole safetensors file"),
        (in_bias(shape=[1] * 100_000 + [4, 16]), "in_bias must have shape [4, 16], got [1, 1, "),
        (in_bias(shape=[16, 4]), "in_bias must have shape [4, 16], got [16, 4]"),
        (in_bias(dtype="I32"), "in_bias must be one of F64"),
        (in_bias(dtype="X"), "not a whole safetensors file"),
        (lambda h: "[" * 200_000, "not a whole safetensors file"),
        (lambda h: h.replace("groups.0.in_bias", "groups.0.in\\n\\u001b[2J"), "missing tensors"),
        (lambda h: h[:-1] + ',"../../x":' + json.dumps({"dtype": "F32", "shape": [0],
         "data_offsets": [0, 0]}) + "}", "1 surplus tensors: ../../x"),
        (lambda h: h[1:], "not a whole safetensors file"),
        (lambda h: h + " " * (files.MAX_JSON_BYTES + 1), "at most"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(directories, change, message):
    rewrite_header(directories["ours"] / "fuser.safetensors", change)
    assert message in refused(directories["ours"], "ours")


def test_header_with_duplicate_keys_is_refused(directories):
    def twice(text: str) -> str:
        item = (
            json.dumps("groups.0.in_bias") + ":" + json.dumps(json.loads(text)["groups.0.in_bias"])
        )
        return text[:-1] + "," + item + "}"

    rewrite_header(directories["ours"] / "fuser.safetensors", twice)
    assert "duplicate keys: groups.0.in_bias" in refused(directories["ours"], "ours")


def test_header_of_absurd_length_is_refused(directories):
    path = directories["ours"] / "fuser.safetensors"
    body = path.read_bytes()[8:]
    for length in (1 << 63, (1 << 64) - 1, 1 << 32, files.MAX_JSON_BYTES + 1):
        path.write_bytes(struct.pack("<Q", length) + body)
        assert "header must be at most" in refused(directories["ours"], "ours")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value, dtype):
    make_fuser().to(dtype).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "fuser.safetensors")
    tensors["groups.0.head_bias"].view(-1)[-1] = value
    save_file(tensors, tmp_path / "fuser.safetensors")
    assert "groups.0.head_bias holds NaN or infinite values" in refused(tmp_path, "ours")


def test_a_loaded_fuser_does_not_follow_its_file(directories):
    """Overwriting or truncating the file in place must not reach parameters that were checked."""
    fuser = Fuser.from_pretrained(directories["ours"])
    before = {name: p.clone() for name, p in fuser.state_dict().items()}
    path = directories["ours"] / "fuser.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    os.truncate(path, 0)
    assert all(torch.equal(p, before[name]) for name, p in fuser.state_dict().items())


# ---- pickles -------------------------------------------------------------------------------------


def repack(path: Path, pickled: bytes) -> None:
    """The archive with another data.pkl."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else data)


class Shell:
    """Unpickling it would run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return (os.system, (self.command,))


def legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def archive_of(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def text(opcode: bytes, *arguments: str) -> bytes:
    return opcode + b"".join(a.encode() + b"\n" for a in arguments)


PICKLES = {
    "protocol 2": lambda c: pickle.dumps({"a": Shell(c)}, 2),
    "protocol 4": lambda c: pickle.dumps({"a": Shell(c)}, 4),
    "protocol 0": lambda c: pickle.dumps({"a": Shell(c)}, 0),
    "inst": lambda c: b"(" + text(b"S", repr(c)) + text(b"i", "os", "system") + b".",
    "obj": lambda c: b"(" + text(b"c", "os", "system") + text(b"S", repr(c)) + b"o.",
    "getattr": lambda c: pickle.dumps(getattr, 2)[:-1] + b"(" + text(b"c", "os", "environ") + b"t.",
    "bytearray": lambda c: text(b"c", "builtins", "bytearray") + b"K\x10\x85R.",
    "tensor": lambda c: text(b"c", "torch", "FloatTensor") + b"K\x10\x85R.",
    "extension": lambda c: b"\x82\x01.",
    "numpy": lambda c: pickle.dumps({"a": np.float64(1.0)}, 2),
}


@pytest.mark.parametrize("name", PICKLES)
def test_nothing_in_a_pickle_runs(directories, tmp_path, name):
    canary = tmp_path / "ran"
    path = directories["published"] / "projector_1.pt"
    repack(path, PICKLES[name](f"touch {canary}"))
    assert "is not a state dict of plain tensors: " in refused(
        directories["published"], "published"
    )
    assert not canary.exists()


def test_whole_modules_and_old_formats_are_refused(directories, tmp_path):
    canary = tmp_path / "ran"
    shell = {"a": Shell(f"touch {canary}")}
    path = directories["published"] / "projector_1.pt"
    state = torch.load(path, weights_only=True)
    for content in (
        legacy(shell),
        archive_of(shell),
        pickle.dumps(shell),
        archive_of(torch.nn.Linear(2, 2)),
        legacy(state),
    ):
        path.write_bytes(content)
        refused(directories["published"], "published")
    assert not canary.exists()


def test_parameters_and_the_old_alignment_are_accepted(directories):
    """What the pickle check must let through: a dict of Parameters, as some tools save."""
    path = directories["published"] / "projector_1.pt"
    state = torch.load(path, weights_only=True)
    before = Fuser.from_published(directories["published"]).state_dict()
    path.write_bytes(archive_of({name: torch.nn.Parameter(t) for name, t in state.items()}))
    after = Fuser.from_published(directories["published"])
    assert all(torch.equal(before[name], p) for name, p in after.state_dict().items())
    assert all(p.is_leaf and p.requires_grad for p in after.parameters())


def test_entries_of_one_name_are_refused(directories):
    path = directories["published"] / "projector_1.pt"
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    assert "two entries of one name" in refused(directories["published"], "published")


def test_layers_that_share_a_projector_have_a_limit(directories, monkeypatch):
    place = directories["published"]
    data = {"0": {"1": {str(layer): [[0, 0]] for layer in range(40)}}}
    (place / "projector_config.json").write_text(json.dumps(data))
    assert len(Fuser.from_published(place).config.layer_map) == 40
    monkeypatch.setattr(published, "MAX_SHARED_BYTES", 10**6)
    assert "layers that share a projector would take" in refused(place, "published")

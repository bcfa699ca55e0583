"""save_pretrained / from_pretrained: round trips, atomicity, and bad directories of every kind."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from c2c_ext import Fuser, FuserConfig, files, serialization
from c2c_ext.model_kv import KVShape, ModelKV


def small_fuser() -> Fuser:
    receiver = ModelKV("qwen3", "org/receiver", (KVShape(2, 6), KVShape(2, 6), KVShape(1, 8)))
    sharer = ModelKV("llama", "sharer", (KVShape(3, 4), KVShape(3, 4)))
    torch.manual_seed(0)
    return Fuser(FuserConfig(receiver, sharer, (0, 1, 1), 10, 7, 4, "silu", 0.2, 0.5))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_fuser().save_pretrained(tmp_path / "fuser")
    return tmp_path / "fuser"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    fuser = small_fuser().to(dtype)
    fuser.save_pretrained(tmp_path)
    loaded = Fuser.from_pretrained(tmp_path)
    assert loaded.config == fuser.config
    assert not loaded.training
    for (name, a), (other, b) in zip(
        fuser.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    assert all(p.requires_grad for p in loaded.parameters())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        small_fuser().save_pretrained(tmp_path / name)
    for file in (serialization.CONFIG_NAME, serialization.WEIGHTS_NAME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_config_file_says_who_the_models_are(saved: Path) -> None:
    data = json.loads((saved / serialization.CONFIG_NAME).read_text())
    assert data["format_version"] == 1
    assert data["receiver"] == {
        "model_type": "qwen3",
        "name": "org/receiver",
        "kv_layers": [[2, 6], [2, 6], [1, 8]],
    }
    assert data["sharer"]["name"] == "sharer"
    expected = ["README.md", "fuser.safetensors", "fuser_config.json"]
    assert sorted(p.name for p in saved.iterdir()) == expected


@pytest.mark.parametrize("broken_file", [serialization.WEIGHTS_NAME, serialization.CONFIG_NAME])
def test_failed_save_leaves_the_old_directory(
    saved: Path, monkeypatch: pytest.MonkeyPatch, broken_file: str
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    fsync = os.fsync

    def disk_full(handle: int) -> None:
        if broken_file in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError("disk full")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", disk_full)
    other = small_fuser().double()
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    monkeypatch.undo()
    other.save_pretrained(saved)
    assert Fuser.from_pretrained(saved).groups[0].in_bias.dtype == torch.float64


def test_save_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    fuser = small_fuser()
    with torch.no_grad():
        fuser.groups[0].out_bias[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"groups\.0\.out_bias holds NaN"):
        fuser.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda g: setattr(g, "in_bias", None), r"1 missing tensors: groups\.0\.in_bias"),
        (lambda g: setattr(g, "more", torch.nn.Parameter(torch.ones(1))), "1 surplus tensors"),
        (
            lambda g: setattr(g, "in_bias", torch.nn.Parameter(torch.ones(2))),
            r"groups\.0\.in_bias must have shape \[4, 10\], got \[2\]",
        ),
        (lambda g: g.double(), "all parameters must have one dtype of F64, F32, BF16, F16, got"),
        (lambda g: setattr(g, "proj_w2", g.proj_w1), r"groups\.0\.proj_w2 must have shape"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, damage: Callable, message: str
) -> None:
    fuser = small_fuser()
    damage(fuser.groups[0])
    with pytest.raises(ValueError, match=message):
        fuser.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tied_parameters_are_saved(tmp_path: Path) -> None:
    fuser = small_fuser()
    fuser.groups[0].shared_norm = fuser.groups[0].weight_norm
    fuser.save_pretrained(tmp_path)
    loaded = Fuser.from_pretrained(tmp_path)
    assert torch.equal(loaded.groups[0].shared_norm, fuser.groups[0].weight_norm)


def test_save_refuses_a_file_as_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="save_directory must be a directory"):
        small_fuser().save_pretrained(tmp_path / "file")


def rewrite(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / serialization.WEIGHTS_NAME
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def replace(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


def with_nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[0] = float("inf")
    return t


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("groups.1.head_bias"), r"1 missing tensors: groups\.1\.head_bias"),
        (lambda t: t.update(extra=torch.ones(1)), "1 surplus tensors: extra"),
        (
            replace("groups.0.shared_w1", lambda t: t[:, :-1].clone()),
            r"groups\.0\.shared_w1 must have shape \[4, 7, 10\], got \[4, 6, 10\]",
        ),
        (replace("groups.0.in_bias", with_nan), r"groups\.0\.in_bias holds NaN or infinite"),
        (replace("groups.0.in_bias", lambda t: t.to(torch.int32)), "must be one of F64"),
        (replace("groups.0.in_bias", lambda t: t.double()), "all tensors must have one dtype"),
    ],
)
def test_bad_weights_are_refused(saved: Path, change: Callable, message: str) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        Fuser.from_pretrained(saved)


def test_weights_of_another_save_are_refused(saved: Path) -> None:
    path = saved / serialization.CONFIG_NAME
    data = json.loads(path.read_text())
    data["layer_map"] = [1, 1, 1]
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="come from different saves"):
        Fuser.from_pretrained(saved)


def test_truncated_weights_are_refused_at_every_tensor(saved: Path) -> None:
    path = saved / serialization.WEIGHTS_NAME
    whole = path.read_bytes()
    header_size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + header_size])
    ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    cuts = {0, 4, 8, 8 + header_size // 2, len(whole) - 1}
    cuts |= {8 + header_size + end for end in ends if 8 + header_size + end < len(whole)}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            Fuser.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply|is not valid JSON"),
        ('{"format_version": 1, "format_version": 1}', "duplicate keys: format_version"),
        ('{"format_version": NaN}', "NaN is not JSON"),
        ('{"format_version": 2}', "format_version must be 1, got 2"),
        ('{"format_version": 1}', r"FuserConfig\.receiver is missing"),
        (" " * (files.MAX_JSON_BYTES + 1), "must be at most"),
    ],
)
def test_bad_config_is_refused(saved: Path, text: str, message: str) -> None:
    (saved / serialization.CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        Fuser.from_pretrained(saved)


def test_absurd_sizes_are_refused_before_allocation(saved: Path) -> None:
    path = saved / serialization.CONFIG_NAME
    data = json.loads(path.read_text())
    data["hidden_size"] = 1 << 18  # would be terabytes
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="must have shape"):
        Fuser.from_pretrained(saved)


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no fuser directory at"):
        Fuser.from_pretrained(tmp_path / "nothing")
    (saved / serialization.WEIGHTS_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"fuser\.safetensors is missing"):
        Fuser.from_pretrained(saved)

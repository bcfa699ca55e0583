"""Fuser directories: fuser_config.json + fuser.safetensors, written atomically, read strictly."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import VARIANT_FIELDS, FuserConfig
from .parameters import parameter_shapes

if TYPE_CHECKING:
    from .fuser import Fuser

CONFIG_NAME = "fuser_config.json"
WEIGHTS_NAME = "fuser.safetensors"
FINGERPRINT_KEY = "c2c_ext.fuser"
MAX_JSON_BYTES = 4 << 20
WEIGHT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def save_fuser(fuser: Fuser, directory: str | os.PathLike) -> None:
    """Writes a fuser directory; see `Fuser.save_pretrained`."""
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"c2c_ext: save_directory must be a directory, got the file {path}"
        )
    # Cloned: safetensors refuses tensors that share memory, as tied parameters do.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in fuser.state_dict().items()
    }
    check_parameters(fuser.config, tensors)
    path.mkdir(parents=True, exist_ok=True)
    # The weights name the configuration they belong to, so that a directory caught between the two
    # replacements of an overwrite is refused and not silently mixed.
    # A single entry: safetensors writes several in no fixed order; equal fusers give equal files.
    metadata = {FINGERPRINT_KEY: _fingerprint(fuser.config)}
    text = fuser.config.to_json()
    write_atomically(
        {
            path / WEIGHTS_NAME: lambda temporary: save_file(tensors, temporary, metadata),
            path / CONFIG_NAME: lambda temporary: Path(temporary).write_text(text, "utf-8"),
        }
    )


def check_parameters(config: FuserConfig, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless `load_fuser` would take these parameters back."""
    expected = dict(parameter_shapes(config))
    check_names(tensors, expected, "the fuser")
    for name, tensor in tensors.items():
        check_shape(name, tensor.shape, expected[name], "the fuser")
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= set(WEIGHT_DTYPES.values()):
        raise ValueError(
            f"c2c_ext: the fuser: all parameters must have one dtype of "
            f"{', '.join(WEIGHT_DTYPES)}, got {', '.join(sorted(map(str, dtypes)))}"
        )
    check_finite(tensors.items(), "the fuser")


def load_fuser(directory: str | os.PathLike) -> Fuser:
    """Reads a fuser directory; see `Fuser.from_pretrained`."""
    from .fuser import Fuser

    path = existing_directory(directory)
    config = FuserConfig.from_dict(read_json(path / CONFIG_NAME))
    weights = existing_file(path / WEIGHTS_NAME)
    expected = dict(parameter_shapes(config))
    try:
        with safe_open(str(weights), framework="pt") as file:
            names = set(file.keys())
            check_names(names, expected.keys(), str(weights))
            dtypes = set()
            for name in sorted(names):
                header = file.get_slice(name)
                check_shape(name, header.get_shape(), expected[name], str(weights))
                dtype = header.get_dtype()
                if dtype not in WEIGHT_DTYPES:
                    raise ValueError(
                        f"c2c_ext: {weights}: {name} must be one of {', '.join(WEIGHT_DTYPES)}, "
                        f"got {dtype}"
                    )
                dtypes.add(dtype)
            if len(dtypes) > 1:
                raise ValueError(
                    f"c2c_ext: {weights}: all tensors must have one dtype, got {sorted(dtypes)}"
                )
            stamp = (file.metadata() or {}).get(FINGERPRINT_KEY)
            if stamp is not None and stamp != _fingerprint(config):
                raise ValueError(
                    f"c2c_ext: {weights} and {CONFIG_NAME} beside it come from different saves "
                    f"({stamp} and {_fingerprint(config)})"
                )
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"c2c_ext: {weights} is not a whole safetensors file: {error}") from error
    check_finite(tensors.items(), str(weights))
    return assemble(Fuser, config, tensors)


def assemble(fuser_class: type[Fuser], config: FuserConfig, tensors: dict[str, Tensor]) -> Fuser:
    """A fuser in eval mode whose parameters are ``tensors``; nothing is initialised first."""
    with torch.device("meta"):
        fuser = fuser_class(config)
    fuser.load_state_dict(tensors, assign=True)
    return fuser.eval()


def existing_directory(directory: str | os.PathLike) -> Path:
    """The directory as a Path, or a clear error."""
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"c2c_ext: no fuser directory at {path}")
    return path


def existing_file(path: Path) -> Path:
    """The path of a regular file, or a clear error."""
    if not path.is_file():
        raise FileNotFoundError(f"c2c_ext: {path} is missing or not a regular file")
    return path


def read_json(path: Path) -> Any:
    """Parses a small JSON file strictly: bounded size, no duplicate keys, no NaN or infinity."""
    size = existing_file(path).stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"c2c_ext: {path} must be at most {MAX_JSON_BYTES} bytes, got {size}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            seen = [key for key, _ in pairs]
            twice = sorted({key for key in seen if seen.count(key) > 1})
            raise ValueError(f"duplicate keys: {', '.join(twice)}")
        return data

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = path.read_bytes().decode("utf-8")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError(f"c2c_ext: {path} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"c2c_ext: {path} is not valid JSON: {error}") from error


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raises ValueError naming missing and surplus tensors."""
    found, expected = set(found), set(expected)
    for problem, names in (("missing", expected - found), ("surplus", found - expected)):
        if names:
            listed = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(f"c2c_ext: {where}: {len(names)} {problem} tensors: {listed}")


def check_shape(name: str, shape: Iterable[int], expected: Iterable[int], where: str) -> None:
    """Raises ValueError naming the tensor and both shapes."""
    if list(shape) != list(expected):
        raise ValueError(
            f"c2c_ext: {where}: {name} must have shape {list(expected)}, got {list(shape)}"
        )


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raises ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"c2c_ext: {where}: {name} holds NaN or infinite values")


def write_atomically(files: Mapping[Path, Callable[[str], Any]]) -> None:
    """Writes files beside their places, then moves all of them there.

    Each value is called with the name of a temporary file to write. Contents reach the disk before
    names do. If any write fails, every file is as it was; only a crash between two moves can leave
    some new and some old, each of them whole.
    """
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


def _fingerprint(config: FuserConfig) -> str:
    """Hash of what the weights depend on: shapes, layer map, depth, activation, variant."""
    data = json.loads(config.to_json())
    for side in ("receiver", "sharer"):
        data[side] = data[side]["kv_layers"]
    for training_only in ("dropout", "gate_init"):
        del data[training_only]
    # Fields of variants count only where they are used, so that a file written before a field
    # existed keeps its hash.
    for name in set(VARIANT_FIELDS) - set(config.variant()) - {"activation"}:
        del data[name]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

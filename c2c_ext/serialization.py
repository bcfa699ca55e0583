"""Fuser directories: fuser_config.json + fuser.safetensors, written atomically, read strictly.

Beside them stands README.md, the model card, which no reader looks at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import VARIANT_FIELDS, FuserConfig
from .messages import shown, shown_name
from .model_card import CARD_NAME, CardInfo, card_text, is_own_card
from .parameters import parameter_shapes

if TYPE_CHECKING:
    from .fuser import Fuser

CONFIG_NAME = "fuser_config.json"
WEIGHTS_NAME = "fuser.safetensors"
FINGERPRINT_KEY = "c2c_ext.fuser"
MAX_JSON_BYTES = 4 << 20
# What a directory may hold for `write_directory` to replace it, a model card of ours aside.
FUSER_FILE = re.compile(
    rf"{re.escape(CONFIG_NAME)}|{re.escape(WEIGHTS_NAME)}|projector_(config\.json|\d+\.(pt|json))"
)
WEIGHT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def save_fuser(
    fuser: Fuser,
    directory: str | os.PathLike,
    card: CardInfo | None = None,
    repo_id: str | None = None,
) -> None:
    """Writes a fuser directory; see `Fuser.save_pretrained`.

    ``repo_id`` is the Hub repository that the model card is written for.
    """
    check_card(card)
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(
            f"c2c_ext: save_directory must be a directory, got the file {path}"
        )
    tensors = host_tensors(fuser)
    # The weights name the configuration they belong to, so that a directory caught between the two
    # replacements of an overwrite is refused and not silently mixed.
    # A single entry: safetensors writes several in no fixed order; equal fusers give equal files.
    metadata = {FINGERPRINT_KEY: _fingerprint(fuser.config)}
    files: dict[Path, Callable[[str], Any]] = {
        path / WEIGHTS_NAME: lambda temporary: _save_tensors(tensors, temporary, metadata),
        path / CONFIG_NAME: _text_writer(fuser.config.to_json()),
    }
    readme = path / CARD_NAME
    if not os.path.lexists(readme) or is_own_card(readme):
        count = sum(t.numel() for t in tensors.values())
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        text = card_text(fuser.config, fuser.open_streams(), count, dtype, card, repo_id)
        files[readme] = _text_writer(text)
    elif card is not None:
        warnings.warn(
            f"c2c_ext: card is not written: {readme} was not written by c2c_ext and stays",
            stacklevel=3,
        )
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(files)


def check_card(card: CardInfo | None) -> None:
    """Raises TypeError for anything that is not what a model card is made from."""
    if card is not None and not isinstance(card, CardInfo):
        raise TypeError(f"c2c_ext: card must be a CardInfo, got {type(card).__name__}")


def host_tensors(fuser: Fuser) -> dict[str, Tensor]:
    """A checked copy of the fuser's parameters in the host's memory, each with its own storage."""
    # Cloned: safetensors refuses tensors that share memory, as tied parameters do.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in fuser.state_dict().items()
    }
    check_parameters(fuser.config, tensors)
    return tensors


def _text_writer(text: str) -> Callable[[str], Any]:
    # As bytes: the same file on every platform.
    return lambda temporary: Path(temporary).write_bytes(text.encode("utf-8"))


def _save_tensors(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk among others
        raise OSError(f"c2c_ext: {path} cannot be written: {error}") from error


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
    data = read_json(path / CONFIG_NAME)
    try:
        config = FuserConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"c2c_ext: {path / CONFIG_NAME}: {error}") from error
    tensors = _read_weights(path / WEIGHTS_NAME, config)
    check_finite(tensors.items(), str(path / WEIGHTS_NAME))
    return assemble(Fuser, config, tensors)


def _read_weights(path: Path, config: FuserConfig) -> dict[str, Tensor]:
    """The parameters of ``config`` from a safetensors file, everything but NaN checked.

    Nothing of a size that the file claims is allocated before it is known to be what ``config``
    asks for and no more than the file holds.
    """
    expected = dict(parameter_shapes(config))
    most = 8 + MAX_JSON_BYTES + 8 * config.num_parameters()  # float64 is the widest
    with open_regular(path, most) as weights:
        header = weights.read(8)
        header_size = struct.unpack("<Q", header)[0] if len(header) == 8 else 0
        if header_size > MAX_JSON_BYTES:
            raise ValueError(
                f"c2c_ext: {path} is not a whole safetensors file: its header must be at most "
                f"{MAX_JSON_BYTES} bytes, claims {header_size}"
            )
        text = weights.read(header_size)
        try:
            # The library's own look at the file comes first: it says best what a damaged one lacks.
            # By descriptor, so that it is the file whose size was checked.
            with safe_open(f"/proc/self/fd/{weights.fileno()}", framework="pt") as file:
                parse_json(text, f"the header of {path}")  # the library takes duplicate keys
                return _checked_tensors(file, config, expected, path)
        except (SafetensorError, UnicodeError) as error:
            raise ValueError(
                f"c2c_ext: {path} is not a whole safetensors file: {shown_name(str(error), 300)}"
            ) from error


def _checked_tensors(
    file: Any, config: FuserConfig, expected: dict[str, tuple[int, ...]], path: Path
) -> dict[str, Tensor]:
    names = set(file.keys())
    check_names(names, expected.keys(), str(path))
    dtypes = set()
    for name in sorted(names):
        header = file.get_slice(name)
        check_shape(name, header.get_shape(), expected[name], str(path))
        dtype = header.get_dtype()
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"c2c_ext: {path}: {name} must be one of {', '.join(WEIGHT_DTYPES)}, got {dtype}"
            )
        dtypes.add(dtype)
    if len(dtypes) > 1:
        raise ValueError(f"c2c_ext: {path}: all tensors must have one dtype, got {sorted(dtypes)}")
    stamp = (file.metadata() or {}).get(FINGERPRINT_KEY)
    if stamp is not None and stamp != _fingerprint(config):
        raise ValueError(
            f"c2c_ext: {path} and {CONFIG_NAME} beside it come from different saves "
            f"({shown_name(stamp)} and {_fingerprint(config)})"
        )
    # Cloned: the library's tensors are views of the mapped file. Overwriting the file would change
    # the fuser's numbers after they were checked, and truncating it would kill the process.
    return {name: file.get_tensor(name).clone() for name in names}


def assemble(fuser_class: type[Fuser], config: FuserConfig, tensors: dict[str, Tensor]) -> Fuser:
    """A fuser in eval mode whose parameters are ``tensors``; nothing is initialised first."""
    with torch.device("meta"):
        fuser = fuser_class(config)
    fuser.load_state_dict(tensors, assign=True)
    return fuser.eval()


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
            raise ValueError(f"duplicate keys: {_listed(twice)}")
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


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(shown_name, names[:4])) + (", ..." if len(names) > 4 else "")


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raises ValueError naming missing and surplus tensors."""
    found, expected = set(found), set(expected)
    for problem, names in (("missing", expected - found), ("surplus", found - expected)):
        if names:
            raise ValueError(f"c2c_ext: {where}: {len(names)} {problem} tensors: {_listed(names)}")


def check_shape(name: str, shape: Iterable[int], expected: Iterable[int], where: str) -> None:
    """Raises ValueError naming the tensor and both shapes."""
    if list(shape) != list(expected):
        raise ValueError(
            f"c2c_ext: {where}: {name} must have shape {list(expected)}, got {shown(list(shape))}"
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


def write_directory(directory: Path, write: Callable[[Path], Any], *, overwrite: bool) -> None:
    """Writes a directory beside its place, then moves it there: it appears whole or not at all.

    ``write`` is called with an empty temporary directory. A directory that is replaced is moved
    aside first and moved back should the move fail.

    Raises:
        NotADirectoryError: ``directory`` is a file.
        FileExistsError: it holds files and ``overwrite`` is false, or it holds anything that is
            not a fuser's.
    """
    path = directory.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"c2c_ext: {path} must be a directory, it is a file")
    held = sorted(path.iterdir()) if path.exists() else []
    if held and not overwrite:
        raise FileExistsError(
            f"c2c_ext: {path} is not empty; with overwrite a fuser there is replaced"
        )
    foreign = [
        entry.name
        for entry in held
        if not (
            (FUSER_FILE.fullmatch(entry.name) and entry.is_file())
            or (entry.name == CARD_NAME and is_own_card(entry))
        )
    ]
    if foreign:
        listed = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise FileExistsError(
            f"c2c_ext: {path} is not replaced, it holds what is not a fuser's: {listed}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(8)
    temporary, aside = (path.with_name(f".{path.name}.{mark}.{end}") for end in ("new", "old"))
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if held:
            os.rename(path, aside)
        try:
            os.rename(temporary, path)  # also over an empty directory
        except OSError:
            if held:
                os.rename(aside, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if held:
        shutil.rmtree(aside, ignore_errors=True)


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

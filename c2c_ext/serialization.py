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
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import VARIANT_FIELDS, FuserConfig
from .files import (
    MAX_JSON_BYTES,
    existing_directory,
    listed,
    open_regular,
    parse_json,
    read_json,
    write_atomically,
)
from .messages import shown, shown_name
from .model_card import CARD_NAME, CardInfo, card_text, is_own_card
from .parameters import parameter_shapes

if TYPE_CHECKING:
    from .fuser import Fuser

CONFIG_NAME = "fuser_config.json"
WEIGHTS_NAME = "fuser.safetensors"
FINGERPRINT_KEY = "c2c_ext.fuser"
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
    check_has_numbers(fuser)
    # Cloned: safetensors refuses tensors that share memory, as tied parameters do.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in fuser.state_dict().items()
    }
    check_parameters(fuser.config, tensors)
    return tensors


def check_has_numbers(fuser: Fuser) -> None:
    """Raises ValueError if a parameter is on the meta device."""
    for name, t in fuser.state_dict().items():
        if t.is_meta:
            raise ValueError(
                f"c2c_ext: the fuser holds no numbers to save: its {name} is on the meta device"
                + (" (it was loaded for inference only)" if fuser.inference_only else "")
            )


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


def load_config(directory: Path) -> FuserConfig:
    """The configuration of a fuser directory."""
    data = read_json(directory / CONFIG_NAME)
    try:
        return FuserConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"c2c_ext: {directory / CONFIG_NAME}: {error}") from error


def load_fuser(directory: str | os.PathLike) -> Fuser:
    """Reads a fuser directory; see `Fuser.from_pretrained`."""
    from .fuser import Fuser

    path = existing_directory(directory)
    config = load_config(path)
    weights = path / WEIGHTS_NAME
    with open_weights(weights, config) as opened:
        # Cloned: the library's tensors are views of the mapped file. Overwriting the file would
        # change the fuser's numbers after they were checked, and truncating it would kill the
        # process.
        tensors = {name: t.clone() for name, t in opened()}
    check_finite(tensors.items(), str(weights))
    return assemble(Fuser, config, tensors)


Reader = Callable[..., Iterator[tuple[str, Tensor]]]


@contextmanager
def open_weights(path: Path, config: FuserConfig) -> Iterator[Reader]:
    """Checks everything but the numbers of a safetensors file; gives a function that reads it.

    Nothing of a size that the file claims is allocated before it is known to be what ``config``
    asks for and no more than the file holds. What is given is called without argument, or with
    (shape group, stream): (name, views of the mapped file) of all parameters whole, or of one
    stream under their names within its group. The file is mapped anew for every call, until its
    iterator ends.
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
        # By descriptor, so that it is the file whose size was checked.
        own = f"/proc/self/fd/{weights.fileno()}"

        def read(group: int | None = None, stream: int = 0) -> Iterator[tuple[str, Tensor]]:
            with safe_open(own, framework="pt") as file:
                for name, shape in expected.items():
                    _, number, short = name.split(".")
                    if group is None:
                        tensor = file.get_tensor(name)
                        check_shape(name, tensor.shape, shape, str(path))
                        yield name, tensor
                    elif int(number) == group:
                        tensor = file.get_slice(name)[stream : stream + 1]
                        check_shape(name, tensor.shape, (1, *shape[1:]), str(path))
                        yield short, tensor[0]

        try:
            # The library's own look at the file comes first: it says best what a damaged one lacks.
            with safe_open(own, framework="pt") as file:
                parse_json(text, f"the header of {path}")  # the library takes duplicate keys
                _check_header(file, config, expected, path)
            yield read
        except (SafetensorError, UnicodeError) as error:
            raise ValueError(
                f"c2c_ext: {path} is not a whole safetensors file: {shown_name(str(error), 300)}"
            ) from error


def _check_header(
    file: Any, config: FuserConfig, expected: dict[str, tuple[int, ...]], path: Path
) -> None:
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


def assemble(fuser_class: type[Fuser], config: FuserConfig, tensors: dict[str, Tensor]) -> Fuser:
    """A fuser in eval mode whose parameters are ``tensors``; nothing is initialised first."""
    with torch.device("meta"):
        fuser = fuser_class(config)
    fuser.load_state_dict(tensors, assign=True)
    return fuser.eval()


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Raises ValueError naming missing and surplus tensors."""
    found, expected = set(found), set(expected)
    for problem, names in (("missing", expected - found), ("surplus", found - expected)):
        if names:
            raise ValueError(f"c2c_ext: {where}: {len(names)} {problem} tensors: {listed(names)}")


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

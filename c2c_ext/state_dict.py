"""A state dict that torch.save wrote, read as data: nothing runs, and sizes are known first."""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import open_regular
from .messages import shown
from .serialization import WEIGHT_DTYPES, check_finite, check_names, check_shape

# What an archive may hold beside its numbers: the pickle, names, alignment.
MAX_PICKLE_BYTES = 1 << 20
MAX_OVERHEAD_BYTES = 4 << 20
# All that a state dict names. weights_only allows much more, bytearray(2**40) among it.
STATE_DICT_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)


def read_state_dict(
    file: Path, expected: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of a state dict, with exactly the expected names and shapes.

    Args:
        file: written by ``torch.save``, as an archive (the form since torch 1.6).
        expected: name -> shape.
        ignored: names that may be there and are left out.

    Raises:
        FileNotFoundError: no regular file.
        ValueError: anything missing, surplus, misshapen, NaN, or more than a plain state dict.
    """
    archive = _checked_archive(file, 8 * sum(map(math.prod, expected.values())))
    try:
        state = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make the unpickler fail in any way
        # Not the loader's own text, which advises to load without weights_only.
        raise ValueError(
            f"c2c_ext: {file} is not a state dict of plain tensors: the weights_only loader "
            f"refused it ({type(error).__name__})"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"c2c_ext: {file} must hold a dict of tensors, got {type(state).__name__}")
    state = {name: t for name, t in state.items() if name not in ignored}
    check_names(state, expected, str(file))
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in WEIGHT_DTYPES.values():
            raise ValueError(
                f"c2c_ext: {file}: {name} must be a tensor of dtype {', '.join(WEIGHT_DTYPES)}, "
                f"got {getattr(tensor, 'dtype', type(tensor).__name__)}"
            )
        # An expanded tensor is small on disk and huge once it is written out.
        if not tensor.is_contiguous():
            raise ValueError(f"c2c_ext: {file}: {name} must be a dense, contiguous tensor")
        check_shape(name, tensor.shape, expected[name], str(file))
    state = {name: tensor.detach() for name, tensor in state.items()}
    check_finite(state.items(), str(file))
    return state


def _checked_archive(file: Path, number_bytes: int) -> io.BytesIO:
    """A torch.save archive's entries, looked at and packed anew.

    Read once, so that what was checked is what is loaded; and torch's own zip reader, which may
    see other entries in a crafted file than Python's, only sees an archive written here.

    Args:
        number_bytes: what the tensors can need at most.
    """
    damaged = f"c2c_ext: {file} is not a state dict of plain tensors: not a whole zip archive"
    with open_regular(file, number_bytes + MAX_OVERHEAD_BYTES) as raw:
        try:
            with zipfile.ZipFile(raw) as archive:
                entries = archive.infolist()
                _check_entries(file, entries, os.fstat(raw.fileno()).st_size)
                contents = {entry.filename: archive.read(entry) for entry in entries}
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(damaged) from error
        except ValueError as error:
            raise error if str(error).startswith("c2c_ext") else ValueError(damaged) from error
    for name, data in contents.items():
        if name.endswith("/data.pkl"):
            _check_pickle(file, data)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in list(contents):
            archive.writestr(name, contents.pop(name))
    packed.seek(0)
    return packed


def _check_entries(file: Path, entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuses anything but an uncompressed zip, which cannot unpack to more than it is."""
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(
            f"c2c_ext: {file} must be an uncompressed archive; its {size} bytes claim to hold "
            f"{unpacked}"
        )
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError(f"c2c_ext: {file} must not hold two entries of one name")


def _check_pickle(file: Path, data: bytes) -> None:
    """Refuses a pickle that is large or names more than a state dict does."""
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(
            f"c2c_ext: {file}: data.pkl must be at most {MAX_PICKLE_BYTES} bytes, got {len(data)}"
        )
    try:
        names = {
            str(argument)
            for opcode, argument, _ in pickletools.genops(data)
            # Protocol 2, which torch.save writes, names things with GLOBAL alone.
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
        }
    except Exception as error:  # as with the loader: of any kind
        raise ValueError(
            f"c2c_ext: {file} is not a state dict of plain tensors: its pickle is damaged "
            f"({type(error).__name__})"
        ) from None
    for name in sorted(names):
        if not STATE_DICT_GLOBALS.fullmatch(name):
            raise ValueError(
                f"c2c_ext: {file} is not a state dict of plain tensors: it names {shown(name)}"
            )

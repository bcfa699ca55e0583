"""Is a shared library whole? The loader maps one that is cut short and then dies of SIGBUS."""

from __future__ import annotations

import os
import struct
from importlib.util import find_spec
from pathlib import Path

_ELF_64_LITTLE = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16x16xQ12x2xHH6x")  # e_phoff, e_phentsize, e_phnum
_SEGMENT = struct.Struct("<I4xQ16xQ16x")  # p_type, p_offset, p_filesz
_LOADED = 1  # PT_LOAD


def check_whole(library: Path) -> None:
    """Refuses an ELF file that ends before what its program headers have the loader map.

    Whatever else is wrong with it, or that it is another format, is the loader's to say.

    Raises:
        OSError: the file is cut short, or cannot be read; names it and both sizes.
    """
    with library.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_HEADER.size)
        if len(start) < _HEADER.size or not start.startswith(_ELF_64_LITTLE):
            return
        offset, each, count = _HEADER.unpack(start)
        if each != _SEGMENT.size:
            return
        needed = offset + count * each
        if needed <= size:
            file.seek(offset)
            for kind, begin, length in _SEGMENT.iter_unpack(file.read(count * each)):
                needed = max(needed, begin + length if kind == _LOADED else 0)
    if size < needed:
        raise OSError(f"{library.name} is cut short: {size} bytes, its headers need {needed}")


def check_whole_module(module: str, beside: str) -> None:
    """As `check_whole`, of a compiled module and of a library in its directory, if they are there.

    Raises:
        OSError: as `check_whole`.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return
    for library in (Path(spec.origin), Path(spec.origin).with_name(beside)):
        if library.exists():
            check_whole(library)

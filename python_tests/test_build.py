"""The compiled parts: what they report, and that they bind to torch's stable ABI alone."""

import re
import struct
from pathlib import Path

import pytest
import torch

import c2c_ext
from c2c_ext import _C

MODULE = Path(_C.__file__)
OPS = MODULE.parent / "libc2c_ext.so"
CUDA = MODULE.parent / "libc2c_ext_cuda.so"  # only where nvcc was
LIBRARIES = {"ops": OPS, "module": MODULE} | ({"cuda": CUDA} if CUDA.exists() else {})


def undefined_symbols(path: Path) -> list[str]:
    """Names of the undefined dynamic symbols of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    offset = struct.unpack_from("<Q", data, 40)[0]
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    names = []
    for section in sections:
        if section[1] != 11:  # SHT_DYNSYM
            continue
        start, length, strings = section[4], section[5], sections[section[6]][4]
        for entry in range(start, start + length, section[9]):
            name, _, _, index = struct.unpack_from("<IBBH", data, entry)
            if index == 0 and name:
                end = data.index(b"\0", strings + name)
                names.append(data[strings + name : end].decode())
    return names


def torch_cpp_symbols(names: list[str]) -> list[str]:
    """Those that are C++ names in torch's namespaces."""
    return [n for n in names if n.startswith("_Z") and re.search(r"N?K?(2at|3c10|5torch)\d", n)]


def python_symbols(names: list[str]) -> list[str]:
    """Those of CPython's C API."""
    return [n for n in names if re.match(r"_?Py[A-Z_]", n)]


@pytest.mark.parametrize("path", LIBRARIES.values(), ids=LIBRARIES.keys())
def test_no_cpp_symbol_of_torch_is_undefined(path: Path) -> None:
    assert torch_cpp_symbols(undefined_symbols(path)) == []


def test_the_ops_need_torch_but_not_python() -> None:
    names = undefined_symbols(OPS)
    assert "torch_call_dispatcher" in names  # the C shims are there
    assert python_symbols(names) == []
    assert "PyDict_New" in python_symbols(undefined_symbols(MODULE))  # the check can fail


def test_the_symbol_check_can_fail() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    found = torch_cpp_symbols(undefined_symbols(library))
    assert any("2at" in n for n in found) and any("3c10" in n for n in found)


def test_build_info_says_what_was_built() -> None:
    info = c2c_ext.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "flags",
        "cuda_architectures",
        "cuda_dispatch",
        "abi_target",
        "built_with_torch",
        "cpu_instruction_set",
    }
    assert info["version"] == c2c_ext.__version__
    assert info["abi_target"] == "2.10"
    assert info["cpu_instruction_set"] in ("baseline", "avx2", "avx512", "avx512bf16")
    assert "-O" in info["flags"]
    assert (info["cuda_architectures"] != []) == CUDA.exists()


def test_the_ops_are_registered() -> None:
    schema = str(torch.ops.c2c.fuse_.default._schema)
    assert schema.startswith("c2c::fuse_(Tensor(a!)[] out_keys, Tensor(b!)[] out_values")

"""Libraries that are cut short are refused before the loader maps them and dies of SIGBUS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from c2c_ext import _C, cuda_library
from c2c_ext.shared_library import check_whole

MODULE = Path(_C.__file__)
LIBRARY = MODULE.with_name("libc2c_ext.so")


@pytest.mark.parametrize("library", [MODULE, LIBRARY], ids=lambda path: path.stem)
def test_whole_libraries_pass(library: Path) -> None:
    check_whole(library)


@pytest.mark.parametrize("text", [b"", b"\x7fELF", b"no library" * 20, b"\x7fELF\x01\x01" * 20])
def test_other_files_are_left_to_the_loader(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.so").write_bytes(text)
    check_whole(tmp_path / "x.so")


@pytest.mark.parametrize("part", [0.001, 0.25, 0.5, 0.8])
def test_a_library_that_is_cut_short_is_refused_with_both_sizes(tmp_path: Path, part: float):
    data = LIBRARY.read_bytes()
    size = int(part * len(data))
    (tmp_path / "x.so").write_bytes(data[:size])
    with pytest.raises(OSError, match=rf"x\.so is cut short: {size} bytes, its headers need \d+"):
        check_whole(tmp_path / "x.so")


def test_cuda_kernels_that_are_cut_short_are_a_reason_not_to_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    data = LIBRARY.read_bytes()
    (tmp_path / "libc2c_ext_cuda.so").write_bytes(data[: len(data) // 2])
    reason = cuda_library.load(tmp_path)
    assert reason.startswith("libc2c_ext_cuda.so cannot be loaded (libc2c_ext_cuda.so is cut short")
    assert "C2C_EXT_CUDA=1" in reason


@pytest.mark.parametrize("broken", [MODULE.name, LIBRARY.name])
def test_an_import_says_which_library_is_cut_short(tmp_path: Path, broken: str) -> None:
    package = tmp_path / "c2c_ext"
    package.mkdir()
    for path in MODULE.parent.iterdir():
        if path.name == broken:
            (package / broken).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif path.is_file():
            (package / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-c", "import c2c_ext"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done  # not a signal
    assert "ImportError: c2c_ext: the compiled module c2c_ext._C cannot be loaded" in done.stderr
    assert f"What is wrong: {broken} is cut short" in done.stderr

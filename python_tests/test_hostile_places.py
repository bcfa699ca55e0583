"""Links, FIFOs, devices and places that cannot be read or written: no waiting, nothing lost."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_fuser
from hostile import FILES, LOADERS, good_directories, load, refused

from c2c_ext import Fuser, files, serialization


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    return good_directories(tmp_path)


@pytest.fixture(autouse=True)
def does_not_block() -> Iterator[None]:
    """A reader that waits, as for a FIFO's writer, ends the run."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def make_fifo(path: Path, spare: Path) -> None:
    os.mkfifo(path)


def make_link_to_fifo(path: Path, spare: Path) -> None:
    os.mkfifo(spare)
    path.symlink_to(spare)


ODD_FILES = {
    "fifo": make_fifo,
    "link to a fifo": make_link_to_fifo,
    "directory": lambda path, spare: path.mkdir(),
    "link to a directory": lambda path, spare: path.symlink_to(path.parent),
    "link to a device": lambda path, spare: path.symlink_to("/dev/zero"),
    "broken link": lambda path, spare: path.symlink_to(spare),
    "link to itself": lambda path, spare: path.symlink_to(path),
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_what_is_no_regular_file_is_refused_without_waiting(directories, tmp_path, kind, name, odd):
    (directories[kind] / name).unlink()
    ODD_FILES[odd](directories[kind] / name, tmp_path / "spare")
    assert "is missing or not a regular file" in refused(directories[kind], kind)


def test_a_file_that_becomes_a_fifo_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(files, "existing_file", lambda path: path)
    with pytest.raises(FileNotFoundError, match="not a regular file"):
        files.read_json(tmp_path / "fifo")


def test_a_file_that_grows_is_read_to_its_limit(monkeypatch):
    """/proc says that its files are empty."""
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="must be at most 10 bytes"):
        files.read_json(Path("/proc/self/status"))


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_links_to_regular_files_are_followed(directories, tmp_path, kind, name):
    """The Hugging Face cache is made of them."""
    shutil.move(directories[kind] / name, tmp_path / "blob")
    (directories[kind] / name).symlink_to(tmp_path / "blob")
    assert isinstance(load(directories[kind], kind), Fuser)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the rights of root, which may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("kind", LOADERS)
def test_an_unreadable_directory_is_an_os_error(directories, kind):
    directories[kind].chmod(0)
    with unprivileged(), pytest.raises(OSError, match=r"ermission denied|no fuser directory"):
        LOADERS[kind](directories[kind])
    directories[kind].chmod(0o700)


@pytest.mark.parametrize("place", [None, 3, b"/tmp", ["a"]])
@pytest.mark.parametrize("kind", LOADERS)
def test_a_directory_that_is_no_path_is_refused(kind, place):
    with pytest.raises(
        TypeError,
        match=r"c2c_ext: (a directory|directory_or_repo_id) must be a (str|path) or .*, got",
    ):
        LOADERS[kind](place)


@pytest.mark.parametrize("place", ["a\0b", "", "x" * 5000, "\ud800"])
@pytest.mark.parametrize("kind", LOADERS)
def test_an_impossible_path_is_an_os_error(kind, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OSError, ValueError)):
        LOADERS[kind](place)


# ---- saving --------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["fuser_config.json", "fuser.safetensors"])
def test_saving_replaces_a_link_and_not_what_it_points_to(directories, tmp_path, name):
    place, target = directories["ours"], tmp_path / "blob"
    shutil.move(place / name, target)
    (place / name).symlink_to(target)
    before = target.read_bytes()
    make_fuser(seed=5).double().save_pretrained(place)
    assert target.read_bytes() == before
    assert not (place / name).is_symlink()
    assert Fuser.from_pretrained(place).groups[0].in_bias.dtype == torch.float64


@pytest.mark.parametrize("name", ["fuser_config.json", "fuser.safetensors"])
def test_saving_over_a_directory_is_refused_before_anything_is_written(directories, name):
    place = directories["ours"]
    (place / name).unlink()
    (place / name).mkdir()
    before = contents(place)
    with pytest.raises(IsADirectoryError, match=r"c2c_ext: .* is a directory, not a file"):
        make_fuser(seed=5).save_pretrained(place)
    assert contents(place) == before


def test_a_full_disk_leaves_the_old_fuser(directories):
    """A limit on file size fails the write itself, inside safetensors."""
    place = directories["ours"]
    before = contents(place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"c2c_ext: .*fuser\.safetensors.* cannot be written"):
            make_fuser(seed=5).save_pretrained(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(place) == before


@pytest.mark.parametrize("step", ["_save_tensors", "_fingerprint"])
def test_an_interrupt_leaves_the_old_fuser(directories, monkeypatch, step):
    place = directories["ours"]
    before = contents(place)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serialization, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_fuser(seed=5).save_pretrained(place)
    assert contents(place) == before


def test_an_unwritable_directory_is_an_os_error(directories):
    place = directories["ours"]
    before = contents(place)
    for directory in (place, place.parent):
        directory.chmod(0o555)
    fuser = make_fuser(seed=5)
    try:
        with unprivileged(), pytest.raises(OSError):
            fuser.save_pretrained(place)
    finally:
        for directory in (place, place.parent):
            directory.chmod(0o755)
    assert contents(place) == before

"""torch.ops.c2c_emulated: the CUDA kernels run by the CPU, built from the checkout for the tests.

C2C_EMULATED_LIBRARY names a library to load in place of building one (sanitizers, mutants).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from conftest import OP_ARGUMENTS, KVPairs, clone
from torch import Tensor

from c2c_ext import Fuser, ops
from c2c_ext.packed import PackedGroup

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulated"
TARGET = "c2c_ext_emulated"


def tool(name: str) -> str:
    """Path of a build tool, on PATH or beside this Python."""
    places = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])
    found = shutil.which(name, path=places)
    assert found is not None, f"the emulated kernels need {name} to build: pip install {name}"
    return found


def build() -> Path:
    """Brings the library up to date, and returns it."""
    configure = ["-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DC2C_EXT_CUDA=0"]
    for arguments in (configure, ["--build", BUILD, "--target", TARGET]):
        done = subprocess.run([tool("cmake"), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / f"lib{TARGET}.so"


@functools.cache
def load() -> Path:
    """Registers ``torch.ops.c2c_emulated``; returns the library."""
    given = os.environ.get("C2C_EMULATED_LIBRARY")
    library = Path(given) if given else build()
    torch.ops.load_library(library)
    return library


def rows_of(panels: Tensor, rows: int, cols: int) -> Tensor:
    """``[G, rows, cols]``, as a GPU has it, of the CPU's panels (`packed.to_panels`)."""
    count, blocks, pairs, panel, pair = panels.shape
    plain = panels.permute(0, 1, 3, 2, 4).reshape(count, blocks * panel, pairs * pair)
    return plain[:, :rows, :cols].contiguous()


def arguments_of(
    group: PackedGroup,
    out: KVPairs,
    base: KVPairs,
    sharer: KVPairs,
    packed: object,
    token_map: Tensor | None = None,
    accumulate: bool = False,
) -> dict[str, object]:
    """The op's arguments by name, for one shape group packed for the CPU."""
    values = ops.group_arguments(group, out, base, sharer, token_map, packed, accumulate)
    arguments = dict(zip(OP_ARGUMENTS, values, strict=True))
    h, m, width = group.in_bias.shape[1], group.inner, group.receiver_shape.width
    inputs = group.sharer_shape.width + (width if group.reads_receiver else 0)
    weighting = h if group.head_bias.shape[1] else 0
    folded = len(group.deep_w2) == len(group.deep_w1)
    shapes = {
        "in_weight": (h, inputs),
        "w1": (m, h),
        "w2": (h, m),
        "branch_w1": (m + weighting, h),
        "out_weight": (width, m + h if folded else h),
    }
    for name, shape in shapes.items():
        arguments[name] = rows_of(arguments[name], *shape)
    for name, shape in (("deep_w2", (h, m)), ("deep_w1", (m, h))):
        arguments[name] = [rows_of(t, *shape) for t in arguments[name]]
    return arguments


def calls(
    fuser: Fuser,
    out: KVPairs,
    base: KVPairs,
    sharer: KVPairs,
    token_map: Tensor | None = None,
    accumulate: bool = False,
) -> Iterator[dict[str, object]]:
    """The arguments of one call per shape group."""
    packed = fuser.packed(base[0][0].dtype, torch.device("cpu"))
    for group in packed.groups:
        yield arguments_of(group, out, base, sharer, packed, token_map, accumulate)


def run_op(
    fuser: Fuser,
    base: KVPairs,
    sharer: KVPairs,
    token_map: Tensor | None = None,
    out: KVPairs | None = None,
    accumulate: bool = False,
) -> KVPairs:
    """As `conftest.run_op`, through the emulated kernels."""
    out = clone(base) if out is None else out
    load()
    with torch.no_grad():
        for arguments in calls(fuser, out, base, sharer, token_map, accumulate):
            torch.ops.c2c_emulated.fuse_(*arguments.values())
    return out

"""Golden data (golden/FORMAT.md): loader, generated weights, and fusers built from them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from c2c_ext import Fuser, FuserConfig
from c2c_ext.model_kv import KVShape, ModelKV

DIRECTORY = Path(__file__).parent / "golden"
EVAL_FILES = sorted(path.name for path in DIRECTORY.glob("eval_*.safetensors"))
TRAIN_FILES = sorted(path.name for path in DIRECTORY.glob("train_*.safetensors"))
REAL_FILE = "real_2x64_8x128_h1024.safetensors"
KINDS = ("key", "value")
# FuserGroup parameter of every published name, after "key_" or "value_"; {i} numbers the block.
_BLOCKS = {"mlp1": "shared", "scalar_mlp2": "weight", "proj_mlp2": "proj"}
_MAPS = {"in": "in", "proj_out": "out", "scalar_head": "head"}


@dataclass(frozen=True)
class GoldenFile:
    """One file: its ``meta`` object and its tensors."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def case(self, index: int) -> dict[str, Tensor]:
        """Tensors of case ``index`` without their prefix."""
        prefix = f"case{index}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def weights(self) -> dict[str, Tensor]:
        """The state dict; generated where the file does not store it."""
        if self.meta["kind"] == "real_shape":
            return generated_weights(self.meta)
        return {n.removeprefix("w."): t for n, t in self.tensors.items() if n.startswith("w.")}


@functools.cache
def load(name: str) -> GoldenFile:
    """A golden file, by its path below the golden directory."""
    with safe_open(DIRECTORY / name, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        return GoldenFile(meta, {key: file.get_tensor(key) for key in file.keys()})


def cases(names: list[str]) -> list[tuple[str, int]]:
    """(file, case index) of all cases of these files."""
    return [(name, index) for name in names for index in range(len(load(name).meta["cases"]))]


def fuser_config(meta: dict[str, Any]) -> FuserConfig:
    """Configuration of the one-layer fuser of a file."""
    c = meta["config"]
    return FuserConfig(
        ModelKV("receiver", "", (KVShape(c["Ht"], c["Dt"]),)),
        ModelKV("sharer", "", (KVShape(c["Hs"], c["Ds"]),)),
        (0,),
        hidden_size=c["hidden"],
        intermediate_size=c["intermediate"],
        depth=c["num_layers"],
        dropout=0.0,
    )


def place(name: str) -> tuple[str, tuple[int, ...]]:
    """(FuserGroup parameter, index into it) of a published state-dict name of a one-layer fuser."""
    kind, _, rest = name.partition("_")
    stream = KINDS.index(kind)
    if rest == "gate_logit":
        return "gate_logit", (stream,)
    parts = rest.split(".")
    if parts[0] in _MAPS:
        return f"{_MAPS[parts[0]]}_{parts[1]}", (stream,)
    block, number, weight = _BLOCKS[parts[0]], int(parts[2]), parts[3]
    return f"{block}_{weight}", (stream, number) if block == "proj" else (stream,)


def build_fuser(file: GoldenFile, case: int, dtype: torch.dtype) -> Fuser:
    """The fuser of a case: the file's weights with the case's gate logits."""
    fuser = Fuser(fuser_config(file.meta)).to(dtype)
    state = {n: t for n, t in file.weights().items() if n != "gate_temperature"}
    for kind in KINDS:
        logit = file.case(case).get(f"{kind}_gate_logit")
        if logit is None:  # the real-shape file keeps its logits in meta
            value = file.meta["cases"][case][f"{kind}_gate_logit"]
            logit = torch.tensor(value, dtype=torch.float64)
        state[f"{kind}_gate_logit"] = logit
    filled = 0
    with torch.no_grad():
        for name, tensor in state.items():
            attribute, index = place(name)
            parameter = getattr(fuser.groups[0], attribute)[index]
            assert parameter.shape == tensor.shape, name
            parameter.copy_(tensor)
            filled += tensor.numel()
    assert filled == sum(p.numel() for p in fuser.parameters())
    return fuser


@functools.cache
def _generated(salt: str, name: str, count: int) -> np.ndarray:
    start = int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode("ascii")).digest()[:8], "little")
    with np.errstate(over="ignore"):
        x = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    if name.endswith("norm.weight"):
        return (24 + (x >> np.uint64(60)).astype(np.float64)) / 32
    exponent = -4
    if name.endswith("scalar_head.weight"):
        exponent = -2
    elif name.endswith("proj_out.weight"):
        exponent = -3
    k = (x >> np.uint64(56)).astype(np.float64)
    return (2 * k - 255) / 256 * 2.0**exponent


def generated_weights(meta: dict[str, Any]) -> dict[str, Tensor]:
    """A real-shape file's weights (FORMAT.md section 4), float64, checked by its spot values."""
    c = meta["config"]
    h, m, width = c["hidden"], c["intermediate"], c["Ht"] * c["Dt"]
    shapes: dict[str, tuple[int, ...]] = {}
    for kind in KINDS:
        shapes[f"{kind}_in.weight"] = (h, c["Hs"] * c["Ds"] + width)
        shapes[f"{kind}_in.bias"] = (h,)
        shapes[f"{kind}_proj_out.weight"], shapes[f"{kind}_proj_out.bias"] = (width, h), (width,)
        shapes[f"{kind}_scalar_head.weight"] = (c["Ht"], h)
        shapes[f"{kind}_scalar_head.bias"] = (c["Ht"],)
        blocks = [("mlp1.blocks.0", m), ("scalar_mlp2.blocks.0", h)]
        blocks += [(f"proj_mlp2.blocks.{i}", m) for i in range(c["num_layers"] - 2)]
        for block, inner in blocks:
            shapes[f"{kind}_{block}.norm.weight"] = (h,)
            shapes[f"{kind}_{block}.w1.weight"] = (inner, h)
            shapes[f"{kind}_{block}.w2.weight"] = (h, inner)
    assert shapes.keys() == meta["spot_values"].keys()
    weights = {}
    for name, shape in shapes.items():
        values = _generated(meta["salt"], name, math.prod(shape))
        assert [values[0], values[-1], values.sum()] == meta["spot_values"][name], name
        weights[name] = torch.from_numpy(values).reshape(shape)
    return weights

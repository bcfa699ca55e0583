"""PackedFuser: the inference form of a fuser. Closed streams dropped, linear maps folded.

What folds, exactly: each norm's gain into the map behind it; the two maps that read the shared
block's output into one; the last W2 of a branch into that branch's output map (the
projection's only where that adds no work). Folded in float64 and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import KINDS
from .model_kv import KVShape

if TYPE_CHECKING:
    from .config import FuserConfig
    from .fuser import Fuser, FuserGroup
    from .reference import StreamWeights


@dataclass
class PackedGroup:
    """The open streams of one shape group: ``num_keys`` key streams, then the value streams."""

    layers: list[int]  # receiver layer of each stream
    sources: list[int]  # sharer layer of each stream
    num_keys: int
    sharer_shape: KVShape
    receiver_shape: KVShape
    inner: int  # of the projection's blocks
    reads_receiver: bool
    # Matrices are written as [G, rows, cols] here; the CPU has them in panels (`to_panels`).
    in_weight: Tensor  # [G, hidden, sharer width + receiver width], or sharer width alone
    in_bias: Tensor  # [G, hidden]
    w1: Tensor  # [G, inner, hidden], shared block
    w2: Tensor  # [G, hidden, inner]
    branch_w1: Tensor  # [G, inner + hidden, hidden]: first projection block, then weighting;
    # [G, inner, hidden] without weighting
    deep_w2: list[Tensor]  # [G, hidden, inner] of every projection block that is not folded
    deep_w1: list[Tensor]  # [G, inner, hidden] of every projection block but the first
    out_weight: (
        Tensor  # [G, width, inner + hidden] if the last W2 is folded, else [G, width, hidden]
    )
    out_bias: Tensor  # [G, width]
    head_weight: Tensor  # [G, heads, hidden + hidden], reads [z1 ; act]; [G, 0, 0] without
    head_bias: Tensor  # [G, heads]; [G, 0] without

    def tensors(self) -> list[Tensor]:
        """All weights."""
        return [
            *(self.in_weight, self.in_bias, self.w1, self.w2, self.branch_w1),
            *(*self.deep_w2, *self.deep_w1),
            *(self.out_weight, self.out_bias, self.head_weight, self.head_bias),
        ]


@dataclass
class PackedFuser:
    """Packed groups with at least one open stream, and what the op needs beside them."""

    groups: list[PackedGroup]
    activation: str
    integration: str

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(t.nbytes for group in self.groups for t in group.tensors())


PANEL = 16  # rows of one panel
# Not matrices of a product: kept as they are, in the dtype that sums are in.
VECTORS = ("in_bias", "out_bias", "head_weight", "head_bias")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, biases and the head for caches of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_panels(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows, cols]`` as the CPU kernels read it, rounded to ``dtype``.

    ``[ceil(rows / 16), ceil(cols / pair), 16, pair]``, the rest filled with zeros: 16 outputs
    side by side for every input; bfloat16 in pairs of inputs (csrc/cpu/panel_gemm.h).
    """
    pair = 2 if dtype == torch.bfloat16 else 1
    rows, cols = matrix.shape
    padded = torch.nn.functional.pad(matrix.to(dtype), (0, -cols % pair, 0, -rows % PANEL))
    return padded.view(-(-rows // PANEL), PANEL, -(-cols // pair), pair).transpose(1, 2)


def pack_fuser(fuser: Fuser, dtype: torch.dtype, device: torch.device) -> PackedFuser:
    """Folds and stacks the open streams of ``fuser`` for caches of ``dtype`` on ``device``.

    Raises:
        ValueError: the fuser has no numbers yet (a parameter is on the meta device), or is a
            variant that the compiled op does not run.
    """
    check_packable(fuser.config)
    for name, parameter in fuser.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"c2c_ext: fuser must hold numbers, its {name} is on the meta device")
    return pack_streams(
        fuser, lambda g, i: fuser.groups[g].stream(i, dtype=torch.float64), dtype, device
    )


def check_packable(config: FuserConfig) -> None:
    """Raises ValueError for a variant that the compiled op does not run."""
    reason = config.uncompiled_reason()
    if reason is not None:
        raise ValueError(f"c2c_ext: this fuser has no packed form: {reason}")


def pack_streams(
    fuser: Fuser,
    read: Callable[[int, int], StreamWeights],
    dtype: torch.dtype,
    device: torch.device,
) -> PackedFuser:
    """`pack_fuser` of weights from elsewhere; of ``fuser`` only the gates are looked at.

    Args:
        read: of (shape group, stream), the stream's weights in float64; called once for every
            open stream, one after the other.
    """
    # Outside inference mode, so that a pack built under it can be used anywhere.
    with torch.inference_mode(False), torch.no_grad():
        groups = []
        for number, group in enumerate(fuser.groups):
            streams = _open_streams(group)
            if streams:
                weights = functools.partial(read, number)
                groups.append(_pack_group(fuser.config, group, streams, weights, dtype, device))
    return PackedFuser(groups, fuser.config.activation, fuser.config.integration)


def _open_streams(group: FuserGroup) -> list[int]:
    """Indices of the group's open streams, keys first."""
    return sorted(group.open_streams(), key=lambda g: KINDS.index(group.place(g)[1]))


def _pack_group(
    config: FuserConfig,
    group: FuserGroup,
    streams: list[int],
    read: Callable[[int], StreamWeights],
    dtype: torch.dtype,
    device: torch.device,
) -> PackedGroup:
    layers, kinds = zip(*(group.place(g) for g in streams), strict=True)
    stacked: dict[str, Tensor] = {}
    for i, g in enumerate(streams):  # one at a time: only one stream's float64 copies are alive
        for name, tensor in fold_stream(read(g)).items():
            if name in VECTORS:
                tensor = tensor.to(sum_dtype(dtype))
            else:
                tensor = to_panels(tensor, dtype) if device.type == "cpu" else tensor.to(dtype)
            if i == 0:
                shape = (len(streams), *tensor.shape)
                stacked[name] = torch.empty(shape, dtype=tensor.dtype, device=device)
            stacked[name][i].copy_(tensor)

    def series(name: str) -> list[Tensor]:
        return [stacked[key] for key in sorted(stacked) if key.startswith(name)]

    return PackedGroup(
        layers=list(layers),
        sources=[config.layer_map[layer] for layer in layers],
        num_keys=kinds.count("key"),
        sharer_shape=group.sharer_shape,
        receiver_shape=group.receiver_shape,
        inner=config.intermediate_size,
        reads_receiver=config.reads == "both",
        deep_w2=series("deep_w2."),
        deep_w1=series("deep_w1."),
        **{name: t for name, t in stacked.items() if not name.startswith("deep_")},
    )


def fold_stream(w: StreamWeights) -> dict[str, Tensor]:
    """The folded weights of one stream by their names in `PackedGroup`."""
    first, last = w.proj[0], w.proj[-1]
    deep_w2 = [block.w2 for block in w.proj]
    if w.out_weight.shape[0] <= w.out_weight.shape[1]:
        out_weight = torch.cat([w.out_weight @ last.w2, w.out_weight], dim=1)
        deep_w2.pop()
    else:
        out_weight = w.out_weight
    folded = {
        "in_weight": w.in_weight,
        "in_bias": w.in_bias,
        "w1": w.shared.w1 * w.shared.norm,
        "w2": w.shared.w2,
        "branch_w1": first.w1 * first.norm,
        "out_weight": out_weight,
        "out_bias": w.out_bias,
        "head_weight": w.out_bias.new_empty(0, 0),
        "head_bias": w.out_bias.new_empty(0),
    }
    if w.weight is not None:
        folded["branch_w1"] = torch.cat([folded["branch_w1"], w.weight.w1 * w.weight.norm])
        folded["head_weight"] = torch.cat([w.head_weight, w.head_weight @ w.weight.w2], dim=1)
        folded["head_bias"] = w.head_bias
    folded.update({f"deep_w2.{i:03d}": w2 for i, w2 in enumerate(deep_w2)})
    folded.update({f"deep_w1.{i:03d}": b.w1 * b.norm for i, b in enumerate(w.proj[1:])})
    return folded

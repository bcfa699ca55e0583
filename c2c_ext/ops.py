"""Wrappers of the compiled ops: what torch.compile needs beside them, and packed arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import cuda_library
from .packed import PackedFuser, PackedGroup
from .shared_library import check_whole_module

try:
    check_whole_module(f"{__package__}._C", "libc2c_ext.so")
    from . import _C  # registers torch.ops.c2c.*
except (ImportError, OSError) as error:
    raise ImportError(
        "c2c_ext: the compiled module c2c_ext._C cannot be loaded. In a source checkout run "
        "`pip install -e .`; after `pip install .`, leave the checkout's directory. "
        f"What is wrong: {error}"
    ) from error

__all__ = ["_C", "check_inplace", "fuse_", "group_arguments", "kernels_missing"]

CUDA_MISSING = cuda_library.load(Path(_C.__file__).parent)  # why, or None


def kernels_missing(device: torch.device) -> str | None:
    """Why the compiled op does not run on ``device``; None: it does."""
    if device.type == "cuda":
        return CUDA_MISSING
    return None if device.type == "cpu" else f"this build has no kernels for {device.type}"


@torch.library.register_fake("c2c::check_inplace")
def _check_inplace_fake(*_: object) -> None:
    """Tensors without memory cannot overlap."""


@torch.library.register_fake("c2c::fuse_")
def _fuse_fake(*args: object) -> None:
    """The op returns nothing; what it writes keeps its shape.

    One meta tensor among real ones is enough to be sent here, where it would fuse nothing.
    """
    tensors = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else (arg,))]
    devices = {t.device for t in tensors if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(
            "c2c_ext.fuse: caches, token_map and weights must be on one device, got "
            + ", ".join(sorted(map(str, devices)))
        )


def check_inplace(
    receiver: Sequence[tuple[Tensor, Tensor]], sharer: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Refuses what cannot be written in place: views that overlap themselves or one another.

    Args:
        receiver: one (key, value) per receiver layer ``[B, Ht, N, Dt]``, to be written.
        sharer: one per sharer layer, only read.

    Raises:
        RuntimeError: as `fuse_`; names both tensors.
    """
    pairs = (*zip(*receiver, strict=True), *zip(*sharer, strict=True))
    torch.ops.c2c.check_inplace(*map(list, pairs))


def group_arguments(
    group: PackedGroup,
    out: Sequence[tuple[Tensor, Tensor]],
    base: Sequence[tuple[Tensor, Tensor]],
    sharer: Sequence[tuple[Tensor, Tensor]],
    token_map: Tensor | None,
    packed: PackedFuser,
    accumulate: bool,
) -> tuple:
    """The positional arguments of ``torch.ops.c2c.fuse_`` for one shape group of ``packed``."""
    return (
        [key for key, _ in out],
        [value for _, value in out],
        [key for key, _ in base],
        [value for _, value in base],
        [key for key, _ in sharer],
        [value for _, value in sharer],
        token_map,
        group.layers,
        group.sources,
        group.num_keys,
        group.sharer_shape.num_heads,
        group.sharer_shape.head_dim,
        group.receiver_shape.num_heads,
        group.receiver_shape.head_dim,
        group.inner,
        group.reads_receiver,
        group.in_weight,
        group.in_bias,
        group.w1,
        group.w2,
        group.branch_w1,
        group.deep_w2,
        group.deep_w1,
        group.out_weight,
        group.out_bias,
        group.head_weight,
        group.head_bias,
        packed.activation,
        packed.integration,
        accumulate,
    )


def fuse_(
    out: Sequence[tuple[Tensor, Tensor]],
    base: Sequence[tuple[Tensor, Tensor]],
    sharer: Sequence[tuple[Tensor, Tensor]],
    packed: PackedFuser,
    *,
    token_map: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """Fuses every open stream: reads ``base`` and ``sharer``, writes ``out``. No autograd.

    Args:
        out: one (key, value) per receiver layer, each ``[B, Ht, N, Dt]``; may be ``base`` itself.
            Closed streams are not touched.
        base: as ``out``; the receiver's clean slices.
        sharer: one (key, value) per sharer layer, each ``[B, Hs, S, Ds]``; S >= N, or
            any S with a map.
        packed: the fuser's packed form for the caches' dtype and device.
        token_map: int64 ``[N]`` or ``[B, N]``; values outside ``0 .. S-1`` leave the token
            as it is.
        accumulate: ``out += fused - base`` in place of ``out = fused``.

    Raises:
        RuntimeError: an argument breaks a rule; the message names argument, rule and numbers. Or
            the caches are on a GPU, and there are no CUDA kernels.
    """
    if packed.groups and base[0][0].device.type == "cuda" and CUDA_MISSING is not None:
        raise RuntimeError(
            f"c2c_ext.fuse: the op cannot run on {base[0][0].device}: {CUDA_MISSING}"
        )
    for group in packed.groups:
        torch.ops.c2c.fuse_(
            *group_arguments(group, out, base, sharer, token_map, packed, accumulate)
        )

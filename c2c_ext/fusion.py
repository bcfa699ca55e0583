"""c2c_ext.fuse: fuses the KV-caches of one or several sharers into a receiver's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, training_op
from .cache import KVPairs, clone_cache, kv_layers, with_layers
from .config import KINDS
from .fuser import Fuser
from .fusion_checks import (
    Source,
    check_fuser_device,
    check_fusion,
    check_parameters,
    checked_sources,
    named,
    window,
)


def fuse(
    receiver_cache: Any,
    sharer_cache: Any,
    fuser: Fuser | Sequence[Fuser],
    *,
    fusion: str = "parallel",
    start: int = 0,
    end: int | None = None,
    token_map: Tensor | Sequence[Tensor | None] | None = None,
    inplace: bool = False,
) -> Any:
    """Fuses tokens ``start .. end - 1`` of a receiver's cache with a sharer's (arXiv 2510.03215).

    All streams are fused from the two caches as they stand (post-RoPE keys). On the CPU, and on
    CUDA GPUs where the build has kernels for them, the compiled op runs, and where gradients are
    needed the training op (`c2c_ext.training_op`), which computes with the parameters as they are
    and is slower: call this under `torch.no_grad` (or freeze the fuser) where you need none. Other
    devices, variants without compiled kernels (`FuserConfig.uncompiled_reason`), forward-mode AD
    and torch.func transforms go through `c2c_ext.reference`.
    Gates are hard: open iff their logit is > 0. Under `torch.compile` the packed form of the last
    eager call is used; see `Fuser.packed`.

    Several sharers are given as lists (or tuples) of their caches and of their fusers, in the order
    in which they are fused. ``"parallel"``: with the receiver's tokens C as they stand and what
    each sharer alone would make of them, OUT_k, the result is C plus the sum of all OUT_k - C.
    ``"sequential"``: each sharer is fused with the result of the one before it.

    Args:
        receiver_cache: a transformers Cache, or a sequence of (key, value) tensors
            ``[B, H, N, D]``, one per receiver layer; all layers hold the same N tokens.
        sharer_cache: likewise, one per sharer layer; same batch, dtype and device. With a list of
            fusers a list of as many such caches.
        fuser: the fuser between the two models, or one for every sharer.
        fusion: ``"parallel"`` or ``"sequential"``; the same for one sharer.
        start, end: receiver positions to fuse; ``end`` defaults to N.
        token_map: int64 ``[end - start]`` or ``[B, end - start]``: for every receiver position the
            absolute sharer position it is fused with, or -1 to leave it as it is. Without one:
            identity, and the sharer holds at least ``end`` tokens. A map on the CPU is checked; on
            another device, or under `torch.compile`, anything out of range counts as -1. For
            several sharers one map for all of them, or a list of one map or None for each.
        inplace: write into ``receiver_cache``'s own tensors.

    Returns:
        the receiver's kind of cache, shapes and dtype unchanged. With ``inplace`` it is
        ``receiver_cache`` itself, otherwise it shares no tensor with the inputs (with gradients:
        positions outside ``start .. end - 1`` stay attached to the inputs).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError, RuntimeError: lists of different lengths or empty ones, an unknown ``fusion``;
            layer counts, shapes, ranges, dtypes or devices that do not fit, views that overlap,
            ``inplace`` while gradients are needed. The message names the argument (of a list its
            place), the rule and both numbers; nothing has been written.
    """
    check_fusion("c2c_ext.fuse", fusion)
    receiver = kv_layers(receiver_cache, "receiver_cache")
    sources, end = checked_sources(receiver, sharer_cache, fuser, token_map, start, end)
    first = receiver[0][0]
    in_transform = _in_transform()
    wanted = in_transform or _gradients_wanted(receiver, sources)
    if inplace:
        _check_writable(receiver, wanted, in_transform)
    compiling = torch.compiler.is_compiling()
    missing = ops.kernels_missing(first.device)
    plain = [
        wanted or missing is not None or source.fuser.config.uncompiled_reason() is not None
        for source in sources
    ]
    if missing is not None and not wanted and not compiling and first.device.type == "cuda":
        if any(source.fuser.config.uncompiled_reason() is None for source in sources):
            warnings.warn(  # Python's default filter shows it once for every line that calls
                f"c2c_ext.fuse: caches on {first.device} go through plain PyTorch, which is "
                f"slower: {missing}",
                RuntimeWarning,
                stacklevel=2,
            )
    for source, by_reference in zip(sources, plain, strict=True):
        if by_reference:
            check_parameters(source.fuser, wanted)
            check_fuser_device(source.fuser, first)
    if any(plain):
        base = window(receiver, start, end)
        if inplace and not compiling:
            for source in sources:
                ops.check_inplace(base, source.pairs)
        fused = _computed(base, sources, plain, fusion, wanted and not in_transform)
        if inplace:
            # Inference tensors can only be written in inference mode; it is the same for others.
            with torch.inference_mode(not compiling):
                for pair, new_pair in zip(base, fused, strict=True):
                    for old, new in zip(pair, new_pair, strict=True):
                        old.copy_(new)
            return receiver_cache
        return with_layers(receiver_cache, _spliced(receiver, fused, start, end), first.shape[2])

    packs = [source.fuser.packed(first.dtype, first.device) for source in sources]
    result = receiver_cache if inplace else clone_cache(receiver_cache)
    out = window(receiver if inplace else kv_layers(result, "receiver_cache"), start, end)
    if inplace and not compiling and (len(sources) > 1 or not packs[0].groups):
        for source in sources:  # the op would check the later ones after it has written, or not run
            ops.check_inplace(out, source.pairs)
    base = out
    if fusion == "parallel" and len(sources) > 1:  # all of them read the clean slices
        clean = window(receiver, start, end)
        base = [(key.clone(), value.clone()) for key, value in clean] if inplace else clean
    for k, (source, packed) in enumerate(zip(sources, packs, strict=True)):
        adds = base is not out and k > 0
        ops.fuse_(out, base, source.pairs, packed, token_map=source.token_map, accumulate=adds)
    if inplace and not compiling:
        written = [t for pair in receiver for t in pair if not t.is_inference()]
        torch.autograd.graph.increment_version(written)
    return result


def _gradients_wanted(receiver: KVPairs, sources: Sequence[Source]) -> bool:
    if not torch.is_grad_enabled():
        return False
    caches = [receiver, *(source.pairs for source in sources)]
    return any(t.requires_grad for pairs in caches for pair in pairs for t in pair) or any(
        p.requires_grad for source in sources for p in source.fuser.parameters()
    )


def _check_writable(receiver: KVPairs, wanted: bool, in_transform: bool) -> None:
    """Raises ValueError where ``inplace=True`` cannot be."""
    if in_transform:
        raise ValueError(
            "c2c_ext.fuse: inplace=True cannot be used inside forward-mode AD or a torch.func "
            "transform, which would not see what is written"
        )
    if wanted:
        raise ValueError(
            "c2c_ext.fuse: inplace=True records no gradient, but gradients are enabled and the "
            "fuser or a cache requires them; call it under torch.no_grad()"
        )
    if torch.compiler.is_compiling():
        return
    for name, t in named("receiver", receiver):
        if t.is_neg() or t._is_zerotensor():
            raise ValueError(
                f"c2c_ext.fuse: {name} cannot be written to, as inplace=True would: it is a "
                "view whose negation is pending (conj().imag) or a constant zero tensor; pass "
                "a copy"
            )


def _computed(
    base: KVPairs, sources: Sequence[Source], plain: Sequence[bool], fusion: str, by_op: bool
) -> KVPairs:
    """New tensors with all sharers fused; ``base`` is only read.

    Args:
        plain: for every sharer whether it takes the differentiable path, else the inference op.
        by_op: take the training op there, where it has kernels.
    """
    total = base
    for k, (source, differentiable) in enumerate(zip(sources, plain, strict=True)):
        read = base if fusion == "parallel" else total
        if not differentiable:
            out = [(key.clone(), value.clone()) for key, value in read]
            first = read[0][0]
            packed = source.fuser.packed(first.dtype, first.device)
            ops.fuse_(out, read, source.pairs, packed, token_map=source.token_map)
        else:
            missing = training_op.op_missing(source.fuser, read[0][0].device)
            run = training_op.fuse_training if by_op and missing is None else reference.fuse
            out = run(read, source.pairs, source.fuser, token_map=source.token_map)
        total = out if k == 0 or fusion == "sequential" else _added(total, base, out, source)
    return total


def _added(total: KVPairs, base: KVPairs, out: KVPairs, source: Source) -> KVPairs:
    """``total + (out - base)`` where ``source`` is fused, elsewhere the very bits of ``total``."""
    config, token_map = source.fuser.config, source.token_map
    touched: dict[tuple[int, str], Tensor | None] = {
        (layer, kind): None for layer in range(len(base)) for kind in config.kinds
    }
    if source.fuser.inference_only:  # the packed form has no gates, the op has run it
        touched = dict.fromkeys(source.fuser.open_streams())
    elif config.gate:
        for group in source.fuser.groups:
            for g in range(len(group.gate_logit)):
                touched[group.place(g)] = group.gate_logit[g].detach() > 0
    if token_map is not None:
        held = source.pairs[0][0].shape[2]
        rows = token_map.expand(base[0][0].shape[0], -1)
        mapped = ((rows >= 0) & (rows < held))[:, None, :, None]
        touched = {
            place: mapped if is_open is None else mapped & is_open
            for place, is_open in touched.items()
        }
    summed = []
    for layer, triple in enumerate(zip(total, base, out, strict=True)):
        pair = []
        for kind, t, b, o in zip(KINDS, *triple, strict=True):
            if (layer, kind) in touched:
                mask = touched[layer, kind]
                t = t + (o - b) if mask is None else torch.where(mask, t + (o - b), t)
            pair.append(t)
        summed.append((pair[0], pair[1]))
    return summed


def _spliced(whole: KVPairs, fused: KVPairs, start: int, end: int) -> KVPairs:
    def splice(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old[:, :, :start], new, old[:, :, end:]], dim=2)

    return [
        (splice(key, new_key), splice(value, new_value))
        for (key, value), (new_key, new_value) in zip(whole, fused, strict=True)
    ]


def _in_transform() -> bool:
    """Whether forward-mode AD or a torch.func transform is active: the op knows neither."""
    return not torch.compiler.is_compiling() and (
        torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.maybe_current_level() is not None
    )

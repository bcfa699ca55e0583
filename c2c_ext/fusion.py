"""c2c_ext.fuse: fuses a sharer's KV-cache into a receiver's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, training_op
from .cache import KVPairs, clone_cache, kv_layers, with_layers
from .fuser import Fuser
from .model_kv import KVShape

CACHE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 1 << 31  # the op counts tokens in 32 bits


def fuse(
    receiver_cache: Any,
    sharer_cache: Any,
    fuser: Fuser,
    *,
    start: int = 0,
    end: int | None = None,
    token_map: Tensor | None = None,
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

    Args:
        receiver_cache: a transformers Cache, or a sequence of (key, value) tensors
            ``[B, H, N, D]``, one per receiver layer; all layers hold the same N tokens.
        sharer_cache: likewise, one per sharer layer; same batch, dtype and device.
        fuser: the fuser between the two models.
        start, end: receiver positions to fuse; ``end`` defaults to N.
        token_map: int64 ``[end - start]`` or ``[B, end - start]``: for every receiver position the
            absolute sharer position it is fused with, or -1 to leave it as it is. Without one:
            identity, and the sharer holds at least ``end`` tokens. A map on the CPU is checked; on
            another device, or under `torch.compile`, anything out of range counts as -1.
        inplace: write into ``receiver_cache``'s own tensors.

    Returns:
        the receiver's kind of cache, shapes and dtype unchanged. With ``inplace`` it is
        ``receiver_cache`` itself, otherwise it shares no tensor with the inputs (with gradients:
        positions outside ``start .. end - 1`` stay attached to the inputs).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError, RuntimeError: layer counts, shapes, ranges, dtypes or devices that do not fit,
            views that overlap, ``inplace`` while gradients are needed. The message names the
            argument, the rule and both numbers; nothing has been written.
    """
    if not isinstance(fuser, Fuser):
        raise TypeError(f"c2c_ext.fuse: fuser must be a c2c_ext.Fuser, got {type(fuser).__name__}")
    receiver = kv_layers(receiver_cache, "receiver_cache")
    sharer = kv_layers(sharer_cache, "sharer_cache")
    config = fuser.config
    _check_layers("receiver_cache", receiver, len(config.receiver.layers))
    _check_layers("sharer_cache", sharer, len(config.sharer.layers))
    _check_tensors("receiver", receiver, config.receiver.layers, receiver[0][0])
    _check_tensors("sharer", sharer, config.sharer.layers, receiver[0][0])
    first = receiver[0][0]
    length, sharer_length = first.shape[2], sharer[0][0].shape[2]
    end = length if end is None else end
    _check_range(start, end, length)
    if token_map is not None:
        token_map = _checked_map(token_map, end - start, first, sharer_length)
    elif sharer_length < end:
        raise ValueError(
            f"c2c_ext.fuse: sharer_cache must hold at least end = {end} tokens without a "
            f"token_map, got {sharer_length}"
        )

    in_transform = _in_transform()
    wanted = in_transform or (
        torch.is_grad_enabled()
        and (
            any(t.requires_grad for pair in (*receiver, *sharer) for t in pair)
            or any(p.requires_grad for p in fuser.parameters())
        )
    )
    if in_transform and inplace:
        raise ValueError(
            "c2c_ext.fuse: inplace=True cannot be used inside forward-mode AD or a torch.func "
            "transform, which would not see what is written"
        )
    if wanted and inplace:
        raise ValueError(
            "c2c_ext.fuse: inplace=True records no gradient, but gradients are enabled and the "
            "fuser or a cache requires them; call it under torch.no_grad()"
        )
    if inplace and not torch.compiler.is_compiling():
        for name, t in _named("receiver", receiver):
            if t.is_neg() or t._is_zerotensor():
                raise ValueError(
                    f"c2c_ext.fuse: {name} cannot be written to, as inplace=True would: it is a "
                    "view whose negation is pending (conj().imag) or a constant zero tensor; pass "
                    "a copy"
                )
    sharer_view = sharer if token_map is not None else _window(sharer, start, end)
    missing = ops.kernels_missing(first.device)
    if wanted or missing is not None or config.uncompiled_reason() is not None:
        if (
            not (wanted or missing is None or torch.compiler.is_compiling())
            and first.device.type == "cuda"
            and config.uncompiled_reason() is None
        ):  # Python's default filter shows it once for every line that calls
            warnings.warn(
                f"c2c_ext.fuse: caches on {first.device} go through plain PyTorch, which is "
                f"slower: {missing}",
                RuntimeWarning,
                stacklevel=2,
            )
        _check_fuser_device(fuser, first)
        base = _window(receiver, start, end)
        if inplace and not torch.compiler.is_compiling():
            ops.check_inplace(base, sharer_view)
        by_op = wanted and not in_transform and training_op.op_missing(fuser, first.device) is None
        run = training_op.fuse_training if by_op else reference.fuse
        fused = run(base, sharer_view, fuser, token_map=token_map)
        if inplace:
            # Inference tensors can only be written in inference mode; it is the same for others.
            with torch.inference_mode(not torch.compiler.is_compiling()):
                for pair, new_pair in zip(base, fused, strict=True):
                    for old, new in zip(pair, new_pair, strict=True):
                        old.copy_(new)
            return receiver_cache
        return with_layers(receiver_cache, _spliced(receiver, fused, start, end), length)

    packed = fuser.packed(first.dtype, first.device)
    result = receiver_cache if inplace else clone_cache(receiver_cache)
    target = receiver if inplace else kv_layers(result, "receiver_cache")
    base = _window(target, start, end)
    if inplace and not packed.groups and not torch.compiler.is_compiling():
        ops.check_inplace(base, sharer_view)  # no gate is open: the op is not called
    ops.fuse_(base, base, sharer_view, packed, token_map=token_map)
    if inplace and not torch.compiler.is_compiling():
        written = [t for pair in receiver for t in pair if not t.is_inference()]
        torch.autograd.graph.increment_version(written)
    return result


def _check_layers(name: str, pairs: KVPairs, expected: int) -> None:
    if len(pairs) != expected:
        side = name.split("_")[0]
        raise ValueError(
            f"c2c_ext.fuse: {name} must have {expected} layers (the fuser's {side}), "
            f"got {len(pairs)}"
        )
    tokens = pairs[0][0].shape[2]
    for i, pair in enumerate(pairs):
        for which, t in zip(("key", "value"), pair, strict=True):
            if t.shape[2] != tokens:
                raise ValueError(
                    f"c2c_ext.fuse: {name} layer {i} {which} must hold {tokens} tokens as layer 0 "
                    f"does, got {t.shape[2]}"
                )


def _check_range(start: int, end: int, length: int) -> None:
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"c2c_ext.fuse: {name} must be an int, got {value!r}")
    if not 0 <= start <= end <= length:
        raise ValueError(
            f"c2c_ext.fuse: start and end must satisfy 0 <= start <= end <= {length} "
            f"(receiver tokens), got start {start}, end {end}"
        )


def _checked_map(token_map: Tensor, tokens: int, first: Tensor, sharer_length: int) -> Tensor:
    if not isinstance(token_map, Tensor) or token_map.dtype != torch.int64:
        got = token_map.dtype if isinstance(token_map, Tensor) else type(token_map).__name__
        raise TypeError(f"c2c_ext.fuse: token_map must be an int64 tensor, got {got}")
    if token_map.layout != torch.strided or token_map.device.type == "meta":
        raise TypeError(
            "c2c_ext.fuse: token_map must be a dense tensor that holds numbers, got "
            f"{token_map.layout} on {token_map.device}"
        )
    shapes = [(tokens,), (first.shape[0], tokens)]
    if tuple(token_map.shape) not in shapes:
        raise ValueError(
            f"c2c_ext.fuse: token_map must have shape {list(shapes[0])} or {list(shapes[1])} "
            f"(end - start tokens, batch), got {list(token_map.shape)}"
        )
    if (
        token_map.device.type == "cpu"
        and token_map.numel() > 0
        and not torch.compiler.is_compiling()
    ):
        low, high = int(token_map.min()), int(token_map.max())
        if low < -1:
            raise ValueError(f"c2c_ext.fuse: token_map's minimum must be at least -1, got {low}")
        if high >= sharer_length:
            raise ValueError(
                f"c2c_ext.fuse: sharer_cache dim 2 (tokens) must exceed token_map's maximum "
                f"{high}, got {sharer_length}"
            )
    return token_map.to(first.device)


def _window(pairs: KVPairs, start: int, end: int) -> KVPairs:
    if start == 0 and all(key.shape[2] == end for key, _ in pairs):
        return pairs
    return [(key[:, :, start:end], value[:, :, start:end]) for key, value in pairs]


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


def _named(side: str, pairs: KVPairs) -> Iterator[tuple[str, Tensor]]:
    """The names of messages: receiver_keys[0], receiver_values[0], ..."""
    for i, pair in enumerate(pairs):
        for which, t in zip(("keys", "values"), pair, strict=True):
            yield f"{side}_{which}[{i}]", t


def _check_fuser_device(fuser: Fuser, first: Tensor) -> None:
    """The reference computes with the parameters as they are; only packing moves them."""
    for name, p in fuser.named_parameters():
        if p.device != first.device:
            raise ValueError(
                f"c2c_ext.fuse: fuser must be on {first.device} as the caches are, its {name} is "
                f"on {p.device}"
            )


def _check_tensors(side: str, pairs: KVPairs, shapes: Sequence[KVShape], first: Tensor) -> None:
    """Every tensor of a cache, whichever gates are open and whichever path will run."""
    for i, (pair, shape) in enumerate(zip(pairs, shapes, strict=True)):
        for which, t in zip(("keys", "values"), pair, strict=True):
            batch, heads, tokens, dim = t.shape
            if (
                (batch, heads, dim) == (first.shape[0], shape.num_heads, shape.head_dim)
                and t.dtype == first.dtype
                and t.device == first.device
                and t.dtype in CACHE_DTYPES
                and t.layout == torch.strided
                and t.device.type != "meta"
                and tokens < MAX_TOKENS
            ):
                continue
            name = f"c2c_ext.fuse: {side}_{which}[{i}]"
            if t.layout != torch.strided:
                raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}")
            for axis, meaning, expected in (
                (0, "batch", first.shape[0]),
                (1, "heads", shape.num_heads),
                (3, "head dim", shape.head_dim),
            ):
                if t.shape[axis] != expected:
                    raise ValueError(
                        f"{name} dim {axis} ({meaning}) must equal {expected}, got {t.shape[axis]}"
                    )
            if t.dtype not in CACHE_DTYPES:
                known = ", ".join(str(d).removeprefix("torch.") for d in CACHE_DTYPES)
                raise ValueError(f"{name} must be one of {known}, got {t.dtype}")
            if t.device.type == "meta":
                raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
            if tokens >= MAX_TOKENS:
                raise ValueError(f"{name} dim 2 (tokens) must be below {MAX_TOKENS}, got {tokens}")
            raise ValueError(
                f"{name} must be {first.dtype} on {first.device} as receiver_keys[0], got "
                f"{t.dtype} on {t.device}"
            )

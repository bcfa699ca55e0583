"""The training op c2c::fuse: what PyTorch must know of it, and its entry for a whole fuser.

One call fuses all streams of a shape group (`FuserGroup`) and records what its hand-written
backward needs; csrc/train/fuse_train.h says what that is and in which order things run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .config import KINDS
from .packed import sum_dtype

if TYPE_CHECKING:
    from .config import FuserConfig
    from .fuser import Fuser, FuserGroup

__all__ = ["fuse_training", "op_missing", "saved_bytes"]

KVLayers = Sequence[tuple[Tensor, Tensor]]
Gates = Sequence[tuple[Tensor, Tensor]] | Tensor

# The op's tensors in its own order: gradients come back in that of NEEDED.
PARAMETERS = (
    *("in_weight", "in_bias", "shared_norm", "shared_w1", "shared_w2"),
    *("proj_norm", "proj_w1", "proj_w2", "out_weight", "out_bias"),
    *("weight_norm", "weight_w1", "weight_w2", "head_weight", "head_bias"),
)
NEEDED = ("base", "sharer", "gate", *PARAMETERS)
ARGUMENTS = tuple(a.name for a in torch.ops.c2c.fuse.default._schema.arguments)
_ON_CUDA = torch._C._dispatch_has_kernel_for_dispatch_key("c2c::fuse", "CUDA")


# ---- what PyTorch must know ----------------------------------------------------------------------


def saved_columns(arguments: dict[str, Any]) -> list[int]:
    """Columns of every tensor ``[G, rows, columns]`` that the op saves without ``recompute``."""
    _, blocks, inner, hidden = arguments["proj_w1"].shape
    _, heads, _, dim = arguments["base"][0].shape
    weighted = arguments["weight_norm"] is not None
    columns = [hidden] * (blocks + 2) + [inner] * (blocks + 1) + [heads * dim]
    if weighted:
        columns[blocks + 3] += hidden  # the first projection block's, beside the weighting's
        columns += [hidden, heads]
    return columns


@torch.library.register_fake("c2c::fuse")
def _fuse_fake(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    named = dict(zip(ARGUMENTS, args, strict=True))
    base = named["base"]
    out = [t.new_empty(t.shape) for t in base]
    if named["recompute"]:
        return out, []
    rows = base[0].shape[0] * base[0].shape[2]
    saved = [base[0].new_empty((len(base), rows, n)) for n in saved_columns(named)]
    return out, saved


@torch.library.register_fake("c2c::fuse_backward")
def _fuse_backward_fake(grad_out: list[Tensor], *args: Any) -> list[Tensor]:
    *inputs, _, needed = args
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    grads = []
    for name, wanted in zip(NEEDED, needed, strict=True):
        if wanted:
            own = named[name] if name in ("base", "sharer") else [named[name]]
            grads += [t.new_empty(t.shape) for t in own]
    return grads


def _setup_context(ctx: Any, inputs: tuple, output: tuple[list[Tensor], list[Tensor]]) -> None:
    tensors, ctx.constants = [], []
    for value in inputs:
        if isinstance(value, list | tuple):
            ctx.constants.append(len(value))
            tensors += value
        elif isinstance(value, Tensor):
            ctx.constants.append(...)
            tensors.append(value)
        else:
            ctx.constants.append((value,))
    _, saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _backward(ctx: Any, grad_out: list[Tensor | None], _: Any) -> tuple:
    tensors = iter(ctx.saved_tensors)
    inputs: list[Any] = []
    for constant in ctx.constants:
        if isinstance(constant, tuple):
            inputs.append(constant[0])
        elif constant is ...:
            inputs.append(next(tensors))
        else:
            inputs.append([next(tensors) for _ in range(constant)])
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    wants = dict(zip(ARGUMENTS, ctx.needs_input_grad, strict=True))
    needed = [any(w) if isinstance(w := wants[n], list | tuple) else w for n in NEEDED]
    grad_out = [
        t.new_zeros(()).expand(t.shape) if g is None else g
        for g, t in zip(grad_out, named["base"], strict=True)
    ]
    grads = iter(torch.ops.c2c.fuse_backward(grad_out, *inputs, list(tensors), needed))
    result: dict[str, Any] = dict.fromkeys(ARGUMENTS)
    for name, wanted in zip(NEEDED, needed, strict=True):
        if name in ("base", "sharer"):
            count = len(named[name])
            result[name] = [next(grads) if wanted else None for _ in range(count)]
        elif wanted:
            result[name] = next(grads)
    return tuple(result.values())


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "c2c_ext.fuse: the gradient of a gradient cannot be computed: c2c::fuse_backward has no "
        "derivative; use c2c_ext.reference.fuse where you need one"
    )


torch.library.register_autograd("c2c::fuse", _backward, setup_context=_setup_context)
torch.library.register_autograd("c2c::fuse_backward", _no_double_backward)


# ---- the entry -----------------------------------------------------------------------------------


def op_missing(fuser: Fuser, device: torch.device) -> str | None:
    """Why `fuse_training` cannot run this fuser on ``device``; None: it can."""
    reason = fuser.config.uncompiled_reason() or ops.kernels_missing(device)
    if reason is None and device.type == "cuda" and not _ON_CUDA:
        reason = "this build has no training kernels for cuda"
    return reason


def saved_bytes(config: FuserConfig, dtype: torch.dtype) -> int:
    """Bytes per token that `fuse_training` saves for the backward without ``recompute``.

    All streams together, for caches of ``dtype``; beside them only the op's inputs are kept alive.
    """
    c, total = config, 0
    for layers in c.shape_groups():
        _, receiver = c.layer_shapes(layers[0])
        per_stream = c.hidden_size * c.depth + c.intermediate_size * (c.depth - 1) + receiver.width
        if c.weighting:
            per_stream += 2 * c.hidden_size + receiver.num_heads
        total += len(layers) * len(c.kinds) * per_stream
    return total * dtype.itemsize


def fuse_training(
    base_pairs: KVLayers,
    sharer_pairs: KVLayers,
    fuser: Fuser,
    *,
    token_map: Tensor | None = None,
    gates: Gates | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    row_seeds: Tensor | None = None,
    recompute: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Fuses all streams by the training op: `c2c_ext.reference.fuse` with a backward of its own.

    Differentiable once, in the caches, the parameters and the gates; only gradients that are
    needed are computed. Matrix products run in the caches' dtype with the weights rounded to it,
    sums and everything between the products in float32 (float64 for float64 caches); gradients
    come back in their tensor's own dtype. Under `torch.autocast` the caches are cast to its dtype
    and the result back. The same inputs give the same bits, whatever the number of threads.

    Args:
        base_pairs: one (key, value) per receiver layer, each ``[B, Ht, N, Dt]``.
        sharer_pairs: one per sharer layer, each ``[B, Hs, S, Ds]``; S >= N, or any S with a map.
        fuser: of a variant and on a device for which `op_missing` is None.
        token_map: int64 ``[N]`` or ``[B, N]``: sharer token of every receiver token; anything
            outside ``0 .. S-1`` leaves the receiver's token as it is.
        gates: one (key gate, value gate) per receiver layer, each broadcastable to
            ``[B, Ht, N, 1]``; or a tensor ``[layers, kinds, 1|B, 1|H, 1|N]``, of which a layer
            with fewer than H heads takes the first. By default hard: open iff the logit is > 0, no
            gradient reaches it. A gate of 0 keeps the token's bits.
        dropout: probability, on the output of every feed-forward block before it is added.
        seed, offset: what dropout draws is a function of these and of an element's place alone.
        row_seeds: int64 ``[B]``, one for each row in place of ``seed``. What a row draws then does
            not depend on the other rows, nor on how many tokens stand before its own.
        recompute: save nothing but the inputs and compute the forward again in the backward, to
            the same bits. Otherwise `saved_bytes` per token are saved.

    Returns:
        one (key, value) per receiver layer, shapes and dtype as ``base_pairs``.

    Raises:
        ValueError: a variant or device without kernels, layer counts or gates that do not fit.
        RuntimeError: an argument of the op breaks a rule; or the gradient of a gradient is asked.
    """
    config = fuser.config
    device = base_pairs[0][0].device
    reason = op_missing(fuser, device)
    if reason is not None:
        raise ValueError(f"c2c_ext.fuse: the training op cannot run: {reason}")
    for name, pairs, model in (
        ("base_pairs", base_pairs, config.receiver),
        ("sharer_pairs", sharer_pairs, config.sharer),
    ):
        if len(pairs) != len(model.layers):
            raise ValueError(
                f"c2c_ext.fuse: {name} must have {len(model.layers)} layers, got {len(pairs)}"
            )
    if gates is not None:
        _check_gates(gates, fuser)
    dtype = original = base_pairs[0][0].dtype
    if torch.is_autocast_enabled(device.type) and original != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    if token_map is not None:
        token_map = token_map.to(device)
    if row_seeds is not None:
        row_seeds = row_seeds.to(device)
    fused = [list(pair) for pair in base_pairs]
    for number, group in enumerate(fuser.groups):
        places = [group.place(g) for g in range(len(group.layers) * len(group.kinds))]
        base = [base_pairs[i][KINDS.index(kind)].to(dtype) for i, kind in places]
        sharer = [
            sharer_pairs[config.layer_map[i]][KINDS.index(kind)].to(dtype) for i, kind in places
        ]
        gate = _group_gate(group, gates, sum_dtype(dtype)) if config.gate else None
        tensors = [getattr(group, name, None) for name in PARAMETERS]
        grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (*base, *sharer, gate, *tensors)
        )
        outs, _ = torch.ops.c2c.fuse(
            base,
            sharer,
            token_map,
            gate,
            *tensors,
            config.activation,
            config.integration,
            config.reads == "both",
            dropout,
            seed,
            offset + number,  # so that no two groups draw the same
            row_seeds,
            recompute or not grad,
        )
        for (layer, kind), out in zip(places, outs, strict=True):
            fused[layer][KINDS.index(kind)] = out.to(original)
    return [(key, value) for key, value in fused]


def _check_gates(gates: Gates, fuser: Fuser) -> None:
    config = fuser.config
    if not config.gate:
        raise ValueError("c2c_ext: gates must not be given for a fuser without gates (gate=False)")
    layers, kinds = len(config.receiver.layers), len(config.kinds)
    if isinstance(gates, Tensor):
        if gates.dim() != 5 or tuple(gates.shape[:2]) != (layers, kinds):
            raise ValueError(
                f"c2c_ext.fuse: gates must be [{layers}, {kinds}, 1|B, 1|Ht, 1|N] (layers, "
                f"kinds, ..), got {list(gates.shape)}"
            )
    elif len(gates) != layers:
        raise ValueError(
            f"c2c_ext.fuse: gates must have one pair per receiver layer ({layers}), got "
            f"{len(gates)}"
        )


def _group_gate(group: FuserGroup, gates: Gates | None, dtype: torch.dtype) -> Tensor:
    """The gates of a shape group's streams, ``[G, 1|B, 1|Ht, 1|N]``."""
    if gates is None:
        return (group.gate_logit.detach() > 0).to(dtype).view(-1, 1, 1, 1)
    if isinstance(gates, Tensor):
        own = torch.stack([gates[layer] for layer in group.layers])
        return own.flatten(0, 1)[:, :, : group.receiver_shape.num_heads].to(dtype)
    streams = []
    for g in range(len(group.layers) * len(group.kinds)):
        layer, kind = group.place(g)
        gate = gates[layer][KINDS.index(kind)]
        if gate.dim() > 4 or (gate.dim() > 0 and gate.shape[-1] != 1):
            raise ValueError(
                f"c2c_ext.fuse: gates[{layer}] {kind} must be broadcastable to [B, Ht, N, 1], got "
                f"{list(gate.shape)}"
            )
        streams.append(gate.reshape((1,) * (4 - gate.dim()) + tuple(gate.shape)).squeeze(-1))
    return torch.stack(torch.broadcast_tensors(*streams)).to(dtype)

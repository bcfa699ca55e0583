"""One call of the training op and its backward, and the same through the reference's autograd."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from conftest import (
    KVPairs,
    assert_as_good_as_plain,
    cast,
    clone,
    flat,
    hidden_dim,
    hidden_order,
    make_caches,
    make_config,
    make_fuser,
    relative_error,
    reorder_hidden,
    same_bits,
)
from torch import Tensor

from c2c_ext import Fuser, reference
from c2c_ext.config import KINDS

PARAMETERS = (
    *("in_weight", "in_bias", "shared_norm", "shared_w1", "shared_w2"),
    *("proj_norm", "proj_w1", "proj_w2", "out_weight", "out_bias"),
    *("weight_norm", "weight_w1", "weight_w2", "head_weight", "head_bias"),
)
INPUTS = ("base", "sharer", "gate", *PARAMETERS)


@dataclass
class Step:
    """What is fused: one gate tensor ``[G, 1|B, 1|Ht, 1|N]`` per shape group, or None."""

    fuser: Fuser
    base: KVPairs
    sharer: KVPairs
    cotangents: KVPairs
    token_map: Tensor | None = None
    gates: Sequence[Tensor] | None = None
    dropout: float = 0.0
    seed: int = 0
    offset: int = 0
    row_seeds: Tensor | None = None

    def to(self, device: torch.device) -> Step:
        """The same on another device."""

        def moved(pairs: KVPairs) -> KVPairs:
            return [(key.to(device), value.to(device)) for key, value in pairs]

        return replace(
            self,
            fuser=copy.deepcopy(self.fuser).to(device),
            base=moved(self.base),
            sharer=moved(self.sharer),
            cotangents=moved(self.cotangents),
            token_map=None if self.token_map is None else self.token_map.to(device),
            gates=None if self.gates is None else [g.to(device) for g in self.gates],
            row_seeds=None if self.row_seeds is None else self.row_seeds.to(device),
        )

    def in_float64(self) -> Step:
        """The same numbers."""
        caches = (cast(pairs, torch.float64) for pairs in (self.base, self.sharer, self.cotangents))
        base, sharer, above = caches
        gates = None if self.gates is None else [g.double() for g in self.gates]
        fuser = copy.deepcopy(self.fuser).double()
        return replace(self, fuser=fuser, base=base, sharer=sharer, cotangents=above, gates=gates)


def philox(seed: int, offset: int, groups: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011) of counters [group, offset]: ``[..., 4]`` words."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    counter = [groups & mask, groups >> shift]
    counter += [np.full_like(groups, offset & 0xFFFFFFFF), np.full_like(groups, offset >> 32)]
    keys = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = (
            np.uint64(factor) * word
            for factor, word in ((0xD2511F53, counter[0]), (0xCD9E8D57, counter[2]))
        )
        counter = [
            (b >> shift) ^ counter[1] ^ np.uint64(keys[0]),
            b & mask,
            (a >> shift) ^ counter[3] ^ np.uint64(keys[1]),
            a & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, -1)


def cotangents(base: KVPairs, seed: int = 5) -> KVPairs:
    """Random ones of the caches' shapes and dtype."""
    generator = torch.Generator().manual_seed(seed)

    def one(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    return [(one(key), one(value)) for key, value in base]


def random_gates(fuser: Fuser, base: KVPairs, shape: str = "ghn", seed: int = 6) -> list[Tensor]:
    """In (0, 1); ``shape`` names the dimensions that are not 1: of b, h, n."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens = base[0][0].shape[0], base[0][0].shape[2]
    gates = []
    for group in fuser.groups:
        heads = group.receiver_shape.num_heads
        sizes = {"b": batch, "h": heads, "n": tokens}
        size = [len(group.layers) * len(group.kinds)]
        size += [sizes[d] if d in shape else 1 for d in "bhn"]
        gate = torch.rand(size, generator=generator, dtype=torch.float64)
        wide = base[0][0].dtype == torch.float64
        gates.append(gate.to(base[0][0].device, torch.float64 if wide else torch.float32))
    return gates


def places(fuser: Fuser) -> list[list[tuple[int, int]]]:
    """(receiver layer, 0 for key or 1 for value) of every stream of every group."""
    return [
        [
            (layer, KINDS.index(kind))
            for layer, kind in (group.place(g) for g in range(len(group.in_bias)))
        ]
        for group in fuser.groups
    ]


def arguments(step: Step, index: int, recompute: bool = False) -> dict[str, object]:
    """The arguments of ``fuse`` for shape group ``index``, by name."""
    config, group = step.fuser.config, step.fuser.groups[index]
    where = places(step.fuser)[index]
    values: dict[str, object] = {
        "base": [step.base[layer][kind] for layer, kind in where],
        "sharer": [step.sharer[config.layer_map[layer]][kind] for layer, kind in where],
        "token_map": step.token_map,
        "gate": None if step.gates is None else step.gates[index],
    }
    for name in PARAMETERS:
        parameter = getattr(group, name, None)
        values[name] = None if parameter is None else parameter.detach()
    return values | {
        "activation": config.activation,
        "integration": config.integration,
        "reads_receiver": config.reads == "both",
        "dropout": step.dropout,
        "seed": step.seed,
        "offset": step.offset,
        "row_seeds": step.row_seeds,
        "recompute": recompute,
    }


def through_op(
    op: object, step: Step, *, recompute: bool = False, wanted: Sequence[str] = INPUTS
) -> tuple[KVPairs, dict[str, Tensor]]:
    """(fused, gradients by name) of ``op.fuse`` and ``op.fuse_backward``; not fused: the base.

    Gradients: ``base.{layer}.{0 or 1}``, ``sharer.{layer}.{0 or 1}`` (of the sharer's layers),
    ``gate.{group}``, ``{parameter}.{group}``.
    """
    fused = [list(pair) for pair in step.base]
    gradients: dict[str, Tensor] = {}
    if "base" in wanted:
        for layer, pair in enumerate(step.cotangents):
            for kind, t in enumerate(pair):
                gradients[f"base.{layer}.{kind}"] = t
    for index, where in enumerate(places(step.fuser)):
        values = arguments(step, index, recompute)
        out, saved = op.fuse(*values.values())
        assert len(saved) == 0 or not recompute
        for (layer, kind), t in zip(where, out, strict=True):
            fused[layer][kind] = t
        above = [step.cotangents[layer][kind] for layer, kind in where]
        needed = [name in wanted and values[name] is not None for name in INPUTS]
        given = iter(op.fuse_backward(above, *values.values(), saved, needed))
        for name, is_needed in zip(INPUTS, needed, strict=True):
            if not is_needed:
                continue
            if name not in ("base", "sharer"):
                gradients[f"{name}.{index}"] = next(given)
                continue
            for layer, kind in where:
                if name == "sharer":
                    layer = step.fuser.config.layer_map[layer]
                at, gradient = f"{name}.{layer}.{kind}", next(given)
                if name == "sharer" and at in gradients:  # several layers read this one
                    gradient = gradients[at] + gradient
                gradients[at] = gradient
        assert next(given, None) is None
    return [(key, value) for key, value in fused], gradients


def through_reference(step: Step) -> tuple[KVPairs, dict[str, Tensor]]:
    """As `through_op`, by autograd through reference.py."""
    fuser = step.fuser
    base, sharer = clone(step.base), clone(step.sharer)
    gates = None if step.gates is None else [g.clone() for g in step.gates]
    for t in (*flat(base), *flat(sharer), *(gates or [])):
        t.requires_grad_()
    by_layer: list[list[Tensor | float]] | None = None
    if gates is not None:
        by_layer = [[1.0, 1.0] for _ in base]
        for gate, where in zip(gates, places(fuser), strict=True):
            for g, (layer, kind) in enumerate(where):
                by_layer[layer][kind] = gate[g].unsqueeze(-1).to(base[0][0].dtype)
    tokens = base[0][0].shape[2]
    read = sharer
    if step.token_map is None:
        read = [(key[:, :, :tokens], value[:, :, :tokens]) for key, value in sharer]
    fuser.zero_grad()
    fused = reference.fuse(base, read, fuser, token_map=step.token_map, gates=by_layer)
    pairs = zip(flat(fused), flat(step.cotangents), strict=True)
    sum((out * above).sum() for out, above in pairs).backward()
    gradients: dict[str, Tensor] = {}
    for name, caches in (("base", base), ("sharer", sharer)):
        for layer, pair in enumerate(caches):
            for kind, t in enumerate(pair):
                if t.grad is not None:
                    gradients[f"{name}.{layer}.{kind}"] = t.grad
    for index, group in enumerate(fuser.groups):
        if gates is not None:
            gradients[f"gate.{index}"] = gates[index].grad
        for name in PARAMETERS:
            parameter = getattr(group, name, None)
            if parameter is not None:
                gradients[f"{name}.{index}"] = parameter.grad.clone()
    fuser.zero_grad()
    return [(key.detach(), value.detach()) for key, value in fused], gradients


def plain_draws(step: Step, orders: int = 3) -> list[tuple[KVPairs, dict[str, Tensor]]]:
    """What plain PyTorch gives with several orders of summation; see `conftest.plain_draws`."""
    draws = [through_reference(step)]
    for seed in range(orders):
        fuser = reorder_hidden(step.fuser, seed)
        fused, gradients = through_reference(replace(step, fuser=fuser))
        back = hidden_order(step.fuser, seed).argsort()
        for at, gradient in gradients.items():
            name = at.partition(".")[0]
            if name in PARAMETERS and (dim := hidden_dim(name)) is not None:
                gradients[at] = gradient.index_select(dim, back.to(gradient.device))
        draws.append((fused, gradients))
    return draws


def made(
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    tokens: int = 5,
    sharer_tokens: int | None = None,
    gates: str | None = None,
    **changes: object,
) -> Step:
    """A random step; parameters are float32 masters of anything but float64 caches."""
    fuser = make_fuser(make_config(**changes))
    if dtype == torch.float64:
        fuser.double()
    base, sharer = make_caches(fuser.config, batch, tokens, sharer_tokens, dtype)
    step = Step(fuser, base, sharer, cotangents(base))
    if gates is not None and fuser.config.gate:
        step.gates = random_gates(fuser, base, gates)
    return step


def assert_step(step: Step, ours: tuple[KVPairs, dict[str, Tensor]]) -> None:
    """Outputs and gradients equal those of autograd through the reference."""
    truth = through_reference(step.in_float64())
    dtype = step.base[0][0].dtype
    assert ours[1].keys() == truth[1].keys()
    if dtype == torch.float64:
        for x, t in zip(flat(ours[0]), flat(truth[0]), strict=True):
            assert relative_error(x, t) <= 1e-12
        for name, t in truth[1].items():
            assert relative_error(ours[1][name], t) <= 1e-11, name
        return
    draws = plain_draws(step)
    for i, (x, t) in enumerate(zip(flat(ours[0]), flat(truth[0]), strict=True)):
        assert_as_good_as_plain(x, [flat(fused)[i] for fused, _ in draws], t)
    for name, t in truth[1].items():
        plain = [gradients[name] for _, gradients in draws]
        assert ours[1][name].dtype == plain[0].dtype, name
        # Gradients of float32 masters have the errors of the caches' dtype.
        narrow = [x.to(dtype) for x in (ours[1][name], *plain)]
        assert_as_good_as_plain(narrow[0], narrow[1:], t, name)


def assert_same_bits(a: tuple[KVPairs, dict], b: tuple[KVPairs, dict]) -> None:
    """Outputs and gradients of two runs."""
    assert all(map(same_bits, flat(a[0]), flat(b[0])))
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert same_bits(a[1][name], b[1][name]), name

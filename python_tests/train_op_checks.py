"""What the tests of the training op share: outputs and all gradients of one call, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from conftest import (
    KVPairs,
    cast,
    flat,
    hidden_dim,
    hidden_order,
    make_caches,
    make_config,
    make_fuser,
    reorder_hidden,
)
from torch import Tensor

from c2c_ext import Fuser, reference
from c2c_ext.training_op import ARGUMENTS, PARAMETERS, fuse_training

# A map with repeats, tokens that stay and one out of range; two rows of five tokens, six sharers'.
TOKEN_MAP = torch.tensor([[0, 3, 3, -1, 5], [2, 2, 2, 1, 9]])


def cotangents(pairs: KVPairs, seed: int = 5) -> list[Tensor]:
    """One random tensor per output, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
        for t in flat(pairs)
    ]


def soft_gates(base: KVPairs, per: str = "token", seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Gate values in (0, 1), one (key, value) pair per layer, float32 (float64 for such caches)."""
    generator = torch.Generator().manual_seed(seed)

    def one(t: Tensor) -> Tensor:
        batch, heads, tokens, _ = t.shape
        shape = {"token": (batch, heads, tokens, 1), "head": (heads, 1, 1), "stream": ()}[per]
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        wide = torch.float64 if t.dtype == torch.float64 else torch.float32
        return values.to(t.device, wide)

    return [(one(key), one(value)) for key, value in base]


def run_with_gradients(
    run: Callable[..., KVPairs],
    fuser: Fuser,
    base: KVPairs,
    sharer: KVPairs,
    gates: list[tuple[Tensor, Tensor]] | None = None,
    **keywords: Any,
) -> dict[str, Tensor]:
    """Outputs and gradients of ``run(base, sharer, fuser, gates=..)``; inputs stay untouched."""
    fuser = copy.deepcopy(fuser).requires_grad_()
    base, sharer = ([(k.detach(), v.detach()) for k, v in pairs] for pairs in (base, sharer))
    leaves = {f"base[{i}]": t for i, t in enumerate(flat(base))}
    leaves |= {f"sharer[{i}]": t for i, t in enumerate(flat(sharer))}
    if gates is not None:
        gates = [(k.detach(), v.detach()) for k, v in gates]
        leaves |= {f"gates[{i}]": t for i, t in enumerate(flat(gates))}
    for t in leaves.values():
        t.requires_grad_()
    leaves |= dict(fuser.named_parameters())
    out = run(base, sharer, fuser, gates=gates, **keywords)
    grads = torch.autograd.grad(
        flat(out), list(leaves.values()), cotangents(out), allow_unused=True, materialize_grads=True
    )
    results = {f"out[{i}]": t.detach() for i, t in enumerate(flat(out))}
    return results | dict(zip(leaves, grads, strict=True))


def truth_of(
    fuser: Fuser, base: KVPairs, sharer: KVPairs, gates: Any = None, **keywords: Any
) -> dict[str, Tensor]:
    """The float64 reference's results for these numbers."""
    wide = [cast(pairs, torch.float64) for pairs in (base, sharer)]
    gates = None if gates is None else cast(gates, torch.float64)
    return run_with_gradients(
        reference.fuse, copy.deepcopy(fuser).double(), *wide, gates=gates, **keywords
    )


def plain_results(
    fuser: Fuser, base: KVPairs, sharer: KVPairs, gates: Any = None, **keywords: Any
) -> list[dict[str, Tensor]]:
    """What plain PyTorch gives in these dtypes, with 4 orders of summation."""
    draws = [run_with_gradients(_plain, fuser, base, sharer, gates, **keywords)]
    for seed in range(3):
        other = run_with_gradients(
            _plain, reorder_hidden(fuser, seed), base, sharer, gates, **keywords
        )
        back = hidden_order(fuser, seed).argsort()
        for name, _ in fuser.named_parameters():
            if (dim := hidden_dim(name.rpartition(".")[2])) is not None:
                other[name] = other[name].index_select(dim, back.to(other[name].device))
        draws.append(other)
    return draws


def _plain(base: KVPairs, sharer: KVPairs, fuser: Fuser, gates: Any, **keywords: Any) -> KVPairs:
    """The reference with gates in the caches' dtype, so that its outputs are."""
    if gates is not None:
        dtype = base[0][0].dtype
        gates = [(key.to(dtype), value.to(dtype)) for key, value in gates]
    return reference.fuse(base, sharer, fuser, gates=gates, **keywords)


def run_op(fuser: Fuser, base: KVPairs, sharer: KVPairs, **keywords: Any) -> dict[str, Tensor]:
    """Outputs and gradients by the training op."""
    return run_with_gradients(fuse_training, fuser, base, sharer, **keywords)


def by_kind(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results with the streams of a kind in one: all outputs, all gradients of bases, and so on."""
    kinds: dict[str, list[Tensor]] = {}
    for name, t in results.items():
        kinds.setdefault(name.partition("[")[0], []).append(t.flatten())
    return {name: torch.cat(parts) for name, parts in kinds.items()}


def make_train_case(
    dtype: torch.dtype = torch.float64,
    device: object = "cpu",
    tokens: int = 5,
    sharer_tokens: int = 6,
    **changes: object,
) -> tuple[Fuser, KVPairs, KVPairs]:
    """(fuser, base, sharer) of two rows; the fuser in float64 for such caches, else in float32."""
    config = make_config(**changes)
    fuser = make_fuser(config, device=device)
    if dtype == torch.float64:
        fuser = fuser.double()
    return fuser, *make_caches(config, 2, tokens, sharer_tokens, dtype, device)


def op_arguments(
    fuser: Fuser,
    base: KVPairs,
    sharer: KVPairs,
    gate: Tensor | None = None,
    token_map: Tensor | None = None,
    **changes: object,
) -> tuple:
    """The op's arguments for the fuser's only shape group."""
    (group,) = fuser.groups
    sources = [sharer[layer] for layer in fuser.config.layer_map]
    values = {
        "base": flat(base),
        "sharer": flat(sources),
        "token_map": token_map,
        "gate": gate,
        **{name: getattr(group, name, None) for name in PARAMETERS},
        "activation": fuser.config.activation,
        "integration": fuser.config.integration,
        "reads_receiver": fuser.config.reads == "both",
        "dropout": 0.0,
        "seed": 0,
        "offset": 0,
        "row_seeds": None,
        "recompute": False,
        **changes,
    }
    assert tuple(values) == ARGUMENTS
    return tuple(values.values())

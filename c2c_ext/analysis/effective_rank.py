"""In how many directions a cache varies: its effective rank, per layer, of keys and of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import kv_layers
from ..config import KINDS
from ..fuser import Fuser
from .readings import Reading, fused


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of a matrix's normalised singular values, between 1 and its rank.

    With ``p_i = s_i / sum(s)``: ``exp(-sum p_i log p_i)`` (Roy and Vetterli, "The effective rank",
    EUSIPCO 2007), the measure that arXiv 2510.03215 reports of caches. The matrix is not centred;
    computed in float64. A matrix of zeros has rank 0.

    Args:
        matrix: real ``[R, C]``, any floating dtype.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: not two dimensions, empty, or NaN or infinity in it.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"effective_rank: matrix must be a floating-point tensor, got {got}")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(
            f"effective_rank: matrix must be [R, C] with R and C at least 1, got "
            f"{list(matrix.shape)}"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError("effective_rank: matrix must be finite, it holds NaN or infinity")
    matrix = matrix.detach().double()
    largest = matrix.abs().max()
    if largest == 0:
        return 0.0
    singular = torch.linalg.svdvals(matrix / largest)  # neither squares nor sums leave the range
    part = singular / singular.sum()
    return float(torch.special.entr(part).sum().exp())


def cache_ranks(
    caches: Sequence[Any], columns: Sequence[Tensor | None] | None = None
) -> list[dict[str, float]]:
    """Effective ranks of keys and values, per layer, of all given caches' tokens together.

    A token is a row: its heads side by side, ``H * D`` numbers. No rank can pass the number of
    rows, so that ranks of few tokens say little.

    Args:
        caches: transformers Caches or (key, value) pairs ``[B, H, N, D]``, of one model.
        columns: for every cache the positions (int64) that count; None: all.

    Returns:
        per layer: ``key`` and ``value``, the ranks; ``rows`` and ``width``, the matrices' shape.

    Raises:
        TypeError, ValueError: no caches, or of different models; as `effective_rank`.
    """
    if not caches:
        raise ValueError("cache_ranks: caches must not be empty")
    columns = [None] * len(caches) if columns is None else columns
    if len(columns) != len(caches):
        raise ValueError(
            f"cache_ranks: columns must have one entry for each of {len(caches)} caches, got "
            f"{len(columns)}"
        )
    pairs = [kv_layers(cache, f"caches[{i}]") for i, cache in enumerate(caches)]
    if len({len(layers) for layers in pairs}) > 1:
        raise ValueError("cache_ranks: caches must have the same number of layers")
    found = []
    for layer in range(len(pairs[0])):
        row: dict[str, float] = {}
        for place, kind in enumerate(KINDS):
            parts = []
            for layers, chosen in zip(pairs, columns, strict=True):
                t = layers[layer][place]
                t = t if chosen is None else t[:, :, chosen.to(t.device)]
                parts.append(t.transpose(1, 2).flatten(2).flatten(0, 1))
            matrix = torch.cat(parts)
            row[kind] = effective_rank(matrix)
            row |= {"rows": matrix.shape[0], "width": matrix.shape[1]}
        found.append(row)
    return found


def rank_rows(readings: Sequence[Reading], fuser: Fuser) -> list[dict[str, Any]]:
    """`cache_ranks` of the tokens that are fused: the sharer's, and the receiver's plain and fused.

    Returns:
        rows with ``cache`` (``"sharer"``, ``"receiver"``, ``"fused"``), ``layer`` and what
        `cache_ranks` gives.

    Raises:
        ValueError: no reading, or none of their tokens is fused.
    """
    if not any(bool((r.token_map >= 0).any()) for r in readings):
        raise ValueError("c2c_ext.analysis: no token of these prompts is fused")
    ours = [(r.token_map >= 0).nonzero()[:, 0] for r in readings]
    theirs = [r.token_map[r.token_map >= 0].unique() for r in readings]
    caches: dict[str, tuple[list[Any], list[Tensor]]] = {
        "sharer": ([r.sharer for r in readings], theirs),
        "receiver": ([r.receiver for r in readings], ours),
        "fused": ([fused(r, fuser) for r in readings], ours),
    }
    return [
        {"cache": name, "layer": layer, **row}
        for name, (pairs, columns) in caches.items()
        for layer, row in enumerate(cache_ranks(pairs, columns))
    ]

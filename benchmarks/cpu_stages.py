"""Single stages of the CPU op at one size, ready to be verified and timed.

The stages are the op's own, through the ops c2c::stage_*. Each is verified against float64 on all
of its streams, or on the first and the last if there are many tokens. Matrix products run over all
streams of the shape; gather and combine, which the op does stream by stream, over one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from c2c_ext.estimate import Ceilings, Work, multiplies_bfloat16
from c2c_ext.fusion_bench import CHECKED_NUMBERS, SHAPES, Shape
from c2c_ext.machine import last_level_cache
from c2c_ext.measure import BASELINE, Cell, Effort, compare, measure_cell, worst
from c2c_ext.packed import sum_dtype, to_panels
from c2c_ext.reference import RMS_EPS

MAX_SETS = 64
MAX_BYTES = 2 << 30  # of all sets
ACTIVATION = "gelu"
REORDERED = 3  # more draws of plain PyTorch's roundings, as in the tests

Tensors = tuple[Tensor, ...]


@dataclass
class Operands:
    """One set of inputs: ways to compute the same from them."""

    ours: Callable[[], Tensors]
    plain: Callable[[], Tensors]
    truth: Callable[[], Tensors]  # float64, of the streams in `Kernel.checked`, before any call
    # As plain, its sums in another order by the seed; None where there are no long sums.
    reordered: Callable[[int], Tensors] | None = None


@dataclass
class Kernel:
    """One stage at one size.

    Attributes:
        make: a new set of inputs.
        bytes: of all inputs and outputs, once.
        flop: multiply-adds count as two; additions and activations are not counted.
        gemm: the dtype that is multiplied in.
        checked: of dim 0 of every output.
    """

    name: str
    make: Callable[[], Operands]
    bytes: int
    flop: int
    gemm: torch.dtype
    checked: list[int] | slice


class Stages:
    """All stages of one fusion: shape, cache dtype and tokens fixed, batch 1.

    Args:
        ops: where the stage ops are: torch.ops.c2c.
    """

    def __init__(self, ops: Any, shape: Shape, dtype: torch.dtype, tokens: int, seed: int = 0):
        self.ops, self.dtype, self.tokens = ops, dtype, tokens
        self.wide = sum_dtype(dtype)
        layers, self.heads, self.dim = shape.receiver
        _, self.sharer_heads, self.sharer_dim = shape.sharer
        self.streams, self.hidden = 2 * layers, shape.hidden
        self.width = self.heads * self.dim
        self.inputs = self.width + self.sharer_heads * self.sharer_dim
        self.generator = torch.Generator().manual_seed(seed)
        # The streams to be verified: of few tokens all, else the first and the last.
        few = tokens <= 16
        self.verified = list(range(self.streams)) if few else [0, self.streams - 1]

    def kernels(self) -> Iterator[Kernel]:
        """In the order in which a fusion runs them; the inner width is the hidden one."""
        h, g, n = self.hidden, self.streams, self.tokens
        yield self._kernel("gather", self._gather, n * self.inputs * 2, slice(None))
        yield self._multiply("multiply_in", self.inputs, h)
        yield self._kernel("bias_stats", self._bias_stats, 2 * g * n * h, self.verified)
        yield self._multiply("multiply_w1", h, h)
        yield self._kernel("scale_activate", self._scale_activate, 2 * g * n * h, self.verified)
        yield self._kernel("residual_stats", self._residual_stats, 3 * g * n * h, self.verified)
        yield self._multiply("multiply_branches", h, 2 * h)
        folded = self.width <= h
        yield self._multiply("multiply_out", 2 * h if folded else h, self.width)
        head = g * (n * (2 * h + self.heads) + self.heads * 2 * h)
        flop = 2 * g * n * self.heads * 2 * h
        yield self._kernel("head", self._head, head, self.verified, flop, self.wide)
        yield self._kernel("combine", self._combine, n * (3 * self.width + self.heads), slice(None))

    def _kernel(
        self,
        name: str,
        make: Callable[[], Operands],
        elements: int,
        checked: list[int] | slice,
        flop: int = 0,
        gemm: torch.dtype = torch.float32,
    ) -> Kernel:
        """``elements`` in the dtype of sums, but for gather and combine, which touch caches."""
        size = elements * self.wide.itemsize
        if name == "gather":
            size = elements // 2 * (self.dtype.itemsize + self.wide.itemsize)
        elif name == "combine":
            cache = 2 * self.tokens * self.width
            size = cache * self.dtype.itemsize + (elements - cache) * self.wide.itemsize
        return Kernel(name, make, size, flop, gemm, checked)

    def _multiply(self, name: str, k: int, n: int) -> Kernel:
        g, rows = self.streams, self.tokens
        native = multiplies_bfloat16(self.dtype, torch.device("cpu"))

        def make() -> Operands:
            x, w = self._random(g, rows, k), (self._random(g, n, k) * k**-0.5).to(self.dtype)
            panels = torch.stack([to_panels(matrix, self.dtype) for matrix in w])
            out = torch.empty(g, rows, n, dtype=self.wide)
            rounded, verified = x.to(self.dtype), self.verified

            def ours() -> Tensors:
                self.ops.stage_multiply(out, x, panels)
                return (out,)

            return Operands(
                ours,
                lambda: (torch.bmm(rounded, w.mT),),
                lambda: (torch.bmm(x[verified].double(), w[verified].double().mT),),
                lambda seed: (
                    torch.bmm(rounded[..., _order(k, seed)], w[..., _order(k, seed)].mT),
                ),
            )

        return Kernel(
            name,
            make,
            g * (rows * (k + n) * self.wide.itemsize + n * k * self.dtype.itemsize),
            2 * g * rows * n * k,
            self.dtype if native else self.wide,
            self.verified,
        )

    def _gather(self) -> Operands:
        sharer = self._random(1, self.sharer_heads, self.tokens, self.sharer_dim).to(self.dtype)
        base = self._random(1, self.heads, self.tokens, self.dim).to(self.dtype)
        out = torch.empty(self.tokens, self.inputs, dtype=self.wide)

        def ours() -> Tensors:
            self.ops.stage_gather(out, sharer, base)
            return (out,)

        def plain(dtype: torch.dtype) -> Tensors:
            rows = [t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (sharer, base)]
            return (torch.cat(rows, dim=-1).to(dtype),)

        return Operands(ours, lambda: plain(self.wide), lambda: plain(torch.float64))

    def _bias_stats(self) -> Operands:
        z, bias = self._random(self.streams, self.tokens, self.hidden), self._bias()
        own, before = z.clone(), z[self.verified].double()
        rstd = torch.empty(self.streams, self.tokens, dtype=self.wide)

        def ours() -> Tensors:
            self.ops.stage_bias_stats(z, rstd, bias)
            return z, rstd

        def plain(z: Tensor, bias: Tensor) -> Tensors:
            z.add_(bias[:, None])
            return z, _rstd(z)

        return Operands(
            ours,
            lambda: plain(own, bias),
            lambda: plain(before.clone(), bias[self.verified].double()),
        )

    def _scale_activate(self) -> Operands:
        x = self._random(self.streams, self.tokens, self.hidden)
        rstd, out = self._random(self.streams, self.tokens).abs(), torch.empty_like(x)

        def ours() -> Tensors:
            self.ops.stage_scale_activate(out, x, rstd, ACTIVATION)
            return (out,)

        def plain(x: Tensor, rstd: Tensor) -> Tensors:
            return (F.gelu(x * rstd[..., None]),)

        return Operands(
            ours,
            lambda: plain(x, rstd),
            lambda: plain(x[self.verified].double(), rstd[self.verified].double()),
        )

    def _residual_stats(self) -> Operands:
        z, delta = (self._random(self.streams, self.tokens, self.hidden) for _ in range(2))
        out, rstd = torch.empty_like(z), torch.empty(self.streams, self.tokens, dtype=self.wide)

        def ours() -> Tensors:
            self.ops.stage_residual_stats(out, rstd, z, delta)
            return out, rstd

        def plain(z: Tensor, delta: Tensor) -> Tensors:
            total = z + delta
            return total, _rstd(total)

        return Operands(
            ours,
            lambda: plain(z, delta),
            lambda: plain(z[self.verified].double(), delta[self.verified].double()),
        )

    def _head(self) -> Operands:
        width = 2 * self.hidden
        x = self._random(self.streams, self.tokens, width)
        weight = self._random(self.streams, self.heads, width) * width**-0.5
        logits = torch.empty(self.streams, self.tokens, self.heads, dtype=self.wide)

        def ours() -> Tensors:
            self.ops.stage_head(logits, x, weight)
            return (logits,)

        verified = self.verified
        return Operands(
            ours,
            lambda: (torch.bmm(x, weight.mT),),
            lambda: (torch.bmm(x[verified].double(), weight[verified].double().mT),),
        )

    def _combine(self) -> Operands:
        shape = (1, self.heads, self.tokens, self.dim)
        base = self._random(*shape).to(self.dtype)
        projected, bias = self._random(self.tokens, self.width), self._random(self.width)
        logits, head_bias = self._random(self.tokens, self.heads), self._random(self.heads)
        out = torch.empty_like(base)

        def ours() -> Tensors:
            self.ops.stage_combine(out, base, projected, bias, logits, head_bias, "residual")
            return (out,)

        def plain(*given: Tensor) -> Tensors:
            base, projected, bias, logits, head_bias = given
            added = (projected + bias).view(1, self.tokens, self.heads, self.dim).transpose(1, 2)
            weights = torch.sigmoid(logits + head_bias).view(1, self.tokens, self.heads, 1)
            return ((base + weights.transpose(1, 2) * added).to(base.dtype),)

        operands = (base, projected, bias, logits, head_bias)
        return Operands(
            ours, lambda: plain(*operands), lambda: plain(*(t.double() for t in operands))
        )

    def _bias(self) -> Tensor:
        # Added at every call to the same buffer: small, so that it stays a number.
        return self._random(self.streams, self.hidden) * 1e-3

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.wide)


def _pooled(outputs: list[Tensors]) -> Tensors:
    """Outputs of several sets, one after the other along dim 0; never the buffers themselves."""
    return tuple(torch.cat(tensors) for tensors in zip(*outputs, strict=True))


def _order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _rstd(z: Tensor) -> Tensor:
    return torch.rsqrt(z.square().mean(-1) + RMS_EPS)


def measure_kernel(
    cell: Cell, kernel: Kernel, ceilings: Callable[[torch.dtype], Ceilings], effort: Effort
) -> tuple[list[Cell], list[Cell]]:
    """Calls rotate among sets of inputs of twice the last-level cache in all, as they fit."""
    wanted = min(1 + 2 * last_level_cache() // kernel.bytes, MAX_BYTES // kernel.bytes, MAX_SETS)
    sets = [kernel.make() for _ in range(max(wanted, 1))]
    first = sets[0].truth()
    # The largest of a few rounding errors is a lottery: as many sets as it takes are compared.
    fewest = min(t.numel() for t in first)
    checked = sets[: -(-CHECKED_NUMBERS // max(fewest, 1))]
    truth = _pooled([first, *(one.truth() for one in checked[1:])])
    draws: list[Tensors] = []  # of plain PyTorch

    def check(provider: str, call: Callable[[int], Tensors]) -> dict[str, float]:
        found = _pooled([tuple(t[kernel.checked] for t in call(i)) for i in range(len(checked))])
        if provider == BASELINE:
            draws.append(found)
            for seed in range(REORDERED if sets[0].reordered else 0):
                again = [one.reordered(seed) for one in checked]
                draws.append(_pooled([tuple(t[kernel.checked] for t in one) for one in again]))
        plain = list(zip(*draws, strict=True))
        return worst(
            compare(
                found[i],
                plain[i],
                exact,
                f"{kernel.name} output {i}",
                is_plain=provider == BASELINE,
            )
            for i, exact in enumerate(truth)
        )

    calls = {
        BASELINE: lambda i: sets[i % len(sets)].plain(),
        "ours": lambda i: sets[i % len(sets)].ours(),
    }
    work = Work(kernel.bytes, kernel.flop, kernel.gemm)
    return measure_cell({**cell, "sets": len(sets)}, calls, check, work, ceilings, effort)


KERNELS = [kernel.name for kernel in Stages(None, SHAPES["tiny"], torch.float32, 1).kernels()]

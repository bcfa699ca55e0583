"""How long does a training step's fuser part take, and what does it keep? The op and plain PyTorch.

usage: python benchmarks/bench_train.py [--shapes short] [--dtypes fp32] [--batches B ...]
           [--tokens N ...] [--providers reference compiled op op_recompute] [--device cpu|cuda]
           [--threads T] [--affinity 0,1] [--rounds R] [--quick] [--output FILE]

One step is forward and backward of all streams with soft gates, one per stream, and no dropout;
parameters and gates get gradients, the frozen models' caches do not. Parameters are float32 and the
caches have the given dtype. Outputs and all gradients of every provider are verified against
float64 before it is timed. Of memory a row holds
  saved_bytes  what autograd keeps between forward and backward beside parameters, caches and gates:
               every storage that a saved tensor lies in, once (`saved_tensors_hooks`);
  peak_bytes   the most that a step takes beyond what was there before it, gradients included: of
               the process (Linux), or of torch's allocator on a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import torch
from gpu import Gpu
from torch import Tensor

from c2c_ext import Fuser, reference
from c2c_ext.config import KINDS
from c2c_ext.estimate import Work
from c2c_ext.fusion_bench import SHAPES, randomised
from c2c_ext.machine import peak_memory
from c2c_ext.measure import BASELINE, Unverified, compare, measure_cell, worst
from c2c_ext.report import DTYPES
from c2c_ext.training_op import fuse_training

PROVIDERS = (BASELINE, "compiled", "op", "op_recompute")


class TrainCase:
    """Caches, soft gates and cotangents of one step."""

    def __init__(self, fuser: Fuser, dtype: torch.dtype, batch: int, tokens: int, device: Any):
        self.fuser, self.dtype, self.device = fuser, dtype, device
        self.batch, self.tokens = batch, tokens
        config = fuser.config
        generator = torch.Generator().manual_seed(1)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        def caches(model: Any) -> list[tuple[Tensor, Tensor]]:
            shapes = [(batch, s.num_heads, tokens, s.head_dim) for s in model.layers]
            return [(random(*s).to(dtype), random(*s).to(dtype)) for s in shapes]

        self.base, self.sharer = caches(config.receiver), caches(config.sharer)
        self.gates = torch.sigmoid(random(len(config.layer_map), len(KINDS), 1, 1, 1))
        if dtype in (torch.bfloat16, torch.float16):  # what every provider sees of them
            self.gates = self.gates.to(dtype).float()
        self.gates.requires_grad_()
        self.cotangents = [torch.randn_like(t) for pair in self.base for t in pair]
        self.truth: dict[str, Tensor] = {}
        self.plain: dict[str, Tensor] = {}

    def work(self) -> Work:
        """Products of forward, weights' gradients and, but for the first map, inputs' gradients."""
        rows = self.batch * self.tokens
        matrices = {
            n: p for n, p in self.fuser.named_parameters() if n.endswith(("weight", "1", "2"))
        }
        flop = sum((4 if "in_weight" in n else 6) * rows * p.numel() for n, p in matrices.items())
        moved = 2 * sum(p.nbytes for p in self.fuser.parameters())
        moved += 2 * sum(t.nbytes for pair in (*self.base, *self.sharer) for t in pair)
        return Work(moved, flop, self.dtype if self.device.type == "cuda" else torch.float32)

    def forward(self, provider: str) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        """Fuses with a graph."""
        if provider == "compiled":
            return self._compiled()
        if provider == BASELINE:
            return lambda: reference.fuse(self.base, self.sharer, self.fuser, gates=self._pairs())
        recompute = provider == "op_recompute"
        return lambda: fuse_training(
            self.base, self.sharer, self.fuser, gates=self.gates, recompute=recompute
        )

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        gates = self.gates.to(self.dtype).unbind(0)
        return [tuple(layer.unbind(0)) for layer in gates]

    def _compiled(self) -> Callable[[], list[tuple[Tensor, Tensor]]]:
        """One graph for all streams, as in bench_fuse; parameters unbound as in the reference."""
        config = self.fuser.config
        torch.compiler.reset()

        def stream(w: Any, sharer: Tensor, base: Tensor, gate: Tensor) -> Tensor:
            return reference.fuse_stream(w, sharer, base, gate, config)

        compiled = torch.compile(stream, dynamic=False, fullgraph=True)

        def run() -> list[tuple[Tensor, Tensor]]:
            fused: list[Any] = [list(pair) for pair in self.base]
            gates = self._pairs()
            for group in self.fuser.groups:
                weights = group.streams()
                for g in range(len(group.layers) * len(group.kinds)):
                    layer, kind = group.place(g)
                    k = KINDS.index(kind)
                    source = self.sharer[config.layer_map[layer]][k]
                    w = weights(g, self.dtype)
                    w.gate_logit = None  # not read, and no gradient reaches it
                    fused[layer][k] = compiled(w, source, self.base[layer][k], gates[layer][k])
            return [tuple(pair) for pair in fused]

        return run

    def step(self, forward: Callable[[], list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
        """Forward and backward; the outputs. Gradients are set, not added up."""
        self.gates.grad = None
        self.fuser.zero_grad(set_to_none=True)
        out = [t for pair in forward() for t in pair]
        torch.autograd.backward(out, self.cotangents)
        return out

    def results(self, forward: Callable[[], list[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        out = self.step(forward)
        found = {"out": torch.cat([t.detach().flatten() for t in out]), "gates": self.gates.grad}
        for name, p in self.fuser.named_parameters():
            if not name.endswith("gate_logit"):
                found[name] = p.grad
        return found

    def float64(self) -> dict[str, Tensor]:
        """The reference in float64 for the same numbers, weights as products see them."""
        wide = TrainCase.__new__(TrainCase)
        wide.__dict__.update(self.__dict__)
        wide.fuser = Fuser(self.fuser.config).to(self.device, torch.float64)
        with torch.no_grad():
            for ours, theirs in zip(wide.fuser.parameters(), self.fuser.parameters(), strict=True):
                ours.copy_(theirs.to(self.dtype))
        for name in ("base", "sharer"):
            pairs = [tuple(t.double() for t in pair) for pair in getattr(self, name)]
            setattr(wide, name, pairs)
        wide.dtype, wide.gates = torch.float64, self.gates.detach().double().requires_grad_()
        wide.cotangents = [t.double() for t in self.cotangents]
        return wide.results(wide.forward(BASELINE))

    def check(self, provider: str, call: Callable[[int], Any]) -> dict[str, Any]:
        """Compares outputs and gradients with float64 by the tests' tolerance, and measures memory.

        Raises:
            Unverified: names what differs.
        """
        forward = call.forward  # type: ignore[attr-defined]
        try:
            found = self.results(forward)
        except Exception as error:
            raise Unverified(f"{provider} failed: {type(error).__name__}: {error}"[:500]) from error
        if not self.truth:
            self.truth, self.plain = self.float64(), found
        compared = []
        for name, truth in self.truth.items():
            # What was computed in the caches' dtype can be stored wider.
            plain = self.plain[name].to(self.dtype)
            ours = found[name].to(self.dtype)
            what = f"{provider}, {name}"
            # torch.compile is plain PyTorch with sums in another, sometimes less exact order.
            is_plain = provider in (BASELINE, "compiled")
            compared.append(compare(ours, [plain], truth, what, is_plain=is_plain))
        return worst(compared)

    def memory(self, forward: Callable[[], list[tuple[Tensor, Tensor]]]) -> dict[str, int | None]:
        """Bytes saved for the backward, and the step's peak."""
        inputs = [*self.fuser.parameters(), self.gates]
        inputs += [t for pair in (*self.base, *self.sharer) for t in pair]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward()
        del out
        self.step(forward)
        self.fuser.zero_grad(set_to_none=True)
        return {"saved_bytes": sum(saved.values()), "peak_bytes": self._peak(forward)}

    def _peak(self, forward: Callable[[], list[tuple[Tensor, Tensor]]]) -> int | None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.step(forward)
            return torch.cuda.max_memory_allocated(self.device) - before
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # memory that was freed and not given back would hide the peak
        measured = peak_memory(lambda: self.step(forward))
        return None if measured is None else measured[1] - measured[0]


class _Call:
    """A provider as `measure_cell` calls it."""

    def __init__(self, case: TrainCase, provider: str) -> None:
        self.case, self.forward = case, case.forward(provider)

    def __call__(self, _: int) -> None:
        self.case.step(self.forward)


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--batches", nargs="+", type=harness.positive, default=[1])
    parser.add_argument("--tokens", nargs="+", type=harness.positive)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    harness.with_device(parser)
    options = parser.parse_args(argv)
    if BASELINE not in options.providers:
        parser.error(f"--providers must contain {BASELINE}, which the others are verified with")
    gpu = Gpu.first("bench_train.py") if options.device == "cuda" else None
    on_gpu = gpu is not None
    options.shapes = options.shapes or ["tiny" if options.quick else "real" if on_gpu else "short"]
    options.dtypes = options.dtypes or (["bf16"] if on_gpu else ["fp32"])
    options.tokens = options.tokens or (
        [16] if options.quick else [512, 2048] if on_gpu else [128, 512]
    )
    device = torch.device("cpu") if gpu is None else gpu.device
    facts = {} if gpu is None else gpu.facts
    name = "train_cuda" if on_gpu else "train"
    results = harness.Results(name, options, options.dtypes, device)

    def clock() -> float:
        if gpu is not None:
            gpu.wait()
        return time.perf_counter()

    for shape in options.shapes:
        harness.say(f"fuser {shape}")
        torch.manual_seed(0)
        fuser = randomised(Fuser(SHAPES[shape].config())).to(device).requires_grad_()
        for dtype in options.dtypes:
            for batch in options.batches:
                for tokens in options.tokens:
                    case = TrainCase(fuser, DTYPES[dtype], batch, tokens, device)
                    calls = {p: _Call(case, p) for p in PROVIDERS if p in options.providers}
                    cell = {"shape": shape, "dtype": dtype, "batch": batch, "tokens": tokens}
                    rows, left_out = measure_cell(
                        cell, calls, case.check, case.work(), results.sampler, results.effort, clock
                    )
                    case.truth, case.plain = {}, {}
                    for row in rows:
                        row.update(facts)
                        row["memory"] = case.memory(calls[row["provider"]].forward)
                    for row in rows:
                        row["memory_ratios"] = memory_ratios(rows[0]["memory"], row["memory"])
                        print(row["provider"], row["memory"], row["memory_ratios"])
                    results.add(rows, left_out)
                    del case, calls
                    gc.collect()
    return results.finish()


def memory_ratios(
    baseline: dict[str, int | None], ours: dict[str, int | None]
) -> dict[str, float | None]:
    """By how much of the baseline's memory a provider does."""
    return {n: ours[n] / b if b and ours[n] is not None else None for n, b in baseline.items()}


if __name__ == "__main__":
    sys.exit(main())

"""How long does a whole fusion take? Plain PyTorch, torch.compile and c2c_ext in turns.

usage: python benchmarks/bench_fuse.py [--shapes real large tiny] [--dtypes fp32 bf16]
           [--gates all half] [--batches B ...] [--tokens N ...] [--providers ...]
           [--device cpu|cuda [--cuda-paths plain fused hopper]]
           [--threads T] [--affinity 0,1] [--rounds R] [--quick] [--output FILE]

Every provider is verified against float64 before it is timed. docs/benchmarks.md says how to read
the results.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import harness
import shapes
import torch
from gpu import Gpu, path_of, poison

from c2c_ext import cuda_paths
from c2c_ext.cache import KVPairs
from c2c_ext.fusion_bench import (
    GATES,
    PROVIDERS,
    SHAPES,
    FusionCase,
    make_fuser,
    measure_fusion,
    set_gates,
)
from c2c_ext.measure import BASELINE, Cell, Unverified
from c2c_ext.report import DTYPES

OP, GRAPH = "op", " graph"
Call = Callable[[int], KVPairs]


def main(argv: list[str] | None = None, gpu: Gpu | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["real", "large", "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--batches", nargs="+", type=harness.positive)
    parser.add_argument("--tokens", nargs="+", type=harness.positive)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    harness.with_device(parser)
    parser.add_argument(
        "--cuda-paths",
        nargs="+",
        choices=cuda_paths.PATHS,
        default=[],
        help="the op once per path, called and as a CUDA graph, in place of what auto takes",
    )
    options = parser.parse_args(argv)
    if BASELINE not in options.providers:
        parser.error(f"--providers must contain {BASELINE}, which the others are verified with")
    if options.cuda_paths and options.device != "cuda":
        parser.error("--cuda-paths needs --device cuda")
    if options.cuda_paths and OP not in options.providers:
        parser.error(f"--cuda-paths needs {OP} among --providers")
    if options.device == "cuda":
        gpu = gpu or Gpu.first("bench_fuse.py")
    if options.quick:
        options.shapes, options.tokens = ["tiny"], options.tokens or [1, 16]
    device = torch.device("cpu") if gpu is None else gpu.device
    results = harness.Results("fuse", options, options.dtypes, device)
    cells = shapes.fusion_cells(
        options.shapes, options.dtypes, options.gates, options.batches, options.tokens
    )
    for (shape, _), same_fuser in groupby(cells, key=lambda c: (c.shape, c.dtype)):
        fuser, gates = None, None
        for cell in same_fuser:
            if fuser is None:  # only one is alive: the large ones take gigabytes
                harness.say(f"fuser {shape} {cell.dtype}")
                fuser = make_fuser(SHAPES[shape], cell.torch_dtype).to(device)
            if gates != cell.gates:
                gates = cell.gates
                set_gates(fuser, gates)
            sizes = (cell.batch, cell.tokens)
            case = FusionCase(fuser, cell.torch_dtype, *sizes, device=device)
            what = {"shape": shape, "gates": gates}
            given = (what, case, results.sampler, results.effort, tuple(options.providers))
            if gpu is None:
                results.add(*measure_fusion(*given))
            else:
                results.add(*measure_on_gpu(*given, gpu, options.cuda_paths))
            del case, given
            gc.collect()
        del fuser
    return results.finish()


def measure_on_gpu(
    cell: Cell,
    case: FusionCase,
    ceilings: Callable[..., Any],
    effort: Any,
    providers: tuple[str, ...],
    gpu: Gpu,
    paths: Sequence[str],
) -> tuple[list[Cell], list[Cell]]:
    """`measure_fusion`, the op once per path; rows say which GPU, kernels and memory.

    A path that leaves this fusion to another one is left out.
    """
    calls = {}
    for name, call in case.calls(providers).items():
        if name != OP or not paths:
            calls[name] = call
            continue
        for path in paths:
            calls[f"{OP} {path}"] = _on(path, call)
            calls[f"{OP} {path}{GRAPH}"] = _captured(gpu, _on(path, call), len(case.sets))
    found: dict[str, Cell] = {}

    def check(provider: str, call: Call) -> dict[str, Any]:
        is_graph = provider.endswith(GRAPH)
        path = provider.removesuffix(GRAPH).removeprefix(OP).strip()
        if path in paths:
            poison(call, case, path)
        verified = case.check(provider, call)
        found[provider] = dict(gpu.facts)
        if not is_graph:
            found[provider]["extra_bytes"] = gpu.extra_bytes(lambda: call(0))
        if path in paths:
            launches = gpu.launches(lambda: call(0))
            ran = path_of(launches)
            if ran not in (path, None):
                raise Unverified(f"{path} left this fusion to {ran}")
            kind = {"cuda_graph": path} if is_graph else {"cuda_path": path, "cuda_path_ran": ran}
            found[provider] |= {**kind, "launches": len(launches)}
        return verified

    rows, left_out = measure_fusion(cell, case, ceilings, effort, providers, calls, check)
    fused = sum(case.sets[0][0][layer][0].nbytes for layer, _ in case.open)
    return [{**row, **found[row["provider"]], "fused_bytes": fused} for row in rows], left_out


def _on(path: str, call: Call) -> Call:
    def run(i: int) -> KVPairs:
        with cuda_paths.asked_for(path):
            return call(i)

    return run


def _captured(gpu: Gpu, call: Call, count: int) -> Call:
    """``call`` by graphs that are made when it is first called."""
    graphs: list[Call] = []

    def run(i: int) -> KVPairs:
        if not graphs:
            graphs.append(gpu.replayed(call, count))
        return graphs[0](i)

    return run


if __name__ == "__main__":
    sys.exit(main())

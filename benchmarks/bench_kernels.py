"""How fast is every stage of a fusion by itself? Ours and the plain PyTorch expression in turns.

usage: python benchmarks/bench_kernels.py [--shapes real large] [--dtypes fp32 bf16]
           [--tokens N ...] [--kernels gather multiply_in ...] [--threads T] [--quick] [--output F]
       python benchmarks/bench_kernels.py --device cuda [--cuda-paths plain fused hopper] ...

On a GPU single stages cannot be called: whole fusions are profiled, path by path. What is done is
in cpu_stages.py and gpu_stages.py; docs/benchmarks.md says how to read the results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gpu_stages
import harness
import torch
from cpu_stages import KERNELS, Stages, measure_kernel
from gpu import Gpu

from c2c_ext import cuda_paths
from c2c_ext.fusion_bench import SHAPES, FusionCase, make_fuser, set_gates
from c2c_ext.measure import Cell
from c2c_ext.report import DTYPES

# By device: what is measured where the command line does not say.
DEFAULTS = {
    "cpu": {
        "shapes": ["real", "large"],
        "dtypes": ["fp32", "bf16"],
        "tokens": [1, 16, 64, 170, 512],
    },
    "cuda": {
        "shapes": ["real"],
        "dtypes": ["bf16"],
        "tokens": [1, 16, 64, 170, 512, 2048, 8192],
    },
}


def main(argv: list[str] | None = None, ops: Any = torch.ops.c2c, gpu: Gpu | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=harness.positive)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, help="on the CPU; all by default")
    harness.with_device(parser)
    parser.add_argument(
        "--cuda-paths", nargs="+", choices=cuda_paths.PATHS, help="on a GPU; all by default"
    )
    options = parser.parse_args(argv)
    other = {"cpu": "cuda_paths", "cuda": "kernels"}[options.device]
    if getattr(options, other) is not None:
        parser.error(f"--{other.replace('_', '-')} is not for --device {options.device}")
    options.kernels = options.kernels or KERNELS
    options.cuda_paths = options.cuda_paths or list(cuda_paths.PATHS)
    if options.device == "cuda":
        gpu = gpu or Gpu.first("bench_kernels.py")
    elif not hasattr(ops, "stage_gather"):
        print(
            "bench_kernels.py: this build has no op c2c::stage_gather, through which single "
            "stages run; rebuild c2c_ext from this checkout",
            file=sys.stderr,
        )
        return 2
    if options.quick:
        options.shapes, options.tokens = options.shapes or ["tiny"], options.tokens or [1, 16]
    for option, value in DEFAULTS[options.device].items():
        if getattr(options, option) is None:
            setattr(options, option, value)
    device = torch.device("cpu") if gpu is None else gpu.device
    results = harness.Results("kernels", options, options.dtypes, device)
    for shape in options.shapes:
        for dtype in options.dtypes:
            run = _on_the_cpu(ops, options.kernels) if gpu is None else _on(gpu, options.cuda_paths)
            for tokens in options.tokens:
                run(results, shape, dtype, tokens)
    return results.finish()


Run = Callable[[harness.Results, str, str, int], None]


def _on_the_cpu(ops: Any, kernels: list[str]) -> Run:
    def run(results: harness.Results, shape: str, dtype: str, tokens: int) -> None:
        for kernel in Stages(ops, SHAPES[shape], DTYPES[dtype], tokens).kernels():
            if kernel.name in kernels:
                cell = {"kernel": kernel.name, **_cell(shape, dtype, tokens)}
                results.add(*measure_kernel(cell, kernel, results.sampler, results.effort))

    return run


def _on(gpu: Gpu, paths: list[str]) -> Run:
    fusers = []  # of the shape and dtype that this is for

    def run(results: harness.Results, shape: str, dtype: str, tokens: int) -> None:
        if not fusers:
            harness.say(f"fuser {shape} {dtype}")
            fusers.append(make_fuser(SHAPES[shape], DTYPES[dtype]).to(gpu.device))
            set_gates(fusers[0], "all")
        case = FusionCase(fusers[0], DTYPES[dtype], 1, tokens, device=gpu.device)
        given = (_cell(shape, dtype, tokens), case, gpu, paths, results.sampler, results.effort)
        results.add(*gpu_stages.measure_stages(*given))

    return run


def _cell(shape: str, dtype: str, tokens: int) -> Cell:
    dtype = str(DTYPES[dtype]).removeprefix("torch.")
    return {"shape": shape, "dtype": dtype, "batch": 1, "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())

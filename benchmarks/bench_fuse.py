"""How long does a whole fusion take? Plain PyTorch, torch.compile and c2c_ext in turns.

usage: python benchmarks/bench_fuse.py [--shapes real large tiny] [--dtypes fp32 bf16]
           [--gates all half] [--batches B ...] [--tokens N ...] [--providers ...]
           [--device cpu|cuda] [--threads T] [--affinity 0,1] [--rounds R] [--quick] [--output FILE]

Every provider is verified against float64 before it is timed. docs/benchmarks.md says how to read
the results.
"""

from __future__ import annotations

import gc
import sys
from itertools import groupby

import harness
import shapes
import torch

from c2c_ext.fusion_bench import (
    GATES,
    PROVIDERS,
    SHAPES,
    FusionCase,
    make_fuser,
    measure_fusion,
    set_gates,
)
from c2c_ext.measure import BASELINE
from c2c_ext.report import DTYPES


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["real", "large", "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--batches", nargs="+", type=harness.positive)
    parser.add_argument("--tokens", nargs="+", type=harness.positive)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use")
    if BASELINE not in options.providers:
        parser.error(f"--providers must contain {BASELINE}, which the others are verified with")
    if options.quick:
        options.shapes, options.tokens = ["tiny"], options.tokens or [1, 16]
    device = torch.device(options.device)
    name = "fuse" if options.device == "cpu" else f"fuse_{options.device}"
    results = harness.Results(name, options, options.dtypes, device)
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
            providers = tuple(options.providers)
            results.add(*measure_fusion(what, case, results.sampler, results.effort, providers))
            del case
            gc.collect()
        del fuser
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())

"""Where a fusion's time goes on a GPU: kernel by kernel, as the profiler saw them in whole fusions.

Kernels of one stage are taken together, library products too. Rows have the form of
`bench_kernels.py`'s, the provider being the CUDA path. Never run on a GPU so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from gpu import Gpu, Launch, path_of, poison

from c2c_ext import cuda_paths
from c2c_ext.cache import KVPairs
from c2c_ext.estimate import Ceilings, Work
from c2c_ext.fusion_bench import FusionCase
from c2c_ext.measure import BASELINE, Cell, Effort, Timing, Unverified, result_rows

CALLS = 20  # that are profiled, at least
WHOLE, LIBRARY = "whole fusion", "library products"
# What in a kernel's name tells its stage, in this order; other kernels keep their own names.
STAGES = {
    "in": re.compile(r"fused_gemm_kernel.*\bCacheInput|hopper_gemm_kernel.*\bBiasEpilogue"),
    "out": re.compile(r"fused_gemm_kernel.*\bFusedOutput|hopper_gemm_kernel.*\bOutputEpilogue"),
    "w1 and branches": re.compile(
        r"fused_gemm_kernel.*\bActivatedOutput|hopper_gemm_kernel.*\bActivateEpilogue"
    ),
    "w2": re.compile(r"fused_gemm_kernel.*\bNormedOutput|hopper_gemm_kernel.*\bResidualEpilogue"),
    "head": re.compile(r"c2c::cuda::.*\bhead(_weights)?_kernel"),
}


def stage_of(launch: Launch) -> str:
    """The stage that a kernel belongs to."""
    if launch.ours is None:
        return LIBRARY
    found = (stage for stage, mark in STAGES.items() if mark.search(launch.name))
    return next(found, launch.ours)


def stage_work(case: FusionCase) -> dict[str, Work]:
    """What each stage reads, writes and multiplies in a fusion of all streams, at depth 3.

    Bytes: every operand read once, every result written once.
    """
    fuser, rows = case.fuser, case.work.rows
    config, size = fuser.config, case.dtype.itemsize
    h, m = config.hidden_size, config.intermediate_size
    sharer, receiver = config.layer_shapes(0)
    width, heads = receiver.width, receiver.num_heads
    inputs, last = sharer.width + width, m + h if width <= h else h
    streams = len(case.open)

    def of(activations: int, weights: int = 0, multiplied: int = 0, sums: int = 0) -> Work:
        """Elements: of activations, per row; of weights; multiply-adds and float32, per row."""
        each = rows * (activations * size + 4 * sums) + weights * size
        return Work(streams * each, 2 * streams * rows * multiplied, case.dtype)

    products = [(inputs, h), (h, m), (m, h), (h, m + h), (last, width)]
    elements = sum(k * n for k, n in products)
    head = heads * 2 * h
    return {
        WHOLE: case.minimum(),
        LIBRARY: of(sum(k + n for k, n in products), elements, elements),
        "gather": of(2 * inputs),
        "add_stats": of(3 * h + 4 * h),  # bias and norm; residual and norm
        "activate": of(2 * m + 2 * (m + h)),
        "head": of(2 * h, 2 * head, head, heads),  # weights in float32
        "combine": of(3 * width, sums=heads),
        "in": of(inputs + h, inputs * h, inputs * h),
        "w1 and branches": of(2 * h + 2 * m + h, h * (2 * m + h), h * (2 * m + h)),
        "w2": of(m + 2 * h, m * h, m * h),
        "out": of(last + 2 * width, last * width, last * width),
    }


def measure_stages(
    cell: Cell,
    case: FusionCase,
    gpu: Gpu,
    paths: Sequence[str],
    ceilings: Callable[[torch.dtype], Ceilings],
    effort: Effort,
) -> tuple[list[Cell], list[Cell]]:
    """A row per path and stage, and one of the whole: seconds on the GPU, gaps not counted.

    A path is verified first; one that leaves the fusion to another is left out.
    """
    calls = case.calls((BASELINE, "op"))
    rows: list[Cell] = []
    left_out: list[Cell] = []
    try:
        case.check(BASELINE, calls[BASELINE])
    except Unverified as error:
        return [], [{**cell, "provider": BASELINE, "reason": str(error)}]
    works, found = stage_work(case), ceilings(case.dtype)
    for path in paths:
        try:
            with cuda_paths.asked_for(path):
                verified, seconds, launches = _profiled(case, calls["op"], gpu, path, effort)
        except Unverified as error:
            left_out.append({**cell, "provider": path, "reason": str(error)})
            continue
        for stage, timing in seconds.items():
            where = {**cell, **gpu.facts, "kernel": stage, "launches": launches[stage]}
            work = works.get(stage)
            rows += result_rows(
                where, {path: timing}, {path: verified}, work, None if work is None else found
            )
    return rows, left_out


def _profiled(
    case: FusionCase, call: Callable[[int], KVPairs], gpu: Gpu, path: str, effort: Effort
) -> tuple[Mapping[str, object], dict[str, Timing], dict[str, int]]:
    """(what was verified, seconds by stage, launches by stage) of fusions on one path."""
    poison(call, case, path)
    verified = case.check(path, call)
    runs = [gpu.launches(lambda i=i: call(i)) for i in range(max(effort.rounds, CALLS))]
    ran = path_of(runs[0])
    if ran is None:
        raise Unverified("the profiler saw none of our kernels")
    if ran != path:
        raise Unverified(f"{path} left this fusion to {ran}")
    seconds: dict[str, list[float]] = {WHOLE: []}
    for i, run in enumerate(runs):
        totals: dict[str, float] = {}
        for launch in run:
            stage = stage_of(launch)
            totals[stage] = totals.get(stage, 0.0) + launch.seconds
        for stage, total in totals.items():
            seconds.setdefault(stage, []).append(total)
        seconds[WHOLE].append(sum(totals.values()))
        if len(run) != len(runs[0]):
            raise Unverified(f"call {i} launched {len(run)} kernels, the first {len(runs[0])}")
    launches = {stage: sum(stage_of(one) == stage for one in runs[0]) for stage in seconds}
    launches[WHOLE] = len(runs[0])
    timings = {stage: Timing(each, len(runs)) for stage, each in seconds.items()}
    return verified, timings, launches

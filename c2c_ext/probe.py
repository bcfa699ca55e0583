"""The machine's ceilings, measured: memory bandwidth and GEMM rate of one device, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .estimate import Ceilings
from .packed import sum_dtype, to_panels

SECONDS = 8.0  # for all devices; starting up and last repetitions come on top
BUFFER_BYTES = 256 << 20  # larger than any cache; a GPU gets more, so that a launch does not count
BUFFER_BYTES_ON_GPU = 4 << 30
SMALLEST_GEMM = 256
SAMPLED_GEMM, SAMPLED_TIMES = 1024, 3  # of `CeilingSampler`
LARGEST_GEMM = {"cpu": 4096, "cuda": 8192}


def probe(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda what: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Ceilings:
    """Measures a device for about ``seconds``; the best of all repetitions counts.

    Memory is the faster of copying (bytes read plus bytes written) and summing (bytes read), on
    `BUFFER_BYTES`. The GEMMs are square, of growing size; on the CPU the faster of PyTorch's and
    the compiled op's own.

    Args:
        device: a CPU or CUDA device.
        dtypes: of the GEMMs.
        progress: called with what is measured next.
        clock: seconds.
    """
    dtypes = list(dict.fromkeys(dtypes))
    share = seconds / (1 + len(dtypes))
    timer = _Timer(device, clock)
    progress("memory")
    memory = _memory_rate(timer, share)
    gemm = {}
    for dtype in dtypes:
        progress(f"{str(dtype).removeprefix('torch.')} GEMM")
        gemm[dtype] = _gemm_rate(timer, dtype, share)
    return Ceilings(str(device), memory, gemm)


class CeilingSampler:
    """The ceilings of this moment, in some tens of milliseconds; what it works on is kept.

    Called again and again among other measurements, its best value says what the machine could do
    at the time: on a shared machine that changes within minutes.

    Args:
        device: a CPU or CUDA device.
        dtypes: of the GEMMs.
    """

    def __init__(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
        self._timer = _Timer(device, time.perf_counter)
        self._source = _buffer(device)
        self._target = torch.zeros_like(self._source)
        self._size = SAMPLED_GEMM if device.type == "cpu" else LARGEST_GEMM[device.type]
        self._products = {d: _products(self._timer, d, self._size) for d in dtypes}

    def __call__(self, dtype: torch.dtype) -> Ceilings:
        """Memory, and the GEMM of one of the dtypes."""
        products = self._products[dtype]
        fastest = min(self._timer(run) for _ in range(SAMPLED_TIMES) for run in products)
        memory = max(_memory_rates(self._timer, self._source, self._target))
        return Ceilings(str(self._timer.device), memory, {dtype: 2 * self._size**3 / fastest})


class _Timer:
    """Seconds of one call on a device, everything it started included."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock

    def __call__(self, run: Callable[[], object]) -> float:
        self._wait()
        start = self.clock()
        run()
        self._wait()
        return max(self.clock() - start, 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _memory_rate(timer: _Timer, seconds: float) -> float:
    source = _buffer(timer.device)
    target = torch.zeros_like(source)
    best, spent = 0.0, timer(lambda: target.copy_(source))  # warms up
    while best == 0.0 or spent < seconds:
        copied, summed = _memory_rates(timer, source, target)
        spent += 2 * source.nbytes / copied + source.nbytes / summed
        best = max(best, copied, summed)
    return best


def _buffer(device: torch.device) -> Tensor:
    size = BUFFER_BYTES if device.type == "cpu" else BUFFER_BYTES_ON_GPU
    return torch.ones(size // 4, device=device)


def _memory_rates(timer: _Timer, source: Tensor, target: Tensor) -> tuple[float, float]:
    """Bytes per second of copying and of summing."""
    copied, summed = timer(lambda: target.copy_(source)), timer(source.sum)
    return 2 * source.nbytes / copied, source.nbytes / summed


def _gemm_rate(timer: _Timer, dtype: torch.dtype, seconds: float) -> float:
    size = SMALLEST_GEMM
    products = _products(timer, dtype, size)
    best, spent = 0.0, sum(timer(run) for run in products)  # warms up
    while best == 0.0 or spent < seconds:
        each = [timer(run) for run in products]
        took = sum(each)
        spent += took
        best = max(best, 2 * size**3 / min(each))
        # Twice the size takes eight times as long, and has to fit.
        if size < LARGEST_GEMM[timer.device.type] and 16 * took < seconds - spent:
            size *= 2
            products = _products(timer, dtype, size)
    return best


def _products(timer: _Timer, dtype: torch.dtype, size: int) -> list[Callable[[], object]]:
    """PyTorch's product of two square matrices, and on the CPU the compiled op's own."""
    # Random numbers: GPUs multiply constant ones faster than they ever do in use.
    operand = torch.randn(size, size, device=timer.device).to(dtype)
    products: list[Callable[[], object]] = [lambda: operand @ operand]
    if timer.device.type == "cpu":
        panels = to_panels(operand, dtype)[None].contiguous()
        x = operand[None].to(sum_dtype(dtype))
        out = torch.empty_like(x)
        products.append(lambda: torch.ops.c2c.stage_multiply(out, x, panels))
    return products

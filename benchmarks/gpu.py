"""What the scripts do on a GPU: which one it is, its memory, and the kernels that a call launches.

Nothing here has run on a GPU so far; the tests run all of it but the calls of torch.cuda.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from c2c_ext.cache import KVPairs
from c2c_ext.config import KINDS
from c2c_ext.fusion_bench import FusionCase
from c2c_ext.measure import Unverified

# Of our kernels, what tells the CUDA op's paths apart; the last of them that ran decides.
MARKS = {"plain": "combine", "fused": "fused_gemm", "hopper": "hopper_gemm"}
OURS = re.compile(r"c2c::cuda::.*?\b(\w+)_kernel\b")


@dataclass(frozen=True)
class Launch:
    """One kernel, copy or fill that ran on the GPU."""

    name: str
    seconds: float

    @property
    def ours(self) -> str | None:
        """Name of a kernel of csrc/cuda without `_kernel`; None of any other."""
        found = OURS.search(self.name)
        return found[1] if found else None


def path_of(launches: Iterable[Launch]) -> str | None:
    """The path whose kernels ran, of `cuda_paths.PATHS`; None: not to be told."""
    seen = {launch.ours for launch in launches}
    return next((path for path, mark in reversed(MARKS.items()) if mark in seen), None)


def poison(call: Callable[[int], KVPairs], case: FusionCase, path: str) -> None:
    """NaN in place of what a path has written: all of them write into the same tensors.

    Raises:
        Unverified: the path cannot run here.
    """
    try:
        out = call(0)
    except RuntimeError as error:
        raise Unverified(f"{path} cannot run: {error}"[:500]) from error
    for layer, kind in case.open:
        out[layer][KINDS.index(kind)].fill_(float("nan"))


@dataclass(frozen=True)
class Gpu:
    """The GPU that a script measures.

    Attributes:
        name: as its maker calls it.
        capability: compute capability, like ``9.0``.
    """

    device: torch.device
    name: str
    capability: str

    @classmethod
    def first(cls, script: str) -> Gpu:
        """cuda:0.

        Raises:
            SystemExit: there is none; one line.
        """
        if not torch.cuda.is_available():
            why = "this torch was built without CUDA" if torch.version.cuda is None else "none here"
            raise SystemExit(f"{script}: --device cuda needs a GPU that torch can use: {why}")
        major, minor = torch.cuda.get_device_capability(0)
        return cls(torch.device("cuda", 0), torch.cuda.get_device_name(0), f"{major}.{minor}")

    @property
    def facts(self) -> dict[str, str]:
        """What every row says of it."""
        return {"device": self.name, "capability": self.capability}

    def wait(self) -> None:
        """Until it has done everything."""
        torch.cuda.synchronize(self.device)

    def extra_bytes(self, call: Callable[[], object]) -> int:
        """The most memory that torch holds during a call beyond what it held before."""
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def launches(self, call: Callable[[], object]) -> list[Launch]:
        """What a call runs on the GPU, in order; nothing where the profiler does not work."""
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.wait()
        ran = [
            event
            for event in profiler.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        ran.sort(key=lambda event: event.time_range.start)
        return [Launch(e.name, 1e-6 * (e.time_range.end - e.time_range.start)) for e in ran]

    def replayed(self, call: Callable[[int], Any], count: int) -> Callable[[int], Any]:
        """``call`` as CUDA graphs, one for each of ``call(0) .. call(count - 1)``.

        A replay has next to no cost on the host: what is timed is the GPU alone.
        """
        pool = torch.cuda.graph_pool_handle()
        graphs, results = [], []
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warms up, as graphs want it
            call(0)
        torch.cuda.current_stream(self.device).wait_stream(side)
        for i in range(count):
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=pool):
                results.append(call(i))

        def replay(i: int) -> Any:
            graphs[i % count].replay()
            return results[i % count]

        return replay

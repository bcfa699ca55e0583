"""One fusion of random caches, ready to be verified and timed by every provider.

The providers: `reference` in eager PyTorch, the same through torch.compile, `c2c_ext.fuse`, and
the compiled op alone, writing into tensors that are there already (as generate does).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import estimate, ops, reference
from .cache import KVPairs
from .config import KINDS, FuserConfig
from .estimate import Ceilings, Work, Workload
from .fuser import Fuser
from .fusion import fuse
from .machine import last_level_cache
from .measure import BASELINE, Cell, Effort, Unverified, compare, max_abs, measure_cell, rms, worst
from .model_kv import KVShape, ModelKV
from .reference import BlockWeights, StreamWeights

PROVIDERS = (BASELINE, "compiled", "fuse", "op")
GATES = ("all", "half")
CPU = torch.device("cpu")
MAX_SETS = 16
PLAIN_DRAWS = 4
CHECKED_NUMBERS = 4096  # per stream, where the sets hold so many


@dataclass(frozen=True)
class Shape:
    """KV shapes of two models and the width of the fuser between them."""

    receiver: tuple[int, int, int]  # layers, heads, head dim
    sharer: tuple[int, int, int]
    hidden: int

    def config(self) -> FuserConfig:
        """A fuser's configuration, the rest as published."""
        (layers, *receiver), (sources, *sharer) = self.receiver, self.sharer
        return FuserConfig(
            ModelKV("", "", (KVShape(*receiver),) * layers),
            ModelKV("", "", (KVShape(*sharer),) * sources),
            tuple(min(max(sources - layers + i, 0), sources - 1) for i in range(layers)),
            hidden_size=self.hidden,
            intermediate_size=self.hidden,
        )


SHAPES = {
    "tiny": Shape((3, 4, 16), (4, 2, 32), 64),  # the shipped pair
    "short": Shape((4, 8, 128), (4, 2, 64), 1024),  # four layers of "real"
    "real": Shape((28, 8, 128), (24, 2, 64), 1024),  # Qwen3-0.6B reads Qwen2.5-0.5B
    "large": Shape((36, 8, 128), (28, 4, 128), 1024),  # Qwen3-8B reads Qwen2.5-7B
}


def make_fuser(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Fuser:
    """A frozen fuser with random weights."""
    torch.manual_seed(seed)
    return randomised(Fuser(shape.config())).to(dtype)


def randomised(fuser: Fuser) -> Fuser:
    """A fresh fuser, scaled so that what is fused clearly differs from what is not; frozen."""
    fuser.eval().requires_grad_(False)
    for name, parameter in fuser.named_parameters():
        if name.endswith("_norm"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith(("in_weight", "out_weight", "head_weight")):
            parameter.mul_(3.0)
    return fuser


def set_gates(fuser: Fuser, gates: str) -> None:
    """Opens ``"all"`` gates, or ``"half"`` of them: keys of even layers, values of odd ones."""
    for group in fuser.groups:
        for g in range(len(group.gate_logit)):
            layer, kind = group.place(g)
            is_open = gates == "all" or (layer + KINDS.index(kind)) % 2 == 0
            group.gate_logit[g] = 1.0 if is_open else -1.0
    fuser.repack()  # the old packed form is not kept while the new one is made


class FusionCase:
    """Caches to fuse, what fuses them, and the float64 truth of some layers.

    Calls rotate among sets of caches, so that no provider finds all of its input in the processor's
    cache: twice the last-level cache in all, but at most `MAX_SETS`. Weights are not rotated.

    Args:
        device: of the caches; the fuser is there already.
    """

    def __init__(
        self,
        fuser: Fuser,
        dtype: torch.dtype,
        batch: int,
        tokens: int,
        *,
        seed: int = 1,
        device: torch.device = CPU,
    ) -> None:
        self.fuser, self.dtype, self.device = fuser, dtype, device
        self.work = Workload(batch, tokens, dtype)
        config = fuser.config
        generator = torch.Generator().manual_seed(seed)
        one = sum(estimate.cache_bytes(m, self.work) for m in (config.receiver, config.sharer))
        self.sets = [
            tuple(
                _random_kv(m, batch, tokens, dtype, generator, device)
                for m in (config.receiver, config.sharer)
            )
            for _ in range(min(1 + 2 * _cache_of(device) // one, MAX_SETS))
        ]
        self.open = set(fuser.open_streams())
        self._plain: KVPairs = []  # what the reference gives, once it is verified
        # The reference's largest errors, relative to the truth's RMS.
        self._plain_error = self._plain_max = 0.0

    def calls(self, providers: tuple[str, ...] = PROVIDERS) -> dict[str, Callable[[int], KVPairs]]:
        """By provider: fuses the i-th set (modulo their number) and returns the result."""
        known = {
            BASELINE: self._reference,
            "compiled": self._compiled,
            "fuse": self._fuse,
            "op": self._op,
        }
        return {name: known[name]() for name in known if name in providers}

    def minimum(self) -> Work:
        """Bytes and FLOP of the packed form: the least work known for this function."""
        return estimate.fuse_work(self.fuser.config, self.work, self.device, sorted(self.open))

    def _reference(self) -> Callable[[int], KVPairs]:
        def call(i: int) -> KVPairs:
            base, sharer = self.sets[i % len(self.sets)]
            return reference.fuse(base, sharer, self.fuser)

        return call

    def _fuse(self) -> Callable[[int], KVPairs]:
        def call(i: int) -> KVPairs:
            base, sharer = self.sets[i % len(self.sets)]
            return fuse(base, sharer, self.fuser)

        return call

    def _op(self) -> Callable[[int], KVPairs]:
        packed = self.fuser.packed(self.dtype, self.device)
        written = [[torch.empty_like(t) for t in pair] for pair in self.sets[0][0]]
        # Closed streams are not written: what is there is the receiver's own.
        outs = [
            [
                tuple(
                    (written if (layer, kind) in self.open else base)[layer][k]
                    for k, kind in enumerate(KINDS)
                )
                for layer in range(len(base))
            ]
            for base, _ in self.sets
        ]

        def call(i: int) -> KVPairs:
            base, sharer = self.sets[i % len(self.sets)]
            ops.fuse_(outs[i % len(outs)], base, sharer, packed)
            return outs[i % len(outs)]

        return call

    def _compiled(self) -> Callable[[int], KVPairs]:
        """One graph for all streams of a shape, called in a loop; views of the weights are ready.

        Compiling the loop itself would unroll every stream into one graph.
        """
        fuser, config = self.fuser, self.fuser.config

        def stream(w: StreamWeights, sharer: Tensor, base: Tensor) -> Tensor:
            fused = reference.fuse_stream(w, sharer, base, base.new_ones(()), config)
            return torch.where(w.gate_logit > 0, fused, base)

        torch.compiler.reset()  # another case's graphs count towards the limit of recompilations
        compiled = torch.compile(stream, dynamic=False, fullgraph=True)
        layers = range(len(config.layer_map))
        weights = [[fuser.stream(layer, kind) for kind in KINDS] for layer in layers]

        def call(i: int) -> KVPairs:
            base, sharer = self.sets[i % len(self.sets)]
            fused = []
            for layer, ws in enumerate(weights):
                pairs = zip(ws, sharer[config.layer_map[layer]], base[layer], strict=True)
                key, value = (compiled(w, source, own) for w, source, own in pairs)
                fused.append((key, value))
            return fused

        return _or_unverified(call, "torch.compile")

    def check(self, provider: str, call: Callable[[int], KVPairs]) -> dict[str, Any]:
        """Compares what a provider gives with float64; the reference comes first.

        As many sets are fused as it takes to compare `CHECKED_NUMBERS` per stream: the largest of a
        few rounding errors is a lottery. First and last layer: every open stream against float64 by
        the tests' tolerance, and the truth must differ from what was not fused. Closed streams
        everywhere: bit for bit. All other open streams: not further from the verified reference
        than errors of that size allow.

        Returns:
            the errors nearest to their bounds, and how many tensors were compared how.

        Raises:
            Unverified: says which stream and number.
        """
        first = self.sets[0][0][0][0]
        count = min(-(-CHECKED_NUMBERS // max(first.numel(), 1)), len(self.sets))
        config = self.fuser.config
        bases = _joined([base for base, _ in self.sets[:count]])
        sharers = _joined([sharer for _, sharer in self.sets[:count]])
        result = _joined([_kept(call(i), count > 1) for i in range(count)])
        if len(result) != len(bases):
            raise Unverified(f"{provider} must give {len(bases)} layers, got {len(result)}")
        found, near = [], 0
        for layer, kind in ((layer, kind) for layer in range(len(bases)) for kind in KINDS):
            k = KINDS.index(kind)
            what = f"{provider}, layer {layer} {kind}"
            ours, own = result[layer][k], bases[layer][k]
            if ours.dtype != self.dtype or ours.shape != own.shape:
                raise Unverified(
                    f"{what} must be {list(own.shape)} {self.dtype}, got {list(ours.shape)} "
                    f"{ours.dtype}"
                )
            if (layer, kind) not in self.open:
                if not torch.equal(ours, own):
                    raise Unverified(f"{what} is closed but not the receiver's own")
            elif layer in (0, len(bases) - 1):
                source = sharers[config.layer_map[layer]][k]
                w = self.fuser.stream(layer, kind)
                found.append(self._compare(w, ours, source, own, what, provider == BASELINE))
            elif provider != BASELINE:
                self._check_near(ours, self._plain[layer][k], what)
                near += 1
        if provider == BASELINE:
            self._plain = result
        return {**worst(found), "tensors_near_reference": near}

    def _compare(
        self,
        w: StreamWeights,
        ours: Tensor,
        source: Tensor,
        own: Tensor,
        what: str,
        is_plain: bool,
    ) -> dict[str, float]:
        """One stream against float64."""

        def run(w: StreamWeights, dtype: torch.dtype) -> Tensor:
            gate = torch.ones((), dtype=dtype, device=own.device)
            w = map_weights(w, lambda t: t.to(dtype))
            return reference.fuse_stream(
                w, source.to(dtype), own.to(dtype), gate, self.fuser.config
            )

        truth = run(w, torch.float64)
        plain = [run(reorder_hidden(w, seed), self.dtype) for seed in range(PLAIN_DRAWS)]
        compared = compare(ours, plain, truth, what, is_plain=is_plain)
        moved = rms(truth - own.double())
        if not moved > 10 * compared["rms_error"]:
            raise Unverified(f"{what}: fusing moves it by {moved:.3g} only: nothing is verified")
        if is_plain:
            self._plain_error = max(self._plain_error, compared["rms_error"] / rms(truth))
            self._plain_max = max(self._plain_max, compared["max_error"] / rms(truth))
        return compared

    def _check_near(self, ours: Tensor, plain: Tensor, what: str) -> None:
        # Twice the reference's error and once its own, twice for luck.
        difference = ours.double() - plain.double()
        for name, size, largest in (
            ("RMS", rms, self._plain_error),
            ("maximum", max_abs, self._plain_max),
        ):
            bound = (6 * largest + 2 * torch.finfo(self.dtype).eps) * rms(plain)
            error = size(difference)
            if not error <= bound:
                raise Unverified(
                    f"{what} is {error:.3g} ({name}) from the reference, at most {bound:.3g} "
                    "allowed"
                )


def measure_fusion(
    cell: Cell,
    case: FusionCase,
    ceilings: Callable[[torch.dtype], Ceilings],
    effort: Effort,
    providers: tuple[str, ...] = PROVIDERS,
    calls: Mapping[str, Callable[[int], KVPairs]] | None = None,
    check: Callable[[str, Callable[[int], KVPairs]], Mapping[str, Any]] | None = None,
) -> tuple[list[Cell], list[Cell]]:
    """`measure_cell` of one fusion; ``cell`` gets batch, tokens and dtype of the case.

    Args:
        calls: in place of the case's own for ``providers``.
        check: in place of the case's own.
    """
    cell = {
        **cell,
        "dtype": str(case.dtype).removeprefix("torch."),
        "batch": case.work.batch,
        "tokens": case.work.tokens,
        "open_streams": len(case.open),
        "cache_sets": len(case.sets),
    }
    calls = case.calls(providers) if calls is None else calls
    check, work = check or case.check, case.minimum()
    return measure_cell(cell, calls, check, work, ceilings, effort, _clock(case.device))


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds, once the device has done what it was told to."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _cache_of(device: torch.device) -> int:
    """Bytes of the device's largest cache."""
    if device.type != "cuda":
        return last_level_cache()
    return torch.cuda.get_device_properties(device).L2_cache_size


def gemm_dtypes(dtypes: Mapping[str, torch.dtype]) -> list[torch.dtype]:
    """The dtypes whose GEMM ceilings `FusionCase.minimum` may ask for."""
    return sorted({torch.float32, *dtypes.values()}, key=str)


def map_weights(w: StreamWeights, change: Callable[[Tensor], Tensor]) -> StreamWeights:
    """The weights with every tensor changed."""

    def block(b: BlockWeights) -> BlockWeights:
        return BlockWeights(change(b.norm), change(b.w1), change(b.w2))

    return StreamWeights(
        in_weight=change(w.in_weight),
        in_bias=change(w.in_bias),
        shared=block(w.shared),
        proj=[block(b) for b in w.proj],
        out_weight=change(w.out_weight),
        out_bias=change(w.out_bias),
        weight=block(w.weight),
        head_weight=change(w.head_weight),
        head_bias=change(w.head_bias),
        gate_logit=change(w.gate_logit),
        attention=None,
    )


def reorder_hidden(w: StreamWeights, seed: int) -> StreamWeights:
    """The same function, summed in another order: the hidden state's channels are permuted."""
    order = torch.randperm(w.in_weight.shape[0], generator=torch.Generator().manual_seed(seed))

    def block(b: BlockWeights) -> BlockWeights:
        return BlockWeights(b.norm[order], b.w1[:, order], b.w2[order])

    return replace(
        w,
        in_weight=w.in_weight[order],
        in_bias=w.in_bias[order],
        shared=block(w.shared),
        proj=[block(b) for b in w.proj],
        out_weight=w.out_weight[:, order],
        weight=block(w.weight),
        head_weight=w.head_weight[:, order],
    )


def _kept(pairs: KVPairs, copy: bool) -> KVPairs:
    """Pairs that the provider's next call does not write to."""
    return [(key.clone(), value.clone()) for key, value in pairs] if copy else pairs


def _joined(sets: list[KVPairs]) -> KVPairs:
    """Several caches as one of a larger batch."""
    if len(sets) == 1:
        return list(sets[0])
    return [
        (torch.cat([key for key, _ in layer]), torch.cat([value for _, value in layer]))
        for layer in zip(*sets, strict=True)
    ]


def _or_unverified(call: Callable[[int], KVPairs], what: str) -> Callable[[int], KVPairs]:
    """A provider whose first call may fail because something is missing, a compiler say."""
    worked = False

    def guarded(i: int) -> KVPairs:
        nonlocal worked
        if worked:
            return call(i)
        try:
            result = call(i)
        except Exception as error:
            raise Unverified(f"{what} failed: {type(error).__name__}: {error}"[:500]) from error
        worked = True
        return result

    return guarded


def _random_kv(
    model: ModelKV,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> KVPairs:
    def one(shape: KVShape) -> Tensor:
        size = (batch, shape.num_heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator).to(device, dtype)

    return [(one(shape), one(shape)) for shape in model.layers]

"""What fusing costs: bytes and seconds, computed from configurations alone (docs/info.md).

Sizes are not formulas of their own: packing and the reference run on the meta device, where
tensors have shapes and no memory. Times are rooflines: nothing is counted but the bytes that must
move and the multiplications that must be done, at the ceilings that `c2c_ext.probe` measures.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .config import FuserConfig
from .fuser import FuserGroup
from .model_kv import ModelKV
from .ops import _C, kernels_missing
from .packed import VECTORS, fold_stream, sum_dtype, to_panels
from .parameters import group_parameter_shapes
from .saved_tensors import saved_per_stream
from .training_op import saved_bytes

# Of csrc/cpu/fuse_cpu.cpp: more tokens than fit into this are fused in chunks.
SCRATCH_BYTES_PER_THREAD = 8 << 20
MAX_SCRATCH_BYTES = 128 << 20
# Of csrc/cuda/fuse_cuda.cpp: this and the size of the fused caches up to the next; streams of one
# launch.
SCRATCH_BYTES_ON_GPU = 64 << 20
MORE_SCRATCH_BYTES_ON_GPU = 1 << 30
MAX_STREAMS_ON_GPU = 128
TRAINING_DTYPE = torch.float32  # of the fuser's parameters, gradients and optimizer state

Streams = Sequence[tuple[int, str]]  # (receiver layer, kind)


@dataclass(frozen=True)
class Workload:
    """One fusion: ``batch`` prompts of ``tokens`` tokens, both models and caches in ``dtype``."""

    batch: int
    tokens: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Tokens of all prompts."""
        return self.batch * self.tokens


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of a model, by when they are read.

    Attributes:
        total: all of them, tied ones once.
        decoder: those that every token of a prefill is multiplied with: no embedding, no head.
        head: those of the language-model head; 0 where there is none.
    """

    total: int
    decoder: int
    head: int


@dataclass(frozen=True)
class Ceilings:
    """The fastest that a device was seen to be.

    Attributes:
        device: torch's name of it.
        memory: bytes per second.
        gemm: multiply-adds count as two; FLOP per second by dtype.
    """

    device: str
    memory: float
    gemm: dict[torch.dtype, float]


@dataclass(frozen=True)
class Work:
    """Bytes to move and FLOP to do, the latter in ``dtype``."""

    bytes: int
    flop: int
    dtype: torch.dtype

    def seconds(self, ceilings: Ceilings) -> float:
        """The roofline: the slower of the two, as if they overlapped perfectly."""
        return max(self.bytes / ceilings.memory, self.flop / ceilings.gemm[self.dtype])

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two it is: ``"memory"`` or ``"compute"``."""
        memory = self.bytes / ceilings.memory
        return "memory" if memory >= self.flop / ceilings.gemm[self.dtype] else "compute"


def uncompiled_reason(config: FuserConfig, device: torch.device) -> str | None:
    """Why a fuser runs through reference.py on ``device``; None: the compiled op runs it."""
    return kernels_missing(device) or config.uncompiled_reason()


def cache_bytes(model: ModelKV, work: Workload) -> int:
    """Keys and values of every token in every layer; sliding layers hold all of them in a prefill.

    ``2 * batch * tokens * sum(num_heads * head_dim) * itemsize``.
    """
    return 2 * work.rows * sum(shape.width for shape in model.layers) * work.dtype.itemsize


def num_streams(config: FuserConfig) -> int:
    """Streams of a fuser, open or not."""
    return sum(_group_streams(config, layers) for layers in config.shape_groups())


def stream_parameters(config: FuserConfig) -> list[int]:
    """Parameters of one stream of every shape group."""
    sizes = []
    for layers in config.shape_groups():
        shapes = group_parameter_shapes(config, layers).values()
        sizes.append(sum(math.prod(shape[1:]) for shape in shapes))
    return sizes


def packed_bytes(
    config: FuserConfig,
    dtype: torch.dtype,
    device: torch.device,
    open_streams: Streams | None = None,
) -> int:
    """``fuser.packed(dtype, device).nbytes``; all streams are open unless they are listed."""

    def nbytes(name: str, shape: torch.Size) -> int:
        if name in VECTORS:
            return shape.numel() * sum_dtype(dtype).itemsize
        if device.type == "cpu":
            shape = to_panels(torch.empty(shape, device="meta"), dtype).shape
        return shape.numel() * dtype.itemsize

    return sum(
        count * sum(nbytes(name, shape) for name, shape in shapes.items())
        for _, count, shapes in _open_groups(config, open_streams)
    )


def packed_matrix_elements(config: FuserConfig, open_streams: Streams | None = None) -> int:
    """Multiply-adds of the compiled op per token."""
    return sum(
        count * sum(shape.numel() for shape in shapes.values() if len(shape) == 2)
        for _, count, shapes in _open_groups(config, open_streams)
    )


def multiplies_bfloat16(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the CPU's own bfloat16 products are used; otherwise it multiplies in float32."""
    native = _C.build_info()["cpu_instruction_set"] == "avx512bf16"
    return native and dtype == torch.bfloat16 and device.type == "cpu"


def scratch_bytes(
    config: FuserConfig,
    work: Workload,
    device: torch.device,
    open_streams: Streams | None = None,
) -> int:
    """Upper bound of the scratch memory of one fusion; shape groups take turns.

    The compiled op: the columns of the buffers of fuse_cpu.cpp or fuse_cuda.cpp for all open
    streams and tokens. On the CPU at most 8 MiB per thread and 128 MiB in all, on a GPU, by
    the path that is the default, 64 MiB and the size of the fused caches or 1 GiB (a single token
    may exceed that). The reference: what autograd
    would keep of one stream.
    """
    if uncompiled_reason(config, device) is not None:
        return max(saved_per_stream(config, work, training=False))
    if device.type == "cuda":
        return _scratch_on_gpu(config, work, open_streams)
    itemsize = sum_dtype(work.dtype).itemsize
    most = min(SCRATCH_BYTES_PER_THREAD * torch.get_num_threads(), MAX_SCRATCH_BYTES)
    h, m, largest = config.hidden_size, config.intermediate_size, 0
    for layer, count, shapes in _open_groups(config, open_streams):
        sharer, receiver = config.layer_shapes(layer)
        inputs = sharer.width + (receiver.width if config.reads == "both" else 0)
        weighting, heads = (h, receiver.num_heads) if config.weighting else (0, 0)
        deep = any(name.startswith("deep_w2") for name in shapes)
        columns = max(inputs, m + h) + h + max(receiver.width, h) + (m + h + weighting)
        columns += (m + h if deep else 0) + heads + 1
        if multiplies_bfloat16(work.dtype, device):  # inputs rounded
            columns += (-(-(max(inputs, m + h) + 1) // 32) | 1) * 16
        budget = most // itemsize // columns  # (stream, token) pairs
        rows = _equal_part(work.rows, max(budget, 1))
        streams = min(max(budget // rows, 1), count)
        largest = max(largest, streams * rows * columns * itemsize)
    return largest


def _scratch_on_gpu(config: FuserConfig, work: Workload, open_streams: Streams | None) -> int:
    h, m, largest = config.hidden_size, config.intermediate_size, 0
    for layer, count, shapes in _open_groups(config, open_streams):
        sharer, receiver = config.layer_shapes(layer)
        inputs = sharer.width + (receiver.width if config.reads == "both" else 0)
        weighting, heads = (h, receiver.num_heads) if config.weighting else (0, 0)
        deep = any(name.startswith("deep_w2") for name in shapes)
        columns = [max(inputs, m + weighting, receiver.width), h, m + h + weighting]
        columns += [m + h] if deep else []
        row = sum(-(-c * work.dtype.itemsize // 16) * 16 for c in columns)
        row += -(-heads * sum_dtype(work.dtype).itemsize // 16) * 16
        fused = count * work.rows * receiver.width * work.dtype.itemsize
        limit = SCRATCH_BYTES_ON_GPU + min(fused, MORE_SCRATCH_BYTES_ON_GPU)
        most = max(limit // row, 1)  # (stream, token) pairs
        rows = _equal_part(work.rows, most)
        streams = _equal_part(count, min(max(most // rows, 1), MAX_STREAMS_ON_GPU))
        largest = max(largest, streams * rows * row)
    return largest


def _equal_part(count: int, most: int) -> int:
    """The size of the equal parts, of at most ``most``, that ``count`` is split into."""
    parts = -(-count // most)
    return -(-count // parts)


def activation_bytes(
    config: FuserConfig, work: Workload, *, recompute: bool = False, compiled: bool | None = None
) -> int:
    """What autograd keeps of one training step's fusion, parameters and caches not counted.

    All streams, with soft gates and the configuration's dropout.

    Args:
        recompute: the fusion is computed again in the backward.
        compiled: by the training op, or by the reference; None: as the variant goes.
    """
    if recompute:
        return 0
    if compiled or (compiled is None and config.uncompiled_reason() is None):
        return work.rows * saved_bytes(config, work.dtype)
    groups = zip(config.shape_groups(), saved_per_stream(config, work, training=True), strict=True)
    return sum(_group_streams(config, layers) * per_stream for layers, per_stream in groups)


def inference_memory(
    config: FuserConfig,
    work: Workload,
    device: torch.device,
    *,
    receiver: ModelSizes | None,
    sharer: ModelSizes | None,
    parameter_dtype: torch.dtype = torch.float32,
    open_streams: Streams | None = None,
) -> dict[str, int | None]:
    """Bytes by what they hold during one `generate` of an attached receiver; None: unknown.

    What the models' own forward passes hold for a moment is not counted.
    """
    packed = 0
    if uncompiled_reason(config, device) is None:
        packed = packed_bytes(config, work.dtype, device, open_streams)
    cache = cache_bytes(config.receiver, work)
    return {
        "receiver weights": _weights(receiver, work),
        "sharer weights": _weights(sharer, work),
        "fuser parameters": config.num_parameters() * parameter_dtype.itemsize,
        "packed fuser": packed,
        "scratch": scratch_bytes(config, work, device, open_streams),
        "receiver cache": cache,
        "sharer cache": cache_bytes(config.sharer, work),
        "decoding cache": cache,  # generate's own, filled from the fused one
    }


def training_memory(
    config: FuserConfig,
    work: Workload,
    *,
    receiver: ModelSizes | None,
    sharer: ModelSizes | None,
    recompute: bool = False,
) -> dict[str, int | None]:
    """Bytes by what they hold during one training step of the fuser with AdamW; None: unknown.

    The receiver's own activations over the answer and scratch are not counted.
    """
    parameters = config.num_parameters() * TRAINING_DTYPE.itemsize
    cache = cache_bytes(config.receiver, work)
    return {
        "receiver weights": _weights(receiver, work),
        "sharer weights": _weights(sharer, work),
        "fuser parameters": parameters,
        "gradients": parameters,
        "AdamW state": 2 * parameters,
        "fuser activations": activation_bytes(config, work, recompute=recompute),
        "receiver cache": cache,
        "sharer cache": cache_bytes(config.sharer, work),
        "fused cache": cache,
    }


def fuse_work(
    config: FuserConfig,
    work: Workload,
    device: torch.device,
    open_streams: Streams | None = None,
) -> Work:
    """One fusion: every weight is read once, the caches are read and the receiver's is written.

    The reference does the work of closed streams too.
    """
    if uncompiled_reason(config, device) is None:
        dtype = work.dtype
        if device.type == "cpu" and not multiplies_bfloat16(dtype, device):
            dtype = sum_dtype(dtype)  # weights are widened in registers
        weights = packed_bytes(config, work.dtype, device, open_streams)
        elements = packed_matrix_elements(config, open_streams)
    else:
        dtype, open_streams = work.dtype, None
        weights = config.num_parameters() * dtype.itemsize
        elements = _reference_matrix_elements(config)
    if open_streams is None:
        open_streams = [
            (layer, kind) for layer in range(len(config.layer_map)) for kind in config.kinds
        ]
    shapes = [config.layer_shapes(layer) for layer, _ in open_streams]
    channels = sum(sharer.width + 2 * receiver.width for sharer, receiver in shapes)
    return Work(
        bytes=weights + channels * work.rows * work.dtype.itemsize,
        flop=2 * elements * work.rows,
        dtype=dtype,
    )


def prefill_work(sizes: ModelSizes, kv: ModelKV, query_heads: int, work: Workload) -> Work:
    """One prefill without logits, as an attached receiver does it; full causal attention.

    ``query_heads`` 0 leaves the attention itself out.
    """
    pairs = work.batch * work.tokens * (work.tokens + 1) // 2
    width = query_heads * sum(shape.head_dim for shape in kv.layers)
    return Work(
        bytes=sizes.decoder * work.dtype.itemsize + cache_bytes(kv, work),
        flop=2 * sizes.decoder * work.rows + 4 * width * pairs,
        dtype=work.dtype,
    )


def decode_work(sizes: ModelSizes, kv: ModelKV, query_heads: int, work: Workload) -> Work:
    """One decoded token per prompt: all weights and the whole cache are read once."""
    width = query_heads * sum(shape.head_dim for shape in kv.layers)
    elements = sizes.decoder + sizes.head
    return Work(
        bytes=elements * work.dtype.itemsize + cache_bytes(kv, work),
        flop=2 * elements * work.batch + 4 * width * work.rows,
        dtype=work.dtype,
    )


def _group_streams(config: FuserConfig, layers: list[int]) -> int:
    return next(iter(group_parameter_shapes(config, layers).values()))[0]


def _weights(sizes: ModelSizes | None, work: Workload) -> int | None:
    return None if sizes is None else sizes.total * work.dtype.itemsize


def _reference_matrix_elements(config: FuserConfig) -> int:
    """Multiply-adds of reference.py per token: every weight but the vectors."""
    total = 0
    for layers in config.shape_groups():
        for name, shape in group_parameter_shapes(config, layers).items():
            if not name.endswith(("_norm", "_bias", "_logit")):
                total += math.prod(shape)
    return total


@functools.lru_cache(maxsize=2)
def _folded_shapes(config: FuserConfig) -> list[dict[str, torch.Size]]:
    """The shapes of one stream's folded weights, per shape group: packed on the meta device."""
    with torch.device("meta"), torch.no_grad():
        groups = (FuserGroup(config, layers) for layers in config.shape_groups())
        return [{name: t.shape for name, t in fold_stream(g.stream(0)).items()} for g in groups]


def _open_groups(
    config: FuserConfig, open_streams: Streams | None
) -> list[tuple[int, int, dict[str, torch.Size]]]:
    """(first layer, open streams, folded shapes) of every shape group that has an open stream."""
    opened = None if open_streams is None else Counter(layer for layer, _ in open_streams)
    groups = []
    for layers, shapes in zip(config.shape_groups(), _folded_shapes(config), strict=True):
        count = sum(len(config.kinds) if opened is None else opened[layer] for layer in layers)
        if count:
            groups.append((layers[0], count, shapes))
    return groups

"""Estimates of memory and time: sizes equal to what is really held, times to sums by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import SHAPES, make_caches, make_config, make_fuser, run_op, set_gates
from tiny_models import RECEIVERS, receiver_model, sharer_model
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, PreTrainedModel
from variants import COMPILED, EVERY, UNCOMPILED

import c2c_ext
from c2c_ext import FuserConfig, estimate, probe, reference
from c2c_ext.config import KINDS
from c2c_ext.estimate import Ceilings, ModelSizes, Work, Workload
from c2c_ext.facts import read_model
from c2c_ext.fuser import Fuser
from c2c_ext.model_kv import KVShape, ModelKV

CPU = torch.device("cpu")
# Variants whose every stream has a gate.
GATED = {name: v for name, v in EVERY.items() if v.get("gate", True)}
# 28 layers of 8 x 128 that read 24 layers of 2 x 64: Qwen3-0.6B and Qwen2.5-0.5B.
REAL = FuserConfig(
    ModelKV("receiver", "", (KVShape(8, 128),) * 28),
    ModelKV("sharer", "", (KVShape(2, 64),) * 24),
    tuple(max(i - 4, 0) for i in range(28)),
)


def gates(config: FuserConfig, which: str) -> dict[tuple[int, str], float]:
    """Gate logits: all open, every other one (of keys and of values), or only the first."""
    streams = itertools.product(range(len(config.layer_map)), KINDS)
    opened = {
        "all": lambda layer, kind: True,
        "half": lambda layer, kind: (layer % 2 == 0) == (kind == "key"),
        "one": lambda layer, kind: (layer, kind) == (0, "value"),
        "none": lambda layer, kind: False,
    }[which]
    return {stream: 1.0 if opened(*stream) else -1.0 for stream in streams}


def config_of(name: str, **changes: object) -> FuserConfig:
    """The configuration of a shape or a variant."""
    return make_config(**{**(SHAPES | EVERY)[name], **changes})


@pytest.mark.parametrize("opened", ["all", "half", "one", "none"])
@pytest.mark.parametrize("shape", [*SHAPES, *(GATED.keys() & COMPILED.keys())])
def test_packed_bytes_are_those_of_the_packed_fuser(shape, opened, dtype):
    config = config_of(shape)
    fuser = make_fuser(config)
    set_gates(fuser, gates(config, opened))
    expected = fuser.packed(dtype, CPU).nbytes
    assert estimate.packed_bytes(config, dtype, CPU, fuser.open_streams()) == expected
    if opened == "all":
        assert estimate.packed_bytes(config, dtype, CPU) == expected
    assert (expected == 0) == (fuser.open_streams() == [])


@pytest.mark.parametrize("shape", [*SHAPES, *EVERY])
def test_parameters_of_a_stream_times_streams_are_all_parameters(shape):
    config = config_of(shape)
    counts = [len(config.kinds) * len(layers) for layers in config.shape_groups()]
    each = estimate.stream_parameters(config)
    real = sum(p.numel() for p in Fuser(config).parameters())
    assert sum(c * n for c, n in zip(counts, each, strict=True)) == real == config.num_parameters()
    assert estimate.num_streams(config) == sum(counts)


def largest_allocation(fuser: Fuser, base: list, sharer: list) -> int:
    """Bytes of the largest tensor that the op allocates, seen by the profiler."""
    fuser.packed(base[0][0].dtype, CPU)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run_op(fuser, base, sharer, out=base)
    sizes = [e.cpu_memory_usage for e in record.events() if e.name == "aten::empty"]
    return max(sizes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("opened", ["all", "one"])
@pytest.mark.parametrize("shape", [*SHAPES, *COMPILED])
def test_scratch_is_what_the_op_allocates(shape, opened, dtype):
    config = config_of(shape)
    fuser = make_fuser(config)
    if config.gate:
        set_gates(fuser, gates(config, opened))
    if not fuser.open_streams():
        assert estimate.scratch_bytes(config, Workload(2, 5, dtype), CPU, []) == 0
        return
    base, sharer = make_caches(config, 2, 5, dtype=dtype)
    work = Workload(2, 5, dtype)
    expected = largest_allocation(fuser, base, sharer)
    assert estimate.scratch_bytes(config, work, CPU, fuser.open_streams()) == expected


@pytest.mark.parametrize("tokens", [100_000, 300_000])  # some, one and not even one stream at once
def test_scratch_is_capped_as_the_op_caps_it(tokens):
    config = make_config()
    base, sharer = make_caches(config, 1, tokens)
    expected = largest_allocation(make_fuser(config), base, sharer)
    assert estimate.scratch_bytes(config, Workload(1, tokens, torch.float32), CPU) == expected
    most = torch.get_num_threads() * estimate.SCRATCH_BYTES_PER_THREAD
    assert expected <= min(most, estimate.MAX_SCRATCH_BYTES) < 1.5 * expected


def prefilled(model: PreTrainedModel, batch: int, tokens: int) -> int:
    """Bytes of a real cache, made as an attached receiver makes it."""
    cache = DynamicCache()
    ids = torch.ones(batch, tokens, dtype=torch.int64)
    with torch.no_grad():
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", RECEIVERS)
def test_cache_bytes_are_those_of_a_real_cache(kind, dtype):
    model = receiver_model(kind).to(dtype)
    kv = ModelKV.from_config(model.config)
    for batch, tokens in ((1, 1), (2, 9)):
        expected = prefilled(model, batch, tokens)
        assert estimate.cache_bytes(kv, Workload(batch, tokens, dtype)) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", RECEIVERS)
def test_model_sizes_are_those_of_the_real_model(kind, tied, tmp_path):
    model = receiver_model(kind, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    sizes = read_model(tmp_path).sizes
    named = dict(model.named_parameters())  # tied ones once
    assert sizes.total == sum(p.numel() for p in named.values())
    embedding = model.get_input_embeddings().weight.numel()
    assert sizes.head == embedding  # a head of its own, or the embedding read again
    assert sizes.decoder == sizes.total - (1 if tied else 2) * embedding


def kept_by_autograd(config: FuserConfig, work: Workload) -> int:
    """Bytes that one real training fusion keeps for its backward pass."""
    fuser = make_fuser(config).train()
    base, sharer = make_caches(config, work.batch, work.tokens, dtype=work.dtype)
    known = [*fuser.parameters(), *(t for pair in (*base, *sharer) for t in pair)]
    addresses = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        soft = config.gate and [
            tuple(
                reference.soft_gate(
                    fuser.stream(layer, kind).gate_logit,
                    torch.rand_like(base[layer][0][..., :1]),
                    1,
                )
                if kind in config.kinds
                else torch.zeros(())
                for kind in KINDS
            )
            for layer in range(len(base))
        ]
        reference.fuse(base, sharer, fuser, gates=soft or None, dropout=config.dropout)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *EVERY])
def test_activation_bytes_are_what_autograd_keeps(shape, dtype, dropout):
    config = config_of(shape, dropout=dropout)
    work = Workload(2, 5, dtype)
    expected = kept_by_autograd(config, work)
    estimated = estimate.activation_bytes(config, work, compiled=False)
    assert estimated == expected
    larger = Workload(2, 10, dtype)
    kept = kept_by_autograd(config, larger)
    assert estimate.activation_bytes(config, larger, compiled=False) == kept > expected
    if config.uncompiled_reason() is None:
        assert estimate.activation_bytes(config, work) < estimated
    assert estimate.activation_bytes(config, work, recompute=True) == 0


def test_memory_of_the_real_shape():
    work = Workload(1, 512, torch.bfloat16)
    sizes = ModelSizes(total=1000, decoder=600, head=400)
    memory = estimate.inference_memory(REAL, work, CPU, receiver=sizes, sharer=None)
    cache = 2 * 512 * 28 * 1024 * 2
    assert memory == {
        "receiver weights": 2000,
        "sharer weights": None,
        "fuser parameters": 477_848_056 * 4,
        # The head and the biases are float32.
        "packed fuser": 56 * ((7_487_488 - 8 * 2048) * 2 + (8 * 2048 + 2 * 1024 + 8) * 4),
        "scratch": memory["scratch"],
        "receiver cache": cache,
        "sharer cache": 2 * 512 * 24 * 128 * 2,
        "decoding cache": cache,
    }
    most = torch.get_num_threads() * estimate.SCRATCH_BYTES_PER_THREAD
    assert 0.5 * most < memory["scratch"] <= estimate.MAX_SCRATCH_BYTES
    training = estimate.training_memory(REAL, work, receiver=None, sharer=sizes)
    learnt = sum(training[name] for name in ("fuser parameters", "gradients", "AdamW state"))
    assert learnt == 16 * 477_848_056
    assert training["receiver weights"] is None and training["sharer weights"] == 2000
    assert training["fuser activations"] == estimate.activation_bytes(REAL, work)


def test_fusing_the_real_shape_by_hand():
    ceilings = Ceilings("cpu", 1e11, {torch.float32: 2e12, torch.bfloat16: 1e9})
    few = estimate.fuse_work(REAL, Workload(1, 8, torch.float32), CPU)
    weights = 56 * (7_487_488 + 2 * 1024 + 8) * 4
    assert few == Work(
        bytes=weights + 8 * 56 * (128 + 2 * 1024) * 4,
        flop=8 * 56 * 2 * 7_487_488,
        dtype=torch.float32,
    )
    assert few.seconds(ceilings) == few.bytes / 1e11
    assert few.bound(ceilings) == "memory"
    many = estimate.fuse_work(REAL, Workload(4, 512, torch.float32), CPU)
    assert many.seconds(ceilings) == 2048 * 56 * 2 * 7_487_488 / 2e12
    assert many.bound(ceilings) == "compute"
    # float16 weights are widened: half the bytes, float32's rate. bfloat16's where the CPU has it.
    half = estimate.fuse_work(REAL, Workload(4, 512, torch.float16), CPU)
    assert (half.flop, half.dtype) == (many.flop, torch.float32) and half.bytes < many.bytes
    native = c2c_ext.build_info()["cpu_instruction_set"] == "avx512bf16"
    brain = estimate.fuse_work(REAL, Workload(4, 512, torch.bfloat16), CPU)
    assert brain.dtype == (torch.bfloat16 if native else torch.float32)


def test_closed_streams_cost_the_compiled_op_nothing():
    work = Workload(2, 5, torch.float32)
    streams = [(layer, kind) for layer in range(28) for kind in KINDS]
    whole = estimate.fuse_work(REAL, work, CPU)
    assert estimate.fuse_work(REAL, work, CPU, streams) == whole
    half = estimate.fuse_work(REAL, work, CPU, streams[::2])
    assert (half.bytes, half.flop) == (whole.bytes // 2, whole.flop // 2)
    none = estimate.fuse_work(REAL, work, CPU, [])
    assert (none.bytes, none.flop) == (0, 0)
    assert estimate.scratch_bytes(REAL, work, CPU, []) == 0


def test_uncompiled_variants_are_estimated_through_the_reference():
    work = Workload(2, 5, torch.bfloat16)
    for name in UNCOMPILED:
        config = config_of(name)
        assert "no compiled kernels" in estimate.uncompiled_reason(config, CPU)
        memory = estimate.inference_memory(config, work, CPU, receiver=None, sharer=None)
        assert memory["packed fuser"] == 0 and memory["scratch"] > 0
        assert estimate.fuse_work(config, work, CPU).flop > 0


def test_the_reference_is_estimated_where_the_op_does_not_run(monkeypatch):
    monkeypatch.setattr(FuserConfig, "uncompiled_reason", lambda self: "it is odd", raising=False)
    work = Workload(1, 8, torch.bfloat16)
    assert estimate.uncompiled_reason(REAL, CPU) == "it is odd"
    memory = estimate.inference_memory(REAL, work, CPU, receiver=None, sharer=None)
    assert memory["packed fuser"] == 0 and memory["scratch"] > 0
    # Unfolded, with closed streams, in the caches' dtype.
    elements = 56 * (1152 * 1024 + 6 * 1024 * 1024 + 1024 * 1024 + 8 * 1024)
    fused = estimate.fuse_work(REAL, work, CPU, [(0, "key")])
    assert (fused.flop, fused.dtype) == (2 * 8 * elements, torch.bfloat16)


def test_prefill_and_decode_by_hand():
    sizes, kv = ModelSizes(total=900, decoder=700, head=100), ModelKV("m", "", (KVShape(2, 8),) * 3)
    work = Workload(2, 10, torch.float16)
    cache = 2 * 20 * 3 * 16 * 2
    pairs = 2 * (10 * 11 // 2)  # causal: token i attends to i + 1 tokens
    assert estimate.prefill_work(sizes, kv, 4, work) == Work(
        bytes=2 * 700 + cache, flop=2 * 700 * 20 + 4 * (4 * 8 * 3) * pairs, dtype=torch.float16
    )
    assert estimate.decode_work(sizes, kv, 4, work) == Work(
        bytes=2 * 800 + cache, flop=2 * 800 * 2 + 4 * (4 * 8 * 3) * 20, dtype=torch.float16
    )


def test_a_prefill_multiplies_as_often_as_pytorch_counts(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    model = sharer_model(attn_implementation="eager")
    model.config.save_pretrained(tmp_path)
    facts = read_model(tmp_path)
    work = Workload(2, 16, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.base_model(input_ids=torch.ones(2, 16, dtype=torch.int64))
    ours = estimate.prefill_work(facts.sizes, facts.kv, facts.query_heads, work).flop
    # PyTorch counts the whole square of the attention and no product with a vector (norms).
    assert 0.9 * counter.get_total_flops() < ours <= 1.02 * counter.get_total_flops()


def test_probe_takes_the_best_of_its_measurements(monkeypatch):
    monkeypatch.setattr(probe, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(probe, "SMALLEST_GEMM", 8)
    durations = itertools.chain([5.0, 4.0, 1.0, 0.5, 2.0], itertools.repeat(1.0))
    ticks = [0.0]

    def clock() -> float:
        if len(seen) % 2:  # the end of a measurement
            ticks[0] += next(durations)
        seen.append(ticks[0])
        return ticks[0]

    seen: list[float] = []
    said: list[str] = []
    measured = probe.probe(
        CPU, [torch.float32] * 2, seconds=24.0, progress=said.append, clock=clock
    )
    # Warming up took 5 s; then copy and sum took 4 and 1, then 0.5 and 2 s.
    assert measured.memory == 2 * (1 << 16) / 0.5
    assert measured.device == "cpu"
    assert said == ["memory", "float32 GEMM"]
    assert measured.gemm == {torch.float32: 2 * 8**3 / 1.0}
    assert ticks[0] <= 24.0 + 2 * 2.5


def test_probe_measures_this_machine(monkeypatch):
    monkeypatch.setattr(probe, "BUFFER_BYTES", 1 << 20)
    measured = probe.probe(CPU, [torch.float32, torch.bfloat16], seconds=0.05)
    assert measured.memory > 0
    assert set(measured.gemm) == {torch.float32, torch.bfloat16}
    assert all(rate > 0 for rate in measured.gemm.values())

"""What only a GPU can show of the CUDA op; `test_op.py` runs there too. Else not collected."""

from __future__ import annotations

import gc
import re
import types

import golden_data
import pytest
import tiny_models
import torch
from conftest import (
    arguments_of,
    assert_fused,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    run_op,
    same_bits,
    set_gates,
)
from generation_checks import generate, left_padded, new_tokens
from test_golden import caches as golden_caches
from variants import COMPILED

import c2c_ext
from c2c_ext import ops, overlap

WIDE = {"hidden_size": 256, "intermediate_size": 384}
MAP = [[8, -1, 0, 3, 3, 1, 7], [-1, 2, -1, 4, 5, 9, 0]]


@pytest.fixture(params=range(torch.cuda.device_count()), ids=lambda i: f"cuda:{i}")
def gpu(request) -> torch.device:
    return torch.device("cuda", request.param)


def made(gpu: torch.device, batch: int = 2, tokens: int = 7, dtype=torch.bfloat16, **changes):
    """(fuser, receiver, sharer) on a GPU."""
    fuser = make_fuser(make_config(**{**WIDE, **changes}), device=gpu)
    return fuser, *make_caches(fuser.config, batch, tokens, tokens + 2, dtype, gpu)


@pytest.mark.parametrize("inplace", [False, True])
def test_fuse_runs_the_op(gpu, dtype, inplace):
    fuser, base, sharer = made(gpu, dtype=dtype)
    token_map = torch.tensor(MAP, device=gpu)
    receiver = clone(base)
    with torch.no_grad():
        fused = c2c_ext.fuse(receiver, sharer, fuser, token_map=token_map, inplace=inplace)
    assert (fused is receiver) == inplace
    assert_fused(fuser, base, sharer, fused, token_map)
    assert all(map(same_bits, flat(fused), flat(run_op(fuser, base, sharer, token_map))))


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("shape", [{}, {"depth": 5, "hidden_size": 12}], ids=str)
def test_variants_match_the_reference(gpu, changes, shape, dtype):
    fuser = make_fuser(make_config(**shape, **changes), device=gpu)
    base, sharer = make_caches(fuser.config, dtype=dtype, device=gpu)
    assert_fused(fuser, base, sharer, run_op(fuser, base, sharer), differs=False)


@pytest.mark.parametrize(("name", "j"), golden_data.cases(golden_data.EVAL_FILES))
def test_golden_float64_equals_truth(gpu, name, j):
    file = golden_data.load(name)
    case = file.case(j)
    base, sharer = (
        [tuple(t.to(gpu) for t in pair) for pair in pairs]
        for pairs in golden_caches(case, torch.float64)
    )
    fuser = golden_data.build_fuser(file, j, torch.float64).to(gpu)
    for kind, ours in zip(golden_data.KINDS, run_op(fuser, base, sharer)[0], strict=True):
        truth = case[f"out_{kind}_f64"]
        assert max_abs(ours.cpu() - truth) <= 1e-13 * max_abs(truth), kind


# The last row of a tile and the first of the next, for every tile of both paths.
@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33, 64, 65, 128, 129, 192, 193, 300])
@pytest.mark.parametrize("path", ["fused", "hopper"])
def test_paths_with_products_of_our_own(gpu, path, tokens, dtype, monkeypatch):
    if path == "hopper" and torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if dtype.itemsize > 2:
        pytest.skip("the path is for 16 bits")
    config = make_config(
        ((4, 64), (4, 64)), ((3, 64),), (0, 0), hidden_size=256, intermediate_size=384, depth=5
    )
    fuser = make_fuser(config, device=gpu)
    base, sharer = make_caches(config, 1, tokens, tokens, dtype, gpu)
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", "plain")
    plain = flat(run_op(fuser, base, sharer))
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", path)
    ours = run_op(fuser, base, sharer)
    assert_fused(fuser, base, sharer, ours)
    assert not all(map(same_bits, flat(ours), plain))  # which rounds more often
    for _ in range(3):
        assert all(map(same_bits, flat(run_op(fuser, base, sharer)), flat(ours)))


def test_float32_is_not_tf32(gpu):
    assert not torch.backends.cuda.matmul.allow_tf32
    fuser, base, sharer = made(gpu, 1, 64, torch.float32)
    assert_fused(fuser, base, sharer, run_op(fuser, base, sharer))


def test_same_bits_every_time(gpu, dtype):
    fuser, base, sharer = made(gpu, 3, 65, dtype)
    first = flat(run_op(fuser, base, sharer))
    for _ in range(5):
        assert all(map(same_bits, flat(run_op(fuser, base, sharer)), first))


def test_no_host_synchronisation(gpu):
    fuser, base, sharer = made(gpu)
    token_map = torch.tensor(MAP, device=gpu)
    run_op(fuser, base, sharer, token_map)  # packs, which does synchronise
    packed = fuser.packed(torch.bfloat16, gpu)
    out = clone(base)
    torch.cuda.synchronize(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.fuse_(out, base, sharer, packed, token_map=token_map)
        with torch.no_grad():
            c2c_ext.fuse(base, sharer, fuser, token_map=token_map)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_graph_replays_on_new_numbers(gpu, path, monkeypatch):
    monkeypatch.setenv("C2C_EXT_CUDA_PATH", path)
    fuser, base, sharer = made(gpu)
    packed, out = fuser.packed(torch.bfloat16, gpu), clone(base)
    with torch.cuda.device(gpu), torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # warms up, as graphs want it
            ops.fuse_(out, base, sharer, packed)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.fuse_(out, base, sharer, packed)
        for seed in range(3):
            torch.manual_seed(seed)
            for t in flat(base) + flat(sharer):
                t.normal_()
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(same_bits, flat(out), flat(run_op(fuser, base, sharer))))


def test_runs_on_the_current_stream(gpu):
    """A slow kernel on a side stream writes the inputs just before; only the stream waits."""
    fuser, base, sharer = made(gpu)
    expected = flat(run_op(fuser, base, sharer))
    packed = fuser.packed(torch.bfloat16, gpu)
    late = [tuple(torch.zeros_like(t) for t in pair) for pair in base]
    out = [tuple(torch.zeros_like(t) for t in pair) for pair in base]
    torch.cuda.synchronize(gpu)
    with torch.cuda.device(gpu), torch.cuda.stream(torch.cuda.Stream()) as _:
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for t, b in zip(flat(late), flat(base), strict=True):
            t.copy_(b)
        ops.fuse_(out, late, sharer, packed)
        torch.cuda.current_stream().synchronize()
    assert all(map(same_bits, flat(out), expected))


def test_current_device_is_restored(gpu):
    fuser, base, sharer = made(gpu)
    with torch.cuda.device(0):
        run_op(fuser, base, sharer)
        assert torch.cuda.current_device() == 0


def test_memory_is_bounded_and_does_not_grow(gpu):
    fuser, base, sharer = made(gpu, 4, 2048, hidden_size=512, intermediate_size=512)
    packed, out = fuser.packed(torch.bfloat16, gpu), clone(base)
    ops.fuse_(out, base, sharer, packed)  # the matrix library's own workspace stays
    gc.collect()
    torch.cuda.synchronize(gpu)
    before = torch.cuda.memory_allocated(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    for _ in range(10):
        ops.fuse_(out, base, sharer, packed)
    torch.cuda.synchronize(gpu)
    fused = sum(t.nbytes for t in flat(base))
    assert torch.cuda.memory_allocated(gpu) == before
    assert torch.cuda.max_memory_allocated(gpu) - before <= (64 << 20) + fused


def test_closed_streams_are_dropped_and_kept(gpu, dtype):
    fuser, base, sharer = made(gpu, dtype=dtype)
    closed = {(0, "key"): 0.0, (1, "value"): -1.0}
    set_gates(fuser, closed)
    fused = run_op(fuser, base, sharer)
    for layer, (pair, own) in enumerate(zip(fused, base, strict=True)):
        for kind, x, b in zip(("key", "value"), pair, own, strict=True):
            assert same_bits(x, b) == ((layer, kind) in closed)


def test_compiles_without_a_break(gpu):
    fuser, base, sharer = made(gpu)
    expected = flat(run_op(fuser, base, sharer))

    @torch.compile(fullgraph=True)
    def fused(base, sharer):
        with torch.no_grad():
            return c2c_ext.fuse(base, sharer, fuser)

    sharer = [(key[:, :, :7], value[:, :, :7]) for key, value in sharer]
    assert all(map(same_bits, flat(fused(base, sharer)), expected))


@pytest.fixture(scope="module")
def models():
    return tiny_models.trio()


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("how", ["stream", "thread"])
def test_overlapped_prefills_equal_those_in_turn(gpu, models, how, own_stream):
    """The prompt is written late: a prefill that does not wait for it reads zeros."""
    receiver, sharer, fuser = (model.to(gpu) for model in models)
    written, mask = (t.to(gpu) for t in left_padded())
    with c2c_ext.attached(receiver, sharer, fuser):
        expected = generate(receiver, written, attention_mask=mask)
    torch.cuda.synchronize(gpu)
    current = torch.cuda.Stream(gpu) if own_stream else torch.cuda.default_stream(gpu)
    with (
        c2c_ext.attached(receiver, sharer, fuser, overlap=how),
        torch.cuda.device(gpu),
        torch.cuda.stream(current),
    ):
        for _ in range(5):  # memory of the side stream is used again
            ids = torch.zeros_like(written)
            torch.cuda._sleep(20_000_000)  # about 10 ms
            ids.copy_(written)
            output = generate(receiver, ids, attention_mask=mask)
            assert torch.equal(new_tokens(output, ids), new_tokens(expected, ids))
            assert all(map(same_bits, output.logits, expected.logits))


@pytest.mark.parametrize("how", ["stream", "thread"])
def test_overlapped_prefills_run_on_two_streams(gpu, how):
    side, seen = overlap.side_stream(gpu), []
    place = types.SimpleNamespace(device=gpu)

    def prefill():
        seen.append(torch.cuda.current_stream(gpu))
        tensor = torch.empty(1 << 20, device=gpu)
        torch.cuda._sleep(50_000_000)
        tensor.fill_(1.0)
        return [(tensor, tensor)]

    base, shared = overlap.run_both(how, place, [place], prefill, prefill)
    total = base[0][0] + shared[0][0]  # on the current stream, which has waited
    del base, shared
    assert total.eq(2.0).all()
    assert set(seen) == {side, torch.cuda.current_stream(gpu)}


if torch.cuda.device_count() > 1:

    def test_models_on_two_gpus_overlap(models):
        receiver, sharer, fuser = models
        ids, mask = left_padded()
        tokens = {}
        for how in overlap.OVERLAPS:
            receiver.to("cuda:0"), sharer.to("cuda:1"), fuser.to("cuda:0")
            with c2c_ext.attached(receiver, sharer, fuser, overlap=how):
                output = generate(receiver, ids.to("cuda:0"), attention_mask=mask.to("cuda:0"))
            tokens[how] = output.sequences
        assert torch.equal(tokens["none"], tokens["stream"])
        assert torch.equal(tokens["none"], tokens["thread"])


def test_tensors_of_another_device_are_refused(gpu):
    fuser, base, sharer = made(gpu, dtype=torch.float32)
    arguments = arguments_of(fuser, clone(base), base, sharer)
    for name, change, message in (
        ("w1", torch.Tensor.cpu, "w1 must be on the caches' device (cuda:"),
        ("base_keys", lambda ts: [t.cpu() for t in ts], "receiver_keys[0] must be on a GPU"),
        ("sharer_keys", lambda ts: [t.cpu() for t in ts], "sharer_keys[0] must be on the device"),
    ):
        values = {**arguments, name: change(arguments[name])}
        with pytest.raises(RuntimeError, match=re.escape("c2c_ext.fuse: " + message)):
            torch.ops.c2c.fuse_(*values.values())

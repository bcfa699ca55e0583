"""What only a GPU can show of the training op. Not collected without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import train_calls
from conftest import flat, relative_error, same_bits
from train_calls import Step, assert_same_bits, assert_step, made
from variants import COMPILED

from c2c_ext.training_op import fuse_training

MAP = [[8, -1, 0, 3, 3, 1, 7], [-1, 2, -1, 4, 5, 9, 0]]
WIDE = {"hidden_size": 256, "intermediate_size": 384}


@pytest.fixture(params=range(torch.cuda.device_count()), ids=lambda i: f"cuda:{i}")
def gpu(request) -> torch.device:
    return torch.device("cuda", request.param)


def run(step: Step, **keywords):
    return train_calls.through_op(torch.ops.c2c, step, **keywords)


def busy_step(dtype=torch.bfloat16, **changes) -> Step:
    """With gates, a map and dropout."""
    step = made(dtype, 2, 7, 9, gates="bhn", **{**WIDE, **changes})
    step.token_map, step.dropout, step.seed = torch.tensor(MAP), 0.2, 2**40 + 1
    return step


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
@pytest.mark.parametrize("shape", [{}, {"depth": 5, "hidden_size": 23}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_cpus_op(gpu, changes, shape, recompute):
    """Dropout and all: both devices keep the same elements."""
    step = busy_step(torch.float64, **{**shape, **changes})
    step.row_seeds = torch.tensor([3, -(2**40)]) if shape else None
    theirs, ours = run(step), run(step.to(gpu), recompute=recompute)
    for x, t in zip(flat(ours[0]), flat(theirs[0]), strict=True):
        assert relative_error(x.cpu(), t) <= 1e-12
    assert ours[1].keys() == theirs[1].keys()
    for name, t in theirs[1].items():
        assert relative_error(ours[1][name].cpu(), t) <= 1e-11, name


@pytest.mark.parametrize("changes", COMPILED.values(), ids=COMPILED.keys())
def test_variants_in_every_dtype(gpu, changes, dtype):
    step = made(dtype, 2, 40, gates="h", **{**changes, "activation": "silu"}).to(gpu)
    assert_step(step, run(step))


def test_parameters_of_the_caches_dtype(gpu, dtype):
    step = made(dtype, 2, 30, gates="h", depth=4).to(gpu)
    step.fuser.to(dtype)
    assert_step(step, run(step))


@pytest.mark.parametrize("tokens", [300, 1500])
def test_many_rows(gpu, tokens, dtype):
    step = made(dtype, 3, tokens, tokens + 1, gates="", **WIDE).to(gpu)
    assert_step(step, run(step))


def test_same_bits_every_time(gpu, dtype):
    step = busy_step(dtype).to(gpu)
    first = run(step)
    for _ in range(5):
        assert_same_bits(run(step), first)
    assert_same_bits(run(step, recompute=True), first)


def leaves(step: Step) -> list[torch.Tensor]:
    tensors = [*flat(step.base), *flat(step.sharer), *step.gates]
    return [t.requires_grad_() for t in tensors] + list(step.fuser.parameters())


def train(step: Step) -> None:
    """Forward and backward through autograd, as a training loop has it."""
    gates = step.gates[0].unflatten(0, (len(step.base), 2))
    fused = fuse_training(
        step.base,
        step.sharer,
        step.fuser,
        token_map=step.token_map,
        gates=gates,
        dropout=step.dropout,
        seed=step.seed,
    )
    torch.autograd.backward(flat(fused), flat(step.cotangents))


def test_no_host_synchronisation(gpu):
    step = busy_step().to(gpu)
    leaves(step)
    train(step)
    torch.cuda.synchronize(gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replays_on_new_numbers(gpu):
    step = busy_step().to(gpu)
    values = train_calls.arguments(step, 0)
    above = flat(step.cotangents)
    needed = [True] * len(train_calls.INPUTS)

    def call():
        out, saved = torch.ops.c2c.fuse(*values.values())
        return out + torch.ops.c2c.fuse_backward(above, *values.values(), saved, needed)

    with torch.cuda.device(gpu):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # warms up, as graphs want it
            call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        for seed in range(3):
            torch.manual_seed(seed)
            for t in (*flat(step.base), *flat(step.sharer), *above):
                t.normal_()
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(same_bits, results, call()))


def test_runs_on_the_current_stream(gpu):
    """A slow kernel on a side stream writes the inputs just before; only the stream waits."""
    step = busy_step().to(gpu)
    expected = run(step)
    late = [tuple(torch.zeros_like(t) for t in pair) for pair in step.base]
    torch.cuda.synchronize(gpu)
    with torch.cuda.device(gpu), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for t, b in zip(flat(late), flat(step.base), strict=True):
            t.copy_(b)
        ours = run(dataclasses.replace(step, base=late))
        torch.cuda.current_stream().synchronize()
    assert_same_bits(ours, expected)


def test_current_device_is_restored(gpu):
    with torch.cuda.device(0):
        run(busy_step().to(gpu))
        assert torch.cuda.current_device() == 0


def test_memory_does_not_grow(gpu):
    step = busy_step().to(gpu)
    leaves(step)
    for _ in range(2):
        train(step)
    torch.cuda.synchronize(gpu)
    before = torch.cuda.memory_allocated(gpu)
    for _ in range(5):
        train(step)
    torch.cuda.synchronize(gpu)
    assert torch.cuda.memory_allocated(gpu) == before

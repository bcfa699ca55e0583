"""Dropout of the CUDA training op with its kernels run by the CPU."""

from __future__ import annotations

import itertools

import emulated
import numpy as np
import pytest
import torch
import train_calls
from conftest import flat, same_bits
from test_cuda_train_emulated import order, own_environment, run
from train_calls import Step, assert_step, made, philox

from c2c_ext import reference

__all__ = ["order", "own_environment"]


def test_philox_is_the_published_one():
    """Known answers of the authors' Random123."""
    assert [f"{w:08x}" for w in philox(0, 0, np.zeros(1, np.uint64))[0]] == [
        *("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")
    ]
    ones = 2**64 - 1
    assert [f"{w:08x}" for w in philox(ones, ones, np.full(1, ones, np.uint64))[0]] == [
        *("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")
    ]


def kept(step: Step, streams: int, block: int) -> torch.Tensor:
    """Which elements ``[streams, rows, hidden]`` of a block's output dropout keeps."""
    batch, _, tokens, _ = step.base[0][0].shape
    hidden, rows = step.fuser.config.hidden_size, batch * tokens
    per_row = -(-hidden // 4)
    if step.row_seeds is not None:  # tokens are counted from the last
        stream = np.arange(block * streams, (block + 1) * streams, dtype=np.uint64)
        place = (stream[:, None] << np.uint64(31)) + np.arange(tokens, dtype=np.uint64)[::-1]
        groups = place[..., None] * np.uint64(per_row) + np.arange(per_row, dtype=np.uint64)
        drawn = [philox(seed % 2**64, step.offset, groups) for seed in step.row_seeds.tolist()]
        words = np.stack(drawn, 1).reshape(streams, rows, 4 * per_row)
        return torch.from_numpy(words[:, :, :hidden] >= int(step.dropout * 2**32))
    groups = np.arange(streams * rows * per_row, dtype=np.uint64)
    groups += np.uint64(block * streams * rows * per_row)
    words = philox(step.seed, step.offset, groups).reshape(streams, rows, 4 * per_row)
    return torch.from_numpy(words[:, :, :hidden] >= int(step.dropout * 2**32))


@pytest.fixture
def counted_dropout(monkeypatch):
    """Has the reference drop what the op drops; set to a step."""
    state = {}

    def feed_forward(z, w, activation, dropout=0.0):
        stream, block = divmod(state["calls"], state["blocks"])
        state["calls"] += 1
        mask = kept(state["step"], state["streams"], block)[stream].view(z.shape)
        plain = state["own"](z, w, activation) - z
        return z + mask * plain / (1 - state["step"].dropout)

    def use(step: Step) -> None:
        config = step.fuser.config
        streams = len(step.fuser.groups[0].in_bias)
        blocks = config.depth - 1 + config.weighting
        state.update(step=step, streams=streams, blocks=blocks, calls=0)

    state["own"] = reference.feed_forward
    monkeypatch.setattr(reference, "feed_forward", feed_forward)
    return use


@pytest.mark.parametrize("hidden", [16, 23])
@pytest.mark.parametrize("changes", [{}, {"depth": 4}, {"weighting": False}], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("row_seeds", [None, [-3, 2**62 + 1]])
def test_dropout_is_philox_by_seed_and_place(
    hidden, changes, recompute, row_seeds, counted_dropout, order
):
    step = made(gates="h", hidden_size=hidden, **changes)
    step.dropout, step.seed, step.offset = 0.3, 2**63 - 5, 2**40 + 3
    step.row_seeds = None if row_seeds is None else torch.tensor(row_seeds)
    ours = run(step, recompute=recompute)
    counted_dropout(step)
    assert_step(step, ours)


@pytest.mark.parametrize("hidden", [16, 18, 23])
def test_dropout_keeps_the_same_in_every_dtype(hidden):
    """A block's z is what it was where its output was dropped: seen in what the forward saves."""
    masks = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        step = made(dtype, hidden_size=hidden)
        step.dropout, step.seed = 0.5, 7
        emulated.load()
        _, saved = torch.ops.c2c_emulated.fuse(*train_calls.arguments(step, 0).values())
        z = saved[:3]
        for before, after in itertools.pairwise(z):
            # In half precision an output may be too small to change z, but rarely.
            masks.append((before != after).view(-1))
    first = [m for i, m in enumerate(masks) if i % 2 == 0]
    assert (first[0] == kept(step, 4, 0).view(-1)).all()
    for mask in first[1:]:
        assert (mask & ~first[0]).sum() == 0 and (mask != first[0]).float().mean() < 0.05


@pytest.mark.parametrize("above", [0, 1])
def test_an_element_at_the_threshold_is_kept(above):
    """Its word is the probability times 2^32, or one less, which drops it."""
    step = made()
    step.seed = 3
    words = philox(step.seed, step.offset, np.arange(160, dtype=np.uint64)).reshape(4, 10, 16)
    place = tuple(int(i[0]) for i in np.nonzero((words > 2**30) & (words < 2**31)))
    step.dropout = (int(words[place]) + above) / 2**32
    assert kept(step, 4, 0)[place] == (above == 0)
    emulated.load()
    _, saved = torch.ops.c2c_emulated.fuse(*train_calls.arguments(step, 0).values())
    assert ((saved[0] != saved[1]) == kept(step, 4, 0)).all()


def test_other_seed_or_offset_drops_other_elements():
    runs = []
    for seed, offset in ((0, 0), (1, 0), (0, 1)):
        step = made()
        step.dropout, step.seed, step.offset = 0.5, seed, offset
        runs.append(flat(run(step)[0]))
    for i in range(3):
        assert not all(map(same_bits, runs[i], runs[i - 1]))

"""200 optimizer steps through the training op and through the reference give one loss curve."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import cast, flat, make_caches, make_config, make_fuser, reorder_hidden

from c2c_ext import reference
from c2c_ext.training_op import fuse_training

STEPS = 200


def loss_curve(run, fuser, dtype) -> torch.Tensor:
    """Losses of a fuser that learns what another one makes of the caches; gates open and close."""
    fuser = fuser.to(dtype)
    base, sharer = (cast(x, dtype) for x in make_caches(fuser.config, 2, 6, dtype=torch.float64))
    teacher = make_fuser(fuser.config, seed=9).double()
    with torch.no_grad():
        target = reference.fuse(*(cast(x, torch.float64) for x in (base, sharer)), teacher)
    target = [t.to(dtype) for t in flat(target)]
    noise = torch.randn(STEPS, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
    optimizer = torch.optim.AdamW(fuser.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        temperature = 0.01 ** (step / STEPS)
        values = torch.sigmoid((fuser.groups[0].gate_logit + noise[step]) / temperature)
        gates = [(values[0], values[1])]
        fused = flat(run(base, sharer, fuser, gates=gates))
        loss = sum((a - b).square().mean() for a, b in zip(fused, target, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs() / b).max().item()


@pytest.fixture
def fuser():
    return make_fuser(make_config([(2, 8)], layer_map=[0]), seed=1)


def copies(fuser, count):
    state = fuser.state_dict()
    for _ in range(count):
        other = make_fuser(fuser.config)
        other.load_state_dict(state)
        yield other


def test_float64_loss_curves_are_one(fuser, one_thread):
    first, second = copies(fuser, 2)
    expected = loss_curve(reference.fuse, first, torch.float64)
    ours = loss_curve(fuse_training, second, torch.float64)
    assert expected[-1] < 0.7 * expected[0]  # it learned something
    assert relative_distance(ours, expected) <= 1e-8


def test_float32_loss_curve_is_as_near_as_another_order_of_summation(fuser, one_thread):
    orders = [fuser, *(reorder_hidden(fuser, seed) for seed in range(3))]
    (ours,) = copies(fuser, 1)
    ours = loss_curve(fuse_training, ours, torch.float32)
    plain = [loss_curve(reference.fuse, f, torch.float32) for f in orders]
    apart = max(relative_distance(b, a) for a, b in itertools.combinations(plain, 2))
    assert relative_distance(ours, plain[0]) <= apart

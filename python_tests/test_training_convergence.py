"""200 steps of the shipped pair: training op and reference give one loss curve.

The pair's own norms round to float32 whatever its dtype; test_train_op_convergence.py has the
fuser alone, in float64 throughout.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from conftest import reorder_hidden
from torch import Tensor

from c2c_ext import Fuser
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.demo.command import ASSETS, SEED
from c2c_ext.training import C2CTrainingModel, GateSampler, parameter_groups
from c2c_ext.training_op import op_missing

STEPS, BATCH, SIZE = 200, 8, 3


@pytest.fixture(scope="module")
def pair() -> ev.Pair:
    return ev.load_pair(ASSETS, SEED)


def batches(world: w.World) -> Iterator[tuple[Tensor, Tensor]]:
    """Questions about train entities: token ids and labels ``[BATCH, tokens]``."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> Tensor:
        return torch.randint(count, (BATCH,), generator=generator)

    for _ in range(STEPS):
        entities, asked = world.train[draw(len(world.train))], draw(w.NUM_ATTRIBUTES)
        kinds = draw(len(w.KINDS))
        form = world.blank_form(entities, ev.random_forms(asked, SIZE, generator))
        answers = world.answers(kinds, asked, world.facts[entities, asked])
        parts = [form, w.question(kinds, asked), w.value_ids(asked, answers)[:, None]]
        ids = torch.cat(parts, dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        yield ids, labels


def fresh(pair: ev.Pair) -> Fuser:
    torch.manual_seed(3)
    return Fuser(pair.fuser.config)


def loss_curve(pair: ev.Pair, fuser: Fuser, backend: str, dtype: torch.dtype) -> Tensor:
    """The loss of every step, float64 ``[STEPS]``; gates are soft, and annealed."""
    receiver, sharer = (copy.deepcopy(m).to(dtype) for m in (pair.receiver, pair.sharer))
    fuser.to(dtype)
    sampler = GateSampler(steps=STEPS, end=0.01)
    model = C2CTrainingModel(
        receiver, sharer, fuser, sampler=sampler, dropout=0.0, backend=backend, seed=1
    )
    optimizer = torch.optim.AdamW(parameter_groups(fuser, 0.01), lr=1e-3)
    losses = []
    for model.step, (ids, labels) in enumerate(batches(pair.world)):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(fuser.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() / b).max().item()


def test_float64_loss_curves_of_the_shipped_pair_are_one(pair, one_thread):
    ours, plain = fresh(pair), fresh(pair)
    assert op_missing(ours, torch.device("cpu")) is None
    curve = loss_curve(pair, ours, "op", torch.float64)
    expected = loss_curve(pair, plain, "reference", torch.float64)
    assert expected[-20:].mean() < 0.6 * expected[0]  # it learned something
    assert distance(curve, expected) <= 1e-8
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter, plain.get_parameter(name), rtol=1e-8, atol=1e-10), name


def test_float32_loss_curve_of_the_shipped_pair_is_as_near_as_reordered_sums(pair, one_thread):
    ours = loss_curve(pair, fresh(pair), "op", torch.float32)
    orders = [fresh(pair), *(reorder_hidden(fresh(pair), seed) for seed in range(3))]
    plain = [loss_curve(pair, fuser, "reference", torch.float32) for fuser in orders]
    apart = max(distance(a, b) for a, b in itertools.combinations(plain, 2))
    assert 0 < distance(ours, plain[0]) <= apart

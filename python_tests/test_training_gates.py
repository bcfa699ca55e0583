"""Gate samplers: what opens how often, temperatures, and noise that follows the sample."""

from __future__ import annotations

import math

import golden_data
import pytest
import torch
from conftest import make_config, make_fuser, relative_error, same_bits, set_gates
from golden_data import KINDS, TRAIN_FILES

from c2c_ext import Fuser, reference
from c2c_ext.training.gates import GateSampler, combined_seed, gate_logits, gate_pairs

# Receiver layers that differ in heads and stand in two shape groups, not in order.
MIXED = {"receiver": [(2, 8), (5, 4), (2, 8)], "layer_map": [0, 1, 2]}


def fuser_with(logit: float, **changes: object) -> Fuser:
    fuser = make_fuser(make_config(**changes))
    set_gates(fuser, {}, logit)
    return fuser


def binomial_interval(n: int, p: float, alpha: float = 1e-6) -> tuple[int, int]:
    """Counts that a binomial variable leaves with probability at most ``alpha``, summed exactly."""
    log_p, log_q = math.log(p), math.log1p(-p)
    masses = [
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + k * log_p
            + (n - k) * log_q
        )
        for k in range(n + 1)
    ]
    low, total = 0, 0.0
    while total + masses[low] < alpha / 2:
        total += masses[low]
        low += 1
    high, total = n, 0.0
    while total + masses[high] < alpha / 2:
        total += masses[high]
        high -= 1
    return low, high


OPENS = {
    "logistic": lambda logit: 1 / (1 + math.exp(-logit)),
    "gumbel": lambda logit: 1 - math.exp(-math.exp(logit)),
}


@pytest.mark.parametrize("logit", [-2.0, -0.4, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["logistic", "gumbel"])
def test_open_probability_at_low_temperature(kind, logit):
    sampler = GateSampler(kind, per="token", start=1.0, end=1e-6, steps=10)
    fuser = fuser_with(logit)
    noise = sampler.noise(fuser, 20, 125, seed=3, step=10, sample_ids=range(20))
    gates = sampler.gates(fuser, noise, 10)
    decided = ((gates < 1e-3) | (gates > 1 - 1e-3)).double().mean().item()
    assert decided > 0.999
    opened, n = int((gates > 0.5).sum()), gates.numel()
    assert n == 2 * 2 * 20 * 2 * 125
    low, high = binomial_interval(n, OPENS[kind](logit))
    assert low <= opened <= high
    other = "gumbel" if kind == "logistic" else "logistic"
    wrong_low, wrong_high = binomial_interval(n, OPENS[other](logit))
    if abs(OPENS[kind](logit) - OPENS[other](logit)) > 0.03:  # this sample tells them apart
        assert not wrong_low <= opened <= wrong_high


@pytest.mark.parametrize("logit", [0.0, 1.0])
def test_stream_draws_open_as_often(logit):
    sampler = GateSampler(steps=1, end=1e-6)
    fuser = fuser_with(logit)
    steps = range(1, 2001)
    opened = sum(
        int((sampler.gates(fuser, sampler.noise(fuser, 1, 1, 0, step=k), k) > 0.5).sum())
        for k in steps
    )
    low, high = binomial_interval(4 * len(steps), OPENS["logistic"](logit))
    assert low <= opened <= high


def test_known_bias_of_the_published_sampler():
    assert OPENS["gumbel"](0.0) == pytest.approx(0.632, abs=5e-4)
    assert OPENS["logistic"](0.0) == 0.5


def test_gates_at_temperature_one_follow_the_logistic_distribution():
    """P(gate <= x) = sigmoid(logit(x) - logit): a Kolmogorov-Smirnov bound on the whole of it."""
    sampler, logit = GateSampler(per="token"), 0.7
    fuser = fuser_with(logit).double()
    noise = sampler.noise(fuser, 10, 250, seed=5, step=0, sample_ids=range(10))
    gates = sampler.gates(fuser, noise, 0).detach().flatten().sort().values
    expected = torch.sigmoid(torch.logit(gates) - logit)
    steps = torch.arange(1, len(gates) + 1).double() / len(gates)
    assert (expected - steps).abs().max() < 2.7 / len(gates) ** 0.5  # fails by chance: 1e-6


@pytest.mark.parametrize(("name", "j"), golden_data.cases(TRAIN_FILES))
def test_gumbel_gates_equal_the_published_ones(name, j):
    """Outputs and the logits' gradients of the golden files through the sampler, edges included."""
    file = golden_data.load(name)
    case, meta = file.case(j), file.meta["cases"][j]
    if meta["mode"] == "eval":
        assert "u_key" not in case
        return
    fuser = golden_data.build_fuser(file, j, torch.float64)
    noise = torch.stack([case[f"u_{kind}"] for kind in KINDS])[None].squeeze(-1)
    temperature = meta["gate_temperature"]
    sampler = GateSampler("gumbel", start=temperature, end=temperature)
    gates = sampler.gates(fuser, noise, 7)
    assert gates.shape == noise.shape
    base, sharer = (
        [tuple(case[f"{side}_{kind}"].double() for kind in KINDS)] for side in ("target", "source")
    )
    fused = reference.fuse(base, sharer, fuser, gates=gate_pairs(gates, fuser))[0]
    for kind, out in zip(KINDS, fused, strict=True):
        assert relative_error(out.detach(), case[f"out_{kind}"]) <= 1e-10, kind
    cotangents = [case[f"cot_{kind}"].double() for kind in KINDS]
    sum((out * c).sum() for out, c in zip(fused, cotangents, strict=True)).backward()
    for i, kind in enumerate(KINDS):
        ours = fuser.groups[0].gate_logit.grad[i]
        assert relative_error(ours, case[f"grad.{kind}_gate_logit"]) <= 1e-10, kind


def test_temperatures():
    published = GateSampler(start=1.0, end=0.001, steps=1929)
    assert published.temperature(0) == 1.0
    assert published.temperature(1929) == published.temperature(10**6) == 0.001
    assert published.temperature(643) == pytest.approx(0.1, rel=1e-12)
    linear = GateSampler(schedule="linear", start=1.0, end=0.2, steps=8)
    assert [linear.temperature(k) for k in (0, 2, 4, 8, 9)] == pytest.approx(
        [1, 0.8, 0.6, 0.2, 0.2]
    )


def test_noise_ranges():
    for dtype, bits in ((torch.float32, 24), (torch.float64, 53)):
        fuser = make_fuser().to(dtype)
        logistic = GateSampler(per="token")._uniform(torch.tensor([0, -1]), dtype)
        assert 0 < logistic[0] == 1 - logistic[1] == 2.0**-bits
        gumbel = GateSampler("gumbel")._uniform(torch.tensor([0, -1]), dtype)
        assert gumbel.tolist() == [0.0, 1 - 2.0**-bits]
        noise = GateSampler(per="token").noise(fuser, 1, 3, 0, step=0, sample_ids=[1])
        assert noise.dtype == dtype
    half = make_fuser().to(torch.bfloat16)  # a fraction of 1 would round to 1 there
    sampler = GateSampler()
    noise = sampler.noise(half, 1, 1, 0, step=0)
    assert noise.dtype == sampler.gates(half, noise, 0).dtype == torch.float32


@pytest.mark.parametrize("kind", ["logistic", "gumbel"])
def test_noise_follows_the_sample(kind):
    sampler, fuser = GateSampler(kind, per="token"), fuser_with(0.5, **MIXED)
    ids = [17, 4, 2**40, -3]
    whole = sampler.noise(fuser, 4, 6, seed=1, step=9, sample_ids=ids)
    assert whole.shape == (3, 2, 4, 5, 6)
    for row, sample in enumerate(ids):
        alone = sampler.noise(fuser, 1, 6, seed=1, step=9, sample_ids=[sample])
        assert same_bits(alone[:, :, 0], whole[:, :, row])
        longer = sampler.noise(fuser, 2, 11, seed=1, step=9, sample_ids=torch.tensor([5, sample]))
        assert same_bits(longer[:, :, 1, :, 5:], whole[:, :, row])
    assert len(whole.unique()) > 0.999 * whole.numel()  # nothing else is shared
    for changed in ({"step": 10}, {"seed": 2}, {"seed": -1}):
        other = sampler.noise(fuser, 4, 6, **{"seed": 1, "step": 9, "sample_ids": ids, **changed})
        assert (other == whole).double().mean() < 1e-3


def test_neighbouring_noise_is_uncorrelated():
    sampler = GateSampler(per="token")
    noise = sampler.noise(make_fuser().double(), 40, 100, 0, step=0, sample_ids=range(40)) - 0.5
    for dim in range(5):
        a, b = (
            noise.narrow(dim, 0, noise.shape[dim] - 1),
            noise.narrow(dim, 1, noise.shape[dim] - 1),
        )
        correlation = ((a * b).mean() / noise.square().mean()).item()
        assert abs(correlation) < 6 / a.numel() ** 0.5, dim


def test_stream_noise_is_one_draw_per_stream_and_step():
    sampler, fuser = GateSampler(), fuser_with(0.0, **MIXED)
    noise = sampler.noise(fuser, 4, 9, seed=1, step=2)
    assert noise.shape == (3, 2, 1, 1, 1) and len(noise.unique()) == 6
    assert same_bits(noise, sampler.noise(fuser, 1, 50, seed=1, step=2, sample_ids=[8]))
    later = sampler.noise(fuser, 4, 9, seed=1, step=3)
    assert not torch.isin(later, noise).any()


def test_gradient_in_the_logits():
    sampler = GateSampler(per="token", start=0.5, end=0.5)
    fuser = fuser_with(0.3, **MIXED).double()
    with torch.no_grad():
        for i, group in enumerate(fuser.groups):
            group.gate_logit.copy_(torch.linspace(-1, 1, len(group.gate_logit)) + i)
    noise = sampler.noise(fuser, 2, 3, seed=0, step=0, sample_ids=[0, 1])
    weights = torch.randn(noise.shape, dtype=torch.float64)
    gates = sampler.gates(fuser, noise, 0)
    (gates * weights).sum().backward()
    slope = (weights * gates * (1 - gates) / 0.5).detach().sum((2, 3, 4))
    for group in fuser.groups:
        for g, grad in enumerate(group.gate_logit.grad):
            layer, kind = group.place(g)
            assert grad.item() == pytest.approx(slope[layer, KINDS.index(kind)].item(), rel=1e-12)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_edges_of_noise_stay_finite(noise):
    fuser = fuser_with(0.0)
    for kind, edge in (("logistic", noise), ("gumbel", min(noise, 1 - 2**-24))):
        fuser.zero_grad()
        gates = GateSampler(kind).gates(fuser, torch.full((2, 2, 1, 1, 1), edge), 5000)
        gates.sum().backward()
        assert gates.isfinite().all() and fuser.groups[0].gate_logit.grad.isfinite().all()


def test_layers_find_their_logits():
    fuser = fuser_with(0.0, **MIXED)
    set_gates(
        fuser, {(layer, kind): 10 * layer + i for layer in range(3) for i, kind in enumerate(KINDS)}
    )
    assert gate_logits(fuser).tolist() == [[0, 1], [10, 11], [20, 21]]
    gates = torch.arange(3 * 2 * 5).view(3, 2, 1, 5, 1)
    pairs = gate_pairs(gates, fuser)
    assert [key.shape for key, _ in pairs] == [(1, 2, 1, 1), (1, 5, 1, 1), (1, 2, 1, 1)]
    assert pairs[1][1].flatten().tolist() == [15, 16, 17, 18, 19]


def test_one_kind_of_streams():
    fuser = make_fuser(make_config(kinds=("value",)))
    sampler = GateSampler()
    gates = sampler.gates(fuser, sampler.noise(fuser, 1, 1, 0, step=0), 0)
    assert gates.shape == (2, 1, 1, 1, 1)
    assert all(key is None and value is not None for key, value in gate_pairs(gates, fuser))


def test_combined_seed_depends_on_everything():
    seeds = {
        combined_seed(*values) for values in [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,)]
    }
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "normal"}, ValueError, "kind must be one of logistic, gumbel, got 'normal'"),
        ({"per": "head"}, ValueError, "per must be one of stream, token, got 'head'"),
        ({"schedule": "cosine"}, ValueError, "schedule must be one of exponential, linear"),
        ({"end": 0}, ValueError, "end must be above 0 and finite, got 0"),
        ({"start": float("nan")}, ValueError, "start must be above 0 and finite, got nan"),
        ({"start": "1"}, TypeError, "start must be a number, got '1'"),
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, ValueError, "steps must be an integer of at least 1, got 2.5"),
    ],
)
def test_bad_settings_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        GateSampler(**arguments)


def test_bad_arguments_are_refused():
    fuser, sampler = make_fuser(), GateSampler(per="token")
    with pytest.raises(ValueError, match="sample_ids must be given with per='token'"):
        sampler.noise(fuser, 2, 3, 0, step=0)
    for ids in ([1], [0.5, 1.5], [True, False]):
        with pytest.raises(ValueError, match="sample_ids must be 2 integers"):
            sampler.noise(fuser, 2, 3, 0, step=0, sample_ids=ids)
    with pytest.raises(ValueError, match="step must be an integer of at least 0, got -1"):
        sampler.temperature(-1)
    with pytest.raises(TypeError, match="seed must be an integer, got None"):
        sampler.noise(fuser, 2, 3, None, step=0, sample_ids=[0, 1])
    with pytest.raises(ValueError, match="no gates"):
        sampler.noise(make_fuser(make_config(gate=False)), 1, 1, 0, step=0, sample_ids=[0])

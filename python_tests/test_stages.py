"""c2c::stage_*: every CPU stage by itself against float64, threads, scalar functions, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, assert_as_good_as_plain, relative_error, same_bits
from torch import Tensor

from c2c_ext.packed import sum_dtype, to_panels

STAGES = torch.ops.c2c
EPS = torch.finfo(torch.float32).eps


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output whose every element has to be written."""
    return torch.full(shape, float("nan"), dtype=dtype)


def panels_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([to_panels(w, dtype) for w in weight]).contiguous()


# (streams, rows, columns, depth): tiles of every height and width, odd depths, parts of sums.
PRODUCTS = [
    (1, 1, 1, 1),
    (2, 3, 16, 7),
    (3, 5, 17, 128),
    (1, 8, 48, 129),
    (2, 9, 50, 130),
    (1, 23, 100, 255),
    (2, 64, 33, 513),
    (1, 170, 212, 96),
]


@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_product_is_as_good_as_plain(sizes, dtype):
    streams, rows, cols, depth = sizes
    weight = random(streams, cols, depth, dtype=dtype, seed=1)
    x = random(streams, rows, depth, dtype=sum_dtype(dtype), seed=2)
    out = poisoned(streams, rows, cols, dtype=sum_dtype(dtype))
    STAGES.stage_multiply(out, x, panels_of(weight, dtype))
    truth = torch.bmm(x.double(), weight.double().mT)
    if dtype == torch.float64:
        assert relative_error(out, truth) <= 1e-13
        return
    # The widened weights are exact; native bfloat16 products round the inputs as PyTorch's do.
    plain = torch.bmm(x.to(dtype).float(), weight.float().mT)
    orders = [torch.randperm(depth, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    draws = [
        plain,
        *(torch.bmm(x[..., o].to(dtype).float(), weight[..., o].float().mT) for o in orders),
    ]
    assert_as_good_as_plain(out, draws, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_their_neighbours_or_on_threads(dtype):
    weight, x = random(3, 70, 300, dtype=dtype), random(3, 45, 300, dtype=sum_dtype(dtype))
    panels, whole = panels_of(weight, dtype), poisoned(3, 45, 70, dtype=sum_dtype(dtype))
    STAGES.stage_multiply(whole, x, panels)
    for rows in (1, 7, 44):
        part = poisoned(3, rows, 70, dtype=sum_dtype(dtype))
        STAGES.stage_multiply(part, x[:, :rows].contiguous(), panels)
        assert same_bits(part, whole[:, :rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            again = torch.empty_like(whole)
            STAGES.stage_multiply(again, x, panels)
            assert same_bits(again, whole)
    finally:
        torch.set_num_threads(threads)


def test_infinities_and_nan_come_through_a_product():
    weight, x = random(1, 20, 9), random(1, 3, 9)
    x[0, 1, 4], x[0, 2, 0] = float("inf"), float("nan")
    out = poisoned(1, 3, 20)
    STAGES.stage_multiply(out, x, panels_of(weight, torch.float32))
    assert out[0, 0].isfinite().all() and out[0, 1].isinf().all() and out[0, 2].isnan().all()


@pytest.mark.parametrize("strided", [False, True])
def test_gather_widens_and_flattens(dtype, strided):
    sharer, base = random(2, 3, 6, 5, dtype=dtype), random(2, 2, 4, 7, dtype=dtype, seed=1)
    if strided:
        sharer, base = (t.transpose(1, 3).contiguous().transpose(1, 3) for t in (sharer, base))
    out = poisoned(8, 29, dtype=sum_dtype(dtype))
    STAGES.stage_gather(out, sharer, base)
    flat = [t[:, :, :4].transpose(1, 2).reshape(8, -1) for t in (sharer, base)]
    assert torch.equal(out, torch.cat(flat, 1).to(out.dtype))


def test_bias_and_statistics():
    z, bias, rstd = random(2, 5, 70), random(2, 70, seed=1), poisoned(2, 5)
    truth = z.double() + bias.double()[:, None]
    STAGES.stage_bias_stats(z, rstd, bias)
    assert relative_error(z, truth) <= 2 * EPS
    assert relative_error(rstd, (truth.square().mean(-1) + 1e-6).rsqrt()) <= 4 * EPS


def test_residual_and_statistics():
    z, delta, out, rstd = (
        random(2, 5, 70),
        random(2, 5, 70, seed=1),
        poisoned(2, 5, 70),
        poisoned(2, 5),
    )
    truth = z.double() + delta.double()
    STAGES.stage_residual_stats(out, rstd, z, delta)
    assert relative_error(out, truth) <= 2 * EPS
    assert relative_error(rstd, (truth.square().mean(-1) + 1e-6).rsqrt()) <= 4 * EPS


def test_statistics_of_many_magnitudes():
    for scale in (0.0, 1e-12, 1e-4, 1.0, 1e4, 1e15):
        z, bias, rstd = random(1, 4, 1024) * scale, torch.zeros(1, 1024), poisoned(1, 4)
        truth = (z.double().square().mean(-1) + 1e-6).rsqrt()
        STAGES.stage_bias_stats(z, rstd, bias)
        assert ((rstd - truth).abs() / truth).max() <= 4 * EPS


def test_head_logits():
    x, weight, logits = random(2, 9, 130), random(2, 5, 130, seed=1), poisoned(2, 9, 5)
    STAGES.stage_head(logits, x, weight)
    assert_as_good_as_plain(
        logits, [torch.bmm(x, weight.mT)], torch.bmm(x.double(), weight.double().mT)
    )


def scan() -> Tensor:
    """float32 numbers of all sizes that matter, dense near zero."""
    small = torch.logspace(-30, 2, 20_000, base=10.0, dtype=torch.float64)
    dense = torch.linspace(-100, 100, 400_001, dtype=torch.float64)
    near = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    return torch.cat([small, -small, dense, near]).float()


@pytest.mark.parametrize(
    ("name", "function"), [("gelu", F.gelu), ("relu", F.relu), ("silu", F.silu)]
)
def test_activations_are_within_four_eps(name: str, function: Callable[[Tensor], Tensor]):
    x = scan().view(1, 1, -1)
    out = torch.empty_like(x)
    STAGES.stage_scale_activate(out, x, torch.ones(1, 1), name)
    error = (out.double() - function(x.double())).abs()
    assert (error <= 4 * EPS * x.abs().clamp(min=1)).all()
    special = torch.tensor([[[float("nan"), float("inf"), -float("inf")]]])
    answer = torch.empty_like(special)
    STAGES.stage_scale_activate(answer, special, torch.ones(1, 1), name)
    assert answer[0, 0, 0].isnan() and answer[0, 0, 1] == float("inf")


def test_sigmoid_is_within_four_eps():
    x = scan()
    ones = torch.ones(x.numel(), 1)
    base, out = torch.zeros(1, 1, x.numel(), 1), poisoned(1, 1, x.numel(), 1)
    STAGES.stage_combine(
        out, base, ones, torch.zeros(1), x.view(-1, 1), torch.zeros(1), "replacement"
    )
    error = (out.flatten().double() - torch.sigmoid(x.double())).abs()
    assert (error <= 4 * EPS).all()


@pytest.mark.parametrize("integration", ["residual", "interpolation", "replacement"])
def test_combine(integration, dtype):
    base = random(2, 3, 4, 5, dtype=dtype)
    sums = sum_dtype(dtype)
    projected, bias = random(8, 15, dtype=sums, seed=1), random(15, dtype=sums, seed=2)
    logits, head_bias = random(8, 3, dtype=sums, seed=3), random(3, dtype=sums, seed=4)

    def formula(kind: torch.dtype) -> Tensor:
        t = base.to(kind)
        p = (projected.to(kind) + bias.to(kind)).view(2, 4, 3, 5).transpose(1, 2)
        w = torch.sigmoid(logits.to(kind) + head_bias.to(kind)).view(2, 4, 3, 1).transpose(1, 2)
        return {
            "residual": t + w * p,
            "interpolation": t + w * (p - t),
            "replacement": w * p,
        }[integration]

    out = poisoned(2, 4, 3, 5, dtype=dtype).transpose(1, 2)  # strided
    STAGES.stage_combine(out, base, projected, bias, logits, head_bias, integration)
    if dtype == torch.float64:
        assert relative_error(out, formula(dtype)) <= 1e-14
    else:
        assert_as_good_as_plain(out, [formula(sums).to(dtype)], formula(torch.float64))


def test_empty_stages_do_nothing():
    none = torch.empty(2, 0, 6)
    STAGES.stage_multiply(torch.empty(2, 0, 4), none, panels_of(random(2, 4, 6), torch.float32))
    STAGES.stage_scale_activate(torch.empty(2, 0, 6), none, torch.empty(2, 0), "gelu")
    STAGES.stage_gather(torch.empty(0, 12), torch.empty(1, 1, 0, 4), torch.empty(1, 2, 0, 4))


X = random(2, 3, 6)
PANELS = panels_of(random(2, 4, 6), torch.float32)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("multiply", (torch.empty(2, 3, 17), X, PANELS), r"panels must stand for \[G, 17, 6\]"),
        ("multiply", (torch.empty(2, 3, 4), X[..., :5].contiguous(), PANELS), "panels must stand"),
        ("multiply", (torch.empty(2, 3, 4), X.mT, PANELS), "x must be a contiguous CPU tensor"),
        ("multiply", (torch.empty(2, 3, 4), X.double(), PANELS), "x must be a contiguous"),
        ("multiply", (torch.empty(2, 3, 4), X, PANELS[0]), "panels must be a contiguous"),
        ("multiply", (torch.empty(2, 3, 4), X.half(), PANELS), "x must be float32 or float64"),
        ("multiply", (torch.empty(1, 3, 4), X, PANELS), "out dim 0 must equal 2, got 1"),
        ("scale_activate", (X, X, torch.ones(2, 4), "gelu"), "rstd dim 1 must equal 3, got 4"),
        ("scale_activate", (X, X, torch.ones(2, 3), "tanh"), "activation must be gelu"),
        ("bias_stats", (torch.ones(()), torch.ones(2, 3), torch.ones(2, 6)), "must have 3 dim"),
        ("residual_stats", (X, torch.ones(2, 3), X, X[:1]), "delta dim 0 must equal 2, got 1"),
        ("residual_stats", (X, torch.ones(2, 3), torch.ones(()), X), "z must have 3 dimensions"),
        ("head", (torch.ones(2, 3, 4), X, torch.ones(2, 4, 7)), "weight dim 2 must equal 6"),
        ("gather", (torch.ones(6, 8), torch.ones(2, 1, 2, 4), torch.ones(2, 1, 3, 4)), "tokens"),
        (
            "combine",
            (
                torch.ones(1, 1, 1, 4).expand(2, 1, 1, 4),
                torch.ones(2, 1, 1, 4),
                torch.ones(2, 4),
                torch.ones(4),
                torch.ones(2, 1),
                torch.ones(1),
                "residual",
            ),
            "out must not overlap itself",
        ),
    ],
)
def test_stages_refuse_what_does_not_fit(stage, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(STAGES, f"stage_{stage}")(*arguments)

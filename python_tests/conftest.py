"""What the tests share: the tolerance, dtypes and devices, and small fusers and caches."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from c2c_ext import Fuser, FuserConfig, ops, reference
from c2c_ext.model_kv import KVShape, ModelKV

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# The devices that the compiled op has kernels for.
DEVICES = ["cpu"]
if torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "c2c::fuse_", "CUDA"
):
    DEVICES.append("cuda")

# `benchmarks` of the checkout; last, so that an installed c2c_ext is the one that is tested.
sys.path.append(str(Path(__file__).parent.parent))

# Files that are not collected: without a GPU, or without the sources that they build.
collect_ignore = [] if "cuda" in DEVICES else ["test_cuda.py", "test_cuda_train.py"]
if "C2C_TEST_WEB" not in os.environ:  # make test-web, which has gradio and a browser
    collect_ignore.append("web")
if "C2C_TEST_EVAL" not in os.environ:  # make test-eval, which has lm-evaluation-harness
    collect_ignore.append("eval")
if not (Path(__file__).parent.parent / "csrc").exists():
    collect_ignore.append("test_cuda_resources.py")
    if "C2C_EMULATED_LIBRARY" not in os.environ:
        collect_ignore += ["test_cuda_emulated.py", "test_cuda_fused_emulated.py"]
        collect_ignore += ["test_cuda_train_emulated.py", "test_cuda_train_dropout_emulated.py"]

KVPairs = list[tuple[Tensor, Tensor]]
Shape = tuple[int, int]  # (heads, head dim)

# Configurations that reach every path of the op: keywords of `make_config`.
SHAPES = {
    "even": {},
    "deeper": {"depth": 4},
    "deepest": {"depth": 6},
    "wide_output": {"hidden_size": 12, "intermediate_size": 20},  # Ht * Dt > hidden: unfolded
    "wide_output_deeper": {"hidden_size": 12, "intermediate_size": 20, "depth": 5},
    "primes": {
        "receiver": [(3, 7)],
        "sharer": [(5, 11), (5, 11)],
        "layer_map": [1],
        "hidden_size": 23,
        "intermediate_size": 37,
    },
    # Sums of an odd and an even, of two odd widths that fill whole cache lines together.
    "odd_inner": {"intermediate_size": 15},
    "odd_widths": {"hidden_size": 17, "intermediate_size": 15},
    "groups": {
        "receiver": [(2, 8), (1, 20), (2, 8)],
        "sharer": [(1, 4), (3, 6)],
        "layer_map": [1, 0, 0],
    },
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
}


SKIPS_FILE = Path(__file__).parent / "expected_skips.txt"
_outcomes: dict[str, bool] = {}  # test -> was it skipped or expected to fail?


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome == "skipped":
        _outcomes[report.nodeid] = report.outcome == "skipped" or hasattr(report, "wasxfail")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Skipped and expected-to-fail tests are a checked-in list: fails where it differs."""
    lines = SKIPS_FILE.read_text().splitlines()
    listed = tuple(line for line in lines if line and not line.startswith("#"))

    def is_listed(test: str) -> bool:
        return any(test == name or test.startswith(name + "[") for name in listed)

    names = {
        test: Path(test.partition("::")[0]).name + test[test.find("::") :] for test in _outcomes
    }
    wrong = [t for t, skipped in _outcomes.items() if skipped != is_listed(names[t])]
    if wrong:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        for test in wrong:
            what = "skipped but not" if _outcomes[test] else "run but"
            reporter.write_line(f"{names[test]}: {what} in {SKIPS_FILE.name}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """Models this small lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rms(x: Tensor) -> float:
    """Root of the mean square; 0 for an empty tensor."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_as_good_as_plain(
    ours: Tensor, plain: Sequence[Tensor], truth: Tensor, what: str = ""
) -> None:
    """The one tolerance: our errors are at most twice plain PyTorch's, plus one rounding.

    Per tensor, for the maximum and for the RMS of the error against ``truth`` (float64):
    ``error(ours) <= 2 * error(plain) + eps(dtype) * rms(truth)``; ``plain`` is what plain PyTorch
    gives in the dtype of ``ours`` for the same inputs. The largest of a few rounding errors is a
    lottery, so plain PyTorch may draw several times (`plain_draws`) and its largest error counts.
    """
    assert truth.dtype == torch.float64
    assert ours.shape == truth.shape
    assert all(p.shape == truth.shape and p.dtype == ours.dtype for p in plain)
    one_rounding = torch.finfo(ours.dtype).eps * rms(truth)
    for name, measure in (("maximum", max_abs), ("RMS", rms)):
        error = measure(ours.double() - truth)
        bound = 2 * max(measure(p.double() - truth) for p in plain) + one_rounding
        assert error <= bound, f"{what} {name} error {error:.3g}, at most {bound:.3g} allowed"


def max_abs(x: Tensor) -> float:
    """Largest absolute value; 0 for an empty tensor, NaN if any element is."""
    return x.double().abs().max().item() if x.numel() else 0.0


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest value of ``truth``."""
    scale = max_abs(truth)
    return max_abs(ours.double() - truth.double()) / (scale if scale > 0 else 1.0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0.0 from 0.0 and takes NaN as equal to itself."""
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(width), b.contiguous().view(width)
    )


def make_config(
    receiver: Sequence[Shape] = ((2, 8), (2, 8)),
    sharer: Sequence[Shape] = ((1, 4), (1, 4), (1, 4)),
    layer_map: Sequence[int] = (0, 2),
    **changes: object,
) -> FuserConfig:
    """A small configuration from (heads, head dim) per layer."""
    settings = {"hidden_size": 16, "intermediate_size": 24, "dropout": 0.0, **changes}
    return FuserConfig(
        ModelKV("receiver", "", tuple(KVShape(*s) for s in receiver)),
        ModelKV("sharer", "", tuple(KVShape(*s) for s in sharer)),
        tuple(layer_map),
        **settings,
    )


def make_fuser(
    config: FuserConfig | None = None, *, seed: int = 0, device: object = "cpu"
) -> Fuser:
    """A random fuser with open gates whose norms and biases are not trivial."""
    torch.manual_seed(seed)
    fuser = Fuser(config or make_config())
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            if name.endswith("_norm"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("in_weight", "out_weight", "head_weight")):
                parameter.mul_(3.0)  # so that what is fused differs clearly from what is not
    return fuser.to(device)


def set_gates(fuser: Fuser, logits: dict[tuple[int, str], float], default: float = 1.0) -> None:
    """Sets every gate logit: ``logits[(layer, kind)]`` or ``default``."""
    with torch.no_grad():
        for group in fuser.groups:
            for g in range(len(group.gate_logit)):
                group.gate_logit[g] = logits.get(group.place(g), default)


def make_kv(
    shapes: Sequence[KVShape],
    batch: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: object = "cpu",
    seed: int = 1,
) -> KVPairs:
    """Random (key, value) pairs ``[batch, heads, tokens, dim]``, one per layer."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: KVShape) -> Tensor:
        size = (batch, shape.num_heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)

    return [(one(shape), one(shape)) for shape in shapes]


def make_caches(
    config: FuserConfig,
    batch: int = 2,
    tokens: int = 5,
    sharer_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: object = "cpu",
) -> tuple[KVPairs, KVPairs]:
    """(receiver, sharer) caches for a fuser of ``config``."""
    sharer_tokens = tokens if sharer_tokens is None else sharer_tokens
    return (
        make_kv(config.receiver.layers, batch, tokens, dtype, device, seed=1),
        make_kv(config.sharer.layers, batch, sharer_tokens, dtype, device, seed=2),
    )


def cast(pairs: KVPairs, dtype: torch.dtype) -> KVPairs:
    """The same numbers in another dtype."""
    return [(key.to(dtype), value.to(dtype)) for key, value in pairs]


def clone(pairs: KVPairs) -> KVPairs:
    """Contiguous copies."""
    return [
        (
            key.clone(memory_format=torch.contiguous_format),
            value.clone(memory_format=torch.contiguous_format),
        )
        for key, value in pairs
    ]


def flat(pairs: KVPairs) -> list[Tensor]:
    """All tensors, layer by layer, key before value."""
    return [t for pair in pairs for t in pair]


def run_op(
    fuser: Fuser,
    base: KVPairs,
    sharer: KVPairs,
    token_map: Tensor | None = None,
    out: KVPairs | None = None,
    accumulate: bool = False,
) -> KVPairs:
    """Fuses through the compiled op into ``out``, by default a copy of ``base``."""
    out = clone(base) if out is None else out
    first = base[0][0]
    packed = fuser.packed(first.dtype, first.device)
    with torch.no_grad():
        ops.fuse_(out, base, sharer, packed, token_map=token_map, accumulate=accumulate)
    return out


def run_reference(
    fuser: Fuser, base: KVPairs, sharer: KVPairs, token_map: Tensor | None = None
) -> KVPairs:
    """The reference, on the sharer's first tokens where there is no map."""
    tokens = base[0][0].shape[2]
    if token_map is None:
        sharer = [(key[:, :, :tokens], value[:, :, :tokens]) for key, value in sharer]
    with torch.no_grad():
        return reference.fuse(base, sharer, fuser, token_map=token_map)


def reorder_hidden(fuser: Fuser, seed: int) -> Fuser:
    """The same function with the hidden channels in another order: other roundings of every sum."""
    fuser = copy.deepcopy(fuser)
    order = hidden_order(fuser, seed)
    with torch.no_grad():
        for group in fuser.groups:
            for name, p in group.named_parameters():
                if (dim := hidden_dim(name)) is not None:
                    p.copy_(p.index_select(dim, order.to(p.device)))
    return fuser


def hidden_order(fuser: Fuser, seed: int) -> Tensor:
    """The order that `reorder_hidden` brings the hidden channels into."""
    return torch.randperm(fuser.config.hidden_size, generator=torch.Generator().manual_seed(seed))


def hidden_dim(name: str) -> int | None:
    """Which dimension of a FuserGroup's parameter counts hidden channels."""
    if name == "in_weight" or name.endswith("_w2"):  # writes hidden channels
        return -2
    return None if name in ("gate_logit", "out_bias", "head_bias") else -1  # has or reads them


def plain_draws(
    fuser: Fuser, base: KVPairs, sharer: KVPairs, token_map: Tensor | None = None
) -> list[tuple[Tensor, ...]]:
    """For every fused tensor what plain PyTorch gives for it, with 4 orders of summation."""
    fusers = [fuser, *(reorder_hidden(fuser, seed) for seed in range(3))]
    runs = [flat(run_reference(f, base, sharer, token_map)) for f in fusers]
    return list(zip(*runs, strict=True))


def assert_fused(
    fuser: Fuser,
    base: KVPairs,
    sharer: KVPairs,
    ours: KVPairs,
    token_map: Tensor | None = None,
    differs: bool = True,
) -> None:
    """Compares ``ours`` with the float64 reference, and with what was not fused."""
    wide = cast(base, torch.float64), cast(sharer, torch.float64)
    truth = flat(run_reference(fuser, *wide, token_map))
    if ours[0][0].dtype == torch.float64:
        for i, (x, t) in enumerate(zip(flat(ours), truth, strict=True)):
            assert relative_error(x, t) <= 1e-13, f"tensor {i}"
    else:
        draws = plain_draws(fuser, base, sharer, token_map)
        for i, (x, p, t) in enumerate(zip(flat(ours), draws, truth, strict=True)):
            assert_as_good_as_plain(x, p, t, f"tensor {i}")
    if differs:
        assert all(max_abs(a - b) > 0.1 for a, b in zip(flat(ours), flat(base), strict=True))


OP_ARGUMENTS = [a.name for a in torch.ops.c2c.fuse_.default._schema.arguments]


def arguments_of(
    fuser: Fuser, out: KVPairs, base: KVPairs, sharer: KVPairs, token_map: Tensor | None = None
) -> dict[str, object]:
    """The op's arguments by name, for the fuser's only shape group."""
    first = base[0][0]
    packed = fuser.packed(first.dtype, first.device)
    (group,) = packed.groups
    values = ops.group_arguments(group, out, base, sharer, token_map, packed, False)
    return dict(zip(OP_ARGUMENTS, values, strict=True))

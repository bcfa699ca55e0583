"""Benchmarks: what is verified and reported. No time is asserted but that of a fake clock."""

import json
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from c2c_ext import machine
from c2c_ext import measure as ms
from c2c_ext import probe as probe_module
from c2c_ext.cli import main
from c2c_ext.estimate import Ceilings, Work
from c2c_ext.fusion_bench import (
    PROVIDERS,
    SHAPES,
    FusionCase,
    make_fuser,
    measure_fusion,
    reorder_hidden,
    set_gates,
)

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CEILINGS = Ceilings("cpu", 1e9, {torch.float32: 1e10, torch.bfloat16: 1e10})
NO_EFFORT = ms.Effort(rounds=1, seconds=0.0, turn=0.0)
TINY = SHAPES["tiny"]


class FakeTime:
    """A clock that only providers move; they take the given seconds, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def provider(self, name: str, *seconds: float):
        def call(i: int) -> None:
            self.called.append(name)
            self.now += seconds[i % len(seconds)]

        return call


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def quiet_probe(*_: object, **__: object) -> Ceilings:
    return CEILINGS


# Timing.


def test_summary_is_median_and_fifths() -> None:
    values = [float(v) for v in (5, 1, 4, 2, 3, 6)]
    assert ms.Timing(values, 2).summary() == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert ms.Timing([7.0], 1).summary() == {"median": 7.0, "p20": 7.0, "p80": 7.0}


def test_providers_take_turns_and_every_second_round_goes_backwards() -> None:
    time = FakeTime()
    calls = {"a": time.provider("a", 1.0), "b": time.provider("b", 2.0)}
    timings = ms.alternate(calls, ms.Effort(rounds=3, seconds=0.0, turn=0.5), time)
    assert time.called == ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].seconds == [1.0, 1.0, 1.0]
    assert timings["b"].rounds == 3


def test_a_turn_lasts_as_long_as_it_should() -> None:
    time = FakeTime()
    ms.alternate({"a": time.provider("a", 0.25)}, ms.Effort(1, 0.0, turn=1.0), time)
    assert len(time.called) == 4


def test_rounds_go_on_until_every_provider_has_its_seconds() -> None:
    time = FakeTime()
    calls = {"fast": time.provider("fast", 0.1), "slow": time.provider("slow", 1.0)}
    timings = ms.alternate(calls, ms.Effort(rounds=2, seconds=0.35, turn=0.0), time)
    assert timings["fast"].rounds == 4


def test_the_limit_ends_a_cell_after_a_whole_round() -> None:
    time = FakeTime()
    calls = {"a": time.provider("a", 3.0), "b": time.provider("b", 3.0)}
    timings = ms.alternate(calls, ms.Effort(rounds=5, seconds=1.0, limit=5.0), time)
    assert [len(t.seconds) for t in timings.values()] == [1, 1]


def test_the_garbage_collector_is_off_while_timing_and_on_again_after_an_error() -> None:
    import gc

    def fail(_: int) -> None:
        assert not gc.isenabled()
        raise KeyError("stopped")

    with pytest.raises(KeyError):
        ms.alternate({"a": fail}, NO_EFFORT)
    assert gc.isenabled()


# Rows.


def test_rows_hold_ratios_rates_and_the_fraction_of_the_ceiling() -> None:
    timings = {"reference": ms.Timing([4.0], 1), "fuse": ms.Timing([0.5], 1)}
    work = Work(bytes=10**8, flop=10**9, dtype=torch.float32)  # 0.1 s, either way
    checked = {"reference": {}, "fuse": {"max_error": 1.0}}
    slow, fast = ms.result_rows({"tokens": 3}, timings, checked, work, CEILINGS)
    assert (slow["provider"], slow["ratios"]) == ("reference", {"fuse": 0.125})
    assert (fast["provider"], fast["ratios"]) == ("fuse", {"reference": 8.0})
    assert fast["fraction_of_ceiling"] == pytest.approx(0.2)
    assert slow["fraction_of_ceiling"] == pytest.approx(0.025)
    assert fast["bytes_per_second"] == pytest.approx(2e8)
    assert fast["tokens"] == 3
    assert fast["verified"] == {"max_error": 1.0}


def test_what_is_not_verified_is_not_timed_and_has_no_row() -> None:
    time = FakeTime()
    calls = {name: time.provider(name, 1.0) for name in ("reference", "wrong", "right")}

    def check(name: str, call: object) -> dict:
        if name == "wrong":
            raise ms.Unverified("off by one")
        return {}

    rows, left_out = ms.measure_cell({"n": 1}, calls, check, None, quiet_probe, NO_EFFORT, time)
    assert [row["provider"] for row in rows] == ["reference", "right"]
    assert left_out == [{"n": 1, "provider": "wrong", "reason": "off by one"}]
    assert "wrong" not in time.called


def test_without_a_verified_reference_there_are_no_rows() -> None:
    def check(name: str, call: object) -> dict:
        if name == "reference":
            raise ms.Unverified("NaN")
        return {}

    calls = {"reference": lambda i: None, "fuse": lambda i: None}
    rows, left_out = ms.measure_cell({}, calls, check, None, quiet_probe, NO_EFFORT)
    assert (rows, len(left_out)) == ([], 1)


def test_ceilings_are_measured_again_before_every_round_and_the_best_counts() -> None:
    time = FakeTime()
    memory = iter((1e9, 4e9, 2e9))
    work = Work(bytes=10**9, flop=0, dtype=torch.float32)
    asked = []

    def ceilings(dtype: torch.dtype) -> Ceilings:
        asked.append(dtype)
        return Ceilings("cpu", next(memory), {dtype: 1e10})

    effort = ms.Effort(rounds=3, seconds=0.0)
    calls = {"reference": time.provider("reference", 1.0)}
    (row,), _ = ms.measure_cell({}, calls, lambda *_: {}, work, ceilings, effort, time)
    assert asked == [torch.float32] * 3
    assert row["memory_ceiling"] == 4e9
    assert row["fraction_of_ceiling"] == pytest.approx(0.25)


def test_the_sampler_measures_memory_and_the_asked_gemm(monkeypatch) -> None:
    monkeypatch.setattr(probe_module, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(probe_module, "SAMPLED_GEMM", 32)
    sampler = probe_module.CeilingSampler(torch.device("cpu"), [torch.float32, torch.bfloat16])
    found = sampler(torch.bfloat16)
    assert found.memory > 0
    assert list(found.gemm) == [torch.bfloat16] and found.gemm[torch.bfloat16] > 0


# The verification rule.


def test_the_rule_is_twice_the_plain_error_plus_one_rounding() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    plain = torch.full((4,), 1.25)
    found = ms.compare(torch.full((4,), 1.5), [plain], truth, "x")
    eps = torch.finfo(torch.float32).eps
    assert found == {
        "max_error": 0.5,
        "max_bound": 0.5 + eps,
        "rms_error": 0.5,
        "rms_bound": 0.5 + eps,
    }
    with pytest.raises(ms.Unverified, match=r"x: max error 0\.501, at most 0\.5 allowed"):
        ms.compare(torch.tensor([1.501, 1, 1, 1]), [plain], truth, "x")
    with pytest.raises(ms.Unverified, match="rms error"):
        plain = torch.tensor([1.5, 1, 1, 1])
        ms.compare(torch.full((4,), 1.9), [plain], truth, "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_plain", [False, True])
def test_what_is_not_finite_is_wrong_even_for_the_yardstick(value: float, is_plain: bool) -> None:
    truth = torch.ones(2, dtype=torch.float64)
    ours = torch.tensor([1.0, value])
    with pytest.raises(ms.Unverified):
        ms.compare(ours, [torch.ones(2)], truth, "x", is_plain=is_plain)


def test_the_yardstick_itself_is_bounded() -> None:
    truth = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ms.Unverified, match="rms error"):
        off = torch.full((2,), 1.1)
        ms.compare(off, [off], truth, "x", is_plain=True)


def test_reordered_weights_are_the_same_function() -> None:
    from c2c_ext import reference

    fuser = make_fuser(TINY, torch.float64)
    w = fuser.stream(1, "value")
    source, own = (torch.randn(2, *s, dtype=torch.float64) for s in ((2, 5, 32), (4, 5, 16)))
    one = torch.ones((), dtype=torch.float64)
    fused = [
        reference.fuse_stream(x, source, own, one, fuser.config) for x in (w, reorder_hidden(w, 0))
    ]
    assert torch.allclose(*fused, rtol=1e-12)
    assert not torch.equal(*fused)


# A whole fusion.


@pytest.fixture(scope="module")
def fuser():
    return make_fuser(TINY, torch.float32)


@pytest.mark.parametrize("gates", ["all", "half"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_provider_but_the_compiled_one_is_verified(fuser, gates: str, batch: int) -> None:
    set_gates(fuser, gates)
    case = FusionCase(fuser, torch.float32, batch, 5)
    providers = tuple(name for name in PROVIDERS if name != "compiled")  # takes a compiler
    rows, left_out = measure_fusion({"gates": gates}, case, quiet_probe, NO_EFFORT, providers)
    assert left_out == []
    assert [row["provider"] for row in rows] == list(providers)
    for row in rows:
        assert row["open_streams"] == {"all": 6, "half": 3}[gates]
        assert (row["batch"], row["tokens"], row["dtype"]) == (batch, 5, "float32")
        assert 0 < row["verified"]["max_error"] <= row["verified"]["max_bound"]
        assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
        assert set(row["ratios"]) == set(providers) - {row["provider"]}


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        (0, 0, "layer 0 key: max error"),  # against float64
        (1, 0, "layer 1 key is .* from the reference"),  # against the verified reference
        (1, 1, "layer 1 value is .* from the reference"),
        (2, 1, "layer 2 value: max error"),
    ],
)
def test_a_wrong_tensor_is_found_wherever_it_is(fuser, layer: int, kind: int, message: str) -> None:
    set_gates(fuser, "all")
    case = FusionCase(fuser, torch.float32, 1, 64)
    calls = case.calls(("reference", "op"))
    case.check("reference", calls["reference"])
    case.check("op", calls["op"])

    def wrong(i: int):
        out = calls["op"](i)
        out[layer][kind][0, 0] += 1e-2
        return out

    with pytest.raises(ms.Unverified, match=message):
        case.check("op", wrong)


def test_a_closed_stream_must_keep_its_bits(fuser) -> None:
    set_gates(fuser, "half")
    case = FusionCase(fuser, torch.float32, 1, 64)
    calls = case.calls(("reference", "fuse"))
    case.check("reference", calls["reference"])
    assert (1, "key") not in case.open

    def wrong(i: int):
        out = calls["fuse"](i)
        out[1][0][0, 0, 0, 0] = torch.nextafter(out[1][0][0, 0, 0, 0], torch.tensor(9.0))
        return out

    with pytest.raises(ms.Unverified, match="layer 1 key is closed"):
        case.check("fuse", wrong)


def test_what_is_not_fused_does_not_pass(fuser) -> None:
    set_gates(fuser, "all")
    case = FusionCase(fuser, torch.float32, 1, 64)
    with pytest.raises(ms.Unverified, match="layer 0 key"):
        case.check("reference", lambda i: case.sets[i][0])


def test_calls_rotate_among_sets_of_caches(fuser) -> None:
    case = FusionCase(fuser, torch.float32, 1, 2)
    call = case.calls(("fuse",))["fuse"]
    count = len(case.sets)
    assert count > 1
    first, second, again = call(0), call(1), call(count)
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], second[0][0])


# The environment.


def test_environment_names_machine_versions_and_commit() -> None:
    found = machine.environment()
    for name in ("date", "cpu", "torch", "transformers", "instruction_set", "affinity", "threads"):
        assert found[name], name
    assert found["memory_bytes"] > 1 << 28
    json.dumps(found, allow_nan=False)


def test_commit_is_that_of_the_checkout_alone(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    assert machine.commit_of(tmp_path) == (None, None)
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "one")
    (tmp_path / "untracked").write_text("b")
    commit, dirty = machine.commit_of(tmp_path)
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "file").write_text("c")
    assert machine.commit_of(tmp_path) == (commit, True)
    (tmp_path / "inside").mkdir()
    assert machine.commit_of(tmp_path / "inside") == (None, None)


def test_a_copy_without_history_is_told_its_commit(tmp_path: Path, monkeypatch) -> None:
    commit = "0123456789" * 4
    for told, expected in ((commit, False), (f"{commit}-dirty", True)):
        monkeypatch.setenv("C2C_EXT_COMMIT", told)
        found = machine.environment(tmp_path)
        assert (found["commit"], found["dirty"]) == (commit, expected)
    monkeypatch.setenv("C2C_EXT_COMMIT", "main")
    with pytest.raises(ValueError, match="C2C_EXT_COMMIT must be 40 digits and perhaps -dirty"):
        machine.environment(tmp_path)
    monkeypatch.delenv("C2C_EXT_COMMIT")
    assert machine.environment(tmp_path)["commit"] is None


def test_peak_memory_sees_what_a_call_frees_again() -> None:
    measured = machine.peak_memory(lambda: torch.ones(64 << 18).sum())  # 64 MiB
    if measured is not None:  # a kernel that does not let the mark be reset
        before, most = measured
        assert 48 << 20 <= most - before <= 256 << 20


# c2c bench.


def test_bench_prints_a_table_and_writes_its_rows(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    target = tmp_path / "bench.json"
    assert (
        main(["bench", "--quick", "--tokens", "3", "--dtype", "fp32", "--json", str(target)]) == 0
    )
    out = capsys.readouterr().out
    assert "PyTorch" in out
    assert "\n fp32       3" in out
    data = json.loads(target.read_text())
    assert (data["benchmark"], data["complete"], data["left_out"]) == ("fuse", True, [])
    assert data["ceilings"]["memory_bytes_per_second"] > 0
    assert [row["provider"] for row in data["rows"]] == ["reference", "fuse"]
    assert data["rows"][1]["ratios"]["reference"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens must be in 1..4096, got 0"),
        (["--quick", "--json", "/nowhere/x"], "--json: there is no directory /nowhere"),
    ],
)
def test_bench_refuses_bad_options(
    capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


# The scripts.


def test_the_default_grid_is_the_one_that_the_docs_state(scripts) -> None:
    shapes = scripts("shapes")
    cells = shapes.fusion_cells(["real"], ["fp32", "bf16"], ["all", "half"], None, None)
    assert len(cells) == 2 * 2 * (5 + 3 + 3) + 1
    assert [c.dtype for c in cells if c.tokens == 2048] == ["fp32"]
    assert all(c.batch == 1 or c.tokens <= 64 for c in cells)
    chosen = shapes.fusion_cells(["real"], ["bf16"], ["all"], [8], [512])
    assert [(c.batch, c.tokens) for c in chosen] == [(8, 512)]


@pytest.mark.parametrize("name", ["tiny", "mid", "real"])
def test_pairs_of_models_have_the_fusers_shapes(scripts, name: str) -> None:
    from c2c_ext import FuserConfig

    receiver, sharer, settings = scripts("shapes").model_pair(name)
    made = FuserConfig.for_models(receiver, sharer, **settings)
    expected = SHAPES[{"mid": "short"}.get(name, name)].config()
    for side in ("receiver", "sharer"):
        assert getattr(made, side).layers == getattr(expected, side).layers
    assert made.layer_map == expected.layer_map
    assert made.hidden_size == expected.hidden_size


def test_bench_fuse_writes_what_plot_draws(
    scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, harness, plot = scripts("bench_fuse"), scripts("harness"), scripts("plot")
    monkeypatch.setattr(harness, "probe", quiet_probe)
    monkeypatch.setattr(harness, "CeilingSampler", lambda *_: quiet_probe)
    target = tmp_path / "fuse.json"
    options = ["--quick", "--dtypes", "fp32", "--providers", "reference", "fuse"]
    assert bench.main([*options, "--output", str(target)]) == 0
    data = json.loads(target.read_text())
    assert data["complete"] is True
    assert len(data["rows"]) == 8
    assert set(data["environment"]["load_average"]) == {"start", "end"}
    assert plot.main([str(target)]) == 0
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [d.name for d in drawn] == [
        "fuse_tiny_float32_all_b1.svg",
        "fuse_tiny_float32_half_b1.svg",
    ]
    root = ElementTree.parse(drawn[0]).getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert len(root.findall(f".//{svg}circle")) == 2 * 2 * 2  # panels, providers, tokens
    texts = [t.text for t in root.iter(f"{svg}text")]
    assert {"fuse", "reference", "tokens", "fraction of the ceiling"} <= set(texts)


def test_an_interrupted_run_keeps_its_rows(
    scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, harness = scripts("bench_fuse"), scripts("harness")
    monkeypatch.setattr(harness, "probe", quiet_probe)
    monkeypatch.setattr(harness, "CeilingSampler", lambda *_: quiet_probe)
    measured = bench.measure_fusion

    def interrupted(cell, case, *rest):
        if case.work.tokens == 16:
            raise KeyboardInterrupt
        return measured(cell, case, *rest)

    monkeypatch.setattr(bench, "measure_fusion", interrupted)
    target = tmp_path / "fuse.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--quick", "--providers", "reference", "--output", str(target)])
    data = json.loads(target.read_text())
    assert data["complete"] is False
    assert [row["tokens"] for row in data["rows"]] == [1]


def test_a_quick_run_does_not_touch_the_recorded_results(scripts) -> None:
    harness = scripts("harness")
    options = harness.arguments("x").parse_args(["--quick"])
    assert options.output is None
    assert harness.effort_of(options) == harness.QUICK


def stand_ins() -> types.SimpleNamespace:
    """The stage ops in plain PyTorch, after their schemas."""

    def rstd(z: Tensor) -> Tensor:
        return torch.rsqrt(z.square().mean(-1) + 1e-6)

    def gather(out: Tensor, sharer: Tensor, base: Tensor) -> None:
        rows = [t.transpose(1, 2).flatten(2).flatten(0, 1) for t in (sharer, base)]
        out.copy_(torch.cat(rows, dim=-1))

    def multiply(out: Tensor, x: Tensor, panels: Tensor) -> None:
        rows = panels.transpose(2, 3).flatten(3).flatten(1, 2)
        weight = rows[:, : out.shape[2], : x.shape[2]].to(x.dtype)
        out.copy_(x @ weight.mT)

    def bias_stats(z: Tensor, out: Tensor, bias: Tensor) -> None:
        z.add_(bias[:, None])
        out.copy_(rstd(z))

    def scale_activate(out: Tensor, x: Tensor, scale: Tensor, activation: str) -> None:
        assert activation == "gelu"
        out.copy_(F.gelu(x * scale[..., None]))

    def residual_stats(out: Tensor, scale: Tensor, z: Tensor, delta: Tensor) -> None:
        out.copy_(z + delta)
        scale.copy_(rstd(out))

    def head(logits: Tensor, x: Tensor, weight: Tensor) -> None:
        logits.copy_(x @ weight.mT)

    def combine(
        out: Tensor,
        base: Tensor,
        projected: Tensor,
        bias: Tensor,
        logits: Tensor,
        head_bias: Tensor,
        integration: str,
    ) -> None:
        assert integration == "residual"
        batch, heads, tokens, dim = base.shape
        added = (projected + bias).view(batch, tokens, heads, dim).transpose(1, 2)
        weights = torch.sigmoid(logits + head_bias).view(batch, tokens, heads, 1).transpose(1, 2)
        out.copy_(base + weights * added)

    made = (gather, multiply, bias_stats, scale_activate, residual_stats, head, combine)
    return types.SimpleNamespace(**{f"stage_{f.__name__}": f for f in made})


# The real ops where the build has them.
STAGES = torch.ops.c2c if hasattr(torch.ops.c2c, "stage_gather") else stand_ins()


def test_every_stage_is_verified_and_timed(
    scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, harness, plot = scripts("bench_kernels"), scripts("harness"), scripts("plot")
    monkeypatch.setattr(harness, "probe", quiet_probe)
    monkeypatch.setattr(harness, "CeilingSampler", lambda *_: quiet_probe)
    monkeypatch.setattr(harness, "QUICK", NO_EFFORT)
    target = tmp_path / "kernels.json"
    assert bench.main(["--quick", "--tokens", "1", "--output", str(target)], STAGES) == 0
    data = json.loads(target.read_text())
    seen = {(row["kernel"], row["dtype"], row["provider"]) for row in data["rows"]}
    assert len(seen) == len(data["rows"]) == len(bench.KERNELS) * 2 * 2
    assert {(row["shape"], row["tokens"]) for row in data["rows"]} == {("tiny", 1)}
    assert plot.main([str(target)]) == 0


@pytest.mark.parametrize("kernel", ["gather", "multiply_w1", "scale_activate", "combine"])
def test_a_wrong_stage_has_no_row(scripts, kernel: str) -> None:
    bench = scripts("bench_kernels")
    ops = stand_ins()
    name = "stage_" + kernel.removesuffix("_w1")
    right = getattr(ops, name)

    def wrong(out: Tensor, *rest: object) -> None:
        right(out, *rest)
        out.flatten()[-1] += 0.1

    setattr(ops, name, wrong)
    stages = bench.Stages(ops, TINY, torch.float32, 4)
    (found,) = (k for k in stages.kernels() if k.name == kernel)
    rows, left_out = bench.measure_kernel({}, found, quiet_probe, NO_EFFORT)
    assert [row["provider"] for row in rows] == ["reference"]
    assert left_out[0]["reason"].startswith(f"{kernel} output 0: max error")


def test_kernels_say_what_the_build_lacks(scripts, capsys: pytest.CaptureFixture) -> None:
    assert scripts("bench_kernels").main([], types.SimpleNamespace()) == 2
    assert "this build has no op c2c::stage_gather" in capsys.readouterr().err


def test_generate_is_broken_down_and_its_tokens_verified(
    scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench, harness, plot = scripts("bench_generate"), scripts("harness"), scripts("plot")
    monkeypatch.setattr(harness, "probe", quiet_probe)
    monkeypatch.setattr(harness, "CeilingSampler", lambda *_: quiet_probe)
    target = tmp_path / "generate.json"
    options = ["--quick", "--no-memory", "--dtypes", "fp32", "--output", str(target)]
    assert bench.main(options) == 0
    receiver, text, c2c = json.loads(target.read_text())["rows"]
    assert [row["provider"] for row in (receiver, text, c2c)] == list(bench.MODES)
    assert set(receiver["parts"]) == {"receiver prefill", "decode"}
    assert set(text["parts"]) >= {"sharer prefill", "sharer writing", "receiver prefill", "decode"}
    assert set(c2c["parts"]) == {*scripts("answers").PREFIX, "decode"}
    for row in (receiver, text, c2c):
        assert row["first_token"]["median"] < row["seconds"]["median"]
        assert row["verified"]["tokens_equal"] == 3
    assert plot.main([str(target)]) == 0


def test_generate_that_does_not_fuse_is_not_timed(scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scripts("bench_generate")
    pair = bench.Pair("tiny", torch.float32)
    pair.attached = {"C2C": pair.receiver}  # answers from its own cache
    ids = pair.prompt(8)
    rows, left_out = bench.measure({}, pair, ids, 4, 8, NO_EFFORT)
    assert [row["provider"] for row in rows] == ["receiver", "T2T"]
    assert left_out[0]["reason"].startswith("C2C: generate gives")


FUSE = '{"format_version": 1, "benchmark": "fuse"'
NOT_RESULTS = ["[]", '{"format_version": 1}', '{"format_version": 99}', "no"]
NOT_RESULTS += [FUSE + end for end in ("}", ', "rows": {}}', ', "rows": [1]}', ', "rows": [{}]}')]


@pytest.mark.parametrize("text", NOT_RESULTS)
def test_plot_refuses_what_is_no_results_file(
    scripts, tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    assert scripts("plot").main([str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.glob("*.svg")) == []

"""Benchmarks on a GPU, all but the GPU: a stand-in that is the CPU and says which kernels ran."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import test_bench
import torch
from test_bench import NO_EFFORT, TINY, quiet_probe
from test_dispatch import load_tool

from c2c_ext import cuda_paths, ops
from c2c_ext.fusion_bench import FusionCase, make_fuser, set_gates

scripts = test_bench.scripts

KERNELS = {
    "plain": ["gather", "add_stats", "activate", "head", "combine"],
    "fused": ["fused_gemm", "fused_gemm", "head_weights"],
    "hopper": ["gather", "hopper_gemm", "head"],
}


def symbol(kernel: str) -> str:
    """As the profiler names a kernel of ours."""
    return f"void c2c::cuda::(anonymous namespace)::{kernel}_kernel<c2c::Bfloat16, 4>(int, float*)"


@pytest.fixture
def fake(scripts, monkeypatch):
    """A GPU of the scripts that is the CPU; ``runs`` says which path takes a call."""
    gpu = scripts("gpu")

    class FakeGpu(gpu.Gpu):
        runs = staticmethod(lambda asked: asked)

        def wait(self) -> None:
            pass

        def extra_bytes(self, call) -> int:
            call()
            return 1 << 20

        def replayed(self, call, count):
            call(0)
            return call

        def launches(self, call):
            asked = []
            original = ops.fuse_

            def recorded(*args, **kwargs):
                asked.append(os.environ.get(cuda_paths.VARIABLE))
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(ops, "fuse_", recorded)
                call()
            assert len(asked) == 1
            ran = self.runs(asked[0])
            names = [] if ran is None else [symbol(name) for name in KERNELS[ran]]
            return [gpu.Launch(name, 1e-6) for name in [*names, "ampere_bf16_s16816gemm"]]

    return FakeGpu(torch.device("cpu"), "a GPU", "9.0")


@pytest.fixture
def quick(scripts, monkeypatch, tmp_path):
    """Runs a script on a stand-in; returns (status, what it wrote), which can be drawn."""
    harness = scripts("harness")
    monkeypatch.setattr(harness, "probe", quiet_probe)
    monkeypatch.setattr(harness, "CeilingSampler", lambda *_: quiet_probe)
    monkeypatch.setattr(harness, "QUICK", NO_EFFORT)

    def run(script: str, *options: str, gpu: object) -> tuple[int, dict]:
        target = tmp_path / f"{script}.json"
        given = ["--quick", "--device", "cuda", "--output", str(target), *options]
        status = scripts(script).main(given, gpu=gpu)
        assert scripts("plot").main([str(target)]) == 0
        return status, json.loads(target.read_text())

    return run


# Without a GPU.


@pytest.mark.parametrize("script", ["bench_fuse", "bench_generate", "bench_kernels", "bench_train"])
def test_without_a_gpu_one_line_says_so(scripts, script: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        scripts(script).main(["--quick", "--device", "cuda"])
    message = str(stopped.value)
    assert message.startswith(f"{script}.py: --device cuda needs a GPU that torch can use: ")
    assert "\n" not in message


# Which kernels ran.


@pytest.mark.parametrize("path", cuda_paths.PATHS)
def test_a_path_is_told_by_its_kernels(scripts, path: str) -> None:
    gpu = scripts("gpu")
    launches = [gpu.Launch(symbol(name), 0.0) for name in KERNELS[path]]
    assert gpu.path_of(launches) == path
    assert [launch.ours for launch in launches] == KERNELS[path]
    foreign = [gpu.Launch("void at::native::combine_kernel<float>(int)", 0.0)]
    assert gpu.path_of(foreign) is None and foreign[0].ours is None


def test_the_marks_are_kernels_of_the_sources(scripts) -> None:
    sources = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
    text = "".join(path.read_text() for path in sorted(sources.glob("*.cu*")))
    marks = scripts("gpu").MARKS
    assert tuple(marks) == cuda_paths.PATHS
    for mark in marks.values():
        assert f" {mark}_kernel(" in text


# bench_fuse.py


def test_every_path_has_rows_that_say_what_ran(quick, fake) -> None:
    options = ["--dtypes", "fp32", "--gates", "half", "--providers", "reference", "fuse", "op"]
    status, data = quick("bench_fuse", *options, "--cuda-paths", "plain", "fused", gpu=fake)
    assert status == 0 and data["left_out"] == []
    rows = [row for row in data["rows"] if row["tokens"] == 16]
    assert [row["provider"] for row in rows] == [
        *("reference", "fuse", "op plain", "op plain graph", "op fused", "op fused graph")
    ]
    for row in rows:
        assert (row["device"], row["capability"]) == ("a GPU", "9.0")
        assert row["fused_bytes"] == 3 * 4 * 16 * 16 * 4  # streams, heads, tokens, dim, float32
    by_name = {row["provider"]: row for row in rows}
    for path in ("plain", "fused"):
        called, graph = by_name[f"op {path}"], by_name[f"op {path} graph"]
        assert (called["cuda_path"], called["cuda_path_ran"]) == (path, path)
        assert graph["cuda_graph"] == path and "cuda_path" not in graph
        assert called["launches"] == len(KERNELS[path]) + 1
        assert called["extra_bytes"] == 1 << 20 and "extra_bytes" not in graph
    assert "cuda_path" not in by_name["fuse"]


def test_a_path_that_leaves_the_fusion_to_another_is_left_out(quick, fake) -> None:
    type(fake).runs = staticmethod(lambda asked: "plain")
    options = ["--dtypes", "fp32", "--gates", "all", "--tokens", "1", "--providers"]
    paths = ["--cuda-paths", "plain", "hopper"]
    status, data = quick("bench_fuse", *options, "reference", "op", *paths, gpu=fake)
    assert status == 1
    assert [row["provider"] for row in data["rows"]] == ["reference", "op plain", "op plain graph"]
    left = [(cell["provider"], cell["reason"]) for cell in data["left_out"]]
    why = "hopper left this fusion to plain"
    assert left == [("op hopper", why), ("op hopper graph", why)]


def test_where_the_profiler_sees_nothing_the_row_says_so(quick, fake) -> None:
    type(fake).runs = staticmethod(lambda asked: None)
    options = ["--dtypes", "fp32", "--gates", "all", "--tokens", "1", "--providers"]
    _, data = quick("bench_fuse", *options, "reference", "op", "--cuda-paths", "fused", gpu=fake)
    assert data["rows"][1]["cuda_path_ran"] is None


def test_what_a_path_does_not_write_is_not_taken_for_its_result(scripts, fake, monkeypatch) -> None:
    """All paths write into the same tensors: the one before must not be verified again."""
    bench = scripts("bench_fuse")
    fuser = make_fuser(TINY, torch.float32)
    set_gates(fuser, "all")
    case = FusionCase(fuser, torch.float32, 1, 64)
    original = ops.fuse_

    def lazy(*args, **kwargs):
        if os.environ.get(cuda_paths.VARIABLE) != "fused":
            original(*args, **kwargs)

    monkeypatch.setattr("c2c_ext.fusion_bench.ops.fuse_", lazy)
    given = ({}, case, quiet_probe, NO_EFFORT, ("reference", "op"), fake, ("plain", "fused"))
    rows, left_out = bench.measure_on_gpu(*given)
    assert [row["provider"] for row in rows] == ["reference", "op plain", "op plain graph"]
    assert "max error nan" in left_out[0]["reason"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cuda-paths", "fused"], "--cuda-paths needs --device cuda"),
        (
            ["--device", "cuda", "--cuda-paths", "fused", "--providers", "reference"],
            "--cuda-paths needs op among --providers",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(scripts, capsys, options, message) -> None:
    with pytest.raises(SystemExit):
        scripts("bench_fuse").main(options)
    assert message in capsys.readouterr().err


def test_rows_of_a_gpu_fill_the_table(quick, fake, tmp_path) -> None:
    """What bench_fuse.py writes is what tools/fill_dispatch.py reads."""
    tool = load_tool()
    options = ["--dtypes", "fp32", "--gates", "all", "--tokens", "16", "--providers"]
    paths = ["--cuda-paths", "plain", "fused"]
    _, data = quick("bench_fuse", *options, "reference", "op", *paths, gpu=fake)
    data["arguments"]["quick"] = False
    data["environment"] |= {"dirty": False, "commit": "0" * 40, "package": "checkout"}
    path = tmp_path / "fuse_cuda.json"
    path.write_text(json.dumps(data))
    _, rows = tool.measurements(path)
    (row,) = tool.table_of(rows)
    assert row[:4] == (90, "float32", 1, 16) and row[4] in ("plain", "fused")


# bench_generate.py


def test_every_overlap_answers_in_a_row_of_its_own(quick, fake, scripts, capsys) -> None:
    status, data = quick("bench_generate", gpu=fake)
    assert status == 0
    assert data["arguments"]["overlaps"] == ["none", "stream", "thread"]
    rows = {row["provider"]: row for row in data["rows"]}
    fused = ["C2C", "C2C stream", "C2C thread"]
    assert list(rows) == ["receiver", "T2T", *fused]
    for row in rows.values():
        assert (row["device"], row["capability"]) == ("a GPU", "9.0")
        assert row["memory_bytes"] == {"extra": 1 << 20}
        assert row["verified"]["tokens_equal"] == 3
    assert set(rows["C2C"]["parts"]) == {*scripts("answers").PREFIX, "decode"}
    assert set(rows["C2C thread"]["parts"]) == {"decode"}
    said = capsys.readouterr().out.splitlines()
    goals = [line for line in said if "times the receiver alone" in line]
    assert [line.split(",")[0] for line in goals] == fused


def test_the_goals_are_ratios_of_totals(scripts) -> None:
    bench = scripts("bench_generate")
    row = {"provider": "C2C stream", "tokens": 170, "new_tokens": 64}
    ratios = {"receiver": 0.8, "T2T": 3.0, "C2C": 1.1}
    alone = {"provider": "receiver", "ratios": {"T2T": 4.0}}
    (line,) = bench.against_goals([alone, {**row, "ratios": ratios}])
    assert line == (
        "C2C stream, 170 tokens and 64 new: 1.250 times the receiver alone (goal on a GPU, at 170 "
        "and 64: 1.05), 3.00 times as fast as T2T (goal: 4)"
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_measured_depends_on_the_device(scripts, fake, device, monkeypatch) -> None:
    bench, harness = scripts("bench_generate"), scripts("harness")
    asked = []

    class Stopped(Exception):
        pass

    def results(name, options, dtypes, where):
        asked.append((options.pairs, options.dtypes, options.new_tokens, options.overlaps))
        raise Stopped

    monkeypatch.setattr(harness, "Results", results)
    with pytest.raises(Stopped):
        bench.main(["--device", device], gpu=fake if device == "cuda" else None)
    assert asked == [
        (["real"], ["bf16"], 64, ["none", "stream", "thread"])
        if device == "cuda"
        else (["tiny", "mid"], ["fp32", "bf16"], 16, ["none"])
    ]


def test_a_thread_overlaps_on_the_cpu_too_and_a_stream_does_not(scripts, capsys) -> None:
    answers = scripts("answers")
    modes = answers.modes_of(["none", "thread"])
    assert modes == ("receiver", "T2T", "C2C", "C2C thread")
    assert [answers.overlap_of(mode) for mode in modes[2:]] == ["none", "thread"]
    with pytest.raises(SystemExit):
        scripts("bench_generate").main(["--overlaps", "stream"])
    assert "--overlaps stream needs --device cuda" in capsys.readouterr().err


# bench_kernels.py


PRODUCTS = {
    "in": "fused_gemm_kernel<B, Tile, CacheInput<B>, MatrixInput<B, 1>, NormedOutput<B, (bool)0>>",
    "w2": "fused_gemm_kernel<B, Tile, MatrixInput<B, 1>, MatrixInput<B, 1>, NormedOutput<B, true>>",
    "w1 and branches": "fused_gemm_kernel<B, Tile, MatrixInput<B, 1>, ActivatedOutput<B>>",
    "out": "fused_gemm_kernel<B, Tile, MatrixInput<B, 2>, MatrixInput<B, 1>, FusedOutput<B>>",
    "head": "head_weights_kernel<B>",
}
HOPPER = {
    "in": "hopper::hopper_gemm_kernel<B, hopper::BiasEpilogue<B>>",
    "w2": "hopper::hopper_gemm_kernel<B, hopper::ResidualEpilogue<B>>",
    "w1 and branches": "hopper::hopper_gemm_kernel<B, hopper::ActivateEpilogue<B, (Activation)0>>",
    "out": "hopper::hopper_gemm_kernel<B, hopper::OutputEpilogue<B, (Integration)0, false>>",
    "head": "head_kernel<B>",
    "gather": "gather_kernel<B>",
    "another": "another_kernel<B>",
}


@pytest.mark.parametrize("names", [PRODUCTS, HOPPER], ids=["fused", "hopper"])
def test_a_kernel_is_told_its_stage(scripts, names) -> None:
    stages, gpu = scripts("gpu_stages"), scripts("gpu")
    for stage, name in names.items():
        launch = gpu.Launch(f"void c2c::cuda::(anonymous namespace)::{name}(Streams)", 0.0)
        assert stages.stage_of(launch) == stage
    for name in ("nvjet_tst_128x256", "void cutlass::fused_gemm_kernel<int>()"):
        assert stages.stage_of(gpu.Launch(name, 0.0)) == stages.LIBRARY


@pytest.mark.parametrize("gates", ["all", "half"])
def test_the_stages_multiply_what_the_whole_fusion_does(scripts, gates) -> None:
    stages = scripts("gpu_stages")
    fuser = make_fuser(TINY, torch.float32)
    set_gates(fuser, gates)
    work = stages.stage_work(FusionCase(fuser, torch.float32, 2, 5))
    whole = work[stages.WHOLE].flop
    assert work[stages.LIBRARY].flop + work["head"].flop == whole
    assert sum(work[name].flop for name in PRODUCTS) == whole
    assert sum(work[name].bytes for name in PRODUCTS) > work[stages.WHOLE].bytes


def test_kernels_of_whole_fusions_are_added_up_by_stage(quick, fake) -> None:
    options = ["--dtypes", "fp32", "--tokens", "1", "--cuda-paths", "plain", "fused"]
    status, data = quick("bench_kernels", *options, gpu=fake)
    assert status == 0
    rows = {(row["provider"], row["kernel"]): row for row in data["rows"] if row["tokens"] == 1}
    stages = {path: [k for p, k in rows if p == path] for path in ("plain", "fused")}
    assert stages["plain"] == ["whole fusion", *KERNELS["plain"], "library products"]
    whole = rows["plain", "whole fusion"]
    assert whole["launches"] == 6 and whole["calls"] == 20
    assert whole["seconds"]["median"] == pytest.approx(6e-6)
    assert 0 < whole["fraction_of_ceiling"] and whole["capability"] == "9.0"
    # Kernels whose stage is not told are not lost: they have no rate.
    assert rows["fused", "fused_gemm"]["launches"] == 2
    assert "flop" not in rows["fused", "fused_gemm"]
    assert data["rows"][0]["verified"]["max_error"] > 0


@pytest.mark.parametrize(
    ("runs", "reason"),
    [("plain", "hopper left this fusion to plain"), (None, "the profiler saw none of our kernels")],
)
def test_a_path_that_did_not_run_has_no_stages(quick, fake, runs, reason) -> None:
    type(fake).runs = staticmethod(lambda asked: runs)
    options = ["--dtypes", "fp32", "--tokens", "1", "--cuda-paths", "hopper"]
    status, data = quick("bench_kernels", *options, gpu=fake)
    assert (status, data["rows"]) == (1, [])
    assert {cell["reason"] for cell in data["left_out"]} == {reason}


@pytest.mark.parametrize("script", ["bench_fuse", "bench_kernels"])
def test_a_path_that_cannot_run_is_left_out(quick, fake, script, monkeypatch) -> None:
    original = ops.fuse_

    def refusing(*args, **kwargs):
        if os.environ.get(cuda_paths.VARIABLE) == "hopper":
            raise RuntimeError("c2c_ext.fuse: the hopper path needs a GPU")
        original(*args, **kwargs)

    monkeypatch.setattr(ops, "fuse_", refusing)
    options = ["--dtypes", "fp32", "--tokens", "1", "--cuda-paths", "plain", "hopper"]
    if script == "bench_fuse":
        options += ["--gates", "all", "--providers", "reference", "op"]
    status, data = quick(script, *options, gpu=fake)
    assert status == 1 and data["complete"] is True
    wanted = "hopper cannot run: c2c_ext.fuse: the hopper path needs a GPU"
    assert {cell["reason"] for cell in data["left_out"]} == {wanted}
    assert any("plain" in row["provider"] for row in data["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cuda-paths", "fused"], "--cuda-paths is not for --device cpu"),
        (["--device", "cuda", "--kernels", "gather"], "--kernels is not for --device cuda"),
    ],
)
def test_options_of_the_other_device_are_refused(scripts, capsys, options, message) -> None:
    with pytest.raises(SystemExit):
        scripts("bench_kernels").main(options)
    assert message in capsys.readouterr().err

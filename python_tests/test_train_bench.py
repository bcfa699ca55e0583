"""benchmarks/bench_train.py: verified before timed, memory recorded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield __import__("bench_train")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def run(bench, target: Path) -> tuple[int, dict]:
    status = bench.main(
        ["--quick", "--providers", "reference", "op", "op_recompute", "--output", str(target)]
    )
    return status, json.loads(target.read_text())


def test_rows_are_verified_and_say_what_is_saved(bench, tmp_path, one_thread) -> None:
    status, data = run(bench, tmp_path / "train.json")
    assert status == 0 and data["complete"] and not data["left_out"]
    rows = {row["provider"]: row for row in data["rows"]}
    assert list(rows) == ["reference", "op", "op_recompute"]
    saved = [row["memory"]["saved_bytes"] for row in rows.values()]
    assert saved[0] > saved[1] > 100 * saved[2] > 0
    assert rows["op"]["memory_ratios"]["saved_bytes"] == saved[1] / saved[0]
    for row in rows.values():
        assert row["verified"]["tensors"] == 17  # outputs, gates, 15 parameters
        assert row["verified"]["rms_error"] <= row["verified"]["rms_bound"]


@pytest.mark.parametrize("what", ["outputs", "gradients"])
def test_a_wrong_op_is_left_out(what, bench, tmp_path, monkeypatch, one_thread) -> None:
    fuse = bench.fuse_training

    def wrong(base, sharer, fuser, **keywords):
        fused = fuse(base, sharer, fuser, **keywords)
        scale = 1.001 if what == "gradients" else 1.0
        shift = 0.001 if what == "outputs" else 0.0
        # The same value with other gradients, or the other way round.
        return [
            tuple(t * scale - (t * (scale - 1.0)).detach() + shift for t in pair) for pair in fused
        ]

    monkeypatch.setattr(bench, "fuse_training", wrong)
    status, data = run(bench, tmp_path / "train.json")
    assert status == 1
    assert [row["provider"] for row in data["rows"]] == ["reference"]
    assert [cell["provider"] for cell in data["left_out"]] == ["op", "op_recompute"]

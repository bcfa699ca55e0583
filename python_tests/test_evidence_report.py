"""benchmarks/evidence/report.py: what is written about result files is what they hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import report as rp
from benchmarks.evidence.__main__ import compare, main
from benchmarks.evidence.outcomes import Cell, update_run

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "dirty": False,
    "cpu": "a CPU",
    "torch": "2.13.0",
    "transformers": "5.0",
}
COUNT = 80


def bits(right: int) -> torch.Tensor:
    return torch.arange(COUNT) < right


def record(directory: Path, seed: int, c2c: int = 78, mismatched: int = 10) -> None:
    right = {
        "receiver": bits(10),
        "t2t": bits(80),
        "c2c": bits(c2c),
        "mismatched": bits(mismatched),
        "zero": bits(9),
        "special": bits(40),
    }
    cells = [Cell("is, K = 3", 8, right, {"t2t": 3.0})]
    cells += [Cell(f"is, K = 3, {k} facts written", 8, {"t2t": bits(10 * k)}) for k in (0, 1)]
    rows = [
        {"cell": c, "mode": m, "rounds": 5, "p20": 1.0, "median": t, "p80": 9.0}
        for c, m, t in (
            ("is, K = 3", "t2t", 8.0),
            ("is, K = 3", "c2c", 4.0),
            ("is, K = 3, 0 facts written", "t2t", 2.0),
            ("is, K = 3, 1 facts written", "t2t", 3.0),
        )
    ]
    rows[1]["parts"] = {"sharer_prefill": 1.5, "fusing": 0.5}
    update_run(
        directory,
        "form",
        seed,
        title="the form world",
        training={
            "environment": ENVIRONMENT,
            "cpu_seconds": 5.0 + seed,
            "stages": {"sharer": {"parameters": 1234, "seconds": 4.0}},
        },
        accuracy={"environment": ENVIRONMENT, "cells": [cell.to_json() for cell in cells]},
        latency={"environment": ENVIRONMENT, "rows": rows},
    )


@pytest.fixture
def report(tmp_path: Path) -> rp.Report:
    for seed in (0, 1):
        record(tmp_path, seed)
    record(tmp_path, 3, c2c=77)
    return rp.Report(tmp_path)


def test_counts_are_added_over_seeds_and_the_fresh_seed_stands_apart(report: rp.Report) -> None:
    table = report.table("accuracy form")
    assert "of 160 (seeds 0, 1) / of 80 (fresh: 3)" in table
    assert "| **C2C** | 156 / 77 |" in table and "| C2C, seed by seed | 78 + 78 |" in table
    assert "| special | 80 / 40 |" in table
    assert "2026-01-02 at 0123456" in table and "form_seed3.json" in table
    assert "facts written" not in table


def test_paired_tests_are_of_the_questions_themselves(report: rp.Report) -> None:
    table = report.table("paired form")
    assert re.search(r"receiver alone \| 20 \| 12\.5% \| 8\..% to 18\..% \| 136 : 0 \|", table)
    assert re.search(r"T2T.*\| 160 \| 100\.0% .*\| 0 : 4 \| 0\.12 \| 3 \|", table)


def test_a_verdict_names_what_is_not_beaten_and_who_does_not_guess(tmp_path: Path) -> None:
    record(tmp_path, 0, c2c=12, mismatched=60)
    said = rp.Report(tmp_path).table("verdicts form")
    assert "Seed 0: content transferred in 0 of 1 cells. No evidence: is, K = 3." in said
    assert "mismatched (is, K = 3): 60" in said
    record(tmp_path, 1)
    said = rp.Report(tmp_path).table("verdicts form")
    assert "Seed 0: content transferred in 0 of 1" in said  # adding seeds up would hide it
    assert "Seed 1: content transferred in 1 of 1" in said
    record(tmp_path, 0)
    said = rp.Report(tmp_path).table("verdicts form")
    assert "in 0 of" not in said and said.rstrip().endswith("all are.")


def test_text_is_compared_in_every_cell(report: rp.Report) -> None:
    said = report.table("verdicts form")
    assert "only C2C : only T2T gets, the seeds added up: is, K = 3 0 : 4 (p = 0.12)." in said
    assert "the fresh seed: is, K = 3 0 : 3 (p = 0.25)." in said


def test_sizes_and_cpu_times_are_of_every_seed(report: rp.Report) -> None:
    assert "| the form world | sharer 1,234 | 5, 6, 8 |" in report.table("training")


def test_times_have_parts_and_a_ratio(report: rp.Report) -> None:
    table = report.table("latency form")
    assert "| T2T : C2C | 2.0 x |" in table and "| of C2C: sharer prefill | 1.50 |" in table


def test_budgets_are_points_of_time_and_accuracy(report: rp.Report) -> None:
    assert report.budget_points("form") == [
        ("T2T, 0 facts written", 2.0, 0, 160),
        ("T2T, 1 facts written", 3.0, 20, 160),
        ("**C2C**", 4.0, 156, 160),
    ]
    drawings = report.drawings()
    assert {"form.svg", "form_budgets.svg"} <= set(drawings)
    assert all(svg.startswith("<svg") for svg in drawings.values())


def test_the_summary_has_a_line_for_every_world(report: rp.Report) -> None:
    (line,) = [s for s in report.table("summary").splitlines() if "the form world" in s]
    assert "| 160 | 156 = 78 + 78 | 160 |" in line
    assert "20 (mismatched)" in line and "4.0 / 8.0" in line


def test_marks_are_filled_and_unknown_tables_refused(report: rp.Report) -> None:
    text = "before\n<!-- table: verdicts form -->\nold\n<!-- end of table -->\nafter\n"
    filled = rp.filled(text, report)
    assert "content transferred" in filled and "old" not in filled
    assert filled == rp.filled(filled, report)
    for name in ("verdicts moon", "weather form"):
        with pytest.raises(ValueError, match=r"docs/evidence\.md: no "):
            report.table(name)


def test_counts_are_compared_with_the_recorded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.evidence.__main__.RESULTS", tmp_path / "recorded")
    record(tmp_path / "recorded", 0, c2c=78)
    record(tmp_path / "new", 0, c2c=70)
    assert compare(tmp_path / "new") == 0
    out = capsys.readouterr().out
    assert "c2c 70 : 78" in out and "t2t 80 : 80" in out
    assert main(["compare", str(tmp_path / "nowhere")]) == 1


def test_the_document_and_its_drawings_are_what_the_files_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rp.main(check=True) == 0, capsys.readouterr().out
    linked = set(re.findall(r"results/evidence/([\w.]+)", rp.DOCUMENT.read_text("utf-8")))
    assert all((rp.RESULTS / name).exists() for name in linked)

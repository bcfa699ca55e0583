"""benchmarks/tables.py: the documents' tables are what the results files say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__("tables")
    sys.modules.pop("tables", None)


def test_documents_hold_what_the_results_say(tables, capsys) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_can_be_made(tables) -> None:
    for name, make in tables.TABLES.items():
        lines = make().splitlines()
        assert len({line.count("|") for line in lines if line.startswith("|")}) == 1, name
        assert lines[-1].endswith(").") and "Measured on 20" in lines[-1]


def row(provider: str, median: float, **ratios: float) -> dict:
    cell = {"shape": "real", "dtype": "float32", "gates": "all", "batch": 1, "tokens": 16}
    return {**cell, "provider": provider, "seconds": {"median": median}, "ratios": ratios}


def test_a_table_shows_medians_and_ratios_of_its_rows(tables, tmp_path, monkeypatch) -> None:
    rows = [
        row("reference", 0.2),
        row("compiled", 0.1),
        row("fuse", 0.05, reference=4.0, compiled=2.0),
    ]
    environment = {"date": "2026-01-02T03:04:05+00:00", "cpu": "a CPU", "torch": "9"}
    environment |= {"commit": "0123456789", "dirty": False}
    for name, held in (("fuse_float32.json", rows), ("fuse_bfloat16.json", [])):
        text = json.dumps({"rows": held, "environment": environment})
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.results.cache_clear()
    try:
        text = tables.filled(
            "README.md", "a\n<!-- table: fusions real -->\nold\n<!-- end of table -->\nb"
        )
    finally:
        tables.results.cache_clear()
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nb")
    assert "| float32: plain PyTorch | 200 |" in text
    assert "| float32: **`c2c_ext.fuse`** | 50.0 |" in text
    assert "half the gates open" not in text  # there are no such rows
    assert "| float32: plain, compiled : ours | 4.0 / 2.0 x |" in text
    source = "[fuse_float32.json](benchmarks/results/fuse_float32.json)"
    assert f"Measured on 2026-01-02 at 0123456, a CPU, torch 9: {source}." in text


def gpu_row(provider: str, ms: float, tokens: int = 64, gates: str = "all", **changes) -> dict:
    found = row(provider, 1e-3 * ms, **changes.pop("ratios", {}))
    found |= {"dtype": "bfloat16", "tokens": tokens, "gates": gates, "device": "GPU 1"}
    found |= {"fused_bytes": 10**7, "extra_bytes": 3 * 10**6}
    return {**found, "fraction_of_ceiling": 0.5, "bound": "memory", **changes}


def test_goals_are_those_of_the_fastest_path(tables, tmp_path, monkeypatch) -> None:
    def op(path: str, ms: float, **changes) -> dict:
        return gpu_row(f"op {path}", ms, cuda_path=path, **changes)

    measured = [
        gpu_row("reference", 20.0),
        op("plain", 1.0, ratios={"reference": 20.0}),
        op("fused", 0.5, ratios={"reference": 40.0}),
        gpu_row("op plain graph", 0.8, cuda_graph="plain"),
        gpu_row("op fused graph", 0.25, cuda_graph="fused", fraction_of_ceiling=0.8),
        op("plain", 0.9, gates="half"),
        op("fused", 0.25, gates="half"),
        op("plain", 3.0, tokens=8192, ratios={"reference": 2.0}),
    ]
    beside = [
        gpu_row("compiled", 4.0, ratios={"op fused": 0.1}),
        op("fused", 0.4, ratios={"reference": 50.0, "compiled": 10.0}),
    ]
    environment = {"date": "2026-01-02T03:04:05+00:00", "cpu": "a CPU", "torch": "9"}
    environment |= {"commit": "0123456789", "dirty": False}
    for name, rows in zip(tables.ON_A_GPU, (measured, beside), strict=True):
        (tmp_path / name).write_text(json.dumps({"rows": rows, "environment": environment}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.results.cache_clear()
    try:
        text = tables.gpu_goals(tables.ON_A_GPU, "real", "bfloat16")
    finally:
        tables.results.cache_clear()
    cells = ["64", "fused", "0.50", "0.25", "80% of memory", "40.0 x", "10.0 x", "2.00 x"]
    assert f"| {' | '.join(cells)} | 3 (87) |" in text
    assert "| 8192 | plain | 3.00 |  |  | 2.0 x |  |  | 3 (87) |" in text
    assert "Measured on 2026-01-02 at 0123456, GPU 1, a CPU, torch 9" in text


def test_an_unknown_table_is_named(tables) -> None:
    text = "<!-- table: nonsense -->\n<!-- end of table -->"
    with pytest.raises(ValueError, match="no table 'nonsense'"):
        tables.filled("README.md", text)


def test_two_rows_of_one_cell_are_refused(tables) -> None:
    with pytest.raises(ValueError, match="2 rows for"):
        tables.find([row("fuse", 1.0), row("fuse", 2.0)], provider="fuse")


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.2345, "1 234"), (0.01234, "12.3"), (0.00123, "1.23"), (2e-6, "0.0020")]
)
def test_milliseconds_have_about_three_digits(tables, seconds: float, text: str) -> None:
    assert tables.milliseconds(seconds) == text

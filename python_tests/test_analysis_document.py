"""docs/analysis.md shows what its files hold: every table, and every figure in its sentences."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from c2c_ext.analysis.arguments import ANALYSES
from c2c_ext.analysis.tables import shown
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = (ROOT / "docs" / "analysis.md").read_text()
FILES = {  # by file, what makes it
    **{what: what for what in ANALYSES},
    "positions_k3": "positions --form-size 3",
    "positions_k12": "positions --form-size 12",
    "attention_filled": "attention --filled",
}
# What sentences say of a method, not of a measurement.
NO_MEASUREMENTS = {
    "": {"960", "128"},
    "solved": {"95%", "128"},
    "rank": {"2007", "0"},
    "weights": set(),
    "layers": {"0", "1", "2", "3"},
    "positions": {"12", "3"},
    "attention": {"0", "1", "0.5", "20", "95%"},
}
NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?%?")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"analyze_{name}.json").read_text())


def sections() -> dict[str, str]:
    """By the analysis that a heading begins with; what is before the first one is ``""``."""
    first, *parts = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    return {"": first, **{part.split(":", 1)[0]: part for part in parts}}


def sentences(section: str) -> str:
    """Without code, tables, and what a link leads to."""
    text = re.sub(r"```.*?```", "", section, flags=re.DOTALL)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    return re.sub(r"`[^`]*`|arXiv \d+\.\d+", "", text)


def numbers_not_in(section: str, files: list[str], allowed: set[str]) -> list[str]:
    """Numbers of a section's sentences that are neither allowed nor in a table of its files."""
    tables = "\n".join(shown(read(name)["arguments"]["what"], read(name)) for name in files)
    known = allowed | set(NUMBER.findall(tables))
    return [number for number in NUMBER.findall(sentences(section)) if number not in known]


@pytest.mark.parametrize("name", FILES)
def test_a_table_is_what_its_file_holds(name: str) -> None:
    data = read(name)
    what = FILES[name].split()[0]
    assert data["arguments"]["what"] == what and data["arguments"]["limit"] is None
    assert data["arguments"].get("filled", False) is ("--filled" in FILES[name])
    size = re.search(r"--form-size (\d+)", FILES[name])
    assert data["arguments"]["form_size"] == (int(size[1]) if size else 6)
    assert f"$ c2c analyze {FILES[name]}\n{shown(what, data)}\n```\n" in DOCUMENT


def test_the_recording_script_writes_these_files_and_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    analyses = importlib.import_module("analyses")
    assert analyses.recorded() == {f"analyze_{n}": line.split() for n, line in FILES.items()}
    wrong = DOCUMENT.replace("layer  mean ", "layer  man  ").replace("  1915 ", "  1916 ")
    assert wrong != DOCUMENT and analyses.with_tables(wrong) == DOCUMENT


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_of_a_committed_tree_and_its_drawing_of_the_same(name: str) -> None:
    environment = read(name)["environment"]
    assert environment["dirty"] is False
    drawing = (RESULTS / f"analyze_{name}.svg").read_text()
    assert f", {environment['commit'][:10]}<" in drawing
    assert f"(../benchmarks/results/analyze_{name}.svg)" in DOCUMENT


def test_every_recorded_analysis_is_in_the_document() -> None:
    assert {p.stem for p in RESULTS.glob("analyze_*.json")} == {f"analyze_{n}" for n in FILES}
    assert sections().keys() == NO_MEASUREMENTS.keys()


@pytest.mark.parametrize("what", NO_MEASUREMENTS)
def test_every_figure_in_a_sentence_is_in_a_table_of_its_files(what: str) -> None:
    files = [name for name, command in FILES.items() if what and command.split()[0] == what]
    section = sections()[what]
    assert numbers_not_in(section, files, NO_MEASUREMENTS[what]) == []
    invented = section + " It is right about 1811 of 1920, 94.3%."
    assert "1811" in numbers_not_in(invented, files, NO_MEASUREMENTS[what])


def test_the_files_agree_with_the_demos() -> None:
    """The demo's own evaluation of the same questions, which shares none of the readings' code."""
    every = json.loads((RESULTS / "demo.json").read_text())["held_out"]
    rows = [row for row in every if row["size"] == 6]
    modes = {row["mode"]: row["right"] for row in read("solved")["modes"]}
    named = {"t2t": "T2T", "c2c": "C2C"}
    for mode in modes.keys() - {"noise"}:  # which the demo has not
        assert modes[mode] == sum(row[named.get(mode, mode)] for row in rows), mode
    for name in ("layers", "positions", "positions_k3", "positions_k12"):
        found = [row for row in read(name)["rows"] if row["which"] == "first"]
        rows = [row for row in every if row["size"] == read(name)["arguments"]["form_size"]]
        ends = (found[0]["right"], found[-1]["right"])
        assert ends == tuple(sum(row[mode] for row in rows) for mode in ("receiver", "C2C"))
    whole = next(r for r in read("attention")["conditions"] if r["condition"] == "whole")
    assert (whole["right_alone"], whole["right"]) == (modes["receiver"], modes["c2c"])


@pytest.mark.parametrize("name", ["positions", "positions_k3", "positions_k12"])
def test_right_answers_grow_in_step_with_the_positions(name: str) -> None:
    """Right is what is asked about a fused position, and one in eight of the rest."""
    size = read(name)["arguments"]["form_size"]
    every = ev.held_out_questions(w.make_world(0), w.KINDS[0], size)  # both kinds ask the same
    place = (every.attributes == every.asked[:, None]).int().argmax(dim=1)
    asked = [2 * int((place == k).sum()) for k in range(size)]
    for row in read(name)["rows"]:
        end = round(row["part"] * size)
        fused = {
            "first": asked[:end],
            "last": asked[size - end :],
            "only": asked[end - 1 : end],
            "without": asked[: end - 1] + asked[end:],
        }[row["which"]]
        assert len(fused) == row["positions"]
        expected = sum(fused) + (row["questions"] - sum(fused)) / w.NUM_VALUES
        # Five standard deviations of a guess at all of them: about half of what one position of
        # twelve is worth.
        assert abs(row["right"] - expected) < 5 * math.sqrt(row["questions"] * 7 / 64)


def test_what_the_sentences_say_in_words() -> None:
    """Of the conclusions about attention that are no single figure."""
    filled = {row["condition"]: row for row in read("attention_filled")["conditions"]}
    first = filled["first 1 of 3 layers"]
    assert first["cosine"] == max(row["cosine"] for row in filled.values())
    for control in ("zero", "noise"):
        assert filled[control]["cosine"] < first["cosine"]
        assert filled[control]["kept"] > first["kept"]
    assert all(row["right_alone"] == 1919 for row in filled.values())
    blank = read("attention")["conditions"]
    parts = [row["right_auc"] for row in blank if "positions" in row["condition"]]
    assert f"AUC {min(parts):.3f} to {max(parts):.3f}" in re.sub(r"\s+", " ", DOCUMENT)

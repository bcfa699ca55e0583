"""benchmarks/evidence/ablations.py: variants from one file, resumed runs, what the table says."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import ablations
from benchmarks.evidence.outcomes import Cell
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.demo.command import ASSETS
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.sweep import load_variants

DEMO = Path(__file__).parents[1] / "benchmarks" / "results" / "demo.json"
RECIPE = load_recipe(ablations.BASE)
FIRST, SHIPPED, LAST = "projection only", "+ gate: the recipe", "lr 1e-3"


@pytest.fixture(scope="module")
def pair() -> ev.Pair:
    return ev.load_pair(ASSETS, 0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    monkeypatch.setattr(ablations, "changed_code", lambda: False)
    ablations._setup.cache_clear()


def run(place: Path, *options: str, seeds: str = "0") -> dict:
    """The results file after two steps of training per variant."""
    given = ["--steps", "2", "--rows", "192", "--seeds", seeds, "--work", str(place / "work")]
    assert ablations.main([*given, "--output", str(place / "x.json"), *options]) == 0
    return json.loads((place / "x.json").read_text())


def test_every_variant_is_another_fuser_or_training(pair: ev.Pair) -> None:
    variants = load_variants(ablations.VARIANTS, RECIPE)
    recipes = [RECIPE.changed(changes) for changes in variants.values()]
    assert all(recipes.count(recipe) == 1 for recipe in recipes)
    assert variants[SHIPPED] == {}
    configs = {
        name: recipe.fuser_config(pair.receiver.config, pair.sharer.config)
        for name, recipe in zip(variants, recipes, strict=True)
    }
    assert configs[SHIPPED] == pair.fuser.config
    maps = [name for name, changes in variants.items() if "layer_map" in changes]
    assert len({configs[name].layer_map for name in [*maps, SHIPPED]}) == len(maps) + 1
    for name in maps:  # what its name says
        assert name.endswith(
            (
                ": " + ", ".join(map(str, configs[name].layer_map)),
                f"{configs[name].layer_map[0]} for all",
            )
        )


def test_the_ladder_adds_one_thing_at_a_time() -> None:
    rungs = list(load_variants(ablations.VARIANTS, RECIPE).values())[:5]
    assert rungs[-1] == {} and [len(rung) for rung in rungs] == [4, 3, 2, 1, 0]
    assert all(rung.items() >= upper.items() for rung, upper in pairwise(rungs))


def test_held_out_answers_are_counted_as_the_demo_does(
    pair: ev.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    shown = [row for row in json.loads(DEMO.read_text())["held_out"] if row["size"] == 3]
    cells = {cell.name: cell for cell in ablations.cells_of(pair)}
    baselines = {cell.name: cell for cell in ablations.baselines_of(pair)}
    assert len(cells) == 4 and len(baselines) == 2
    for row in shown:
        name = f"held-out, {row['kind']}, K = 3"
        assert cells[name].questions == baselines[name].questions == row["questions"]
        # Another CPU than the recorded one rounds otherwise: a few answers may be near.
        assert cells[name].count("c2c") == pytest.approx(row["C2C"], abs=3)
        assert cells[name].count("mismatched") == pytest.approx(row["mismatched"], abs=9)
        assert baselines[name].count("t2t") == pytest.approx(row["T2T"], abs=3)
        assert baselines[name].count("receiver") == pytest.approx(row["receiver"], abs=9)
        known = cells[f"train, {row['kind']}, K = 3"]
        assert known.count("c2c") >= 0.97 * known.questions


def test_train_questions_are_about_entities_that_training_saw(
    pair: ev.Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    asked = []

    def answer(pair: ev.Pair, questions: ev.Questions, *rest: object) -> torch.Tensor:
        asked.append(questions.entities)
        return torch.zeros(len(questions.asked), w.NUM_VALUES)

    for name in ("answer_c2c", "answer_mismatched", "answer_zero"):
        monkeypatch.setattr(ev, name, answer)
    cells = ablations.cells_of(pair)
    held_out, train = set(pair.world.held_out.tolist()), set(pair.world.train.tolist())
    seen = [set(entities.tolist()) for entities in asked]
    assert [s <= train for s in seen] == 2 * [False, False, False, True]
    assert [s <= held_out for s in seen] == 2 * [True, True, True, False]
    # Always the first value: right one time in eight.
    assert cells[0].count("c2c") * w.NUM_VALUES == cells[0].questions


def test_an_interrupted_run_goes_on_where_it_was(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    only = ("--only", FIRST, "values only")
    real = ablations.run_variant

    def stopped(work: Path, settings: dict, job: ablations.Job) -> dict:
        if job[0] != FIRST:
            raise KeyboardInterrupt
        return real(work, settings, job)

    monkeypatch.setattr(ablations, "run_variant", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *only)
    before = json.loads((tmp_path / "x.json").read_text())
    assert [row["variant"] for row in before["runs"]] == [FIRST]
    monkeypatch.setattr(ablations, "run_variant", real)
    after = run(tmp_path, *only, "--resume")
    assert after["runs"][0] == before["runs"][0] and len(after["runs"]) == 2
    values = after["runs"][1]
    assert (values["variant"], values["steps"], values["streams"]) == ("values only", 2, 3)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        *("receiver", "sharer", "train.jsonl")
    ]
    printed = capsys.readouterr().out
    assert f"| {FIRST} | 148 992 | 0 | " in printed and "| values only | " in printed

    given = ["--seeds", "0", "--work", str(tmp_path / "work"), "--rows", "192", "--resume"]
    with pytest.raises(SystemExit):  # other settings
        ablations.main([*given, "--steps", "3", "--output", str(tmp_path / "x.json")])
    assert "--resume: the file was written with another recipe" in capsys.readouterr().err


def test_processes_share_the_runs_and_stop_at_a_failure() -> None:
    assert sorted(ablations.results_of([4, 9, 16], math.sqrt, 2)) == [2, 3, 4]
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(ablations.results_of([-1, 4], math.sqrt, 2))


def document(**rows: list[dict]) -> dict:
    bits = torch.tensor([True, False, True, True])

    def cells(entities: str, modes: tuple[str, ...]) -> list[dict]:
        right = dict.fromkeys(modes, bits)
        return [
            Cell(f"{entities}, {kind}, K = {size}", 8, right).to_json()
            for size in ev.FORM_SIZES
            for kind in w.KINDS
        ]

    runs = [
        {
            "variant": name,
            "changes": load_variants(ablations.VARIANTS, RECIPE)[name],
            "parameters": 12345,
            "train_loss": 0.25,
            "open_streams": 4,
            "streams": 6,
            "cells": cells("held-out", ("c2c", "mismatched", "zero")) + cells("train", ("c2c",)),
        }
        | row
        for name, seeds in rows.items()
        for row in seeds
    ]
    environment = {
        **{"date": "2026-01-02T", "commit": "abcdefgh", "changed_code": False, "cpu": "a CPU"},
        **{"torch": "2", "transformers": "5"},
    }
    return {
        "environment": environment,
        "runs": runs,
        "baselines": cells("held-out", ("receiver", "t2t")),
    }


def test_the_table_has_a_line_per_seed_and_says_what_diverged(tmp_path: Path) -> None:
    rows = {LAST: [{"seed": 1}], SHIPPED: [{"seed": 1}, {"seed": 0, "train_loss": 0.125}]}
    rows[FIRST] = [{"seed": 0}]
    saved = document(**rows)
    del saved["runs"][-1]["cells"]
    saved["runs"][-1]["diverged_in_step"] = 7
    path = tmp_path / "ablations.json"
    path.write_text(json.dumps(saved))
    lines = ablations.table(path).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    names = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("|")]
    assert names[2:] == ["receiver alone", "text (T2T)", FIRST, SHIPPED, LAST]  # the file's order
    shipped = next(line for line in lines if line.startswith(f"| {SHIPPED}"))
    assert shipped.startswith(
        f"| {SHIPPED} | 12 345 | 0<br>1 | 0.125<br>0.250 | 4 of 6<br>4 of 6 | 3 / 3<br>3 / 3 | "
    )
    assert shipped.endswith(" | 18<br>18 | 18<br>18 | 18<br>18 | 18<br>18 |")
    assert f"| {FIRST} | 12 345 |  | diverged (seed 0) |" in "\n".join(lines)
    assert lines[-1].startswith("Measured on 2026-01-02 at abcdefg, a CPU")
    drawn = ablations.drawing(path)
    assert SHIPPED in drawn and FIRST not in drawn and "guessing: 3;" in drawn


def test_runs_of_other_code_are_not_resumed() -> None:
    old = document(**{FIRST: [{"seed": 0}]})
    old |= {"recipe": {}, "world": {}, "training_questions": 1}
    variants = {FIRST: old["runs"][0]["changes"]}
    assert ablations.resumed({**old, "runs": []}, old, variants)["runs"] == old["runs"]
    assert ablations.resumed({**old, "runs": []}, old, {FIRST: {"gate": False}})["runs"] == []
    for key, value in (("commit", "other"), ("changed_code", True), ("torch", "3")):
        other = {**old, "environment": {**old["environment"], key: value}}
        with pytest.raises(ValueError, match=f"was written with {key} {value}"):
            ablations.resumed(old, other, variants)
    changed = {**old, "environment": {**old["environment"], "changed_code": True}}
    with pytest.raises(ValueError, match="changed_code True"):
        ablations.resumed(changed, changed, variants)

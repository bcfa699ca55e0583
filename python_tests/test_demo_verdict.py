"""What the demo concludes from its counts: from guesses, from a fuser that fails, from a leak."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from c2c_ext.cli import main
from c2c_ext.demo import command
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w

COUNT = w.NUM_HELD_OUT * w.NUM_ATTRIBUTES


def rows(**changes: int) -> list[dict]:
    """Six rows as they should be, the first one with changes."""
    good = {"questions": COUNT, "C2C": 950, "swapped": 950}
    good |= dict.fromkeys(ev.AT_CHANCE, COUNT // w.NUM_VALUES)
    found = [{"kind": kind, "size": s, **good} for s in (3, 6, 12) for kind in w.KINDS]
    found[0] |= changes
    return found


def convolve(a: list, b: list) -> list:
    result = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += x * y
    return result


def matches(each: int) -> list[float]:
    """How probable 0, 1, ... right answers are when both answers and facts are a random order of
    every value `each` times: from the ways to place rooks where a value meets itself."""
    total = each * w.NUM_VALUES
    one = [math.comb(each, i) ** 2 * math.factorial(i) for i in range(each + 1)]
    rooks = [1]
    for _ in range(w.NUM_VALUES):
        rooks = convolve(rooks, one)
    ways = [
        sum(
            (-1) ** (j - k) * math.comb(j, k) * rooks[j] * math.factorial(total - j)
            for j in range(k, total + 1)
        )
        for k in range(total + 1)
    ]
    return [float(Fraction(way, math.factorial(total))) for way in ways]


def test_guesses_of_a_balanced_world_are_jointly_inside() -> None:
    """The facts are balanced, so their number right is not quite binomial: widest where the answers
    are balanced too. There too all cells must be inside with 95%, whatever they share."""
    low, high = ev.judge(rows()).interval
    column, right = matches(w.NUM_HELD_OUT // w.NUM_VALUES), [1.0]
    for _ in range(w.NUM_ATTRIBUTES):
        right = convolve(right, column)
    mean = math.fsum(k * p for k, p in enumerate(right))
    variance = math.fsum((k - mean) ** 2 * p for k, p in enumerate(right))
    assert mean == pytest.approx(COUNT / w.NUM_VALUES)
    assert variance > COUNT * 7 / 64  # the binomial one
    outside = math.fsum(right[:low]) + math.fsum(right[high + 1 :])
    cells = 6 * len(ev.AT_CHANCE)
    assert 0.02 < cells * outside <= 0.05


def test_the_interval_is_that_of_one_cell_where_there_is_one_cell(monkeypatch) -> None:
    monkeypatch.setattr(ev, "AT_CHANCE", ("zero",))
    assert ev.judge(rows()[:1]).interval == ev.chance_interval(COUNT) == (100, 140)


@pytest.mark.parametrize("mode", ev.AT_CHANCE)
def test_each_control_is_judged_in_every_cell(mode: str) -> None:
    low, high = ev.judge(rows()).interval
    for inside in (low, high):
        assert ev.judge(rows(**{mode: inside})).good
    for outside in (low - 1, high + 1):
        verdict = ev.judge(rows(**{mode: outside}))
        assert not verdict.good
        assert f"outside are {mode} (K = 3, is): {outside}." in verdict.lines[-1]


@pytest.mark.parametrize("mode", ["C2C", "swapped"])
def test_one_cell_below_the_required_part_is_not_good(mode: str) -> None:
    needed = math.ceil(ev.EXPECTED * COUNT)
    assert ev.judge(rows(**{mode: needed})).good
    assert not ev.judge(rows(**{mode: needed - 1})).good


def test_guessing_is_said_in_plain_words() -> None:
    (*_, line) = ev.judge(rows()).lines
    assert line == (
        "Controls that only guess are right 120 times of 960 on average; in 95% of cases all their "
        "18 cells are inside 90 to 152: they are."
    )


def test_mismatched_caches_have_each_value_equally_often() -> None:
    """What makes one in eight the exact chance of the mismatched control."""
    facts = w.make_world(0).facts[: w.NUM_TRAIN]
    for column in facts.T:
        assert column.bincount(minlength=w.NUM_VALUES).tolist() == [20] * w.NUM_VALUES


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    """Runs `c2c demo`, shortened, on the shipped pair with a changed fuser; the exit status."""
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    monkeypatch.setattr(command, "TIMING_ROUNDS", 2)

    def run(change=lambda parameter: None) -> int:
        pair = ev.load_pair(command.ASSETS, command.SEED)
        with torch.no_grad():
            for parameter in pair.fuser.parameters():
                change(parameter)
        pair.fuser.repack()
        monkeypatch.setattr(command, "_load", lambda: pair)
        return main(["demo"])

    return run


def test_a_fuser_of_zeros_fails_the_demo(demo, capsys: pytest.CaptureFixture) -> None:
    assert demo(torch.Tensor.zero_) == 1
    assert "C2C answers at least 1" in capsys.readouterr().out  # 1x.x%


def test_a_fuser_of_random_weights_fails_the_demo(demo) -> None:
    generator = torch.Generator().manual_seed(0)
    assert demo(lambda p: p.normal_(0, 0.1, generator=generator)) == 1


def test_a_leak_into_a_control_fails_the_demo(demo, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        ev, "answer_mismatched", lambda pair, asked, seed: ev.answer_c2c(pair, asked)
    )
    assert demo() == 1
    assert "outside are mismatched (K = 3, is): 9" in capsys.readouterr().out


def test_answers_that_ignore_the_cache_fail_the_demo(demo, monkeypatch) -> None:
    """So a fuser would that knew the held-out facts by the entity's name."""
    swapped = ev.answer_swapped
    monkeypatch.setattr(
        ev,
        "answer_swapped",
        lambda pair, asked: (ev.answer_c2c(pair, asked), swapped(pair, asked)[1]),
    )
    assert demo() == 1


def test_the_table_of_a_pair_that_fails_is_printed_with_status_1(
    monkeypatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(ev, "FORM_SIZES", (3,))
    monkeypatch.setattr(
        ev, "answer_mismatched", lambda pair, asked, seed: ev.answer_c2c(pair, asked)
    )
    assert ev.main([str(command.ASSETS), "--json", str(tmp_path / "held_out.json")]) == 1
    assert "outside are mismatched" in capsys.readouterr().out
    assert '"held_out"' in (tmp_path / "held_out.json").read_text()

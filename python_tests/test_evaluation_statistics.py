"""Intervals, McNemar's test and the verdict, against values worked out by hand or published."""

import pytest

from c2c_ext.evaluation.statistics import compare, holm, mcnemar, verdict, wilson_interval


def answers(right: int, count: int = 40) -> list[bool]:
    return [k < right for k in range(count)]


def test_wilson_interval_equals_hand_computed_values() -> None:
    # z = 1.959964, z^2 = 3.841459. 8 of 10: (.8 + .192073) / 1.384146 -+ 1.959964 *
    # sqrt(.016 + .00960365) / 1.384146 = .716740 -+ .226577.
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=2e-6)
    # 0 of n: z^2 / (n + z^2) above.
    assert wilson_interval(0, 20) == pytest.approx((0.0, 3.841459 / 23.841459), abs=1e-6)
    low, high = wilson_interval(20, 20)
    assert high == 1.0 and low == pytest.approx(20 / 23.841459, abs=1e-6)


def test_wilson_interval_narrows_with_questions_and_widens_with_the_level() -> None:
    def width(right, count, level=0.95):
        low, high = wilson_interval(right, count, level)
        assert low < right / count < high
        return high - low

    assert width(50, 100) < width(5, 10) < width(5, 10, 0.99)


@pytest.mark.parametrize("right, count, level", [(-1, 3, 0.9), (4, 3, 0.9), (0, 0, 0.9), (1, 3, 1)])
def test_wilson_interval_refuses_what_is_no_proportion(right, count, level) -> None:
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(right, count, level)


@pytest.mark.parametrize(
    "first, second, p",
    [
        (0, 0, 1.0),
        (3, 3, 1.0),  # 2 * (1 + 6 + 15 + 20) / 64 is above 1
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (0, 6, 2 / 64),
        (9, 1, 2 * (1 + 10) / 1024),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_equals_hand_computed_values(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-14)


def test_mcnemar_is_finite_for_thousands_of_questions() -> None:
    assert mcnemar(4000, 4000) == 1.0
    assert 0 <= mcnemar(5000, 3000) < 1e-80


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar(-1, 2)


def test_compare_counts_what_only_one_mode_solves() -> None:
    right = {"c2c": [True, True, True, False, False], "zero": [True, False, False, True, False]}
    found = compare("c2c", "zero", right)
    assert (found.first_only, found.second_only, found.p) == (2, 1, 1.0)
    with pytest.raises(ValueError, match="c2c has 5 and short 1"):
        compare("c2c", "short", {**right, "short": [True]})


def test_verdict_is_transfer_where_c2c_beats_everything() -> None:
    right = {"c2c": answers(30), **dict.fromkeys(("receiver", "mismatched", "zero"), answers(10))}
    found = verdict(right)
    assert found.transferred
    assert found.line.startswith("content transferred: C2C beats receiver, mismatched, zero")
    assert "not measured: noise, identical" in found.line


@pytest.mark.parametrize("control", ["receiver", "mismatched", "zero", "noise", "identical"])
def test_verdict_is_no_evidence_where_one_control_keeps_up(control: str) -> None:
    right = dict.fromkeys(("receiver", "mismatched", "zero", "noise", "identical"), answers(10))
    assert verdict({**right, "c2c": answers(30)}).transferred
    right[control] = answers(28)  # 2 : 0 of the questions on which they differ, p = 1/2
    found = verdict({**right, "c2c": answers(30)})
    assert not found.transferred
    assert found.line == (
        f"no evidence that content was transferred: against {control} 2 : 0 (p = 0.5)"
    )


def test_verdict_is_no_evidence_where_c2c_is_much_worse() -> None:
    right = dict.fromkeys(("receiver", "mismatched"), answers(30))
    assert not verdict({**right, "c2c": answers(5)}).transferred


def test_verdict_at_the_level_follows_the_p_value() -> None:
    right = {"c2c": answers(6), "receiver": answers(0), "mismatched": answers(0)}  # p = 1/32
    assert verdict(right, level=0.95).transferred
    assert not verdict(right, level=0.99).transferred


def test_verdict_needs_receiver_and_mismatched_cache() -> None:
    with pytest.raises(ValueError, match="needs the answers of mismatched"):
        verdict({"c2c": answers(3), "receiver": answers(1)})


def test_a_verdicts_p_is_its_worst_tests() -> None:
    right = {"c2c": answers(6), "receiver": answers(0), "mismatched": answers(1)}
    assert verdict(right).p == 2 / 32  # 5 : 0 against the mismatched
    assert verdict({**right, "receiver": answers(7)}).p == 1.0  # worse, whatever the test says


@pytest.mark.parametrize(
    "p, rejected",
    [
        ({}, []),
        ({"a": 0.04}, ["a"]),
        ({"a": 0.04, "b": 0.03}, []),  # 0.03 is not below 0.05 / 2
        ({"a": 0.04, "b": 0.02}, ["b", "a"]),  # 0.02 is, and 0.04 is below 0.05
        ({"a": 0.9, "b": 0.001, "c": 0.026}, ["b"]),  # 0.026 is not below 0.05 / 2
    ],
)
def test_holm_rejects_from_the_smallest_on(p, rejected) -> None:
    assert holm(p) == rejected

"""What a cosine predicts: AUC, Spearman and their intervals, and the conditions they are of."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_models import VOCABULARY, close_all_gates, trio
from torch import Tensor

from c2c_ext import fuse
from c2c_ext.analysis import association, controls, readings, retention
from c2c_ext.analysis import questions as qs
from c2c_ext.analysis.attention_outputs import attention_cosines, attention_outputs
from c2c_ext.chat.models import load_models
from c2c_ext.demo import world as w


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs_won(scores: Tensor, outcomes: Tensor) -> float:
    won = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[outcomes].tolist()
        for b in scores[~outcomes].tolist()
    ]
    return sum(won) / len(won)


@pytest.mark.parametrize("digits", [0, 1, 9])  # many ties, few, none
def test_auc_is_the_part_of_pairs_that_a_yes_wins(digits: int) -> None:
    scores = drawn(60).round(decimals=digits)
    outcomes = drawn(60, seed=1) + scores > 0.3
    found = association.auc(scores, outcomes)
    assert found.value == pytest.approx(pairs_won(scores, outcomes), abs=1e-12)
    assert 0.6 < found.value < 0.95 and 0 < found.low < found.value < found.high < 1
    flipped = association.auc(-scores, outcomes)
    assert flipped.value == pytest.approx(1 - found.value)
    assert (flipped.low, flipped.high) == pytest.approx((1 - found.high, 1 - found.low))


@pytest.mark.parametrize(("value", "yes", "no"), [(0.7, 20, 50), (0.95, 8, 8), (0.5, 300, 2)])
def test_an_interval_ends_where_its_own_standard_error_reaches(
    value: float, yes: int, no: int
) -> None:
    half = (yes + no) / 2
    for theta in association.newcombe_interval(value, yes, no):
        factor = 1 + (half - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        error = math.sqrt(theta * (1 - theta) * factor / (yes * no))
        assert abs(value - theta) == pytest.approx(1.959963985 * error, rel=1e-6)


def test_an_interval_has_width_at_the_ends() -> None:
    low, high = association.newcombe_interval(1.0, 10, 10)
    assert 0.6 < low < 0.95 and high == 1.0
    assert association.newcombe_interval(0.0, 10, 10) == pytest.approx((0.0, 1 - low))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    shift = 1.0
    truth = 0.5 * (1 + math.erf(shift / 2))  # P(x + 1 > y) of two standard normals
    outcomes = torch.arange(60) < 25
    covered = 0
    for seed in range(400):
        found = association.auc(drawn(60, seed=seed) + shift * outcomes, outcomes)
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 400 <= 0.985


@pytest.mark.parametrize("outcome", [True, False])
def test_auc_of_questions_that_are_all_alike_is_none(outcome: bool) -> None:
    assert association.auc(drawn(5), torch.full((5,), outcome)) is None
    assert association.auc(drawn(0), torch.zeros(0, dtype=torch.bool)) is None


def test_auc_refuses_what_is_no_score() -> None:
    with pytest.raises(ValueError, match=r"both be \[Q\], got \[2\] and \[3\]"):
        association.auc(drawn(2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be finite"):
        association.auc(torch.tensor([math.nan, 1.0]), torch.tensor([True, False]))


def test_ranks_of_equal_values_are_their_mean() -> None:
    assert association.mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_spearman_across_conditions_is_that_of_means_and_rates() -> None:
    # Means 1, 2, 3, 4 and rates 0, 3/4, 1/2, 1: ranks differ by 0, 1, 1, 0.
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 4)
    outcomes = torch.arange(4)[None] < torch.tensor([0, 3, 2, 4])[:, None]
    found = association.order_across(scores, outcomes)
    assert found == association.Estimate(pytest.approx(1 - 6 * 2 / (4 * 15)), None, None)
    many = association.order_across(scores.repeat(1, 9), outcomes.repeat(1, 9))
    assert many.value == found.value and many.low <= many.value <= many.high <= 1
    reverse = association.order_across(-scores.repeat(1, 9), outcomes.repeat(1, 9))
    assert reverse.value == pytest.approx(-many.value)
    assert (reverse.low, reverse.high) == pytest.approx((-many.high, -many.low))


def test_spearman_with_ties_is_pearsons_of_the_mean_ranks() -> None:
    scores = torch.tensor([1.0, 1.0, 2.0, 5.0])[:, None].expand(4, 3)
    outcomes = torch.arange(3)[None] < torch.tensor([1, 2, 2, 3])[:, None]
    # Ranks 1.5, 1.5, 3, 4 and 1, 2.5, 2.5, 4: deviations' products 1.5 + 0 + 0 + 2.25.
    expected = 3.75 / math.sqrt((1 + 1 + 0.25 + 2.25) * (2.25 + 0 + 0 + 2.25))
    assert association.order_across(scores, outcomes).value == pytest.approx(expected)


def test_an_interval_narrows_with_more_questions() -> None:
    widths = []
    for questions in (20, 2000):
        noise = drawn(6, questions)
        scores = noise + torch.arange(6)[:, None] / 4
        found = association.order_across(scores, drawn(6, questions, seed=1) + scores > 1)
        widths.append(found.high - found.low)
        assert found == association.order_across(
            scores, drawn(6, questions, seed=1) + scores > 1
        )  # always the same draws
    assert widths[1] < widths[0] / 2


def test_spearman_without_an_order_is_none() -> None:
    yes = torch.ones(4, 5, dtype=torch.bool)
    assert association.order_across(drawn(4, 5), yes) is None
    assert association.order_across(torch.ones(4, 5), drawn(4, 5) > 0) is None
    assert association.order_across(drawn(2, 5), drawn(2, 5) > 0) is None
    assert association.order_across(drawn(4, 0), torch.zeros(4, 0, dtype=torch.bool)) is None
    assert association.order_within(drawn(4, 5), yes) is None


def test_order_within_compares_conditions_of_the_same_question() -> None:
    scores = drawn(5, 7).round(decimals=1)
    outcomes = drawn(5, 7, seed=2) + 0.5 * scores > 0
    won = [
        (scores[a, q] > scores[b, q]) + 0.5 * (scores[a, q] == scores[b, q])
        for q in range(7)
        for a, b in itertools.permutations(range(5), 2)
        if outcomes[a, q] and not outcomes[b, q]
    ]
    found = association.order_within(scores, outcomes)
    assert found.value == pytest.approx(float(sum(won)) / len(won))
    assert (found.low, found.high) == (None, None)  # too few questions
    many = association.order_within(scores.repeat(1, 5), outcomes.repeat(1, 5))
    assert many.value == pytest.approx(found.value) and many.low < many.value < many.high
    # What questions differ in counts for nothing.
    assert association.order_within(scores + 100 * torch.arange(7), outcomes) == found


@pytest.fixture(scope="module")
def case() -> tuple:
    receiver, sharer, fuser = trio()
    generator = torch.Generator().manual_seed(3)
    made = []
    for tokens in (6, 7, 7, 9):
        ids = torch.randint(VOCABULARY, (1, tokens + 1), generator=generator)
        places = torch.arange(tokens)
        places[0] = -1
        made.append(readings.read(receiver, sharer, ids, ids[:, :-1], places, answers=ids[:, 1]))
    # The first is answered right alone, the second on the whole fusion.
    for place, cache in ((0, made[0].receiver), (1, readings.fused(made[1], fuser))):
        said = readings.next_logits(receiver, cache, made[place]).argmax(dim=1)
        made[place] = readings.Reading(**{**vars(made[place]), "answers": said})
    return receiver, fuser, made


def test_what_is_observed_is_what_the_caches_say(case: tuple) -> None:
    receiver, fuser, made = case
    others = controls.mismatched(made)
    seen = retention.observe(receiver, fuser, made, others)
    assert seen.conditions[0] == "whole" and seen.conditions[-3:] == retention.CONTROLS
    assert seen.conditions[1:5] == tuple(
        f"{which} {n} of 3 layers" for which in ("first", "last") for n in (1, 2)
    )
    assert seen.parts == len(seen.conditions) - 3 == 1 + 4 + 10
    assert seen.right_alone[0] and seen.right[0, 1]
    for q, reading in enumerate(made):
        whole = fuse(reading.receiver, reading.sharer, fuser, token_map=reading.token_map)
        half = reading.token_map.clone()
        half[1 + round(len(half[1:]) / 2) :] = -1
        empty = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in reading.sharer]
        expected = {
            "whole": whole,
            "last 1 of 3 layers": [*reading.receiver[:2], whole[2]],
            "first 3 of 6 parts of the positions": fuse(
                reading.receiver, reading.sharer, fuser, token_map=half
            ),
            "mismatched": fuse(
                reading.receiver, others[q].sharer, fuser, token_map=others[q].token_map
            ),
            "zero": fuse(reading.receiver, empty, fuser, token_map=reading.token_map),
        }
        plain, alone = attention_outputs(receiver, reading.receiver, reading.last)
        for name, cache in expected.items():
            c = seen.conditions.index(name)
            outputs, logits = attention_outputs(receiver, cache, reading.last)
            cosines = attention_cosines(outputs, plain)[:, 0]
            torch.testing.assert_close(seen.cosines[c, :, q], cosines, rtol=0, atol=1e-5)
            assert bool(seen.kept[c, q]) is bool(logits.argmax() == alone.argmax())
            assert bool(seen.right[c, q]) is bool(logits.argmax() == reading.answers[0])


def test_rows_are_of_the_observed(case: tuple) -> None:
    receiver, fuser, made = case
    seen = retention.observe(receiver, fuser, made, controls.mismatched(made))
    rows = retention.condition_rows(seen)
    assert [row["condition"] for row in rows] == list(seen.conditions)
    for c, row in enumerate(rows):
        assert row["kept"] == int(seen.kept[c].sum()) and row["right"] == int(seen.right[c].sum())
        assert row["cosine"] == pytest.approx(float(seen.cosines[c].mean()))
        assert row["still_right"] <= row["right_alone"] == int(seen.right_alone.sum())
        found = association.auc(seen.cosines[c].mean(dim=0), seen.kept[c])
        assert row["kept_auc"] == (None if found is None else found.value)
    by_layer = retention.layer_auc_rows(seen)
    assert len(by_layer) == 3 * len(seen.conditions)
    found = association.auc(seen.cosines[3, 1], seen.kept[3])
    assert by_layer[3 * 3 + 1]["kept_auc"] == (None if found is None else found.value)
    across = retention.across_rows(seen)
    assert len(across) == 2 * 4 * 3
    row = next(r for r in across if (r["conditions"], r["layer"]) == ("parts", 2))
    found = association.order_across(seen.cosines[: seen.parts, 2], seen.kept[: seen.parts])
    assert (row["outcome"], row["spearman"]) == ("kept", found.value)
    still = next(r for r in across if r["outcome"] == "still_right")
    assert still["questions"] == int(seen.right_alone.sum())


def test_filled_forms_are_what_the_receiver_can_read_alone() -> None:
    models = load_models()
    asked = qs.shipped_questions(models, 30, filled=True)
    seen = retention.observe(models.receiver, models.fuser, asked.readings, asked.mismatched)
    assert int(seen.right_alone.sum()) >= 59 and seen.right[0].sum() > 45
    world = w.make_world(0)
    for reading in asked.readings:
        for name, answer in zip(reading.names, reading.answers.tolist(), strict=True):
            words = name.split()
            told = words[words.index(words[-1]) + 1]
            if words[-2] == "rivals":
                values = w.VALUES_OF[words[-1]]
                rival = world.rival_of[w.attribute(words[-1]), values.index(told)]
                told = values[int(rival)]
            assert w.VOCABULARY[answer] == told
        # Attributes alone are fused, each with itself in the sharer's blank form.
        fused = (reading.token_map >= 0).nonzero()[:, 0]
        assert fused.tolist() == list(range(3, 15, 2))
        for row, ids in zip(reading.names, reading.sharer_ids, strict=True):
            theirs = w.decode(ids[reading.token_map[fused]]).split()
            assert theirs == row.split()[2:14:2]


def test_closed_gates_keep_every_answer_and_leave_nothing_to_predict(case: tuple) -> None:
    receiver, _, made = case
    fuser = trio()[2]
    close_all_gates(fuser)
    seen = retention.observe(receiver, fuser, made)
    assert "mismatched" not in seen.conditions
    assert bool(seen.kept.all()) and float(seen.cosines.min()) > 1 - 1e-12
    rows = retention.condition_rows(seen) + retention.across_rows(seen)
    names = {"kept_auc", "kept_low", "spearman", "within", "within_high"}
    kept = [row for row in rows if row.get("outcome", "kept") == "kept"]
    assert all(row[name] is None for row in kept for name in names & row.keys())


def test_one_question_is_observed_and_says_nothing(case: tuple) -> None:
    receiver, fuser, made = case
    rows = retention.condition_rows(retention.observe(receiver, fuser, made[:1]))
    assert all(row["kept_auc"] is None and row["questions"] == 1 for row in rows)
    with pytest.raises(ValueError, match="at least one reading"):
        retention.observe(receiver, fuser, [])


def test_a_mismatched_cache_is_met_in_proportion(case: tuple) -> None:
    _, _, made = case
    others = controls.mismatched(made)
    for own, other in zip(made, others, strict=True):
        assert not torch.equal(own.sharer_ids, other.sharer_ids)
        held = other.sharer[0][0].shape[2]
        assert int(other.token_map[-1]) == held - 1 and int(other.token_map[0]) == -1
        assert bool((other.token_map[1:] >= 0).all()) and other.last is own.last
    assert controls.mismatched(made[:1]) == []
    assert controls.mismatched([made[0], made[0]]) == []
    unread = readings.Reading(*(made[0].receiver, made[0].sharer, made[0].token_map, made[0].last))
    for refused in (controls.noisy, lambda reading: controls.mismatched([reading])):
        with pytest.raises(ValueError, match="what the sharer has read is not known"):
            refused(unread)


def test_noise_is_as_long_as_the_sharers_vectors_and_always_the_same(case: tuple) -> None:
    _, _, made = case
    one, again, other = (controls.noisy(made[0], seed) for seed in (0, 0, 1))
    for own, a, b, c in zip(made[0].sharer, one.sharer, again.sharer, other.sharer, strict=True):
        for place in range(2):
            torch.testing.assert_close(a[place].norm(dim=-1), own[place].norm(dim=-1))
            assert torch.equal(a[place], b[place]) and not torch.equal(a[place], c[place])
            cosine = (a[place] * own[place]).sum() / own[place].norm() / a[place].norm()
            assert abs(float(cosine)) < 0.5
    silent = controls.noisy(controls.zeroed(made[0]))
    assert all(bool((t == 0).all()) for pair in silent.sharer for t in pair)

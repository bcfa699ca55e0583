"""The analyses: ranks of known matrices, curves with known ends, cosines, weights, patterns."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import VOCABULARY, close_all_gates, trio
from torch import Tensor

from c2c_ext import fuse
from c2c_ext.analysis import curves, readings, solved
from c2c_ext.analysis.attention_outputs import (
    attention_cosines,
    attention_outputs,
    cosine_rows,
)
from c2c_ext.analysis.effective_rank import cache_ranks, effective_rank, rank_rows
from c2c_ext.analysis.weight_maps import weight_rows
from c2c_ext.weights import fusion_weights

MAP = [-1, 0, 1, 2, -1, 4]


def with_singular_values(values: list[float], rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
        for n in (rows, columns)
    )
    k = len(values)
    return u[:, :k] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v[:k]


@pytest.fixture(scope="module")
def pair() -> tuple:
    """(receiver, fuser, readings of two lengths with answers)."""
    receiver, sharer, fuser = trio()
    generator = torch.Generator().manual_seed(3)
    made = []
    for batch, places in ((3, MAP), (2, MAP[1:])):
        shape = (batch, len(places) + 1)
        ids = torch.randint(VOCABULARY, shape, generator=generator)
        answers = torch.randint(VOCABULARY, (batch,), generator=generator)
        theirs = ids[:, :-1]
        made.append(
            readings.read(receiver, sharer, ids, theirs, torch.tensor(places), answers=answers)
        )
    return receiver, fuser, made


@pytest.fixture
def closed() -> tuple:
    receiver, sharer, fuser = trio()
    close_all_gates(fuser)
    ids = torch.arange(2, 16).view(2, 7)
    return receiver, fuser, [readings.read(receiver, sharer, ids, ids[:, :-1], torch.tensor(MAP))]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 1.0),
        ([2.0, 2.0, 2.0], 3.0),
        ([0.0, 0.0], 0.0),
        ([3.0, 1.0], math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))),
        ([1e6, 1e6, 0.0], 2.0),
    ],
)
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_effective_rank_of_known_singular_values(
    values: list[float], expected: float, shape: tuple[int, int]
) -> None:
    assert effective_rank(with_singular_values(values, *shape)) == pytest.approx(expected, 1e-9)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 2, 2), ValueError, r"must be \[R, C\].* got \[2, 2, 2\]"),
        (torch.ones(0, 2), ValueError, r"got \[0, 2\]"),
        (torch.tensor([[math.nan]]), ValueError, "must be finite"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "got torch.int64"),
        ([[1.0]], TypeError, "got list"),
    ],
)
def test_effective_rank_refuses(matrix: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        effective_rank(matrix)


def test_cache_ranks_put_tokens_in_rows_and_heads_side_by_side() -> None:
    # 6 tokens, of which two are repeated: 4 orthogonal directions of equal length over two heads.
    rows = torch.eye(4).repeat(2, 1)[:6]
    rows[4:] = 0
    key = rows.view(2, 3, 2, 2).transpose(1, 2)
    (layer,) = cache_ranks([[(key, key[..., :1])]])
    assert layer["key"] == pytest.approx(4.0)
    assert layer["value"] == pytest.approx(2.0)  # first channel of each head: rows 0 and 2
    (first,) = cache_ranks([[(key, key)]], [torch.tensor([0])])  # tokens 0 and 3
    assert (first["key"], first["rows"], first["width"]) == (pytest.approx(2.0), 2, 4)
    (twice,) = cache_ranks([[(key, key)], [(2 * key, key)]])
    assert (twice["key"], twice["rows"]) == (pytest.approx(4.0), 12)


def test_cache_ranks_refuse_what_does_not_fit_together() -> None:
    key = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="must not be empty"):
        cache_ranks([])
    with pytest.raises(ValueError, match="same number of layers"):
        cache_ranks([[(key, key)], [(key, key)] * 2])
    with pytest.raises(ValueError, match="one entry for each of 1 caches, got 2"):
        cache_ranks([[(key, key)]], [None, None])


def test_rank_rows_are_of_the_fused_tokens_alone(pair: tuple) -> None:
    _, fuser, made = pair
    rows = rank_rows(made, fuser)
    assert [(r["cache"], r["layer"]) for r in rows] == [
        *(("sharer", i) for i in range(5)),
        *(("receiver", i) for i in range(3)),
        *(("fused", i) for i in range(3)),
    ]
    assert {r["rows"] for r in rows} == {3 * 4 + 2 * 4}
    places = (made[0].token_map >= 0).nonzero()[:, 0], (made[1].token_map >= 0).nonzero()[:, 0]
    whole = [fuse(r.receiver, r.sharer, fuser, token_map=r.token_map) for r in made]
    value = torch.cat(
        [
            c[2][1][:, :, p].transpose(1, 2).reshape(-1, 24)
            for c, p in zip(whole, places, strict=True)
        ]
    )
    assert rows[-1]["value"] == pytest.approx(effective_rank(value))
    assert rows[-1]["value"] != pytest.approx(rows[-4]["value"])


def cosines(receiver: object, fuser: object, reading: readings.Reading) -> Tensor:
    caches = readings.fused(reading, fuser), reading.receiver
    outputs = (attention_outputs(receiver, cache, reading.last)[0] for cache in caches)
    return attention_cosines(*outputs)


def test_attention_outputs_are_the_same_with_closed_gates(closed: tuple) -> None:
    receiver, fuser, (reading,) = closed
    for row in cosine_rows(cosines(receiver, fuser, reading)):
        assert row["min"] == pytest.approx(1.0, abs=1e-12)
        assert row["questions"] == 2


def test_attention_outputs_differ_with_open_gates_and_leave_no_hook(pair: tuple) -> None:
    receiver, fuser, made = pair
    rows = cosine_rows(cosines(receiver, fuser, made[0]))
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert all(row["min"] <= row["mean"] <= row["max"] < 0.9999 for row in rows)
    assert not any(m._forward_hooks for m in receiver.modules())
    outputs, logits = attention_outputs(receiver, made[0].receiver, made[0].last)
    assert [tuple(o.shape) for o in outputs] == [(3, 32)] * 3
    assert torch.equal(logits.double(), readings.next_logits(receiver, made[0].receiver, made[0]))


def test_cosines_of_zeros_are_defined() -> None:
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    found = attention_cosines([zero, zero, one, one], [zero, one, zero, -one])
    assert found[:, 0].tolist() == pytest.approx([1.0, 0.0, 0.0, -1.0])


def test_attention_outputs_of_a_receiver_without_such_modules_are_refused(pair: tuple) -> None:
    receiver, _, made = pair
    with pytest.raises(ValueError, match="each of its 2 layers"):
        attention_outputs(receiver, made[0].receiver[:2], made[0].last)


def test_layer_curve_ends_at_the_receiver_alone_and_at_c2c(pair: tuple) -> None:
    receiver, fuser, made = pair
    rows = {(r["which"], r["layers"]): r for r in curves.layer_rows(receiver, fuser, made)}
    assert len(rows) == 2 * 4 + 3 + 3
    assert_ends(pair, [rows[which, 0] for which in curves.ENDS], [rows["first", 3]])
    assert_ends(pair, [], [rows["last", 3]])
    for one, other in (
        (("first", 1), ("only", 0)),
        (("last", 1), ("only", 2)),
        (("first", 2), ("without", 2)),
        (("last", 2), ("without", 0)),
    ):
        drop = {"which", "layers"}
        a, b = ({k: v for k, v in rows[key].items() if k not in drop} for key in (one, other))
        assert a == b
    assert rows["first", 1]["kl"] > 1e-6


def test_position_curve_ends_at_the_receiver_alone_and_at_c2c(pair: tuple) -> None:
    receiver, fuser, made = pair
    parts = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = curves.position_rows(receiver, fuser, made, parts)
    rows = {(r["which"], r["part"]): r for r in found}
    assert len(rows) == 2 * len(parts) + 2 * (len(parts) - 1)
    for which in curves.ENDS:
        assert_ends(pair, [rows[which, 0.0]], [rows[which, 1.0]])
        assert [rows[which, part]["positions"] for part in parts] == [0, 1, 2, 3, 4]
    assert rows["first", 0.5]["kl"] != rows["last", 0.5]["kl"]
    for which, part, other in (
        ("only", 0.25, ("first", 0.25)),
        ("only", 1.0, ("last", 0.25)),
        ("without", 1.0, ("first", 0.75)),
        ("without", 0.25, ("last", 0.75)),
    ):
        for name in ("positions", "right", "as_fused", "kl"):
            assert rows[which, part][name] == rows[other][name]
    assert rows["only", 0.5]["positions"] == 1 and rows["without", 0.5]["positions"] == 3
    with pytest.raises(ValueError, match=r"within 0..1, got 1.5"):
        curves.position_rows(receiver, fuser, made, [1.5])


def assert_ends(pair: tuple, alone: list[dict], whole: list[dict]) -> None:
    """What the models themselves say: a plain forward, and generate's logits by plain fusing."""
    receiver, fuser, made = pair
    right = {"alone": 0, "whole": 0}
    for r in made:
        for name, cache in (
            ("alone", r.receiver),
            ("whole", fuse(r.receiver, r.sharer, fuser, token_map=r.token_map)),
        ):
            logits = readings.next_logits(receiver, cache, r)
            right[name] += int((logits.argmax(dim=1) == r.answers).sum())
    for row in alone:
        assert (row["questions"], row["right"]) == (5, right["alone"])
        assert row["kl"] > 1e-6
    for row in whole:
        assert (row["questions"], row["right"], row["as_fused"]) == (5, right["whole"], 5)
        assert row["kl"] == pytest.approx(0.0, abs=1e-12)


def test_logits_on_the_plain_cache_are_the_receivers_own() -> None:
    receiver, sharer, _ = trio()
    ids = torch.arange(3, 17).view(2, 7)
    reading = readings.read(receiver, sharer, ids, ids[:, :-1], torch.tensor(MAP))
    own = receiver(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(
        readings.next_logits(receiver, reading.receiver, reading).float(), own, rtol=0, atol=1e-4
    )


def test_answers_are_chosen_among_the_candidates(pair: tuple) -> None:
    _, _, (reading, _) = pair
    chosen = readings.Reading(
        reading.receiver,
        reading.sharer,
        reading.token_map,
        reading.last,
        answers=torch.tensor([7, 8, 9]),
        candidates=torch.tensor([[5, 7], [8, 4], [1, 9]]),
    )
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert readings.is_right(logits, chosen).tolist() == [True, False, True]
    unknown = readings.Reading(
        reading.receiver, reading.sharer, reading.token_map, reading.last, None, None
    )
    with pytest.raises(ValueError, match="are not known"):
        readings.is_right(logits, unknown)


@pytest.mark.parametrize(
    ("ids", "theirs", "places", "message"),
    [
        ((2, 1), (2, 3), [], "at least 2 tokens"),
        ((2, 3), (1, 3), [0, 1], "must have 2 rows as ids, got 1"),
        ((2, 3), (2, 3), [0], r"token_map must be \[2\], got \[1\]"),
        ((2, 3), (2, 3), [0, 3], r"within -1..2, got 0..3"),
        ((2, 3), (2, 3), [-2, 1], r"within -1..2, got -2..1"),
    ],
)
def test_readings_refuse(ids: tuple, theirs: tuple, places: list, message: str) -> None:
    receiver, sharer, _ = trio()
    rows = [torch.ones(shape, dtype=torch.int64) for shape in (ids, theirs)]
    with pytest.raises(ValueError, match=message):
        readings.read(receiver, sharer, *rows, torch.tensor(places, dtype=torch.int64))


def test_weight_rows_are_the_means_of_the_fused_tokens(pair: tuple) -> None:
    _, fuser, made = pair
    rows = weight_rows(made, fuser)
    assert len(rows) == 3 * 2 * 2
    head = next(r for r in rows if (r["layer"], r["kind"], r["head"]) == (1, "value", 1))
    every = [
        fusion_weights(r.receiver, r.sharer, fuser, r.token_map)[1].value[:, 1].flatten()
        for r in made
    ]
    weights = torch.cat(every)
    weights = weights[~weights.isnan()].double()
    assert head["tokens"] == len(weights) == 20
    assert head["mean"] == pytest.approx(float(weights.mean()))
    assert head["std"] == pytest.approx(float(weights.std(correction=0)))
    assert all(r["open"] for r in rows)


def test_weight_rows_say_which_gates_are_closed_and_refuse_what_is_not_fused(
    closed: tuple,
) -> None:
    _, fuser, (reading,) = closed
    assert not any(r["open"] for r in weight_rows([reading], fuser))
    nowhere = readings.Reading(
        reading.receiver, reading.sharer, torch.full_like(reading.token_map, -1), reading.last
    )
    with pytest.raises(ValueError, match="no token of these prompts is fused"):
        weight_rows([nowhere], fuser)


def test_solved_counts_every_set_of_modes() -> None:
    right = {
        "receiver": torch.tensor([True, False, False, False]),
        "C2C": torch.tensor([True, True, True, False]),
    }
    assert solved.patterns(right) == [
        {"solved_by": ["C2C"], "questions": 2},
        {"solved_by": [], "questions": 1},
        {"solved_by": ["receiver", "C2C"], "questions": 1},
    ]
    counts = {"both": 1, "only_first": 0, "only_second": 2, "neither": 1, "p": 0.5}
    assert solved.pairs(right) == [{"first": "receiver", "second": "C2C", **counts}]
    with pytest.raises(ValueError, match="C2C must have 4 questions as the others, got 1"):
        solved.patterns({**right, "C2C": torch.tensor([True])})
    with pytest.raises(TypeError, match="must be a bool tensor"):
        solved.pairs({"C2C": torch.tensor([1])})
    with pytest.raises(ValueError, match="at least one mode"):
        solved.patterns({})

"""`positions` of generate that are slices or count the own tokens of each row, ragged or not."""

from __future__ import annotations

import numpy as np
import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import CLOSE, VISIBLE, generate, left_padded, prompt
from torch import Tensor

import c2c_ext
from c2c_ext import Positions
from c2c_ext.generation import attached
from c2c_ext.positions import fused_columns

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (11, 6, 2, 1)  # so many tokens to fuse: 10, 5, 1, 0


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


# Which of a row's n own tokens are fused, written out.
CASES = {
    "span": (Positions.span(1, 4), lambda n: list(range(n))[1:4]),
    "span to the end": (Positions.span(3), lambda n: list(range(n))[3:]),
    "span of nothing": (Positions.span(2, 2), lambda n: []),
    "span beyond": (Positions.span(4, 99), lambda n: list(range(n))[4:99]),
    "first": (Positions.first(3), lambda n: list(range(n))[:3]),
    "first none": (Positions.first(0), lambda n: []),
    "last": (Positions.last(3), lambda n: list(range(n))[max(n - 3, 0) :]),
    "last none": (Positions.last(0), lambda n: []),
    "a third from the front": (
        Positions.first_fraction(0.3),
        {10: [0, 1, 2], 5: [0, 1], 1: [], 0: []}.get,
    ),
    "half from the end": (
        Positions.last_fraction(0.5),
        {10: [5, 6, 7, 8, 9], 5: [2, 3, 4], 1: [0], 0: []}.get,
    ),
    "all from the front": (Positions.first_fraction(1), lambda n: list(range(n))),
    "none from the end": (Positions.last_fraction(0.0), lambda n: []),
}


def columns_of(rule, lengths: tuple[int, ...]) -> Tensor:
    """bool [rows, P - 1] of left-padded rows."""
    longest = max(lengths)
    columns = torch.zeros(len(lengths), longest - 1, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for token in rule(length - 1):
            columns[row, longest - length + token] = True
    return columns


@pytest.mark.parametrize("case", list(CASES))
def test_positions_count_each_rows_own_tokens(case):
    positions, rule = CASES[case]
    _, mask = left_padded(LENGTHS)
    for kind in (torch.long, torch.bool, torch.float32):
        assert torch.equal(positions.columns(11, mask.to(kind)), columns_of(rule, LENGTHS))
    assert torch.equal(positions.columns(11), columns_of(rule, (11,)))
    assert positions.columns(1).shape == (1, 0)


def test_a_fraction_and_the_rest_make_the_whole():
    _, mask = left_padded((11, 8, 5, 4))  # 10, 7, 4 and 3 tokens: no halves below
    for fraction in (0.2, 0.4, 0.6):
        front = Positions.first_fraction(fraction).columns(11, mask)
        rest = Positions.last_fraction(1 - fraction).columns(11, mask)
        assert not (front & rest).any()
        assert torch.equal(front | rest, mask[:, :-1].bool())


@pytest.mark.parametrize("case", ["span", "last", "half from the end"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_generate_fuses_what_positions_name(trio, case, padded):
    receiver, sharer, fuser = trio
    positions, rule = CASES[case]
    ids, mask = left_padded((11, 6, 2)) if padded else (prompt(2), None)
    columns = columns_of(rule, (11, 6, 2) if padded else (11,))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask, columns)
    whole = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected, all_fused = (plain_loop.decode(receiver, k, ids, 1, mask=mask) for k in (kv, whole))
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, positions=positions, max_new_tokens=1)
    torch.testing.assert_close(output.logits[0], expected.logits[:, 0], **CLOSE)
    assert (all_fused.logits[:, 0] - output.logits[0]).abs().max() > VISIBLE


def test_positions_of_a_ragged_batch_equal_each_row_alone(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 6, 2))
    positions = Positions.last_fraction(0.5)
    with attached(receiver, sharer, fuser):
        together = generate(receiver, ids, attention_mask=mask, positions=positions)
        for row, length in enumerate((11, 6, 2)):
            alone = generate(receiver, ids[row : row + 1, -length:], positions=positions)
            torch.testing.assert_close(
                torch.stack(together.logits, 1)[row], torch.stack(alone.logits, 1)[0], **CLOSE
            )


def test_positions_see_the_mask_that_generate_infers_from_padding_tokens(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 6))
    assert torch.equal(ids == receiver.generation_config.pad_token_id, mask == 0)
    with attached(receiver, sharer, fuser):
        given, inferred = (
            generate(receiver, ids, positions=Positions.first(2), max_new_tokens=1, **how)
            for how in ({"attention_mask": mask}, {})
        )
    assert torch.equal(given.logits[0], inferred.logits[0])


def test_positions_with_beams_mean_the_prompts_rows(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 6))
    with attached(receiver, sharer, fuser):
        settings = {"attention_mask": mask, "positions": Positions.last(2), "max_new_tokens": 1}
        once = generate(receiver, ids, **settings)
        beams = generate(receiver, ids, num_beams=2, **settings)
    torch.testing.assert_close(beams.logits[0], once.logits[0].repeat_interleave(2, 0), **CLOSE)


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(None, 3), [0, 1, 2]),
        (slice(7, None), [7, 8, 9]),
        (slice(None), list(range(10))),
        (slice(1, 10, 4), [1, 5, 9]),
        (slice(np.int64(2), torch.tensor(5)), [2, 3, 4]),
        (slice(4, 4), []),
    ],
    ids=str,
)
def test_a_slice_means_its_columns(given, same):
    columns = torch.tensor([[column in same for column in range(10)]])
    assert torch.equal(fused_columns(given, 2, 11), columns)


def test_generate_takes_a_slice(trio):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        by_slice, by_list = (
            generate(receiver, prompt(), positions=positions, max_new_tokens=1).logits[0]
            for positions in (slice(2, 5), [2, 3, 4])
        )
    assert torch.equal(by_slice, by_list)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (slice(0, 11), ValueError, r"slice must satisfy 0 <= start <= stop <= 10 .* stop 11"),
        (slice(-3, None), ValueError, r"slice must satisfy .* start -3.*Positions.last counts"),
        (slice(0, -1), ValueError, r"slice must satisfy .* stop -1"),
        (slice(5, 2), ValueError, r"slice must satisfy .* start 5, stop 2"),
        (slice(0, 5, 0), ValueError, r"slice must have a step of at least 1, got 0"),
        (slice(5, 0, -1), ValueError, r"slice must have a step of at least 1, got -1"),
        (slice(0.5, 3), TypeError, r"slice must have an integer or None as its start, got float"),
        (slice("a"), TypeError, r"slice must have an integer or None as its stop, got str"),
        (Positions, TypeError, r"positions must be a range, .*Positions, got type"),
    ],
    ids=str,
)
def test_wrong_slices_are_refused(trio, positions, error, message):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser), pytest.raises(error, match=message):
        generate(receiver, prompt(), positions=positions)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Positions.span(-1), ValueError, r"span: start must be at least 0, got -1"),
        (lambda: Positions.span(3, 2), ValueError, r"span: end must be at least start = 3, got 2"),
        (lambda: Positions.span(0, -2), ValueError, r"span: end must be at least 0, got -2"),
        (lambda: Positions.span(0.5), TypeError, r"span: start must be an integer, got float"),
        (lambda: Positions.span(0, "3"), TypeError, r"span: end must be an integer, got str"),
        (lambda: Positions.first(-1), ValueError, r"first: count must be at least 0, got -1"),
        (lambda: Positions.first(True), TypeError, r"first: count must be an integer, got bool"),
        (lambda: Positions.last(None), TypeError, r"last: count must be an integer, got NoneType"),
        (lambda: Positions.last(-4), ValueError, r"last: count must be at least 0, got -4"),
        (
            lambda: Positions.first_fraction(1.5),
            ValueError,
            r"first_fraction: fraction must be at least 0 and at most 1, got 1.5",
        ),
        (
            lambda: Positions.last_fraction(float("nan")),
            ValueError,
            r"last_fraction: fraction must be at least 0 and at most 1, got nan",
        ),
        (
            lambda: Positions.last_fraction("half"),
            TypeError,
            r"last_fraction: fraction must be a number, got str",
        ),
        (
            lambda: Positions.first_fraction(True),
            TypeError,
            r"first_fraction: fraction must be a number, got bool",
        ),
    ],
)
def test_wrong_counts_and_fractions_are_refused(make, error, message):
    with pytest.raises(error, match=r"c2c_ext.Positions\." + message):
        make()


def test_positions_are_values():
    assert c2c_ext.Positions is Positions
    assert Positions.first(3) == Positions.span(0, 3) != Positions.last(3)
    assert Positions.first(np.int64(3)) == Positions.first(3)
    assert Positions.first_fraction(np.float32(0.5)) == Positions.first_fraction(0.5)
    with pytest.raises(AttributeError):
        Positions.first(3).end = 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Positions(-3, 5), ValueError, "start must be at least 0, got -3"),
        (lambda: Positions("a", None), TypeError, "start must be an integer, got str"),
        (lambda: Positions(None, None), TypeError, "start must be an integer, got NoneType"),
        (lambda: Positions(0.5, None), TypeError, "start must be an integer, got float"),
        (lambda: Positions(2, 1), ValueError, "end must be at least start = 2, got 1"),
        (lambda: Positions(0, 2.0), ValueError, "fraction must be at least 0 and at most 1"),
        (lambda: Positions(0, float("nan")), ValueError, "fraction must be at least 0"),
    ],
)
def test_positions_made_without_the_class_methods_are_checked_too(make, error, message):
    with pytest.raises(error, match=r"c2c_ext.Positions.__init__: " + message):
        make()


def test_positions_beyond_any_integer_of_a_tensor_are_all_or_nothing():
    assert Positions.first(10**30).columns(5).all()
    assert Positions.last(10**30).columns(5).all()
    assert not Positions.span(10**30, 10**31).columns(5).any()


def test_positions_of_columns_and_bools_together_are_refused():
    with pytest.raises(TypeError, match="all columns or all bools, got some of both"):
        fused_columns([True, 2], 1, 5)

"""sharers= and sections= of generate: every form, and every refusal by its message."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
from generation_checks import prompt

from c2c_ext.generation import attached
from c2c_ext.selection import selected_sharers, spans_of

BATCH, COUNT, LENGTH = 2, 3, 11


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [[1, 1, 1]]),
        ([], [[0, 0, 0]]),
        ([2], [[0, 0, 1]]),
        ((2, 0), [[1, 0, 1]]),
        (range(2), [[1, 1, 0]]),
        ([1, 1], [[0, 1, 0]]),
        (np.array([1, 2]), [[0, 1, 1]]),
        (np.array([]), [[0, 0, 0]]),
        (torch.tensor([1], dtype=torch.uint8), [[0, 1, 0]]),
        ([np.int64(1), torch.tensor(2)], [[0, 1, 1]]),
        ([True, False, True], [[1, 0, 1]]),
        (torch.tensor([True, False, True]), [[1, 0, 1]]),
        (np.array([[True, False, True], [False] * 3]), [[1, 0, 1], [0, 0, 0]]),
        ([[0], []], [[1, 0, 0], [0, 0, 0]]),
        ([[0, 2], (1,)], [[1, 0, 1], [0, 1, 0]]),
        ([np.array([0, 2]), torch.tensor([1])], [[1, 0, 1], [0, 1, 0]]),
        ([[True, False, False], [1, 2]], [[1, 0, 0], [0, 1, 1]]),
    ],
    ids=str,
)
def test_every_form_of_a_selection(given, expected):
    selected = selected_sharers("sharers", given, BATCH, COUNT)
    assert selected.dtype == torch.bool
    assert selected.int().tolist() == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (1, TypeError, r"sharers must be a list of indices, .* got int"),
        ("01", TypeError, r"sharers must be a list of indices, .* got str"),
        ({0}, TypeError, r"sharers must be a list of indices, .* got set"),
        (torch.tensor(1), ValueError, r"1-D array of indices or bools, got integers of shape \[\]"),
        (
            torch.ones(2, 3).long(),
            ValueError,
            r"shape \[2, 3\]; rows of indices are given as lists",
        ),
        (torch.ones(3), TypeError, r"indices or bools, got torch.float32"),
        (np.array(["a"]), TypeError, r"array of indices or bools, got ndarray"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"\[3\] .* or \[2, 3\] .* got \[2\]"),
        (torch.ones(3, 3, dtype=torch.bool), ValueError, r"\[2, 3\] .* got \[3, 3\]"),
        ([True, False], ValueError, r"sharers as bools must be \[3\] .* got \[2\]"),
        ([0, 3], ValueError, r"at least 0 and below 3, .* attached, got 3"),
        ([-1], ValueError, r"at least 0 and below 3, .* attached, got -1"),
        ([0.0], TypeError, r"an index in sharers must be an integer, got float"),
        (["a"], TypeError, r"an index in sharers must be an integer, got str"),
        ([None], TypeError, r"an index in sharers must be an integer, got NoneType"),
        ([0, True], TypeError, r"an index in sharers must be an integer, got bool"),
        ([[0], 1], TypeError, r"sharers\[1\] must be a list of indices as .*, got int"),
        ([[0]], ValueError, r"one list of indices for each of the 2 rows, got 1"),
        ([[0], [1], [2]], ValueError, r"each of the 2 rows, got 3"),
        ([[0], [3]], ValueError, r"sharers\[1\] must hold indices .* got 3"),
        ([[0], [[1]]], TypeError, r"an index in sharers\[1\] must be an integer, got list"),
    ],
    ids=str,
)
def test_wrong_selections_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        selected_sharers("sharers", given, BATCH, COUNT)


def test_sections_are_spans_from_the_first_column():
    spans = spans_of(None, [(2, [0]), [3, None], (np.int64(5), [[], [1, 2]])], BATCH, LENGTH, COUNT)
    assert [(span.start, span.end) for span in spans] == [(0, 2), (2, 5), (5, 10)]
    assert [span.sharers() for span in spans] == [[0], [0, 1, 2], [1, 2]]
    (whole,) = spans_of([1], None, BATCH, LENGTH, COUNT)
    assert (whole.start, whole.end, whole.sharers()) == (0, 10, [1])
    assert spans_of(None, [], BATCH, LENGTH, COUNT) == ()


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (5, TypeError, r"sections must be a list of \(length, sharers\), got int"),
        ("ab", TypeError, r"sections must be a list of \(length, sharers\), got str"),
        ([5], TypeError, r"sections\[0\] must be \(length, sharers\), got 5"),
        ([(1, [0]), (1,)], TypeError, r"sections\[1\] must be .*, got 1 entries"),
        ([(1, [0], 2)], TypeError, r"sections\[0\] must be .*, got 3 entries"),
        (["ab"], TypeError, r"sections\[0\] must be .*, got 'ab'"),
        ([(0, [0])], ValueError, r"sections\[0\]'s length must be at least 1, got 0"),
        ([(2, None), (-1, [0])], ValueError, r"sections\[1\]'s length must be at least 1, got -1"),
        ([(1.0, [0])], TypeError, r"sections\[0\]'s length must be an integer, got float"),
        ([(True, [0])], TypeError, r"sections\[0\]'s length must be an integer, got bool"),
        ([(4, None), (7, None)], ValueError, r"at most 10 \(the last of the 11 .*\), got 11"),
        ([(1, [3])], ValueError, r"sections\[0\]'s sharers must hold indices .* below 3.* got 3"),
        ([(1, [[0]])], ValueError, r"sections\[0\]'s sharers must have .* 2 rows, got 1"),
    ],
    ids=str,
)
def test_wrong_sections_are_refused(sections, error, message):
    with pytest.raises(error, match=message):
        spans_of(None, sections, BATCH, LENGTH, COUNT)


def test_generate_refuses_both_and_what_does_not_fit_before_anything_runs():
    receiver, sharers, fusers = tiny_models.quintet()
    ran = []
    hooks = [
        model.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
        for model in (receiver, *sharers)
    ]
    with attached(receiver, sharers, fusers):
        with pytest.raises(ValueError, match="sharers and sections cannot both be given"):
            receiver.generate(prompt(), sharers=[0], sections=[(2, [0])])
        with pytest.raises(ValueError, match="below 2, the number of sharers attached, got 2"):
            receiver.generate(prompt(), sharers=[2])
        with pytest.raises(ValueError, match="at most 10 "):
            receiver.generate(prompt(), sections=[(11, [0])])
    for hook in hooks:
        hook.remove()
    assert ran == []

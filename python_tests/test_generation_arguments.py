"""Which prompts, masks and positions an attached receiver's generate takes and which it refuses."""

from __future__ import annotations

import numpy as np
import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import CLOSE, VISIBLE, generate, left_padded, prompt

from c2c_ext.generation import attached


@pytest.fixture(scope="module")
def trio():
    receiver, sharer = tiny_models.receiver_model("qwen3"), tiny_models.sharer_model()
    return receiver, sharer, tiny_models.fuser_between(receiver, sharer)


@pytest.mark.parametrize("how", ["inputs", "input_ids", "inputs=None", "positional"])
def test_the_prompt_is_fused_however_it_is_given(trio, how):
    receiver, sharer, fuser = trio
    ids = prompt()
    given = {
        "inputs": {"inputs": ids},
        "input_ids": {"input_ids": ids},
        "inputs=None": {"inputs": None, "input_ids": ids},
    }
    settings = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, 1)
    clean = plain_loop.decode(receiver, plain_loop.prefill(receiver, ids[:, :-1]), ids, 1)
    with attached(receiver, sharer, fuser):
        if how == "positional":
            output = receiver.generate(ids, receiver.generation_config, **settings)
        else:
            output = receiver.generate(**given[how], **settings)
        with pytest.raises(ValueError, match="passed alongside"):
            receiver.generate(ids, input_ids=ids)
    torch.testing.assert_close(output.logits[0], expected.logits[:, 0], **CLOSE)
    assert (clean.logits - expected.logits).abs().max() > VISIBLE


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2]], TypeError, r"input_ids must be a tensor \[batch, tokens\], got list"),
        (prompt()[0], ValueError, r"input_ids must be \[batch, tokens\], got \[11\]"),
        (prompt()[:, :0], ValueError, r"input_ids must hold at least one .* got \[2, 0\]"),
        (prompt()[:0], ValueError, r"input_ids must hold at least one .* got \[0, 11\]"),
    ],
)
def test_wrong_prompts_are_refused(trio, ids, error, message):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        with pytest.raises(error, match=message):
            generate(receiver, ids)
        with pytest.raises(error, match=message):
            generate(receiver, None, input_ids=ids)


@pytest.mark.parametrize("shape", [(11,), (1, 11), (2, 10), (2, 12), (4, 11), (2, 1, 11, 11)])
def test_a_mask_of_another_shape_than_the_prompt_is_refused(trio, shape):
    receiver, sharer, fuser = trio
    message = r"attention_mask must be \[batch, prompt tokens\] = \[2, 11\], got \["
    message += ", ".join(map(str, shape)) + r"\]"
    with attached(receiver, sharer, fuser), pytest.raises(ValueError, match=message):
        generate(receiver, prompt(), attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("kind", [list, np.array])
def test_prompt_tensors_must_be_tensors(trio, name, kind):
    receiver, sharer, fuser = trio
    message = f"{name} must be a tensor, got {type(kind([])).__name__}"
    with attached(receiver, sharer, fuser), pytest.raises(TypeError, match=message):
        generate(receiver, prompt(), **{name: kind([[1] * 11] * 2)})


@pytest.mark.parametrize("shape", [(11,), (1, 10), (2, 12), (3, 11)])
def test_position_ids_of_another_shape_than_the_prompt_are_refused(trio, shape):
    receiver, sharer, fuser = trio
    message = r"position_ids must be \[batch, prompt tokens\] = \[2, 11\] or \[1, 11\], got \["
    with attached(receiver, sharer, fuser), pytest.raises(ValueError, match=message):
        generate(receiver, prompt(), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype_mean_the_same(trio, dtype):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 4))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, 1, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask.to(dtype), max_new_tokens=1)
    torch.testing.assert_close(output.logits[0], expected.logits[:, 0], **CLOSE)


@pytest.mark.parametrize(
    "positions",
    [
        range(2, 5),
        (2, 3, 4),
        np.array([2, 3, 4]),
        np.arange(2, 5)[::-1],
        np.array([2, 3, 4], dtype=np.uint8),
        [np.int64(2), torch.tensor(3), 4],
        torch.tensor([2, 3, 4], dtype=torch.uint8),
        [4, 2, 3, 2],
        [2 <= column < 5 for column in range(11)],
        np.array([2 <= column < 5 for column in range(11)]),
    ],
    ids=lambda positions: type(positions).__name__,
)
def test_every_form_of_positions_means_the_same(trio, positions):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        expected = generate(receiver, prompt(), positions=[2, 3, 4], max_new_tokens=1)
        output = generate(receiver, prompt(), positions=positions, max_new_tokens=1)
        whole = generate(receiver, prompt(), max_new_tokens=1)
    assert torch.equal(output.logits[0], expected.logits[0])
    assert (whole.logits[0] - expected.logits[0]).abs().max() > VISIBLE


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([0, 10], ValueError, r"at most 9 \(the last of the 11 prompt tokens .*\), got 10"),
        ([-1], ValueError, r"at least 0 .* got -1"),
        ([[0, 1]], ValueError, r"positions must be a 1-D list .* shape \[1, 2\]"),
        (3, ValueError, r"positions must be a 1-D list .* shape \[\]"),
        (np.array(3), ValueError, r"positions must be a 1-D list .* shape \[\]"),
        (True, ValueError, r"positions mask must be \[11\] or \[2, 11\] .* got \[\]"),
        ([0.5], TypeError, r"positions must be integers or bools, got torch.float32"),
        (torch.zeros(10, dtype=torch.bool), ValueError, r"\[11\] or \[2, 11\] .* got \[10\]"),
        (torch.zeros(3, 11, dtype=torch.bool), ValueError, r"\[2, 11\] .* got \[3, 11\]"),
        (torch.ones(11, dtype=torch.bool), ValueError, r"marks column 10: the last of the 11"),
        ([0, 0, 1, 1, 1, 0], ValueError, r"got 6 integers that are all 0 or 1: a mask would be"),
        (torch.ones(11, dtype=torch.int8), ValueError, r"got 11 integers that are all 0 or 1"),
        (np.array([0] * 10), ValueError, r"got 10 integers that are all 0 or 1"),
        (["a"], TypeError, r"positions must be a range, .* got list: "),
        ("abc", TypeError, r"positions must be a range, .* got str: "),
        ({1, 2}, TypeError, r"positions must be a range, .* got set: "),
        ((i for i in (1, 2)), TypeError, r"positions must be a range, .* got generator: "),
        ([None], TypeError, r"positions must be a range, .* got list: "),
        ([[1], [1, 2]], TypeError, r"positions must be a range, .* got list: "),
        ([2**63], TypeError, r"positions must be a range, .* of int64 columns .* got list: "),
        (np.array(["a"]), TypeError, r"positions must be a range, .* got ndarray: "),
    ],
)
def test_wrong_positions_are_refused(trio, positions, error, message):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser), pytest.raises(error, match=message):
        generate(receiver, prompt(), positions=positions)


@pytest.mark.parametrize("positions", [[0], [1], [0, 1], (1, 0)], ids=str)
def test_the_first_two_columns_are_not_mistaken_for_a_mask(trio, positions):
    receiver, sharer, fuser = trio
    ids = prompt()
    columns = torch.tensor([column in positions for column in range(10)])
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, columns=columns)
    expected = plain_loop.decode(receiver, kv, ids, 1)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, positions=positions, max_new_tokens=1)
    torch.testing.assert_close(output.logits[0], expected.logits[:, 0], **CLOSE)


@pytest.mark.parametrize("number", [-1, 2, float("nan")])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(trio, number):
    receiver, sharer, fuser = trio
    ids = prompt()
    mask = torch.ones(ids.shape, dtype=torch.long if number == number else torch.float32)
    mask[0, 1] = number
    own = {"input_ids": ids, "attention_mask": mask, "token_map": torch.arange(ids.shape[1])}
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match=rf"attention_mask must hold 1 .* got {number}"):
            generate(receiver, ids, attention_mask=mask)
        with pytest.raises(ValueError, match=rf"inputs's attention_mask must hold .* got {number}"):
            generate(receiver, ids, sharer_inputs=own)


@pytest.mark.parametrize("shift", [-1000, 1000])
def test_tokens_outside_the_receivers_vocabulary_are_named(trio, shift):
    receiver, sharer, fuser = trio
    message = r"input_ids must be at least 0 and below the receiver's vocabulary size 97, got -?\d"
    with attached(receiver, sharer, fuser), pytest.raises(ValueError, match=message):
        generate(receiver, prompt() + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_tokens_of_another_kind_are_named(trio, dtype):
    receiver, sharer, fuser = trio
    message = f"input_ids must be int64 or int32, got {dtype}"
    with attached(receiver, sharer, fuser), pytest.raises(TypeError, match=message):
        generate(receiver, prompt().to(dtype))

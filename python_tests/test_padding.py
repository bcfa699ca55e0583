"""Ragged batches: padding on either side equals every row alone; rows come back padded left."""

from __future__ import annotations

import plain_loop
import pytest
import tiny_models
import torch
from conftest import same_bits
from generation_checks import CLOSE, VISIBLE, generate, left_padded, logits_of, prompt
from transformers import DynamicCache

from c2c_ext import Positions
from c2c_ext.generation import attached
from c2c_ext.padding import shift_of

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (7, 11, 1, 4, 2)
BOTH = [0, 1]


@pytest.fixture(scope="module")
def quintet():
    return tiny_models.quintet()


def right_padded(lengths=LENGTHS):
    """The rows of `left_padded` with their padding on the right, and both masks."""
    ids, mask = left_padded(lengths)
    right, right_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        right[row, :length], right_mask[row, :length] = ids[row, -length:], 1
    return right, right_mask


def alone(receiver, row, **settings):
    return generate(receiver, row[None], past_key_values=DynamicCache(), **settings)


def assert_rows_alone(receiver, output, ids, lengths, **settings):
    """Every row is what it is without the others: logits, tokens, caches."""
    width = max(lengths)
    held = plain_loop.kv_of(output.past_key_values)
    for row, length in enumerate(lengths):
        own = {name: of_row(row) for name, of_row in settings.items()}
        one = alone(receiver, ids[row, -length:], **own)
        torch.testing.assert_close(logits_of(output)[row], logits_of(one)[0], **CLOSE)
        assert torch.equal(output.sequences[row, width - length :], one.sequences[0])
        for pair, pair_alone in zip(held, plain_loop.kv_of(one.past_key_values), strict=True):
            for tensor, expected in zip(pair, pair_alone, strict=True):
                torch.testing.assert_close(tensor[row, :, width - length :], expected[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
@pytest.mark.parametrize("fusion", ["parallel", "sequential"])
def test_every_row_is_what_it_is_alone(kind, side, fusion):
    receiver, sharers, fusers = tiny_models.quintet(kind)
    left, left_mask = left_padded(LENGTHS)
    ids, mask = (left, left_mask) if side == "left" else right_padded()
    with attached(receiver, sharers, fusers, fusion=fusion):
        output = generate(receiver, ids, attention_mask=mask, past_key_values=DynamicCache())
        assert_rows_alone(receiver, output, left, LENGTHS)
    unfused = generate(receiver, left, attention_mask=left_mask)
    change = (logits_of(unfused)[:, 0] - logits_of(output)[:, 0]).abs().amax(1)
    assert (change > VISIBLE).tolist() == [length > 1 for length in LENGTHS]


def test_right_padding_is_left_padding_bit_for_bit_and_comes_back_on_the_left(quintet):
    receiver, sharers, fusers = quintet
    left, left_mask = left_padded(LENGTHS)
    right, right_mask = right_padded()
    with attached(receiver, sharers, fusers):
        expected = generate(receiver, left, attention_mask=left_mask)
        for given in ({"inputs": right}, {"input_ids": right}):
            output = generate(
                receiver, given.pop("inputs", None), attention_mask=right_mask, **given
            )
            assert same_bits(logits_of(output), logits_of(expected))
            assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.sequences[:, :11], left)
    assert right[0, 0] == left[0, 4] and not right[0, 7:].any()  # the caller's stay as they are


@pytest.mark.parametrize("how", ["beams", "samples"])
def test_right_padding_with_repeated_rows(quintet, how):
    receiver, sharers, fusers = quintet
    left, left_mask = left_padded((9, 4))
    right, right_mask = right_padded((9, 4))
    settings = {"max_new_tokens": 3, "num_return_sequences": 2}
    settings |= {"num_beams": 2} if how == "beams" else {"do_sample": True, "top_k": 0}
    with attached(receiver, sharers, fusers):
        torch.manual_seed(1)
        expected = generate(receiver, left, attention_mask=left_mask, **settings)
        torch.manual_seed(1)
        output = generate(receiver, right, attention_mask=right_mask, **settings)
    assert torch.equal(output.sequences, expected.sequences)
    assert all(map(same_bits, output.scores, expected.scores))


def test_position_ids_move_with_their_rows(quintet):
    receiver, sharers, fusers = quintet
    left, left_mask = left_padded((11, 6))
    right, right_mask = right_padded((11, 6))
    positions = torch.arange(0, 22, 2).expand(2, -1)
    on_the_left = torch.stack([positions[0], torch.cat([torch.zeros(5).long(), positions[1, :6]])])
    settings = {"max_new_tokens": 1}
    with attached(receiver, sharers, fusers):
        output = generate(
            receiver, right, attention_mask=right_mask, position_ids=positions, **settings
        )
        shared = generate(
            receiver, right, attention_mask=right_mask, position_ids=positions[:1], **settings
        )
        expected = generate(
            receiver, left, attention_mask=left_mask, position_ids=on_the_left, **settings
        )
    torch.testing.assert_close(output.logits[0], expected.logits[0], **CLOSE)
    assert same_bits(output.logits[0], shared.logits[0])


@pytest.mark.parametrize(
    "form",
    ["columns", "mask", "row mask", "first", "last"],
)
def test_positions_move_with_their_rows(quintet, form):
    receiver, sharers, fusers = quintet
    lengths = (11, 6)
    left, _ = left_padded(lengths)
    right, right_mask = right_padded(lengths)
    mask = torch.zeros(11, dtype=torch.bool)
    mask[[1, 2, 5, 8]] = True
    positions = {
        "columns": [1, 2, 5, 8],  # 5 is the second row's last token, 8 its padding
        "mask": mask,
        "row mask": torch.stack([mask, mask]),
        "first": Positions.first(3),
        "last": Positions.last(3),
    }[form]
    rows = [[1, 2, 5, 8], [1, 2]]
    if form in ("first", "last"):
        rows = [range(3), range(3)] if form == "first" else [range(7, 10), range(2, 5)]
    with attached(receiver, sharers, fusers):
        output = generate(
            receiver, right, attention_mask=right_mask, positions=positions,
            past_key_values=DynamicCache(),
        )  # fmt: skip
        assert_rows_alone(receiver, output, left, lengths, positions=lambda row: list(rows[row]))
        whole = generate(receiver, right, attention_mask=right_mask)
    assert (logits_of(whole)[:, 0] - logits_of(output)[:, 0]).abs().amax(1).min() > VISIBLE


def test_selections_and_maps_move_with_their_rows(quintet):
    receiver, sharers, fusers = quintet
    lengths, text = (11, 6), prompt(2, 14, seed=6)
    left, _ = left_padded(lengths)
    right, right_mask = right_padded(lengths)
    maps = torch.stack([torch.arange(11) + 2, 13 - torch.arange(11)])
    chosen = [[0, 1], [1]]
    own = [None, {"input_ids": text, "token_map": maps}]

    def own_of(row):
        one_map = maps[row, : lengths[row]]
        return [None, {"input_ids": text[row : row + 1], "token_map": one_map}]

    with attached(receiver, sharers, fusers):
        output = generate(
            receiver, right, attention_mask=right_mask, sharers=chosen, sharer_inputs=own,
            past_key_values=DynamicCache(),
        )  # fmt: skip
        assert_rows_alone(
            receiver, output, left, lengths,
            sharers=lambda row: chosen[row], sharer_inputs=own_of,
        )  # fmt: skip


def test_rows_with_gaps_keep_them(quintet):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded((11, 8))
    mask[1, 5] = 0  # inside the row
    shifted, shifted_mask = ids.clone(), mask.clone()
    shifted[1], shifted_mask[1] = ids[1].roll(-3), mask[1].roll(-3)
    with attached(receiver, sharers, fusers):
        expected = generate(receiver, ids, attention_mask=mask)
        output = generate(receiver, shifted, attention_mask=shifted_mask)
    assert same_bits(logits_of(output), logits_of(expected))


def test_what_is_not_padded_on_the_right_is_not_moved():
    _, mask = left_padded(LENGTHS)
    assert shift_of(None) is None
    assert shift_of(mask) is None
    assert shift_of(torch.ones(2, 3)) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype_are_moved(quintet, dtype):
    receiver, sharers, fusers = quintet
    right, mask = right_padded()
    with attached(receiver, sharers, fusers):
        expected = generate(receiver, right, attention_mask=mask, max_new_tokens=1)
        output = generate(receiver, right, attention_mask=mask.to(dtype), max_new_tokens=1)
    assert same_bits(output.logits[0], expected.logits[0])


def test_what_padding_cannot_go_with_is_refused(quintet):
    receiver, sharers, fusers = quintet
    right, mask = right_padded()
    empty = mask.clone()
    empty[3] = 0
    with attached(receiver, sharers, fusers):
        with pytest.raises(ValueError, match="at least one token in every row, row 3 has none"):
            generate(receiver, right, attention_mask=empty)
        with pytest.raises(
            ValueError, match=r"sections must not be given with rows .* pad on the l"
        ):
            generate(receiver, right, attention_mask=mask, sections=[(2, BOTH)])
        with pytest.raises(ValueError, match=r"attention_mask must be given: row 0 .* ends in the"):
            generate(receiver, right)
        first = generate(receiver, prompt())
        longer = torch.cat([first.sequences, prompt(2, 3)], 1)
        mask = torch.ones_like(longer)
        mask[0, -1] = 0
        with pytest.raises(ValueError, match="in a later turn: pad the new tokens on their left"):
            generate(receiver, longer, attention_mask=mask, past_key_values=first.past_key_values)

"""How a training batch is cut, and every batch that cannot be."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import falcon_model, fuser_between, sharer_model, trio

from c2c_ext.training import C2CTrainingModel, GateSampler
from c2c_ext.training.layout import lay_out


def tensor(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


# Row 0: two columns of padding, prompt 11 12 13, response 14 15. Row 1: prompt 21, response 22 23.
IDS = tensor([9, 9, 11, 12, 13, 14, 15], [9, 21, 22, 23, 9, 9, 9])
MASK = tensor([0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0])
LABELS = tensor([-100] * 5 + [14, 15], [-100, -100, 22, 23, -100, -100, -100])


def test_prompts_end_at_one_column():
    layout = lay_out(IDS, MASK, LABELS)
    assert layout.prefix_ids.tolist() == [[11, 12], [0, 0]]
    assert layout.prefix_mask.tolist() == [[True, True], [False, False]]
    assert layout.rest_ids.tolist() == [[13, 14, 15], [21, 22, 23]]
    assert layout.targets.tolist() == [[14, 15, -100], [22, 23, -100]]
    assert layout.sharer_ids.tolist() == [[11, 12], [0, 0]]
    assert layout.token_map.tolist() == [[0, 1], [-1, -1]]
    assert [row.tolist() for row in layout.receiver_rows()] == [[11, 12], []]


def test_shorter_rows_are_padded():
    labels = tensor([-100] * 6 + [15], [-100, -100, 22, 23, -100, -100, -100])
    layout = lay_out(IDS, MASK, labels)
    assert layout.prefix_ids.tolist() == [[11, 12, 13], [0, 0, 0]]
    assert layout.rest_ids.tolist() == [[14, 15, 0], [21, 22, 23]]
    assert layout.targets.tolist() == [[15, -100, -100], [22, 23, -100]]


def test_equal_rows_need_no_map():
    ids = tensor([1, 2, 3, 4], [5, 6, 7, 8])
    layout = lay_out(ids, None, ids * (torch.arange(4) == 3) - 100 * (torch.arange(4) != 3))
    assert layout.token_map is None
    assert layout.prefix_ids.tolist() == [[1, 2], [5, 6]]
    assert lay_out(ids).prefix_ids.tolist() == [[1, 2, 3], [5, 6, 7]]  # all of it is prompt


def test_chosen_tokens():
    fused = torch.zeros_like(IDS, dtype=torch.bool)
    fused[0, 3] = True
    assert lay_out(IDS, MASK, LABELS, fused_mask=fused).token_map.tolist() == [[-1, 1], [-1, -1]]


def test_a_map_follows_the_sharers_layout():
    token_map = torch.full_like(IDS, -8)
    token_map[0, 2:4] = torch.tensor([-1, 3])
    layout = lay_out(
        *(IDS, MASK, LABELS),
        sharer_input_ids=tensor([9, 31, 32, 33], [41, 42, 9, 9]),
        sharer_attention_mask=tensor([0, 1, 1, 1], [1, 1, 0, 0]),
        token_map=token_map,
    )
    assert layout.sharer_ids.tolist() == [[31, 32, 33], [0, 41, 42]]
    assert layout.token_map.tolist() == [[-1, 2], [-1, -1]]
    assert [row.tolist() for row in layout.sharer_rows()] == [[31, 32, 33], [41, 42]]


def test_a_map_between_equal_tokens():
    token_map = torch.zeros_like(IDS)
    token_map[0, 2:4] = torch.tensor([3, 2])  # columns of input_ids
    assert lay_out(IDS, MASK, LABELS, token_map=token_map).token_map.tolist() == [[1, 0], [-1, -1]]


FUSED = torch.zeros_like(IDS, dtype=torch.bool)
FUSED[0, 4] = True
MAPPED = {"sharer_input_ids": tensor([31, 32], [41, 42]), "token_map": torch.zeros_like(IDS)}
REFUSED = {
    "ids_float": ({"input_ids": IDS.float()}, TypeError, "input_ids must be an int64 tensor, got"),
    "ids_list": ({"input_ids": [[1]]}, TypeError, "input_ids must be an int64 tensor, got list"),
    "ids_flat": ({"input_ids": IDS[0]}, ValueError, "input_ids must be int64 [B, L], got [7]"),
    "no_rows": (
        {"input_ids": IDS[:0], "attention_mask": None, "labels": None},
        ValueError,
        "input_ids must have at least one row, got 0",
    ),
    "mask_shape": (
        {"attention_mask": MASK[:, 1:]},
        ValueError,
        "attention_mask must be of shape [2, 7], as the ids are, got [2, 6]",
    ),
    "mask_values": ({"attention_mask": 2 * MASK}, ValueError, "must hold 0 and 1 only, got tensor"),
    "mask_list": ({"attention_mask": [1]}, TypeError, "attention_mask must be a tensor, got list"),
    "mask_gap": (
        {"attention_mask": tensor([0, 0, 1, 0, 1, 1, 1], [1] * 7)},
        ValueError,
        "one run of tokens in every row, got padding between tokens in row 0",
    ),
    "mask_empty": (
        {"attention_mask": tensor([1] * 7, [0] * 7)},
        ValueError,
        "one run of tokens in every row, got no token in row 1",
    ),
    "labels_shape": ({"labels": LABELS[:1]}, ValueError, "labels must be of shape [2, 7]"),
    "no_label": (
        {"labels": LABELS.masked_fill(tensor([0], [1]) == 1, -100)},
        ValueError,
        "labels must have a token to learn in every row (anything but -100), got none in row 1",
    ),
    "label_on_padding": (
        {"labels": tensor([5] + [-100] * 4 + [14, 15], [-100] * 3 + [23] + [-100] * 3)},
        ValueError,
        "labels must be -100 where attention_mask is 0, got 5 in row 0",
    ),
    "label_on_first": (
        {"labels": tensor([-100] * 5 + [14, 15], [-100, 21, 22, 23, -100, -100, -100])},
        ValueError,
        "labels must begin behind a prompt of at least one token, got one on the first token of "
        "row 1",
    ),
    "fused_last": (
        {"fused_mask": FUSED},
        ValueError,
        "fused_mask must be true only in the prompt before its last token, columns 2 to 3 of row "
        "0, got true in column 4",
    ),
    "sharer_alone": (
        {"sharer_input_ids": IDS},
        ValueError,
        "sharer_input_ids must come with a token_map",
    ),
    "sharer_mask_alone": (
        {"sharer_attention_mask": MASK},
        ValueError,
        "sharer_attention_mask must come with sharer_input_ids",
    ),
    "sharer_rows": (
        {**MAPPED, "sharer_input_ids": tensor([31, 32])},
        ValueError,
        "sharer_input_ids must have 2 rows as input_ids, got 1",
    ),
    "map_shape": (
        {**MAPPED, "token_map": torch.zeros(2, 6).long()},
        ValueError,
        "token_map must be of shape [2, 7]",
    ),
    "map_float": ({**MAPPED, "token_map": 1.0 * IDS}, TypeError, "token_map must be an int64"),
    "map_beyond": (
        {**MAPPED, "token_map": torch.full_like(IDS, 2)},
        ValueError,
        "token_map must hold -1 or columns of the tokens that the sharer reads, 0 to 1 in row 0, "
        "got 2 in column 2",
    ),
    "map_below": ({**MAPPED, "token_map": torch.full_like(IDS, -2)}, ValueError, "got -2 in col"),
    "map_on_padding": (
        {**MAPPED, "sharer_attention_mask": tensor([0, 1], [1, 1])},
        ValueError,
        "the sharer reads, 1 to 1 in row 0, got 0 in column 2",
    ),
    "map_of_response": (  # the sharer reads the same ids, and of them the prompt alone
        {"token_map": torch.full_like(IDS, 5)},
        ValueError,
        "the sharer reads, 2 to 3 in row 0, got 5 in column 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_cannot_be_cut_are_refused(name):
    changed, error, message = REFUSED[name]
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, **changed}
    with pytest.raises(error, match=re.escape(message)):
        lay_out(batch.pop("input_ids"), **batch)


@pytest.fixture(scope="module")
def model() -> C2CTrainingModel:
    return C2CTrainingModel(*trio(), sampler=GateSampler(per="token"))


def test_ids_outside_a_vocabulary_are_refused(model):
    for ids, got in ((97, 97), (-1, -1)):
        with pytest.raises(
            ValueError, match=f"ids that the receiver reads must be .* 0 to 96, got {got}"
        ):
            model(tensor([1, 2, ids, 4]), sample_ids=[0])
    sharer = sharer_model(vocab_size=50)
    receiver, _, fuser = trio()
    small = C2CTrainingModel(receiver, sharer, fuser, sampler=None)
    assert small(tensor([1, 2, 60])).logits.isfinite().all()  # the sharer does not read it
    with pytest.raises(ValueError, match=r"ids that the sharer reads must be .* 0 to 49, got 60"):
        small(tensor([1, 60, 2]))


def test_sample_ids_are_checked(model):
    with pytest.raises(ValueError, match="sample_ids must be given with per='token'"):
        model(tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"sample_ids must be 1 integers .* got 2"):
        model(tensor([1, 2, 3]), sample_ids=[1, 2])


def test_models_that_do_not_fit_are_refused():
    receiver, sharer, fuser = trio()
    for arguments, error, message in (
        ((receiver, receiver, fuser), ValueError, "sharer must be another model than the receiver"),
        ((receiver.model, receiver, fuser), ValueError, "has parameters in common with it"),
        ((falcon_model(), sharer, fuser), ValueError, "fuser does not fit: the fuser was made for"),
        ((receiver, torch.nn.Linear(1, 1), fuser), TypeError, "sharer must be a transformers"),
        ((receiver, sharer, None), TypeError, "fuser must be a Fuser, got NoneType"),
        ((receiver, sharer, trio()[2].half()), ValueError, "its .* is torch.float16"),
    ):
        with pytest.raises(error, match=message):
            C2CTrainingModel(*arguments, sampler=None)
    same = fuser_between(receiver, receiver)
    with pytest.raises(ValueError, match="sharer must be another model"):
        C2CTrainingModel(receiver, receiver, same, sampler=None)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampler": "logistic"}, TypeError, "sampler must be a GateSampler or None, got str"),
        ({"dropout": 1.0}, ValueError, "dropout must be in .* got 1.0"),
        ({"dropout": "0.1"}, ValueError, "dropout must be in .* got '0.1'"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be None or .* got 0"),
        ({"backend": "eager"}, ValueError, "backend must be one of op, reference, got 'eager'"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        C2CTrainingModel(*trio(), **{"sampler": None, **settings})


def test_several_devices_are_refused():
    receiver, sharer, fuser = trio()
    model = C2CTrainingModel(receiver, sharer.to("meta"), fuser, sampler=None)
    with pytest.raises(
        ValueError,
        match="must be on one device, got receiver on cpu, sharer on meta, fuser on cpu",
    ):
        model(tensor([1, 2, 3]))

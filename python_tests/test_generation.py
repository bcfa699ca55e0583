"""An attached receiver's generate against the plain loops of plain_loop.py."""

from __future__ import annotations

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    CLOSE,
    STEPS,
    VISIBLE,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    logits_of,
    new_tokens,
    prompt,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    """(receiver, sharer, fuser) for every kind of receiver."""
    return tiny_models.trio(request.param)


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(autouse=True)
def nothing_left(request):
    """Every test must leave the shared receivers as it found them."""
    yield
    for name in ("trio", "each_trio"):
        if name in request.fixturenames:
            receiver = request.getfixturevalue(name)[0]
            assert type(receiver).__mro__[1].__name__ != "_FusedGeneration"
            assert not [key for key in vars(receiver) if "c2c" in key]


def test_greedy_matches_plain_loop(each_trio):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    expected = plain_loop.decode(
        receiver, plain_loop.fused_prompt(receiver, sharer, fuser, ids), ids, STEPS
    )
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids)
        full = generate(receiver, ids, past_key_values=DynamicCache())
    slides = getattr(receiver.config, "sliding_window", None) is not None
    assert_same_run(output, ids, expected, kv=not slides)
    assert_same_run(full, ids, expected)
    assert_visible(expected, receiver, ids)


def test_plain_loop_notices_a_shifted_sharer_cache(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    expected = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    base, shared = (plain_loop.prefill(model, ids[:, :-1]) for model in (receiver, sharer))
    shifted = [(key.roll(1, 2), value.roll(1, 2)) for key, value in shared]
    wrong = plain_loop.reference.fuse(base, shifted, fuser)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids)
    first = plain_loop.decode(receiver, wrong, ids, 1).logits[:, 0]
    assert (first - output.logits[0]).abs().max() > VISIBLE
    right = plain_loop.decode(receiver, expected, ids, 1).logits[:, 0]
    torch.testing.assert_close(output.logits[0], right, **CLOSE)


def test_shallower_sharer_matches_plain_loop(trio):
    receiver, _, _ = trio
    sharer = tiny_models.other_sharer_model()
    fuser = tiny_models.fuser_between(receiver, sharer, layer_map=[0, 0, 1])
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, sharer, fuser):
        assert_same_run(generate(receiver, ids), ids, expected)
    assert_visible(expected, receiver, ids)


def test_receiver_as_its_own_sharer_matches_plain_loop(trio):
    receiver, _, _ = trio
    fuser = tiny_models.fuser_between(receiver, receiver)
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, receiver, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, receiver, fuser):
        assert_same_run(generate(receiver, ids), ids, expected)
    assert_visible(expected, receiver, ids)


def test_sharer_without_head_and_in_bfloat16_matches_plain_loop(trio):
    receiver, _, fuser = trio
    sharer = tiny_models.sharer_model().to(torch.bfloat16)
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, sharer.model, fuser):
        assert_same_run(generate(receiver, ids), ids, expected)
    assert_visible(expected, receiver, ids)


def test_sampling_draws_what_the_plain_loop_draws(each_trio):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    torch.manual_seed(11)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, choose=plain_loop.sampled(0.8))
    with attached(receiver, sharer, fuser):
        torch.manual_seed(11)
        output = generate(receiver, ids, do_sample=True, temperature=0.8, top_k=0, top_p=1.0)
    assert_same_run(output, ids, expected, kv=False)
    torch.testing.assert_close(torch.stack(output.scores, 1), expected.logits / 0.8, **CLOSE)
    assert not torch.equal(expected.tokens, expected.logits.argmax(-1))
    assert_visible(expected, receiver, ids)


def test_return_sequences_follow_the_plain_loop(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    with attached(receiver, sharer, fuser):
        torch.manual_seed(12)
        output = generate(receiver, ids, do_sample=True, top_k=0, num_return_sequences=3)
    tokens = new_tokens(output, ids)
    assert len({tuple(row) for row in tokens.tolist()}) > 2
    kv = plain_loop.repeat_rows(plain_loop.fused_prompt(receiver, sharer, fuser, ids), 3)
    rows = ids.repeat_interleave(3, 0)
    expected = plain_loop.decode(receiver, kv, rows, STEPS, choose=plain_loop.forced(tokens))
    assert_same_run(output, rows, expected)
    assert_visible(expected, receiver, rows)


def test_beams_match_plain_beam_search_and_prefill_each_prompt_once(each_trio):
    receiver, sharer, fuser = each_trio
    ids, beams = prompt(), 3
    prefilled = []
    hooks = [
        model.model.register_forward_hook(
            lambda module, args, kwargs, out: prefilled.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        for model in (receiver, sharer)
    ]
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, num_beams=beams, num_return_sequences=2, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    assert [shape for shape in prefilled if shape[1] > 1] == [(2, 10), (2, 10)]
    for row in range(2):
        one = ids[row : row + 1]
        kv = plain_loop.fused_prompt(receiver, sharer, fuser, one)
        tokens, scores = plain_loop.beam_search(receiver, kv, one, 4, beams)
        clean = plain_loop.prefill(receiver, one[:, :-1])
        unfused, _ = plain_loop.beam_search(receiver, clean, one, 4, beams)
        assert torch.equal(new_tokens(output, ids)[2 * row : 2 * row + 2], tokens[:2])
        torch.testing.assert_close(
            output.sequences_scores[2 * row : 2 * row + 2], scores[:2], **CLOSE
        )
        assert not torch.equal(tokens, unfused)


def test_beams_with_left_padding_match_each_prompt_alone(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((9, 4))
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver,
            ids,
            attention_mask=mask,
            num_beams=2,
            num_return_sequences=2,
            max_new_tokens=3,
        )
    for row, length in enumerate((9, 4)):
        one = ids[row : row + 1, -length:]
        kv = plain_loop.fused_prompt(receiver, sharer, fuser, one)
        tokens, scores = plain_loop.beam_search(receiver, kv, one, 3, 2)
        assert torch.equal(new_tokens(output, ids)[2 * row : 2 * row + 2], tokens)
        torch.testing.assert_close(output.sequences_scores[2 * row : 2 * row + 2], scores, **CLOSE)


def test_left_padding_matches_plain_loop_and_each_prompt_alone(each_trio):
    receiver, sharer, fuser = each_trio
    lengths = (11, 4, 1)
    ids, mask = left_padded(lengths)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, past_key_values=DynamicCache())
    assert_same_run(output, ids, expected, kv=False)
    for row, length in enumerate(lengths):
        one = ids[row : row + 1, -length:]
        if length > 1:
            kv = plain_loop.fused_prompt(receiver, sharer, fuser, one)
        else:
            kv = []
        alone = plain_loop.decode(receiver, kv, one, STEPS)
        torch.testing.assert_close(logits_of(output)[row], alone.logits[0], **CLOSE)
        held = plain_loop.kv_of(output.past_key_values)
        for pair, alone_pair in zip(held, alone.kv, strict=True):
            for tensor, expected_tensor in zip(pair, alone_pair, strict=True):
                padding = max(lengths) - length
                torch.testing.assert_close(tensor[row, :, padding:], expected_tensor[0], **CLOSE)
    assert_visible(expected, receiver, ids, mask)


def test_left_padding_in_a_static_cache_matches_plain_loop(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, cache_implementation="static")
    assert_same_run(output, ids, expected, kv=False)


def test_both_models_follow_given_position_ids(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    position_ids = torch.arange(0, 22, 2).expand(2, -1)
    caches = [DynamicCache(), DynamicCache()]
    with torch.no_grad():
        for model, cache in zip((receiver, sharer), caches, strict=True):
            model(ids[:, :-1], position_ids=position_ids[:, :-1], past_key_values=cache)
        base, shared = (plain_loop.kv_of(cache) for cache in caches)
        fused = plain_loop.reference.fuse(base, shared, fuser)
        last = {"position_ids": position_ids[:, -1:], "past_key_values": plain_loop.cache_of(fused)}
        expected = receiver(ids[:, -1:], **last).logits[:, -1]
    usual = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, position_ids=position_ids, max_new_tokens=1)
    torch.testing.assert_close(output.logits[0], expected, **CLOSE)
    held = [(k[:, :, :-1], v[:, :, :-1]) for k, v in plain_loop.kv_of(output.past_key_values)]
    torch.testing.assert_close(held, fused, **CLOSE)
    assert (held[0][0] - usual[0][0]).abs().max() > VISIBLE


def test_padding_token_outside_the_sharers_vocabulary_is_harmless(trio):
    receiver, _, _ = trio
    sharer = tiny_models.sharer_model(vocab_size=90)
    fuser = tiny_models.fuser_between(receiver, sharer)
    ids, mask = left_padded((7, 3))
    ids = ids.clamp(max=89)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        padded = ids.masked_fill(mask == 0, 95)
        output = generate(receiver, padded, attention_mask=mask)
        assert_same_run(output, padded, expected, kv=False)
        with pytest.raises(ValueError, match=r"sharer's vocabulary size 90, got 95"):
            generate(receiver, padded, attention_mask=torch.ones_like(mask))


@pytest.mark.parametrize("given_by", ["name", "object"])
def test_static_cache_matches_plain_loop(each_trio, given_by):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, sharer, fuser):
        for _ in range(2):  # transformers may keep and reuse the cache between calls
            if given_by == "name":
                how = {"cache_implementation": "static"}
            else:
                how = {"past_key_values": StaticCache(config=receiver.config, max_cache_len=32)}
            output = generate(receiver, ids, **how)
            assert_same_run(output, ids, expected, kv=False)
            for layer, (key, value) in zip(output.past_key_values.layers, expected.kv, strict=True):
                if not layer.is_sliding:
                    torch.testing.assert_close(layer.keys[:, :, : key.shape[2]], key, **CLOSE)
                    torch.testing.assert_close(layer.values[:, :, : key.shape[2]], value, **CLOSE)
    assert_visible(expected, receiver, ids)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces, self.ended = [], False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_streamer_sees_the_plain_loops_tokens(trio):
    receiver, sharer, fuser = trio
    ids, streamer = prompt(1), Collector()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, sharer, fuser):
        assert_same_run(generate(receiver, ids, streamer=streamer), ids, expected)
    assert streamer.ended
    assert torch.equal(torch.cat(streamer.pieces), torch.cat([ids[0], expected.tokens[0]]))
    assert_visible(expected, receiver, ids)


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, dtype=torch.bool)


def test_stopping_criteria_and_end_token_cut_the_plain_loops_answer(trio):
    receiver, sharer, fuser = trio
    ids = prompt(1)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, 4)
    end = int(expected.tokens[0, -1])
    assert end not in expected.tokens[0, :-1]
    with attached(receiver, sharer, fuser):
        stopped = generate(
            receiver, ids, stopping_criteria=StoppingCriteriaList([StopAt(ids.shape[1] + 4)])
        )
        ended = generate(receiver, ids, eos_token_id=end, pad_token_id=0)
    assert_same_run(stopped, ids, expected)
    assert_same_run(ended, ids, expected)
    assert_visible(expected, receiver, ids)


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("form", ["list", "tensor", "mask", "row_mask", "padded"])
def test_positions_fuse_only_what_they_name(trio, form, repeats):
    receiver, sharer, fuser = trio
    ids, mask = prompt(), None
    columns = torch.zeros(10, dtype=torch.bool)
    columns[[2, 3, 7]] = True
    if form == "list":
        positions = [2, 3, 7]
    elif form == "tensor":
        positions = torch.tensor([7, 3, 2])
    elif form == "row_mask":
        columns = torch.stack([columns, ~columns])
        positions = torch.cat([columns, torch.zeros(2, 1, dtype=torch.bool)], 1)
    else:
        positions = torch.cat([columns, torch.zeros(1, dtype=torch.bool)])
        if form == "padded":
            ids, mask = left_padded((11, 6))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask, columns)
    whole = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    rows = ids.repeat_interleave(repeats, 0)
    rows_mask = None if mask is None else mask.repeat_interleave(repeats, 0)
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver, ids, attention_mask=mask, positions=positions, num_beams=repeats,
            num_return_sequences=repeats, max_new_tokens=1,
        )  # fmt: skip
    expected = plain_loop.decode(
        receiver, plain_loop.repeat_rows(kv, repeats), rows, 1, mask=rows_mask
    )
    torch.testing.assert_close(output.logits[0], expected.logits[:, 0], **CLOSE)
    torch.testing.assert_close(
        [(k[:, :, :10], v[:, :, :10]) for k, v in plain_loop.kv_of(output.past_key_values)],
        plain_loop.repeat_rows(kv, repeats),
        **CLOSE,
    )
    all_fused = plain_loop.decode(receiver, whole, ids, 1, mask=mask).logits[:, 0]
    assert (all_fused.repeat_interleave(repeats, 0) - output.logits[0]).abs().max() > VISIBLE
    assert_visible(expected, receiver, rows, rows_mask)


def test_no_positions_leaves_the_prompt_unfused(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    clean = plain_loop.decode(receiver, plain_loop.prefill(receiver, ids[:, :-1]), ids, STEPS)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, positions=[])
    assert torch.equal(logits_of(output), clean.logits)


@pytest.mark.parametrize("how", ["greedy", "beams", "static", "no prompt"])
def test_prompt_of_one_token_generates_as_the_receiver_alone(trio, how):
    receiver, sharer, fuser = trio
    ids = None if how == "no prompt" else prompt(2, 1)
    settings = {"beams": {"num_beams": 2}, "static": {"cache_implementation": "static"}}.get(
        how, {}
    )
    alone = generate(receiver, ids, **settings)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, **settings)
        with pytest.raises(ValueError, match=r"prompt of one token.*nothing to fuse .* got 0"):
            generate(receiver, ids, positions=[0])
    assert torch.equal(output.sequences, alone.sequences)
    assert torch.equal(logits_of(output), logits_of(alone))


def test_closed_gates_change_no_bit(each_trio):
    receiver, sharer, _ = each_trio
    fuser = tiny_models.fuser_between(receiver, sharer)
    tiny_models.close_all_gates(fuser)
    ids = prompt()
    clean = plain_loop.prefill(receiver, ids[:, :-1])
    expected = plain_loop.decode(receiver, clean, ids, STEPS)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, past_key_values=DynamicCache())
    assert torch.equal(logits_of(output), expected.logits)
    assert torch.equal(new_tokens(output, ids), expected.tokens)
    held = plain_loop.kv_of(output.past_key_values)
    for pair, clean_pair, run_pair in zip(held, clean, expected.kv, strict=True):
        for tensor, clean_tensor, run_tensor in zip(pair, clean_pair, run_pair, strict=True):
            assert torch.equal(tensor[:, :, : clean_tensor.shape[2]], clean_tensor)
            assert torch.equal(tensor, run_tensor)

"""What a later turn refuses, with one error, and leaves as it was."""

from __future__ import annotations

import copy

import plain_loop
import pytest
import tiny_models
import torch
from chat_checks import (
    STEPS,
    answer,
    cropped,
    new_cache,
    said,
    spoken,
)
from generation_checks import (
    assert_same_run,
    generate,
    left_padded,
    prompt,
)
from plain_chat import PlainChat
from transformers import DynamicCache, StaticCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


@pytest.mark.parametrize(
    ("row", "column", "what"), [(0, 3, "masks"), (1, 5, "does not mask"), (2, 10, "masks")]
)
def test_a_mask_that_contradicts_earlier_turns_is_refused(trio, row, column, what):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 5, 1))
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        talk = spoken(answer(receiver, ids, cache, attention_mask=mask))
        later = torch.cat([mask, torch.ones(3, STEPS + 3, dtype=torch.long)], dim=1)
        wrong = later.clone()
        wrong[row, column] = 1 - wrong[row, column]
        message = rf"attention_mask must mark .*: row {row} {what} column {column}$"
        with pytest.raises(ValueError, match=message):
            answer(receiver, talk, cache, attention_mask=wrong)
        answer(receiver, talk, cache, attention_mask=later)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([3], r"positions must be at least 15 \(the 15 tokens that past_key_values holds .* got 3"),
        (slice(14, 17), r"slice must start at 15 or later \(the 15 tokens .* got 14"),
        (torch.arange(19) < 4, r"positions marks column 0: the 15 tokens that past_key_values"),
        ([18], r"at most 17 .* got 18"),
    ],
)
def test_what_is_held_is_not_fused_again(trio, positions, message):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), cache, max_new_tokens=5)
        talk = torch.cat([first.sequences, said(1)], dim=1)
        with pytest.raises(ValueError, match=message):
            answer(receiver, talk, cache, positions=positions)
    assert cache.get_seq_length() == 15


def test_an_edited_chat_is_refused_until_it_is_cropped(trio):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        output = answer(receiver, prompt(), cache)
        for column in (4, 10, 12):  # in the prompt, its last token, in the answer
            edited = spoken(output)
            edited[1, column] = 1 + edited[1, column] % 90
            before = plain_loop.kv_of(copy.deepcopy(cache))
            message = rf"input_ids must begin with .* row 1 has another one in column {column} "
            with pytest.raises(ValueError, match=message):
                answer(receiver, edited, cache)
            torch.testing.assert_close(plain_loop.kv_of(cache), before, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"row 1 has another one in column 4 "):
            again = output.sequences.clone()  # nothing new to read but its last token
            again[1, 4] = 1 + again[1, 4] % 90
            answer(receiver, again, cache)
        twin = cropped(copy.deepcopy(cache), 4)
        edited[1, 4] = 3
        answer(receiver, edited, twin)
        answer(receiver, spoken(output), cache)


def test_what_does_not_go_on_from_a_cache_is_refused(trio):
    receiver, sharer, fuser = trio
    foreign = plain_loop.cache_of(plain_loop.prefill(receiver, prompt()[:, :-1]))
    other = tiny_models.receiver_model(num_hidden_layers=2)
    wider = tiny_models.receiver_model(num_key_value_heads=4)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, prompt())
        cache, talk = output.past_key_values, torch.cat([output.sequences, said(1)], dim=1)
        before = plain_loop.kv_of(copy.deepcopy(cache))
        for ids in (talk[:, :16], talk[:, :5], said(1)):
            message = rf"input_ids must be the whole .* longer than the 16 .* got {ids.shape[1]}"
            with pytest.raises(ValueError, match=message):
                generate(receiver, ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask must be .* = \[2, 20\]"):
            generate(receiver, talk, past_key_values=cache, attention_mask=torch.ones(2, 4))
        with pytest.raises(ValueError, match="use_cache=False is not supported"):
            generate(receiver, talk, past_key_values=cache, use_cache=False)
        with pytest.raises(ValueError, match=r"must be empty .* the 10 tokens .* were not fused"):
            generate(receiver, prompt(), past_key_values=foreign)
        with pytest.raises(ValueError, match=r"cannot take 1 rows .*: it holds 2 rows"):
            generate(receiver, talk[:1], past_key_values=cache)
    for model, message in (
        (other, r"it holds 3 layers, the receiver has 2"),
        (wider, r"its layer 0 holds 2 heads of 12 channels, the receiver's 4 of 12"),
    ):
        with attached(model, sharer, tiny_models.fuser_between(model, sharer)):
            with pytest.raises(ValueError, match=message):
                generate(model, talk, past_key_values=cache)
    torch.testing.assert_close(plain_loop.kv_of(cache), before, rtol=0, atol=0)
    assert foreign.get_seq_length() == 10


def test_a_static_cache_without_room_for_the_turn_is_left_as_it_is(trio):
    receiver, sharer, fuser = trio
    cache = StaticCache(config=receiver.config, max_cache_len=16)
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), cache)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with pytest.raises(ValueError, match=r"cannot take 2 rows .*: it has room for 16 tokens"):
            answer(receiver, torch.cat([first.sequences, said(1, tokens=5)], dim=1), cache)
    assert cache.get_seq_length() == 13
    torch.testing.assert_close(plain_loop.kv_of(cache), before, rtol=0, atol=0)


def test_a_cache_without_plain_keys_is_not_gone_on_from(trio):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        output = generate(receiver, prompt())
        cache = output.past_key_values
        layer = cache.layers[0]
        layer._quantize = lambda t: t  # what a quantised layer has
        with pytest.raises(ValueError, match=r"must hold plain keys and values, a Dynamic\w*Layer"):
            generate(receiver, spoken(output), past_key_values=cache)


def test_a_mark_of_another_kind_is_no_mark(trio):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        output = generate(receiver, prompt())
        output.past_key_values._c2c_fused = True
        with pytest.raises(ValueError, match="past_key_values must be empty or come from"):
            generate(receiver, spoken(output), past_key_values=output.past_key_values)


def test_a_failing_later_turn_leaves_the_chat_as_it_was(trio):
    receiver, sharer, fuser = trio
    chat, cache = PlainChat(receiver, [sharer], [fuser]), DynamicCache()

    def fail(*args: object) -> None:
        raise KeyError("broken layer")

    with attached(receiver, sharer, fuser):
        talk = spoken(answer(receiver, prompt(), cache))
        for broken in (receiver.model.layers[-1], sharer.model.layers[-1]):
            hook = broken.register_forward_hook(fail)
            with pytest.raises(KeyError, match="broken layer"):
                answer(receiver, talk, cache)
            hook.remove()
            assert cache.get_seq_length() == 13
        output = answer(receiver, talk, cache)
    chat.turn(prompt(), STEPS)
    assert_same_run(output, talk, chat.turn(talk, STEPS))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_reset_and_filled_by_something_else_is_refused(each_trio, kind):
    receiver, sharer, fuser = each_trio
    ids = prompt(1, 4)
    cache = new_cache(kind, receiver)
    with attached(receiver, sharer, fuser):
        generate(receiver, ids, past_key_values=cache, max_new_tokens=2)
        cache.reset()
        with torch.no_grad():
            receiver(input_ids=ids, past_key_values=cache)
        longer = torch.cat([ids, prompt(1, 12)], dim=1)
        with pytest.raises(ValueError, match="c2c_ext: past_key_values must be empty or come"):
            generate(receiver, longer, past_key_values=cache)

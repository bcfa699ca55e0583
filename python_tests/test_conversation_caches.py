"""What may happen to the cache of a chat between its turns, and what the chat then goes on from."""

from __future__ import annotations

import copy
import gc
import pickle

import plain_loop
import pytest
import tiny_models
import torch
from chat_checks import (
    STEPS,
    Read,
    answer,
    cropped,
    new_cache,
    pair_of_sharers,
    said,
    spoken,
)
from generation_checks import (
    CLOSE,
    assert_same_run,
    generate,
    logits_of,
    new_tokens,
    prompt,
)
from plain_chat import PlainChat
from transformers import DynamicCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


@pytest.fixture(scope="module")
def pair():
    return pair_of_sharers()


@pytest.mark.parametrize("kept", [1, 6, 10, 12])
def test_a_cropped_chat_goes_on_from_there(each_trio, kept):
    receiver, sharer, fuser = each_trio
    chat, cache = PlainChat(receiver, [sharer], [fuser]), DynamicCache()
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), cache)
        answer(receiver, spoken(first), cache)
        cropped(cache, kept)
        edited = torch.cat([first.sequences[:, :kept], said(5)], dim=1)
        with Read(sharer) as shared:
            output = answer(receiver, edited, cache)
    assert shared == [(2, 2)] if kept <= 10 else [(2, kept - 10 + 2)]
    expected = chat.turn(prompt(), STEPS)
    chat.kv = [(k[:, :, :kept], v[:, :, :kept]) for k, v in expected.kv]
    chat.shared = [[(k[:, :, :kept], v[:, :, :kept]) for k, v in kv] for kv in chat.shared]
    assert_same_run(output, edited, chat.turn(edited, STEPS))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "copy"])
def test_a_copied_cache_branches_the_chat(trio, how):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), DynamicCache())
        cache = first.past_key_values
        if how == "deepcopy":
            branch = copy.deepcopy(cache)
        elif how == "pickle":
            branch = pickle.loads(pickle.dumps(cache))
        else:
            branch = copy.copy(cache)  # the layers' tensors are new in every step
            branch.layers = [copy.copy(layer) for layer in cache.layers]
        with Read(sharer) as shared:
            left = answer(receiver, spoken(first, 1), cache)
            right = answer(receiver, spoken(first, 2), branch)
        if how == "copy":
            answer(receiver, spoken(left, 3), cache)
    # A pickled sharer's cache is not taken for that of the sharer at hand.
    assert shared[:2] == [(2, 6), (2, 16) if how == "pickle" else (2, 6)]
    for output, turn in ((left, 1), (right, 2)):
        chat = PlainChat(receiver, [sharer], [fuser])
        chat.turn(prompt(), STEPS)
        talk = spoken(first, turn)
        assert_same_run(output, talk, chat.turn(talk, STEPS), kv=output is right)


@pytest.mark.parametrize("how", ["select", "repeat", "reorder"])
def test_rows_of_a_cache_may_be_moved(trio, how):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(3), cache)
        if how == "select":
            rows = torch.tensor([2, 0])
            cache.batch_select_indices(rows)
        elif how == "repeat":
            rows = torch.arange(3).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        else:
            rows = torch.tensor([1, 2, 1])
            cache.reorder_cache(rows)
        talk = torch.cat([first.sequences[rows], said(1, len(rows))], dim=1)
        with Read(sharer) as shared:
            output = answer(receiver, talk, cache)
        if how == "select":
            wrong = torch.cat([first.sequences[[0, 2]], said(1)], dim=1)
            with pytest.raises(ValueError, match=r"row 0 has another one in column 0"):
                answer(receiver, torch.cat([wrong, output.sequences], 1), cache)
    assert shared == [(len(rows), 6)]
    for i, row in enumerate(rows.tolist()):
        chat = PlainChat(receiver, [sharer], [fuser])
        chat.turn(prompt(3)[row : row + 1], STEPS)
        expected = chat.turn(talk[i : i + 1], STEPS)
        torch.testing.assert_close(logits_of(output)[i], expected.logits[0], **CLOSE)


def test_rows_of_beams_go_on_alone(trio):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        answer(receiver, prompt(), cache, num_beams=3)
        cropped(cache, 10)
        cache.batch_select_indices(torch.tensor([5, 1]))  # one of each prompt's three
        talk = torch.cat([prompt().flip(0)[:, :10], said(1)], dim=1)
        with Read(sharer) as shared:
            output = answer(receiver, talk, cache)
    assert shared == [(2, 2)]
    chat = PlainChat(receiver, [sharer], [fuser])
    chat.read(prompt().flip(0))
    assert_same_run(output, talk, chat.turn(talk, STEPS))


def test_a_later_turn_is_searched_by_beams(trio):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), cache)
        cache.batch_repeat_interleave(2)
        talk = spoken(first)
        output = answer(receiver, talk, cache, num_beams=2, num_return_sequences=2)
    for row in range(2):
        one = slice(row, row + 1)
        chat = PlainChat(receiver, [sharer], [fuser])
        chat.turn(prompt()[one], STEPS)
        chat.read(talk[one])
        tokens, scores = plain_loop.beam_search(receiver, chat.kv, talk[one], STEPS, 2)
        assert torch.equal(new_tokens(output, talk)[2 * row : 2 * row + 2], tokens)
        torch.testing.assert_close(output.sequences_scores[2 * row : 2 * row + 2], scores, **CLOSE)


@pytest.mark.parametrize("turn", [1, 2])
def test_a_turn_after_detach_reads_on_unfused(trio, turn):
    receiver, sharer, fuser = trio
    chat, cache, talk = PlainChat(receiver, [sharer], [fuser]), DynamicCache(), prompt()
    with attached(receiver, sharer, fuser):
        for i in range(turn):
            chat.turn(talk, STEPS)
            talk = spoken(answer(receiver, talk, cache), i)
    output = answer(receiver, talk, cache)
    kv = plain_loop.read_on(receiver, chat.kv, talk)
    assert_same_run(output, talk, plain_loop.decode(receiver, kv, talk, STEPS))
    with attached(receiver, sharer, fuser):  # what was read meanwhile is not known, and not fused
        more = spoken(output, 7)
        answer(receiver, more, cache)


def test_another_sharer_goes_on_from_the_start_of_the_chat(pair):
    receiver, sharers, fusers = pair
    chat, cache = PlainChat(receiver, sharers[:1], fusers[:1]), DynamicCache()
    with attached(receiver, sharers[0], fusers[0]):
        talk = spoken(answer(receiver, prompt(), cache))
    chat.turn(prompt(), STEPS)
    with attached(receiver, sharers[1], fusers[1]), Read(sharers[1]) as shared:
        output = answer(receiver, talk, cache)
    assert shared == [(2, 16)]
    other = PlainChat(receiver, sharers[1:], fusers[1:], kv=chat.kv)
    assert_same_run(output, talk, other.turn(talk, STEPS))


def test_the_same_sharer_attached_again_reads_on(trio):
    receiver, sharer, fuser = trio
    cache, talk = DynamicCache(), prompt()
    with Read(sharer) as shared:
        for turn in range(2):
            with attached(receiver, sharer, fuser):
                talk = spoken(answer(receiver, talk, cache), turn)
    assert shared == [(2, 10), (2, 6)]


def shared_by(cache) -> int:
    return len(cache._c2c_fused.shared)


def test_sharers_caches_are_kept_only_where_the_cache_outlives_the_call(trio):
    receiver, sharer, fuser = trio
    ids, seen = prompt(), []

    own = receiver.forward

    def watched(*args, **kwargs):
        seen.append(shared_by(kwargs["past_key_values"]))
        return own(*args, **kwargs)

    with attached(receiver, sharer, fuser):
        assert shared_by(generate(receiver, ids).past_key_values) == 1
        cache = DynamicCache()
        receiver.generate(ids, max_new_tokens=2, do_sample=False, past_key_values=cache)
        assert shared_by(cache) == 1
        receiver.forward = watched
        try:
            receiver.generate(ids, max_new_tokens=2, do_sample=False)
        finally:
            del receiver.forward
    assert seen == [0, 0]


def test_the_cache_of_a_sharer_that_is_gone_is_not_kept_on(trio):
    receiver, sharer, fuser = trio
    gone = tiny_models.sharer_model()
    with attached(receiver, gone, fuser):
        output = answer(receiver, prompt(), DynamicCache())
    assert shared_by(output.past_key_values) == 1
    del gone
    gc.collect()
    with attached(receiver, sharer, fuser):
        output = answer(receiver, spoken(output), output.past_key_values)
    assert shared_by(output.past_key_values) == 1


def test_a_reset_cache_begins_another_chat(each_trio):
    receiver, sharer, fuser = each_trio
    cache = new_cache("static", receiver)
    with attached(receiver, sharer, fuser):
        answer(receiver, spoken(answer(receiver, prompt(), cache)), cache)
        cache.reset()
        chat, talk = PlainChat(receiver, [sharer], [fuser]), prompt(2, 7, seed=3)
        for turn in range(2):
            output = answer(receiver, talk, cache)
            assert_same_run(output, talk, chat.turn(talk, STEPS), kv=False)
            talk = spoken(output, turn)

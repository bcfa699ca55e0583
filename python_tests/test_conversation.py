"""Chats: every turn on an attached receiver is fused, the earlier ones stay as they are."""

from __future__ import annotations

import copy

import plain_loop
import pytest
import tiny_models
import torch
from chat_checks import (
    CACHES,
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
    VISIBLE,
    assert_same_run,
    generate,
    left_padded,
    logits_of,
    new_tokens,
    prompt,
)
from plain_chat import PlainChat
from transformers import DynamicCache

from c2c_ext import Positions
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


def chat_like_the_plain_loop(trio, kind: str, turns: int) -> None:
    receiver, sharer, fuser = trio
    chat = PlainChat(receiver, [sharer], [fuser])
    talk, cache = prompt(), new_cache(kind, receiver)
    with attached(receiver, sharer, fuser):
        for turn in range(turns):
            output = answer(receiver, talk, cache)
            assert output.past_key_values is cache
            assert_same_run(output, talk, chat.turn(talk, STEPS), kv=kind == "dynamic")
            talk = spoken(output, turn)


@pytest.mark.parametrize("kind", CACHES)
def test_three_turns_equal_the_plain_loop(each_trio, kind):
    chat_like_the_plain_loop(each_trio, kind, 3)


@pytest.mark.parametrize("kind", CACHES)
def test_ten_turns_equal_the_plain_loop(trio, kind):
    chat_like_the_plain_loop(trio, kind, 10)


def test_a_second_turn_is_fused_and_overwrites_nothing(trio):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        output = answer(receiver, prompt(), DynamicCache())
        before = plain_loop.kv_of(copy.deepcopy(output.past_key_values))
        talk = spoken(output)
        again = answer(receiver, talk, output.past_key_values)
    held = before[0][0].shape[2]
    after = plain_loop.kv_of(again.past_key_values)
    for pair, old in zip(after, before, strict=True):
        for tensor, kept in zip(pair, old, strict=True):
            assert torch.equal(tensor[:, :, :held], kept)  # bit for bit
    # Neither is the first turn unfused, nor the second one, nor is the answer fused in between.
    clean = plain_loop.prefill(receiver, talk[:, :-1])
    read_on = plain_loop.read_on(receiver, before, talk)
    whole = plain_loop.fused_prompt(receiver, sharer, fuser, talk)
    for other in (clean, read_on, whole):
        logits = plain_loop.decode(receiver, other, talk, 1).logits[:, 0]
        assert (logits - again.logits[0]).abs().max() > VISIBLE


def test_no_token_is_read_twice(pair):
    receiver, sharers, fusers = pair
    with attached(receiver, sharers, fusers):
        cache, talk = DynamicCache(), prompt()
        with Read(receiver) as own, Read(sharers[0]) as first, Read(sharers[1]) as second:
            for turn in range(3):
                talk = spoken(answer(receiver, talk, cache), turn)
    # 11 tokens, 3 of answer, 3 more: the last answered token is read with what was said next.
    one, two = [(2, 10)], [(2, 6), (2, 6)]
    assert first == second == one + two
    step = [(2, 1)] * STEPS
    assert own == [(2, 10), *step, (2, 3), *step, (2, 3), *step]


@pytest.mark.parametrize("fusion", ["parallel", "sequential"])
def test_a_chat_with_several_sharers_equals_the_plain_loop(pair, fusion):
    receiver, sharers, fusers = pair
    chat = PlainChat(receiver, sharers, fusers, fusion=fusion)
    cache, talk = DynamicCache(), prompt()
    with attached(receiver, sharers, fusers, fusion=fusion):
        for turn in range(3):
            output = answer(receiver, talk, cache)
            assert_same_run(output, talk, chat.turn(talk, STEPS))
            talk = spoken(output, turn)


def test_turns_may_choose_their_sharers(pair):
    receiver, sharers, fusers = pair
    cache, talk = DynamicCache(), prompt()
    chat = PlainChat(receiver, sharers, fusers)
    with attached(receiver, sharers, fusers):
        for turn, chosen in enumerate(([0], [1], [], [0, 1], [[0], [1]])):
            output = answer(receiver, talk, cache, sharers=chosen)
            if turn == 4:
                chosen = [[True, False], [False, True]]
            else:
                chosen = [[k in chosen for k in range(2)]] * 2
            expected = chat.turn(talk, STEPS, chosen=torch.tensor(chosen))
            assert_same_run(output, talk, expected)
            talk = spoken(output, turn)


def test_sections_of_a_later_turn_begin_after_what_is_held(pair):
    receiver, sharers, fusers = pair
    chat = PlainChat(receiver, sharers, fusers)
    cache, talk = DynamicCache(), prompt()
    with attached(receiver, sharers, fusers):
        talk = spoken(answer(receiver, talk, cache))
        chat.turn(prompt(), STEPS)
        output = answer(receiver, talk, cache, sections=[(2, [0]), (1, [1])])  # the whole turn
        with pytest.raises(ValueError, match=r"sum to at most 2 .*, 19 are from .*, got 3"):
            later = torch.cat([output.sequences, said(2, 2, 2)], 1)
            answer(receiver, later, cache, sections=[(1, [0]), (2, [1])])
    for end, chosen in ((16, [True, False]), (17, [False, True])):  # one column after the other
        chat.read(talk[:, :end], chosen=torch.tensor([chosen] * 2))
    expected = chat.turn(talk, STEPS)
    assert_same_run(output, talk, expected)


def test_padded_rows_chat_like_the_plain_loop_and_alone(trio):
    receiver, sharer, fuser = trio
    lengths = (11, 5, 1)
    talk, mask = left_padded(lengths)
    chat, cache = PlainChat(receiver, [sharer], [fuser]), DynamicCache()
    rows = [(talk[i : i + 1, 11 - n :], DynamicCache()) for i, n in enumerate(lengths)]
    with attached(receiver, sharer, fuser):
        for turn in range(3):
            output = answer(receiver, talk, cache, attention_mask=mask)
            expected = chat.turn(talk, STEPS, mask=mask)
            assert_same_run(output, talk, expected, kv=False)  # what padding holds means nothing
            for i, (own, kept) in enumerate(rows):
                alone = answer(receiver, own, kept)
                torch.testing.assert_close(logits_of(output)[i], logits_of(alone)[0], **CLOSE)
                more = torch.cat([alone.sequences, said(turn, 3)[i : i + 1]], dim=1)
                rows[i] = more, kept
            talk = spoken(output, turn)
            mask = torch.cat([mask, torch.ones(3, STEPS + 3, dtype=torch.long)], dim=1)


def test_rows_that_ended_early_go_on_behind_their_padding(trio):
    receiver, sharer, fuser = trio
    first = prompt(seed=4)
    with attached(receiver, sharer, fuser):
        plain = answer(receiver, first, DynamicCache())
        end = int(new_tokens(plain, first)[0, 0])  # row 0 ends at once
        assert end not in new_tokens(plain, first)[1]
        cache = DynamicCache()
        output = answer(receiver, first, cache, eos_token_id=end, pad_token_id=0)
        assert new_tokens(output, first)[0].tolist() == [end, 0, 0]
        talk = spoken(output)
        mask = torch.ones_like(talk)
        mask[0, 12:14] = 0
        again = answer(receiver, talk, cache, attention_mask=mask)
        third, ones = spoken(again, 2), torch.ones(2, STEPS + 3, dtype=torch.long)
        twin = copy.deepcopy(cache)
        answer(receiver, third, twin, attention_mask=torch.cat([mask, ones], dim=1))
        with pytest.raises(ValueError, match=r"attention_mask must mark .* mask column 12$"):
            answer(receiver, third, cache)
    alone = torch.cat([first[:1], torch.tensor([[end]]), said(1)[:1]], dim=1)
    chat = PlainChat(receiver, [sharer], [fuser])
    chat.turn(first[:1], 2)  # the answered end is in the cache, unfused
    expected = chat.turn(alone, STEPS)
    torch.testing.assert_close(logits_of(again)[0], expected.logits[0], **CLOSE)


def test_chunks_bound_what_a_later_turn_reads(each_trio):
    receiver, sharer, fuser = each_trio
    with attached(receiver, sharer, fuser):
        for kind in CACHES:
            cache = new_cache(kind, receiver)
            first = answer(receiver, prompt(), cache)
            twin = copy.deepcopy(cache)
            talk = torch.cat([first.sequences, said(1, tokens=9)], dim=1)
            whole = answer(receiver, talk, twin)
            with Read(receiver) as own, Read(sharer) as shared:
                output = answer(receiver, talk, cache, prefill_chunk_size=4)
            torch.testing.assert_close(logits_of(output), logits_of(whole), **CLOSE)
            assert shared == [(2, 4), (2, 4), (2, 4)]
            assert own[:3] == [(2, 4), (2, 4), (2, 1)]


def test_a_turn_of_one_token_more_reads_nothing(trio):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser), Read(sharer) as shared:
        output = answer(receiver, prompt(), cache)
        again = answer(receiver, output.sequences, cache)  # the last answered token is unread
        longer = answer(receiver, prompt(), DynamicCache(), max_new_tokens=2 * STEPS)
    assert torch.equal(again.sequences, longer.sequences)
    assert shared == [(2, 10), (2, 10)]


def test_a_chat_without_masks_equals_the_plain_loop(trio):
    receiver, sharer, fuser = trio
    chat, cache, talk = PlainChat(receiver, [sharer], [fuser]), DynamicCache(), prompt()
    with attached(receiver, sharer, fuser):
        for turn in range(2):
            output = answer(receiver, talk, cache, attention_mask=None)
            assert_same_run(output, talk, chat.turn(talk, STEPS))
            talk = spoken(output, turn)


def own_text(tokens: int, turn: int) -> dict:
    """A sharer's own text of so many tokens; the receiver's new columns are fused with its end."""
    text = prompt(2, 40, seed=7)[:, :tokens]
    return {"input_ids": text, "span": (0, 2, 10) if turn == 0 else (13, tokens - 4, 3)}


@pytest.mark.parametrize("beams", [1, 2])
def test_a_sharer_with_a_text_of_its_own_reads_on_in_it(trio, beams):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser), Read(sharer) as shared:
        first = answer(receiver, prompt(), cache, sharer_inputs=own_text(14, 0))
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        talk, settings = spoken(first), {"sharer_inputs": own_text(22, 1)}
        if beams > 1:
            settings |= {"num_beams": beams, "max_new_tokens": 1}
        output = answer(receiver, talk, cache, **settings)
    assert shared == [(2, 14), (2 * beams, 8)]
    kv = plain_loop.prefill(receiver, prompt()[:, :10])
    text = plain_loop.prefill(sharer, own_text(22, 1)["input_ids"])
    for start, source, count in ((0, 2, 10), (13, 18, 3)):
        if start:
            kv = plain_loop.decode(receiver, kv, prompt(), STEPS).kv
            kv = plain_loop.read_on(receiver, kv, talk)
        token_map = torch.full((kv[0][0].shape[2],), -1)
        token_map[start : start + count] = torch.arange(source, source + count)
        with torch.no_grad():
            kv = plain_loop.reference.fuse(kv, text, fuser, token_map=token_map)
    expected = plain_loop.decode(receiver, kv, talk, STEPS)
    rows = logits_of(output)[::beams] if beams > 1 else logits_of(output)
    torch.testing.assert_close(rows, expected.logits[:, : rows.shape[1]], **CLOSE)


def test_a_sharer_that_a_turn_leaves_out_reads_on_later(pair):
    receiver, sharers, fusers = pair
    cache, talk = DynamicCache(), prompt()
    with attached(receiver, sharers, fusers), Read(sharers[1]) as shared:
        for turn, chosen in enumerate(([0, 1], [0], [0, 1])):
            talk = spoken(answer(receiver, talk, cache, sharers=chosen), turn)
    assert shared == [(2, 10), (2, 12)]


@pytest.mark.parametrize("kind", CACHES)
def test_a_first_turn_of_one_token_begins_a_chat(trio, kind):
    receiver, sharer, fuser = trio
    chat, cache, talk = (
        PlainChat(receiver, [sharer], [fuser]),
        new_cache(kind, receiver),
        said(0)[:, :1],
    )
    with attached(receiver, sharer, fuser):
        for turn in range(3):
            output = answer(receiver, talk, cache)
            assert_same_run(output, talk, chat.turn(talk, STEPS), kv=False)
            talk = spoken(output, turn)


NAMED = {
    "list": [15, 17],
    "range": range(15, 16),
    "slice": slice(16, 18),
    "slice to the end": slice(16, None),
    "everything": slice(None),
    "mask": torch.arange(19) == 16,
    "row mask": torch.stack([torch.arange(19) == 16, torch.arange(19) == 17]),
    "last": Positions.last(2),
    "first": Positions.first(1),
    "half": Positions.last_fraction(0.5),
    "nothing": [],
}


@pytest.mark.parametrize("form", list(NAMED))
def test_positions_of_a_later_turn_name_its_own_tokens(trio, form):
    receiver, sharer, fuser = trio
    chat, cache = PlainChat(receiver, [sharer], [fuser]), DynamicCache()
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), cache, max_new_tokens=5)
        assert cache.get_seq_length() == 15
        talk = torch.cat([first.sequences, said(1)], dim=1)  # new are columns 15, 16 and 17
        output = answer(receiver, talk, cache, positions=NAMED[form])
    named = {
        "list": [15, 17], "range": [15], "slice": [16, 17], "slice to the end": [16, 17],
        "everything": [15, 16, 17], "mask": [16], "last": [16, 17], "first": [15],
        "half": [16, 17], "nothing": [],
    }  # fmt: skip
    columns = torch.zeros(2, 18, dtype=torch.bool)
    for row in range(2):
        columns[row, [16 + row] if form == "row mask" else named[form]] = True
    chat.turn(prompt(), 5)
    assert_same_run(output, talk, chat.turn(talk, STEPS, columns=columns))


@pytest.mark.parametrize("positions", [Positions.first(3), Positions.last(2), slice(9, 12)])
def test_positions_of_a_later_turn_go_with_several_answers_to_padded_rows(trio, positions):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((9, 6))
    talk = torch.cat([ids, said(1, 2, 5)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], dim=1)

    def second_turn(answers: int):
        many = {"num_return_sequences": answers, "do_sample": True, "top_k": 1}
        first = generate(receiver, ids, attention_mask=mask[:, :9], **many)
        cache = cropped(first.past_key_values, 8)
        how = {"attention_mask": mask, "past_key_values": cache, "positions": positions, **many}
        return generate(receiver, talk, **how)

    with attached(receiver, sharer, fuser):
        one, two = second_turn(1), second_turn(2)
    assert torch.equal(two.sequences, one.sequences.repeat_interleave(2, 0))
    torch.testing.assert_close(logits_of(two), logits_of(one).repeat_interleave(2, 0), **CLOSE)


@pytest.mark.parametrize("how", ["assistant", "lookup", "drawn"])
def test_a_second_turn_may_decode_in_any_way(trio, how):
    receiver, sharer, fuser = trio
    settings = {"max_new_tokens": 6}
    if how == "assistant":
        settings["assistant_model"] = tiny_models.receiver_model("qwen3", num_hidden_layers=1)
    elif how == "lookup":
        settings.update(prompt_lookup_num_tokens=2, eos_token_id=1, suppress_tokens=[1])
    else:
        settings.update(do_sample=True, top_k=0)
    first, chat = prompt(1), PlainChat(receiver, [sharer], [fuser])
    with attached(receiver, sharer, fuser):
        output = answer(receiver, first, DynamicCache(), **settings)
        talk = torch.cat([output.sequences, said(1, 1)], dim=1)
        again = answer(receiver, talk, output.past_key_values, **settings)
    chat.turn(first, 6, choose=plain_loop.forced(new_tokens(output, first)))
    choose = plain_loop.forced(new_tokens(again, talk))
    assert_same_run(again, talk, chat.turn(talk, 6, choose=choose))


def test_an_attached_assistant_drafts_in_a_chat(trio):
    receiver, sharer, fuser = trio
    assistant = copy.deepcopy(receiver)
    first, chat = prompt(1), PlainChat(receiver, [sharer], [fuser])
    with attached(receiver, sharer, fuser), attached(assistant, sharer, fuser):
        settings = {"assistant_model": assistant, "max_new_tokens": 6}
        output = answer(receiver, first, DynamicCache(), **settings)
        talk = torch.cat([output.sequences, said(1, 1)], dim=1)
        again = answer(receiver, talk, output.past_key_values, **settings)
    assert_same_run(output, first, chat.turn(first, 6), kv=False)
    assert_same_run(again, talk, chat.turn(talk, 6))


def test_given_position_ids_go_on_in_both_models(trio):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    with attached(receiver, sharer, fuser):
        places = torch.arange(0, 40, 2)[None]
        first = answer(receiver, prompt(), cache, max_new_tokens=1, position_ids=places[:, :11])
        talk = spoken(first)
        output = answer(receiver, talk, cache, max_new_tokens=1, position_ids=places[:, :15])
    chat = PlainChat(receiver, [sharer], [fuser], stride=2)
    chat.turn(prompt(), 1)
    assert_same_run(output, talk, chat.turn(talk, 1))

"""Chats: every turn on an attached receiver is fused, the earlier ones stay as they are."""

from __future__ import annotations

import copy
import pickle

import plain_loop
import pytest
import tiny_models
import torch
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
from torch import Tensor
from transformers import DynamicCache, StaticCache

from c2c_ext import Positions
from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
CACHES = ["dynamic", "sliding", "static"]


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


@pytest.fixture(scope="module")
def pair():
    """(receiver, two sharers, their fusers)."""
    receiver = tiny_models.receiver_model()
    sharers = [tiny_models.sharer_model(), tiny_models.other_sharer_model()]
    fusers = [
        tiny_models.fuser_between(receiver, sharers[0]),
        tiny_models.fuser_between(receiver, sharers[1], layer_map=[0, 0, 1]),
    ]
    return receiver, sharers, fusers


def new_cache(kind: str, receiver):
    if kind == "static":
        return StaticCache(config=receiver.config, max_cache_len=80)
    return DynamicCache(config=receiver.config) if kind == "sliding" else DynamicCache()


def said(turn: int, rows: int = 2, tokens: int = 3) -> Tensor:
    """What the user says next."""
    return prompt(rows, tokens, seed=20 + turn)


def answer(receiver, talk: Tensor, cache, **settings):
    # Given a mask, generate does not take an answered padding token for padding.
    how = {
        "past_key_values": cache,
        "max_new_tokens": STEPS,
        "attention_mask": torch.ones_like(talk),
    }
    return generate(receiver, talk, **{**how, **settings})


def spoken(output, turn: int = 1) -> Tensor:
    """The whole conversation with the user's next turn."""
    return torch.cat([output.sequences, said(turn, len(output.sequences))], dim=1)


def cropped(cache, tokens: int):
    """In place; older versions of transformers count what is kept, newer ones what is not."""
    cache.crop(tokens - int(cache.get_seq_length()))
    return cache


class Read:
    """How many tokens each forward of a model reads, and in how many rows."""

    def __init__(self, model) -> None:
        self.seen: list[tuple[int, int]] = []
        layer = model.model.layers[0]
        self.hook = layer.register_forward_hook(
            lambda module, args, output: self.seen.append(tuple(args[0].shape[:2]))
        )

    def __enter__(self) -> list[tuple[int, int]]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


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

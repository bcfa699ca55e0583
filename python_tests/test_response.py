"""`fuse_response`: generated tokens fused block by block, against plain_chat.py's plain loop."""

from __future__ import annotations

import numpy as np
import plain_loop
import pytest
import tiny_models
import torch
from chat_checks import pair_of_sharers
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
from transformers import DynamicCache, StaticCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8
WINDOW = tiny_models.SLIDING_WINDOW


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


@pytest.fixture(scope="module")
def pair():
    """(receiver, two sharers, their fusers)."""
    return pair_of_sharers()


def new_cache(kind: str, receiver):
    if kind == "static":
        return StaticCache(config=receiver.config, max_cache_len=64)
    return DynamicCache(config=receiver.config) if kind == "sliding" else DynamicCache()


def answer(receiver, ids, every: int, **settings):
    # Given a mask, generate does not take an answered padding token for padding.
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": STEPS, "fuse_response": every, "attention_mask": mask, **settings}
    return generate(receiver, ids, **how)


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static"])
@pytest.mark.parametrize("every", [1, 3, WINDOW + 1])
def test_a_fused_answer_equals_the_plain_loop(each_trio, every, kind):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    expected = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, every=every)
    with attached(receiver, sharer, fuser):
        output = answer(receiver, ids, every, past_key_values=new_cache(kind, receiver))
    assert_same_run(output, ids, expected, kv=kind == "dynamic")
    choose = plain_loop.forced(expected.tokens)
    unfused = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, choose=choose).logits
    changed = (unfused - expected.logits).abs().amax((0, 2))
    # The first block is in the cache after the step that runs its last token.
    assert torch.equal(unfused[:, : every + 1], expected.logits[:, : every + 1])
    assert (changed[every + 1 :] > 0.01).all()


@pytest.mark.parametrize("how", ["nothing given", "tokens only", "static"])
def test_caches_that_generate_makes_are_fused_too(trio, how):
    receiver, sharer, fuser = trio
    ids = prompt()
    settings = {"cache_implementation": "static"} if how == "static" else {}
    expected = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, every=2)
    with attached(receiver, sharer, fuser):
        if how == "tokens only":
            output = receiver.generate(ids, fuse_response=2, max_new_tokens=STEPS, do_sample=False)
            assert torch.equal(output[:, ids.shape[1] :], expected.tokens)
        else:
            assert_same_run(answer(receiver, ids, 2, **settings), ids, expected, kv=False)


@pytest.mark.parametrize("every", [1, 3])
def test_a_drawn_fused_answer_equals_the_plain_loop(each_trio, every):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    torch.manual_seed(11)
    expected = PlainChat(receiver, [sharer], [fuser]).turn(
        ids, STEPS, every=every, choose=plain_loop.sampled(0.8)
    )
    with attached(receiver, sharer, fuser):
        torch.manual_seed(11)
        output = answer(receiver, ids, every, do_sample=True, temperature=0.8, top_k=0, top_p=1.0)
    assert_same_run(output, ids, expected, kv=False)
    assert not torch.equal(expected.tokens, expected.logits.argmax(-1))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_several_answers_to_a_prompt_are_fused_each(trio, kind):
    receiver, sharer, fuser = trio
    ids, cache = prompt(), new_cache(kind, trio[0])
    with attached(receiver, sharer, fuser):
        torch.manual_seed(12)
        output = answer(
            receiver, ids, 2, do_sample=True, top_k=0, num_return_sequences=3, past_key_values=cache
        )
        talk = torch.cat([output.sequences, prompt(6, 3, seed=9)], dim=1)
        again = answer(receiver, talk, 2, past_key_values=cache)
    rows = ids.repeat_interleave(3, 0)
    tokens = new_tokens(output, ids)
    assert len({tuple(row) for row in tokens.tolist()}) > 3
    chat = PlainChat(receiver, [sharer], [fuser])
    expected = chat.turn(rows, STEPS, every=2, choose=plain_loop.forced(tokens))
    assert_same_run(output, rows, expected, kv=False)
    assert_same_run(again, talk, chat.turn(talk, STEPS, every=2), kv=kind == "dynamic")


def test_padded_rows_are_fused_as_alone(trio):
    receiver, sharer, fuser = trio
    lengths = (11, 4, 1)
    ids, mask = left_padded(lengths)
    expected = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, mask=mask, every=2)
    with attached(receiver, sharer, fuser):
        output = answer(receiver, ids, 2, attention_mask=mask)
        assert_same_run(output, ids, expected, kv=False)
        for row, length in enumerate(lengths):
            alone = answer(receiver, ids[row : row + 1, -length:], 2)
            torch.testing.assert_close(logits_of(output)[row], logits_of(alone)[0], **CLOSE)


@pytest.mark.parametrize("fusion", ["parallel", "sequential"])
def test_several_sharers_fuse_the_rows_that_select_them(pair, fusion):
    receiver, sharers, fusers = pair
    ids = prompt()
    for chosen in ([[True, True], [True, True]], [[True, False], [False, True]]):
        chat = PlainChat(receiver, sharers, fusers, fusion=fusion)
        expected = chat.turn(ids, STEPS, every=2, chosen=torch.tensor(chosen))
        with attached(receiver, sharers, fusers, fusion=fusion):
            output = answer(receiver, ids, 2, sharers=torch.tensor(chosen))
        assert_same_run(output, ids, expected)


def test_without_a_selected_sharer_nothing_is_fused(pair):
    receiver, sharers, fusers = pair
    with attached(receiver, sharers, fusers):
        output, plain = (answer(receiver, prompt(), every, sharers=[]) for every in (1, 0))
    assert torch.equal(logits_of(output), logits_of(plain))


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static"])
def test_fused_answers_make_a_chat(each_trio, kind):
    receiver, sharer, fuser = each_trio
    chat, cache, talk = PlainChat(receiver, [sharer], [fuser]), new_cache(kind, receiver), prompt()
    read = []
    hook = sharer.model.layers[0].register_forward_hook(
        lambda module, args, output: read.append(args[0].shape[1])
    )
    with attached(receiver, sharer, fuser):
        for turn, every in enumerate((1, 3, 2)):
            output = answer(receiver, talk, every, past_key_values=cache, max_new_tokens=5)
            if turn == 0:
                assert read == [10, 2, 1, 1, 1]  # the prompt's last token with the first answered
            hook.remove()
            expected = chat.turn(talk, 5, every=every)
            assert_same_run(output, talk, expected, kv=kind == "dynamic")
            talk = torch.cat([output.sequences, prompt(2, 3, seed=20 + turn)], dim=1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_answer_to_one_token_is_fused(trio, kind):
    receiver, sharer, fuser = trio
    ids = prompt(2, 1)
    expected = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, every=2)
    with attached(receiver, sharer, fuser):
        output = answer(receiver, ids, 2, past_key_values=new_cache(kind, receiver))
    assert_same_run(output, ids, expected, kv=kind == "dynamic")


def test_an_answer_that_goes_on_from_a_cache_alone_is_fused(trio):
    receiver, sharer, fuser = trio
    chat, cache = PlainChat(receiver, [sharer], [fuser]), DynamicCache()
    with attached(receiver, sharer, fuser):
        first = answer(receiver, prompt(), 2, past_key_values=cache, max_new_tokens=3)
        again = answer(receiver, first.sequences, 2, past_key_values=cache)  # nothing said between
    chat.turn(prompt(), 3, every=2)
    assert_same_run(again, first.sequences, chat.turn(first.sequences, STEPS, every=2))


def test_prompts_with_positions_and_chunks_go_with_it(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    columns = torch.arange(10) >= 7
    expected = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, columns=columns, every=3)
    with attached(receiver, sharer, fuser):
        output = answer(receiver, ids, 3, positions=slice(7, None), prefill_chunk_size=4)
    assert_same_run(output, ids, expected)


def test_rows_that_have_ended_do_not_disturb_the_others(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    expected = PlainChat(receiver, [sharer], [fuser]).turn(ids, STEPS, every=1)
    end = int(expected.tokens[0, 0])
    stays = next(i for i, t in enumerate([*expected.tokens[1].tolist(), end]) if t == end)
    with attached(receiver, sharer, fuser):
        output = answer(receiver, ids, 1, eos_token_id=end, pad_token_id=0)
    assert (new_tokens(output, ids)[0, 1:] == 0).all()
    kept = min(stays + 1, STEPS)
    torch.testing.assert_close(logits_of(output)[1, :kept], expected.logits[1, :kept], **CLOSE)


def test_closed_gates_change_no_bit(each_trio):
    receiver, sharer, _ = each_trio
    fuser = tiny_models.fuser_between(receiver, sharer)
    tiny_models.close_all_gates(fuser)
    with attached(receiver, sharer, fuser):
        for kind in ("sliding", "static"):
            fused, plain = (
                answer(receiver, prompt(), every, past_key_values=new_cache(kind, receiver))
                for every in (2, 0)
            )
            assert torch.equal(logits_of(fused), logits_of(plain))


def test_zero_fuses_no_answer(trio):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        given, plain = answer(receiver, prompt(), 0), generate(receiver, prompt(), max_new_tokens=8)
        other = answer(receiver, prompt(), np.int64(1))
    assert torch.equal(logits_of(given), logits_of(plain))
    assert (logits_of(other) - logits_of(plain)).abs().max() > VISIBLE


def span_text(ids):
    return {"input_ids": ids, "span": (0, 0, 5)}


REFUSED = {
    "negative": ({"fuse_response": -1}, ValueError, "must be at least 0, got -1"),
    "float": ({"fuse_response": 1.0}, TypeError, "must be an integer, got float"),
    "bool": ({"fuse_response": True}, TypeError, "must be an integer, got bool"),
    "none": ({"fuse_response": None}, TypeError, "must be an integer, got NoneType"),
    "beams": ({"num_beams": 2}, ValueError, r"does not go with num_beams \(beam search"),
    "lookup": (
        {"prompt_lookup_num_tokens": 2},
        ValueError,
        r"does not go with prompt_lookup_num_tokens \(drafting",
    ),
    "early exit": (
        {"assistant_early_exit": 1},
        ValueError,
        r"does not go with assistant_early_exit \(drafting",
    ),
    "assistant": (
        {"assistant_model": object()},
        ValueError,
        r"does not go with assistant_model \(drafting",
    ),
    "own loop": (
        {"custom_generate": lambda *args, **kwargs: None},
        ValueError,
        "does not go with custom_generate",
    ),
    "own text": (
        {"sharer_inputs": span_text(prompt())},
        ValueError,
        r"does not go with sharer_inputs \(texts of the sharers' own",
    ),
    "sections": ({"sections": [(3, [0])]}, ValueError, "does not go with sections"),
    "positions": (
        {"position_ids": torch.arange(11)[None]},
        ValueError,
        "does not go with position_ids",
    ),
    "offloaded": (
        {"cache_implementation": "offloaded"},
        ValueError,
        "does not go with cache_implementation",
    ),
    "quantised": (
        {"cache_implementation": "quantized"},
        ValueError,
        "does not go with cache_implementation",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_go_with_it_is_refused_by_name(trio, case):
    receiver, sharer, fuser = trio
    settings, error, message = REFUSED[case]
    with attached(receiver, sharer, fuser):
        with pytest.raises(error, match="c2c_ext: fuse_response " + message):
            generate(receiver, prompt(), **{"fuse_response": 2, **settings})


def test_an_assistant_given_by_its_place_is_refused_by_name(trio):
    receiver, sharer, fuser = trio
    assistant = tiny_models.receiver_model(num_hidden_layers=1)
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match="does not go with assistant_model"):
            receiver.generate(prompt(1), *[None] * 5, assistant, fuse_response=1)


def test_a_cache_that_moves_its_layers_is_refused(trio):
    receiver, sharer, fuser = trio
    cache = DynamicCache()
    cache.offloading = True
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match="fuse_response does not go with past_key_values"):
            answer(receiver, prompt(), 2, past_key_values=cache)


def test_a_sharer_that_does_not_know_every_answer_is_refused(trio):
    receiver, _, _ = trio
    sharer = tiny_models.sharer_model(vocab_size=90)
    ids = prompt().clamp(max=89)
    with attached(receiver, sharer, tiny_models.fuser_between(receiver, sharer)):
        with pytest.raises(ValueError, match="can answer, 97: the sharer knows 90"):
            answer(receiver, ids, 2)
        answer(receiver, ids, 0)


def test_a_sharer_without_positions_for_the_answer_is_refused(trio):
    receiver, _, _ = trio
    sharer = tiny_models.sharer_model(max_position_embeddings=16)
    with attached(receiver, sharer, tiny_models.fuser_between(receiver, sharer)):
        with pytest.raises(ValueError, match=r"max_new_tokens, 19 tokens: the sharer has 16 "):
            answer(receiver, prompt(), 2)
        answer(receiver, prompt(), 2, max_new_tokens=6)
        answer(receiver, prompt(), 0)


def test_a_failing_step_leaves_nothing_armed(trio):
    receiver, sharer, fuser = trio
    calls = []

    def fail(*args: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("broken layer")

    hook = sharer.model.layers[-1].register_forward_hook(fail)
    with attached(receiver, sharer, fuser):
        with pytest.raises(KeyError, match="broken layer"):
            answer(receiver, prompt(), 2)
        hook.remove()
        assert receiver._c2c_attachment.calls == {}
        output = answer(receiver, prompt(), 2)
    expected = PlainChat(receiver, [sharer], [fuser]).turn(prompt(), STEPS, every=2)
    assert_same_run(output, prompt(), expected, kv=False)

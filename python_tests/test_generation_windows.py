"""Receivers with sliding windows, some between full layers: before, at and beyond the window."""

from __future__ import annotations

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    CLOSE,
    assert_same_run,
    assert_visible,
    generate,
    new_tokens,
    prompt,
)
from plain_chat import PlainChat
from transformers import DynamicCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = tiny_models.SLIDING_WINDOW
STEPS = 7  # beyond the window even where the prompt is not
LENGTHS = [2, WINDOW, WINDOW + 1, 3 * WINDOW]


@pytest.fixture(scope="module", params=tiny_models.SLIDING)
def trio(request):
    return tiny_models.trio(request.param)


def settings_of(how: str) -> dict[str, object]:
    if how == "assistant":
        return {"assistant_model": tiny_models.receiver_model("qwen3", num_hidden_layers=1)}
    if how == "lookup":
        return {"prompt_lookup_num_tokens": 2, "eos_token_id": 1, "suppress_tokens": [1]}
    return {"cache_implementation": "static"} if how == "static" else {}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("how", ["dynamic", "static", "assistant", "lookup"])
def test_answers_across_the_window_match_plain_loop(trio, how, length):
    receiver, sharer, fuser = trio
    rows = 1 if how in ("assistant", "lookup") else 2
    ids = prompt(rows, length, seed=length)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, max_new_tokens=STEPS, **settings_of(how))
    tokens = new_tokens(output, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, choose=plain_loop.forced(tokens))
    assert_same_run(output, ids, expected, kv=False)
    allowed = expected.logits.clone()
    if how == "lookup":
        allowed[:, :, 1] = -torch.inf
    assert torch.equal(tokens, allowed.argmax(-1))
    assert_visible(expected, receiver, ids)


@pytest.mark.parametrize("length", [3, WINDOW, 11])
def test_dynamic_layers_keep_the_window_of_the_plain_loops_cache(trio, length):
    receiver, sharer, fuser = trio
    ids = prompt(2, length)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, sharer, fuser):
        cache = DynamicCache(config=receiver.config)
        output = generate(receiver, ids, max_new_tokens=STEPS, past_key_values=cache)
    layers = output.past_key_values.layers
    assert any(layer.is_sliding for layer in layers)
    for layer, pair in zip(layers, expected.kv, strict=True):
        total = length + STEPS - 1
        kept = WINDOW - 1 if layer.is_sliding else total
        assert int(layer.get_seq_length()) == total
        for held, full in zip((layer.keys, layer.values), pair, strict=True):
            assert held.shape[2] == kept
            torch.testing.assert_close(held, full[:, :, -kept:], **CLOSE)


@pytest.mark.parametrize("how", ["dynamic", "static"])
@pytest.mark.parametrize("length", [3, 11])
def test_beams_across_the_window_match_plain_beam_search(trio, length, how):
    receiver, sharer, fuser = trio
    ids = prompt(2, length)
    settings = {"cache_implementation": "static"} if how == "static" else {}
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver, ids, num_beams=2, num_return_sequences=2, max_new_tokens=5, **settings
        )
    for row in range(2):
        one = ids[row : row + 1]
        kv = plain_loop.fused_prompt(receiver, sharer, fuser, one)
        tokens, scores = plain_loop.beam_search(receiver, kv, one, 5, 2)
        both = slice(2 * row, 2 * row + 2)
        assert torch.equal(new_tokens(output, ids)[both], tokens)
        torch.testing.assert_close(output.sequences_scores[both], scores, **CLOSE)
        clean = plain_loop.prefill(receiver, one[:, :-1])
        _, unfused = plain_loop.beam_search(receiver, clean, one, 5, 2)
        assert (unfused - scores).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_a_drafted_second_turn_beyond_the_window_matches_plain_loop(trio, how, kind):
    receiver, sharer, fuser = trio
    ids, said = prompt(1), prompt(1, 4, seed=9)
    chat = PlainChat(receiver, [sharer], [fuser])
    first = chat.turn(ids, 2)  # fused tokens stay within reach
    talk = torch.cat([ids, first.tokens, said], dim=1)
    cache = DynamicCache(**({"config": receiver.config} if kind == "sliding" else {}))
    with attached(receiver, sharer, fuser):
        generate(receiver, ids, max_new_tokens=2, past_key_values=cache)
        settings = {"max_new_tokens": STEPS, "past_key_values": cache, **settings_of(how)}
        try:
            output = generate(receiver, talk, **settings)
        except ValueError as error:  # transformers 4.57 takes no drafted token back from a window
            assert kind == "sliding" and "Cannot `crop`" in str(error)
            return
    expected = chat.turn(talk, STEPS, choose=plain_loop.forced(new_tokens(output, talk)))
    assert_same_run(output, talk, expected, kv=False)
    assert_visible(expected, receiver, talk)

"""Assisted decoding and guidance from a fused prompt, and the ways to decode that are refused."""

from __future__ import annotations

import copy

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
from transformers import GenerationConfig

from c2c_ext.generation import attach, attached

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRED = prompt(1).repeat(1, 2)  # something to look up


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


def drafting(draft: str, trio, tokens: torch.Tensor) -> dict[str, object]:
    """How generate is to be asked; ``tokens``: of the answer."""
    if draft == "lookup":
        # Looking up needs an end token; this one does not come.
        end = next(i for i in range(2, tiny_models.VOCABULARY) if i not in tokens)
        return {"prompt_lookup_num_tokens": 3, "eos_token_id": end}
    if draft == "attached":
        assistant = attach(copy.deepcopy(trio[0]), *trio[1:])
    else:
        assistant = tiny_models.receiver_model("qwen3", num_hidden_layers=1)
    assistant.generation_config.num_assistant_tokens = 3
    return {"assistant_model": assistant}


def lengths_of_forwards(receiver) -> tuple[list[int], object]:
    """How many tokens the receiver's head gives logits for, call by call, until it is removed."""
    lengths: list[int] = []
    hook = receiver.lm_head.register_forward_hook(
        lambda module, inputs, logits: lengths.append(logits.shape[1])
    )
    return lengths, hook


@pytest.mark.parametrize("draft", ["assistant", "attached", "lookup"])
def test_drafted_tokens_do_not_change_the_greedy_answer(each_trio, draft):
    receiver, sharer, fuser = each_trio
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, PAIRED)
    expected = plain_loop.decode(receiver, kv, PAIRED, STEPS)
    how = drafting(draft, each_trio, expected.tokens)
    lengths, hook = lengths_of_forwards(receiver)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, PAIRED, **how)
    hook.remove()
    assert_same_run(output, PAIRED, expected, kv=False)
    assert_visible(expected, receiver, PAIRED)
    assert max(lengths) > 1  # drafted tokens were checked,
    if draft == "attached":  # and taken: this assistant gives the same answer
        assert len(lengths) < STEPS
    # Taken back is what was not taken; sliding layers may have dropped old tokens.
    for layer, pair in zip(output.past_key_values.layers, expected.kv, strict=True):
        assert int(layer.get_seq_length()) == PAIRED.shape[1] + STEPS - 1
        for held, full in zip((layer.keys, layer.values), pair, strict=True):
            assert held.shape[2] >= min(full.shape[2], tiny_models.SLIDING_WINDOW - 1)
            torch.testing.assert_close(held, full[:, :, -held.shape[2] :], **CLOSE)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("draft", ["assistant", "attached", "lookup"])
def test_drafted_tokens_are_drawn_from_the_plain_loops_logits(kind, draft):
    trio = receiver, sharer, fuser = tiny_models.trio(kind)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, PAIRED)
    how = drafting(draft, trio, torch.zeros(1))
    how.update(do_sample=True, top_k=0, temperature=1.3)
    if draft == "lookup":
        how["eos_token_id"] = 1  # kept away, so that the answer has its length
        how["suppress_tokens"] = [1]
    outputs = []
    for seed in (1, 1, 2):
        with attached(receiver, sharer, fuser):
            torch.manual_seed(seed)
            outputs.append(generate(receiver, PAIRED, **how))
    tokens = [new_tokens(output, PAIRED) for output in outputs]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    for output, own in ((outputs[0], tokens[0]), (outputs[2], tokens[2])):
        choose = plain_loop.forced(own)
        expected = plain_loop.decode(receiver, kv, PAIRED, STEPS, choose=choose)
        assert_same_run(output, PAIRED, expected, kv=False)
        drawn_from = expected.logits / 1.3
        if draft == "lookup":
            drawn_from[:, :, 1] = -torch.inf
        torch.testing.assert_close(torch.stack(output.scores, 1), drawn_from, **CLOSE)
        assert_visible(expected, receiver, PAIRED)


def test_speculative_draws_follow_the_fused_distribution(trio):
    receiver, sharer, fuser = trio
    ids, temperature, draws = prompt(1, seed=3), 0.6, 150

    def chances(kv):
        return (plain_loop.decode(receiver, kv, ids, 1).logits[0, 0] / temperature).softmax(-1)

    right = chances(plain_loop.fused_prompt(receiver, sharer, fuser, ids))
    unfused = chances(plain_loop.prefill(receiver, ids[:, :-1]))
    how = drafting("assistant", trio, torch.zeros(1))
    how.update(do_sample=True, top_k=0, temperature=temperature, max_new_tokens=2)
    count = torch.zeros(tiny_models.VOCABULARY)
    with attached(receiver, sharer, fuser):
        torch.manual_seed(3)
        for _ in range(draws):
            count[generate(receiver, ids, **how).sequences[0, -2]] += 1
    # Draws from the distribution itself are about 0.16 away from it, here and so many.
    assert (count / draws - right).abs().sum() / 2 < 0.25
    assert (count / draws - unfused).abs().sum() / 2 > 0.6


def test_the_receiver_as_its_own_assistant_is_refused(trio):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match="assistant_model must be another model"):
            generate(receiver, PAIRED, assistant_model=receiver)
        with pytest.raises(ValueError, match="assistant_model must be another model"):
            receiver.generate(PAIRED, *[None] * 5, receiver)


def test_early_exit_drafts_do_not_change_the_greedy_answer():
    trio = tiny_models.trio("llama")
    receiver = trio[0]
    try:
        generate(copy.deepcopy(receiver), PAIRED, assistant_early_exit=1)
    except (TypeError, AttributeError):  # some versions of transformers break it
        with attached(*trio), pytest.raises((TypeError, AttributeError)):
            generate(receiver, PAIRED, assistant_early_exit=1)
        return
    expected = plain_loop.decode(receiver, plain_loop.fused_prompt(*trio, PAIRED), PAIRED, STEPS)
    with attached(*trio):
        output = generate(receiver, PAIRED, assistant_early_exit=1)
    assert_same_run(output, PAIRED, expected)
    assert_visible(expected, receiver, PAIRED)


@pytest.mark.parametrize("draw", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("negative", [False, True], ids=["last token", "negative prompt"])
def test_guidance_leads_away_from_what_the_receiver_reads_alone(each_trio, negative, draw):
    receiver, sharer, fuser = each_trio
    ids, away, scale = prompt(), prompt(2, 7, seed=8) if negative else None, 2.5
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    guided = [plain_loop.Guided(receiver, away, scale)]
    choose = plain_loop.Processed(ids, guided, draw=draw)
    torch.manual_seed(6)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, choose=choose)
    with attached(receiver, sharer, fuser):
        torch.manual_seed(6)
        output = generate(
            receiver, ids, guidance_scale=scale, negative_prompt_ids=away, do_sample=draw, top_k=0
        )
    assert_same_run(output, ids, expected, kv=False)
    scores = torch.stack(choose.scores, 1)
    torch.testing.assert_close(torch.stack(output.scores, 1), scores, rtol=1e-4, atol=1e-4)
    assert (scores - expected.logits.log_softmax(-1)).abs().max() > VISIBLE
    assert_visible(expected, receiver, ids)


def test_guidance_with_left_padding_and_a_static_cache_matches_the_plain_loop(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 6))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    choose = plain_loop.Processed(ids, [plain_loop.Guided(receiver, None, 3.0)], draw=False)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask, choose=choose)
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver, ids, attention_mask=mask, guidance_scale=3.0, cache_implementation="static"
        )
    assert_same_run(output, ids, expected, kv=False)
    scores = torch.stack(choose.scores, 1)
    torch.testing.assert_close(torch.stack(output.scores, 1), scores, rtol=1e-4, atol=1e-4)
    assert_visible(expected, receiver, ids, mask)


CONTRASTIVE = {"penalty_alpha": 0.6, "top_k": 4}
REFUSED = {
    "contrastive": (CONTRASTIVE, r"penalty_alpha \(contrastive search\)"),
    "contrastive by default k": ({"penalty_alpha": 0.6}, r"penalty_alpha \(contrastive search\)"),
    "dola": ({"dola_layers": "low"}, r"dola_layers \(DoLa\)"),
    "groups": (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        r"num_beam_groups \(group beam search\)",
    ),
    "words": ({"num_beams": 2, "force_words_ids": [[5]]}, r"force_words_ids \(constrained"),
    "constraints": ({"num_beams": 2, "constraints": [object()]}, r"constraints \(constrained"),
    "mtp": ({"use_mtp": True}, r"use_mtp \(multi-token prediction\)"),
    "dflash": ({"speculation_type": "dflash"}, r"speculation_type \(drafting by"),
}


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["", "trusting"])
@pytest.mark.parametrize("case", list(REFUSED))
def test_a_way_to_decode_that_cannot_start_fused_is_refused_by_name(trio, monkeypatch, case, trust):
    receiver, sharer, fuser = trio
    settings, message = REFUSED[case]

    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(type(receiver), "load_custom_generate", fetch)
    message += r".* is not supported by an attached receiver: \w+"
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match=message):
            generate(receiver, prompt(), **settings, **trust)
        assert receiver._c2c_attachment.calls == {}


@pytest.mark.parametrize("given", ["configuration", "positional", "the receiver's"])
def test_contrastive_search_is_refused_wherever_it_is_asked_for(given):
    receiver, sharer, fuser = tiny_models.trio()
    config = GenerationConfig(**CONTRASTIVE, max_new_tokens=2)
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match=r"penalty_alpha \(contrastive search\)"):
            if given == "configuration":
                receiver.generate(prompt(), generation_config=config)
            elif given == "positional":
                receiver.generate(prompt(), config)
            else:
                receiver.generation_config = config
                receiver.generate(prompt())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_alpha": 0.6, "top_k": 1},
        {"penalty_alpha": 0.0, "top_k": 4},
        {"penalty_alpha": 0.6, "top_k": 4, "num_beams": 2},
        {"penalty_alpha": 0.6, "top_k": 1, "do_sample": True},
        {"num_beam_groups": 1},
    ],
    ids=str,
)
def test_settings_that_ask_for_nothing_special_are_not_refused(trio, settings):
    receiver, sharer, fuser = trio
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, max_new_tokens=1, **settings)
    expected = plain_loop.decode(receiver, kv, ids, 1)
    rows = output.logits[0][:: len(output.logits[0]) // 2]
    torch.testing.assert_close(rows, expected.logits[:, 0], **CLOSE)
    assert_visible(expected, receiver, ids)


def test_a_decoding_loop_of_ones_own_may_use_any_setting(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)

    def own(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        assert generation_config.penalty_alpha == 0.6
        kwargs.pop("synced_gpus", None)
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, **kwargs
        )

    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, custom_generate=own, **CONTRASTIVE)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    torch.testing.assert_close(logits_of(output), expected.logits, **CLOSE)

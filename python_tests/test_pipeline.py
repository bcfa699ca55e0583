"""An attached receiver behind a tokenizer: text-generation pipelines and token healing."""

from __future__ import annotations

import copy

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import STEPS, VISIBLE, assert_same_run, generate
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from c2c_ext.generation import attached

TEXT = "w12 w40 w7 w33 w21 w64 w9"


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<s>", *(f"w{word}" for word in range(2, tiny_models.VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", padding_side="left"
    )


@pytest.mark.parametrize("positions", [None, [1, 2, 4]])
def test_text_generation_pipeline_answers_from_the_fused_cache(trio, tokenizer, positions):
    receiver, sharer, fuser = trio
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    columns = None
    if positions is not None:
        columns = torch.tensor([column in positions for column in range(ids.shape[1] - 1)])
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, columns=columns)
    fused = plain_loop.decode(receiver, kv, ids, STEPS).tokens
    clean = plain_loop.decode(receiver, plain_loop.prefill(receiver, ids[:, :-1]), ids, STEPS)
    assert not torch.equal(fused, clean.tokens)
    named = {} if positions is None else {"positions": positions}
    with attached(receiver, sharer, fuser):
        ask = pipeline("text-generation", model=receiver, tokenizer=tokenizer)
        answer = ask(TEXT, max_new_tokens=STEPS, do_sample=False, return_full_text=False, **named)
    assert answer[0]["generated_text"].split() == tokenizer.decode(fused[0]).split()


TEXTS = [TEXT, "w5 w6", "w90 w3 w44 w8", "w70 w71 w72 w73 w74 w75 w76 w77", "w9"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w50 "


def answers(trio, ids, choose=None) -> tuple[list[str], list[str]]:
    """The plain loop's tokens for ``ids [1, P]``, fused and not, as the tokenizer spells them."""
    receiver, sharer, fuser = trio
    both = (
        plain_loop.fused_prompt(receiver, sharer, fuser, ids) if ids.shape[1] > 1 else [],
        plain_loop.prefill(receiver, ids[:, :-1]) if ids.shape[1] > 1 else [],
    )
    found = [plain_loop.decode(receiver, kv, ids, STEPS, choose=choose).tokens[0] for kv in both]
    return tuple([f"w{int(token)}" for token in tokens] for tokens in found)


def spelled(text: str) -> list[str]:
    return ["w1" if word == "<s>" else "w0" if word == "<pad>" else word for word in text.split()]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pipeline_answers_a_list_of_texts_as_each_alone(trio, tokenizer, batch_size):
    expected, clean = zip(
        *(answers(trio, tokenizer(text, return_tensors="pt").input_ids) for text in TEXTS),
        strict=True,
    )
    assert sum(a != b for a, b in zip(expected, clean, strict=True)) >= 3
    with attached(*trio) as receiver:
        ask = pipeline("text-generation", model=receiver, tokenizer=tokenizer)
        settings = {"max_new_tokens": STEPS, "do_sample": False, "batch_size": batch_size}
        parts = ask(TEXTS, return_full_text=False, **settings)
        wholes = ask(TEXTS, return_full_text=True, **settings)
    for text, words, part, whole in zip(TEXTS, expected, parts, wholes, strict=True):
        assert spelled(part[0]["generated_text"]) == words
        full = whole[0]["generated_text"]
        assert full.startswith(text) and spelled(full.removeprefix(text)) == words


def test_pipeline_returns_several_fused_sequences(trio, tokenizer):
    receiver, sharer, fuser = trio
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    tokens, _ = plain_loop.beam_search(receiver, kv, ids, STEPS, 3)
    clean = plain_loop.prefill(receiver, ids[:, :-1])
    unfused, _ = plain_loop.beam_search(receiver, clean, ids, STEPS, 3)
    assert not torch.equal(tokens, unfused)
    settings = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 3}
    with attached(receiver, sharer, fuser):
        ask = pipeline("text-generation", model=receiver, tokenizer=tokenizer)
        found = ask(TEXT, do_sample=False, return_full_text=False, **settings)
    expected = [[f"w{int(token)}" for token in row] for row in tokens]
    assert [spelled(one["generated_text"]) for one in found] == expected


@pytest.mark.parametrize("talks", [1, 2])
def test_pipeline_answers_chats_through_the_template(trio, tokenizer, talks):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    chats = [
        [{"role": "w40", "content": "w41 w42 w43"}],
        [
            {"role": "w30", "content": "w31 w32"},
            {"role": "w33", "content": "w34"},
            {"role": "w30", "content": "w35 w36 w37"},
        ],
    ][:talks]
    with attached(*trio) as receiver:
        ask = pipeline("text-generation", model=receiver, tokenizer=tokenizer)
        found = ask(chats, max_new_tokens=STEPS, do_sample=False, batch_size=talks)
    for chat, one in zip(chats, found, strict=True):
        words = " ".join(f"{turn['role']} {turn['content']}" for turn in chat) + " w50"
        expected, clean = answers(trio, tokenizer(words, return_tensors="pt").input_ids)
        assert expected != clean
        reply = one[0]["generated_text"][-1]
        assert reply["role"] == "assistant" and spelled(reply["content"]) == expected


def test_healed_prompt_is_fused_again(trio, tokenizer):
    receiver, sharer, fuser = trio
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with attached(receiver, sharer, fuser):
        healed = receiver.heal_tokens(ids.clone(), tokenizer)
        output = generate(receiver, ids, token_healing=True, tokenizer=tokenizer)
    assert torch.equal(healed[:, :-1], ids[:, :-1])
    assert not torch.equal(healed, ids)  # generate was called inside generate
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, healed)
    expected = plain_loop.decode(receiver, kv, healed, STEPS)
    clean = plain_loop.prefill(receiver, healed[:, :-1])
    alone = plain_loop.decode(receiver, clean, healed, STEPS)
    assert (alone.logits[:, 0] - expected.logits[:, 0]).abs().max() > VISIBLE
    assert_same_run(output, healed, expected)

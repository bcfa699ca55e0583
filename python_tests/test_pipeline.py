"""An attached receiver behind a tokenizer: text-generation pipelines and token healing."""

from __future__ import annotations

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
    receiver, sharer = tiny_models.receiver_model("qwen3"), tiny_models.sharer_model()
    return receiver, sharer, tiny_models.fuser_between(receiver, sharer)


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

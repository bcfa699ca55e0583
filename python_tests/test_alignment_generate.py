"""Texts and chats through TokenAligner into generate: two tokenizers, equal to a plain loop."""

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import CLOSE, STEPS, VISIBLE, generate, logits_of, new_tokens
from local_tokenizers import letter_tokenizer, turns, word_tokenizer

import c2c_ext
from c2c_ext import TokenAligner, reference
from c2c_ext.aligned import AlignedBatch, Alignment


def by_hand(receiver, sharer, fuser, row: Alignment) -> plain_loop.Decoded:
    """One row: both models read their own tokens, the map says what is fused with what."""
    ids, others = torch.tensor([row.receiver_ids]), torch.tensor([row.sharer_ids])
    base = plain_loop.prefill(receiver, ids[:, :-1])
    shared = plain_loop.prefill(sharer, others)
    places = torch.tensor([row.token_map[:-1]])
    fused = reference.fuse(base, shared, fuser, token_map=places)
    return plain_loop.decode(receiver, fused, ids, STEPS)


def check(models, batch: AlignedBatch) -> None:
    receiver, sharer, fuser = models
    with c2c_ext.attached(receiver, sharer, fuser):
        output = generate(receiver, None, **batch.receiver, sharer_inputs=batch.sharer_inputs)
        tokens = new_tokens(output, batch.receiver["input_ids"])
    for i, row in enumerate(batch.alignments):
        assert max(row.token_map[:-1]) >= 0
        expected = by_hand(receiver, sharer, fuser, row)
        assert torch.equal(tokens[i], expected.tokens[0])
        torch.testing.assert_close(logits_of(output)[i], expected.logits[0], **CLOSE)
        unfused = by_hand(
            *models, Alignment(row.receiver_ids, row.sharer_ids, [-1] * len(row.token_map))
        )
        assert (unfused.logits[:, 0] - expected.logits[:, 0]).abs().max() > VISIBLE


@pytest.fixture
def models():
    """A sharer of fewer tokens than the receiver has."""
    receiver = tiny_models.receiver_model()
    sharer = tiny_models.sharer_model(vocab_size=len(letter_tokenizer()))
    return receiver, sharer, tiny_models.fuser_between(receiver, sharer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", ["span", "longest"])
def test_texts_in_two_tokenizations_equal_a_plain_loop(models, strategy: str, side: str) -> None:
    aligner = TokenAligner(word_tokenizer(), letter_tokenizer(), strategy)
    texts = ["w12 w3 w45 w6 w7 w80", "w9 w10", "w1 w22 w33"]
    check(models, aligner(texts, padding_side=side))


def test_chats_in_two_templates_equal_a_plain_loop(models) -> None:
    letters = letter_tokenizer()
    letters.chat_template = letters.chat_template.replace("<s>", "<s> <sys>", 1)
    aligner = TokenAligner(word_tokenizer(), letters)
    talks = [turns("w12 w3", "w4", "w5 w67"), turns("w8 w90")]
    check(models, aligner.apply_chat_template(talks))

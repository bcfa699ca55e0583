"""Chats whose answers are fused too, for every architecture of test_architectures.py."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from generation_checks import assert_same_run, generate, prompt
from plain_chat import PlainChat
from test_architectures import ARCHITECTURES, model_of
from transformers import DynamicCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("role", ["receiver", "sharer"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_chat_of_fused_answers_equals_the_plain_loop(name, role):
    if role == "receiver":
        receiver, sharer = model_of(name), tiny_models.sharer_model()
    else:
        receiver, sharer = tiny_models.receiver_model(), model_of(name, seed=2)
    fuser = tiny_models.fuser_between(receiver, sharer)
    chat, cache, talk = PlainChat(receiver, [sharer], [fuser]), DynamicCache(), prompt(2, 7)
    with attached(receiver, sharer, fuser):
        for turn in range(2):
            output = generate(
                receiver,
                talk,
                # Given a mask, generate does not take an answered padding token for padding.
                attention_mask=torch.ones_like(talk),
                past_key_values=cache,
                max_new_tokens=5,
                fuse_response=2,
            )
            assert_same_run(output, talk, chat.turn(talk, 5, every=2))
            talk = torch.cat([output.sequences, prompt(2, 3, seed=20 + turn)], dim=1)

"""Prompts beyond the positions that a model was made for: refused, with the model's name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from generation_checks import generate, left_padded, prompt
from transformers import GPT2Config, LlamaConfig

from c2c_ext.generation import attached
from c2c_ext.position_limit import limit_of


@pytest.fixture(scope="module")
def short():
    """(receiver of 12 positions, sharers of 256 and of 10, fusers)."""
    receiver = tiny_models.receiver_model(max_position_embeddings=12)
    sharers = [
        tiny_models.sharer_model(),
        tiny_models.sharer_model(max_position_embeddings=10),
    ]
    return receiver, sharers, [tiny_models.fuser_between(receiver, s) for s in sharers]


def test_a_prompt_must_fit_every_model_that_reads_it(short):
    receiver, sharers, fusers = short
    with attached(receiver, sharers, fusers):
        generate(receiver, prompt(2, 11), max_new_tokens=1)  # of which the sharers read 10
        with pytest.raises(
            ValueError, match=r"the sharer\[1\] \(LlamaForCausalLM\) has 10 \(max_.*\), .* needs 11"
        ):
            generate(receiver, prompt(2, 12))
        generate(receiver, prompt(2, 12), sharers=[0], max_new_tokens=1)
        with pytest.raises(ValueError, match=r"the receiver \(Qwen3For.*\) has 12 .* needs 13"):
            generate(receiver, prompt(2, 13), sharers=[0])


def test_padding_takes_no_position(short):
    receiver, sharers, fusers = short
    ids, mask = left_padded((11, 4))
    wider = torch.nn.functional.pad(ids, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    with attached(receiver, sharers, fusers):
        generate(receiver, wider[0], attention_mask=wider[1], max_new_tokens=1)


def test_given_positions_count(short):
    receiver, sharers, fusers = short
    ids = prompt(2, 5)
    with attached(receiver, sharers[0], fusers[0]):
        generate(receiver, ids, position_ids=torch.arange(7, 12)[None], max_new_tokens=1)
        with pytest.raises(ValueError, match=r"receiver .* has 12 .* needs 13"):
            generate(receiver, ids, position_ids=torch.arange(8, 13)[None])


def test_a_text_of_a_sharers_own_must_fit_it(short):
    receiver, sharers, fusers = short
    text = {"input_ids": prompt(2, 11), "span": (0, 0, 2)}
    with attached(receiver, sharers[1], fusers[1]):
        with pytest.raises(ValueError, match=r"the sharer \(Llama.*\) has 10 .* needs 11"):
            generate(receiver, prompt(2, 5), sharer_inputs=text)
        text = {**text, "input_ids": prompt(2, 3), "position_ids": torch.tensor([[0, 4, 10]])}
        with pytest.raises(ValueError, match=r"the sharer \(Llama.*\) has 10 .* needs 11"):
            generate(receiver, prompt(2, 5), sharer_inputs=text)


def model_of(config) -> SimpleNamespace:
    return SimpleNamespace(config=config)


def test_the_bound_is_what_the_configuration_says():
    assert limit_of(model_of(LlamaConfig(max_position_embeddings=77))) == 77
    assert limit_of(model_of(GPT2Config(n_positions=33))) == 33
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 77}
    config = LlamaConfig(max_position_embeddings=77, rope_scaling=scaled)
    assert limit_of(model_of(config)) is None
    assert limit_of(tiny_models.falcon_model(alibi=True)) is None
    assert limit_of(tiny_models.receiver_model("gemma3")) == 256

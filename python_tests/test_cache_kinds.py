"""The kinds of caches that generate can decode from: each takes a fused prompt or is refused."""

from __future__ import annotations

import plain_loop
import pytest
import tiny_models
import torch
import transformers
from generation_checks import (
    CLOSE,
    STEPS,
    VISIBLE,
    generate,
    left_padded,
    logits_of,
    new_tokens,
    prompt,
)
from packaging import version
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
    cache_utils,
)

from c2c_ext.generation import attached

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CAN_FP8 = version.parse(transformers.__version__) >= version.parse("5.23")


class RoundedLayer(cache_utils.QuantizedLayer):
    """A quantised layer whose backend needs no package: 8-bit steps of 1/16."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return (tensor * 16).round().clamp(-128, 127).to(torch.int8)

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor.float() / 16


KINDS = {
    "dynamic": lambda config: DynamicCache(),
    "dynamic, sliding": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=48),
    "quantised": lambda config: Cache(
        layers=[RoundedLayer(residual_length=4) for _ in range(config.num_hidden_layers)]
    ),
}
if CAN_FP8:
    KINDS["quantised, fp8"] = lambda config: QuantizedCache("fp8", config)


def decode(receiver, cache, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Logits ``[B, steps, V]`` of the last prompt token and of ``tokens [B, steps]`` but the last,
    over a cache of what was before."""
    said = torch.cat([ids[:, -1:], tokens], dim=1)
    logits = []
    with torch.no_grad():
        for step in range(tokens.shape[1]):
            logits.append(plain_loop._step(receiver, cache, said[:, step : step + 1], mask)[:, -1])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return torch.stack(logits, 1)


def filled(cache, kv: plain_loop.KVLayers):
    for layer, (key, value) in enumerate(kv):
        cache.update(key, value, layer)
    return cache


# transformers quantises no sliding layers.
CASES = [("qwen3", kind) for kind in KINDS]
CASES += [("gemma3", kind) for kind in KINDS if "quantised" not in kind]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["rows of one length", "padded"])
def test_a_cache_of_this_kind_is_answered_from(architecture, kind, padded):
    receiver, sharer, fuser = tiny_models.trio(architecture)
    ids, mask = left_padded((11, 6)) if padded else (prompt(), torch.ones(2, 11).long())
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    cache = KINDS[kind](receiver.config)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, past_key_values=cache)
    assert output.past_key_values is cache
    tokens = new_tokens(output, ids)
    expected = decode(receiver, filled(KINDS[kind](receiver.config), kv), ids, mask, tokens)
    torch.testing.assert_close(logits_of(output), expected, **CLOSE)
    assert torch.equal(tokens, expected.argmax(-1))
    clean = plain_loop.prefill(receiver, ids[:, :-1], mask[:, :-1])
    unfused = decode(receiver, filled(KINDS[kind](receiver.config), clean), ids, mask, tokens)
    assert (unfused[:, 0] - expected[:, 0]).abs().max() > VISIBLE


def test_a_quantised_cache_is_no_plain_one():
    """The guard of the above: what is decoded from was rounded."""
    receiver, sharer, fuser = tiny_models.trio()
    ids = prompt()
    outputs = []
    for kind in ("dynamic", "quantised"):
        with attached(receiver, sharer, fuser):
            cache = KINDS[kind](receiver.config)
            outputs.append(generate(receiver, ids, past_key_values=cache))
    plain, rounded = (logits_of(output)[:, 0] for output in outputs)
    assert 1e-3 < (plain - rounded).abs().max() < 2


def test_a_second_turn_of_a_quantised_cache_is_refused_by_name():
    receiver, sharer, fuser = tiny_models.trio()
    with attached(receiver, sharer, fuser):
        output = generate(receiver, prompt(), past_key_values=KINDS["quantised"](receiver.config))
        talk = torch.cat([output.sequences, prompt(2, 4)], dim=1)
        cache = output.past_key_values
        with pytest.raises(ValueError, match=r"must hold plain keys and values, a RoundedLayer"):
            generate(receiver, talk, past_key_values=cache)
    assert cache.get_seq_length() == 10 + STEPS


REFUSED = {
    "encoder-decoder": (
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
        r"past_key_values must be the cache of a decoder alone, got EncoderDecoderCache",
    ),
}
if hasattr(cache_utils, "LinearAttentionLayer"):
    REFUSED["recurrent layers"] = (
        lambda: Cache(layers=[cache_utils.DynamicLayer(), cache_utils.LinearAttentionLayer()]),
        r"its layer 1 \(LinearAttentionLayer\) keeps a state",
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_a_cache_that_cannot_hold_a_prompt_is_refused(kind):
    make, message = REFUSED[kind]
    with attached(*tiny_models.trio()) as receiver:
        with pytest.raises(ValueError, match=message):
            generate(receiver, prompt(), past_key_values=make())
        assert generate(receiver, prompt()).past_key_values.get_seq_length() == 10 + STEPS


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_of_a_prompt_on_the_cpu_is_refused(name):
    with attached(*tiny_models.trio()) as receiver:
        with pytest.raises(ValueError, match=r"offloads its layers, .* CUDA devices only"):
            generate(receiver, prompt(), cache_implementation=name)


def test_a_quantised_cache_without_its_package_is_refused_by_transformers():
    with attached(*tiny_models.trio()) as receiver:
        with pytest.raises(ImportError, match="install"):
            generate(
                receiver,
                prompt(),
                cache_implementation="quantized",
                cache_config={"backend": "hqq"},
            )
        assert generate(receiver, prompt()).past_key_values.get_seq_length() == 10 + STEPS


def test_a_receiver_that_drops_its_cache_at_a_length_is_stopped_there():
    """Phi-3's long rotary scaling: what was fused would be read again unfused."""
    halves = [1.0] * 4
    scaling = {"type": "longrope", "short_factor": halves, "long_factor": [2.0] * 4}
    common = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    config = transformers.Phi3Config(
        **common,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=12,
        rope_scaling=scaling,
        bos_token_id=1,
        eos_token_id=None,
    )
    receiver, sharer = tiny_models.random_model(config, 1), tiny_models.sharer_model()
    with attached(receiver, sharer, tiny_models.fuser_between(receiver, sharer)):
        generate(receiver, prompt(1, 9), max_new_tokens=3)
        with pytest.raises(RuntimeError, match=r"drops its cache at 13 tokens"):
            generate(receiver, prompt(1, 9), max_new_tokens=8)
        generate(receiver, prompt(1, 20), max_new_tokens=8)  # beyond it from the beginning

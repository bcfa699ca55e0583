"""Receivers and sharers of the common architectures, each with what is special about it.

Compared with the plain loop; docs/support.md is made from the results.
"""

from __future__ import annotations

import json
from typing import Any

import plain_loop
import pytest
import tiny_models
import torch
import transformers
from generation_checks import (
    CLOSE,
    STEPS,
    VISIBLE,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    logits_of,
    prompt,
)
from torch import Tensor
from transformers import DynamicCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = 5
_COMMON = {
    "vocab_size": tiny_models.VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_WIDE = {"head_dim": 12}  # not hidden_size / num_attention_heads
_SLIDING = {"sliding_window": WINDOW}
_ONE_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Name: configuration and what it changes.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("Qwen2Config", {}),  # biases on queries, keys and values
    "Qwen3": ("Qwen3Config", _WIDE),  # norms of queries and keys
    "Llama": ("LlamaConfig", {}),
    "Mistral": ("MistralConfig", {**_WIDE, **_SLIDING}),  # every layer slides
    "Gemma": ("GemmaConfig", _WIDE),
    "Gemma 2": (  # every other layer slides
        "Gemma2Config",
        {
            **_WIDE,
            **_SLIDING,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "Gemma 3": (  # two rotary bases
        "Gemma3TextConfig",
        {**_WIDE, **_SLIDING, "query_pre_attn_scalar": 7, "layer_types": _ONE_FULL},
    ),
    "Phi-3": ("Phi3Config", _SLIDING),  # queries, keys and values from one product
    "Mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        {**_WIDE, **_EXPERTS, "num_experts": 3, "decoder_sparse_step": 1},
    ),
    "GPT-OSS": (  # attention sinks
        "GptOssConfig",
        {
            **_WIDE,
            **_SLIDING,
            "layer_types": _ONE_FULL,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
    "OLMo 2": ("Olmo2Config", {}),  # norms behind attention and feed-forward
    "Cohere 2": (  # its full layer has no positions
        "Cohere2Config",
        {**_SLIDING, "layer_types": _ONE_FULL},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", {"num_key_value_heads": None}),  # rotates a part of each head
    "GPT-2": (  # learned absolute positions
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 128,
            "num_key_value_heads": None,
        },
    ),
    "Falcon": ("FalconConfig", {"num_key_value_heads": None}),  # one key-value head for all
    "BLOOM": (  # positions by attention bias
        "BloomConfig",
        {"n_layer": 3, "n_head": 4, "num_key_value_heads": None},
    ),
}
_NAMES_OF_OTHERS = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
_SLIDES = [name for name, (_, changes) in ARCHITECTURES.items() if "sliding_window" in changes]


def model_of(name: str, seed: int = 1, dtype: torch.dtype = torch.float32):
    kind, changes = ARCHITECTURES[name]
    values = {**_COMMON, **changes}
    if "n_layer" in changes:  # names of its own
        values = {key: value for key, value in values.items() if key not in _NAMES_OF_OTHERS}
    values = {key: value for key, value in values.items() if value is not None or "eos" in key}
    return tiny_models.random_model(getattr(transformers, kind)(**values), seed).to(dtype)


@pytest.fixture(scope="module")
def receiver_trio(request):
    receiver, sharer = model_of(request.param), tiny_models.sharer_model()
    return receiver, sharer, tiny_models.fuser_between(receiver, sharer)


each_receiver = pytest.mark.parametrize("receiver_trio", ARCHITECTURES, indirect=True)
each_sliding = pytest.mark.parametrize("receiver_trio", _SLIDES, indirect=True)


def assert_fused(trio, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> None:
    receiver, sharer, fuser = trio
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        # A cache that keeps all tokens is compared whole.
        cache = DynamicCache()
        output = generate(receiver, ids, attention_mask=mask, past_key_values=cache, **kwargs)
    assert_same_run(output, ids, expected)
    assert_visible(expected, receiver, ids, mask)
    clean = plain_loop.prefill(receiver, ids[:, :-1], None if mask is None else mask[:, :-1])
    fused = zip(plain_loop.kv_of(cache), clean, strict=True)
    for pairs in fused:
        for new, old in zip(*pairs, strict=True):  # keys, values
            assert (new[:, :, : old.shape[2]] - old).abs().max() > 0.01, "a stream was not fused"


@each_receiver
def test_as_receiver(receiver_trio):
    assert_fused(receiver_trio, prompt(2, WINDOW))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_sharer(name):
    receiver, sharer = tiny_models.receiver_model(), model_of(name, seed=2)
    assert_fused((receiver, sharer, tiny_models.fuser_between(receiver, sharer)), prompt())


@each_receiver
def test_as_receiver_of_padded_rows(receiver_trio):
    receiver, sharer, fuser = receiver_trio
    ids, mask = left_padded((8, 5, 2))
    assert_fused(receiver_trio, ids, mask)
    with attached(receiver, sharer, fuser):
        together = generate(receiver, ids, attention_mask=mask)
        for row, length in enumerate((8, 5, 2)):
            alone = generate(receiver, ids[row : row + 1, -length:])
            torch.testing.assert_close(
                logits_of(together)[row : row + 1], logits_of(alone), **CLOSE
            )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_sharer_of_padded_rows(name):
    receiver, sharer = tiny_models.receiver_model(), model_of(name, seed=2)
    assert_fused(
        (receiver, sharer, tiny_models.fuser_between(receiver, sharer)), *left_padded((8, 5, 2))
    )


@each_sliding
@pytest.mark.parametrize("implementation", [None, "static"])
def test_as_receiver_beyond_the_window(receiver_trio, implementation):
    receiver, sharer, fuser = receiver_trio
    ids, mask = left_padded((3 * WINDOW, 2 * WINDOW))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, cache_implementation=implementation)
    assert_same_run(output, ids, expected, kv=False)
    assert_visible(expected, receiver, ids, mask)


@each_receiver
def test_with_all_gates_closed_it_is_the_plain_split_run_bit_for_bit(receiver_trio):
    receiver, sharer, _ = receiver_trio
    if getattr(receiver.config, "_experts_implementation", None) == "grouped_mm":
        # generate may take another one for decoding, of other roundings.
        receiver.set_experts_implementation("eager")
    fuser = tiny_models.fuser_between(receiver, sharer)
    tiny_models.close_all_gates(fuser)
    ids, mask = left_padded((8, 5))
    kv = plain_loop.prefill(receiver, ids[:, :-1], mask[:, :-1])
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver, ids, attention_mask=mask, past_key_values=DynamicCache(), max_new_tokens=STEPS
        )
    assert torch.equal(logits_of(output), expected.logits)
    for held, plain in zip(plain_loop.kv_of(output.past_key_values), expected.kv, strict=True):
        assert torch.equal(held[0], plain[0]) and torch.equal(held[1], plain[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_in_bfloat16(name):
    receiver, sharer = model_of(name), model_of(name, seed=2)
    fuser = tiny_models.fuser_between(receiver, sharer)
    ids = prompt(2, 8)
    exact = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    receiver, sharer = receiver.bfloat16(), sharer.bfloat16()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser.bfloat16(), ids)
    with attached(receiver, sharer, fuser):
        cache = DynamicCache()
        generate(receiver, ids, past_key_values=cache)
    held = [(k[:, :, :7], v[:, :, :7]) for k, v in plain_loop.kv_of(cache)]
    clean = plain_loop.prefill(receiver, ids[:, :-1])
    for ours, plain, truth, unfused in zip(held, kv, exact, clean, strict=True):
        for a, b, c, d in zip(ours, plain, truth, unfused, strict=True):
            assert a.dtype == torch.bfloat16
            # As far from float32 as plain PyTorch in bfloat16 is, and far from unfused.
            allowed = 2 * (b.float() - c).abs().max() + 0.02 * c.square().mean().sqrt()
            assert (a.float() - c).abs().max() <= allowed
            assert (a.float() - d.float()).abs().max() > VISIBLE


@each_receiver
def test_its_saved_form_is_that_of_the_model_alone(receiver_trio, tmp_path):
    receiver, sharer, fuser = receiver_trio
    receiver.save_pretrained(tmp_path / "alone")
    with attached(receiver, sharer, fuser):
        receiver.save_pretrained(tmp_path / "attached")
        again = type(receiver).__mro__[2].from_pretrained(tmp_path / "attached").eval()
    for name in ("config.json", "generation_config.json"):
        alone, saved = (
            json.loads((tmp_path / place / name).read_text()) for place in ("alone", "attached")
        )
        assert saved == alone
    ids = prompt()
    assert torch.equal(again(ids).logits, receiver(ids).logits)

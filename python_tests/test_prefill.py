"""Prompts that are read in chunks: prefill_chunk_size, for both models of an attached receiver."""

from __future__ import annotations

import copy

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    CLOSE,
    STEPS,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    prompt,
)
from transformers import DynamicCache, GenerationConfig

from c2c_ext.generation import attached
from c2c_ext.prefill import read_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


class Watched:
    """The (rows, tokens) of every forward of the models' layers, by model."""

    def __init__(self, *models) -> None:
        self.seen = [[] for _ in models]
        self.hooks = [
            model.model.layers[0].register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(tuple(args[0].shape[:2]))
            )
            for model, seen in zip(models, self.seen, strict=True)
        ]

    def __enter__(self) -> list[list[tuple[int, int]]]:
        return self.seen

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_a_prompt_in_chunks_equals_the_plain_loop(each_trio, chunk, padded):
    receiver, sharer, fuser = each_trio
    ids, mask = left_padded((11, 4, 1)) if padded else (prompt(2), None)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser), Watched(receiver, sharer) as (own, shared):
        output = generate(
            receiver,
            ids,
            attention_mask=mask,
            prefill_chunk_size=chunk,
            past_key_values=DynamicCache(),
        )
    assert_same_run(output, ids, expected, kv=not padded)  # what padding holds means nothing
    assert_visible(expected, receiver, ids, mask)
    rows = len(ids)
    chunks = [(rows, min(chunk, 10 - start)) for start in range(0, 10, chunk)]
    assert shared == chunks
    assert own == chunks + [(rows, 1)] * STEPS


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_chunks_go_with_other_ways_of_generate(trio, settings):
    receiver, sharer, fuser = trio
    ids = prompt()
    with attached(receiver, sharer, fuser):
        whole = generate(receiver, ids, **settings)
        with Watched(receiver, sharer) as (own, shared):
            chunked = generate(receiver, ids, prefill_chunk_size=4, **settings)
    torch.testing.assert_close(torch.stack(chunked.logits), torch.stack(whole.logits), **CLOSE)
    assert torch.equal(chunked.sequences, whole.sequences)
    assert shared == [(2, 4), (2, 4), (2, 2)] == own[:3]
    assert max(tokens for _, tokens in own) == 4


@pytest.mark.parametrize(
    "given", ["keyword", "configuration", "positional", "the receiver's", "everywhere"]
)
def test_the_chunk_size_is_found_wherever_it_is_given(given):
    receiver, sharer, fuser = tiny_models.trio()
    config = GenerationConfig(prefill_chunk_size=4, max_new_tokens=2, do_sample=False)
    args, kwargs = (), {}
    if given == "keyword":
        kwargs = {"prefill_chunk_size": 4, "max_new_tokens": 2, "do_sample": False}
    elif given == "positional":
        args = (config,)
    elif given == "the receiver's":
        receiver.generation_config = config
    else:
        kwargs = {"generation_config": config}
    if given == "everywhere":
        receiver.generation_config.prefill_chunk_size = 1
        kwargs["prefill_chunk_size"] = 5
    before = copy.deepcopy((config.to_dict(), receiver.generation_config.to_dict()))
    with attached(receiver, sharer, fuser), Watched(receiver, sharer) as (own, shared):
        receiver.generate(prompt(), *args, **kwargs)
    widths = [5, 5] if given == "everywhere" else [4, 4, 2]
    assert [tokens for _, tokens in shared] == widths
    assert [tokens for _, tokens in own] == [*widths, 1, 1]
    assert (config.to_dict(), receiver.generation_config.to_dict()) == before


def test_none_as_the_keyword_reads_the_prompt_whole():
    receiver, sharer, fuser = tiny_models.trio()
    receiver.generation_config.prefill_chunk_size = 4
    with attached(receiver, sharer, fuser), Watched(receiver, sharer) as (own, shared):
        generate(receiver, prompt(), prefill_chunk_size=None, max_new_tokens=1)
    assert shared == [(2, 10)] and own == [(2, 10), (2, 1)]


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (0, ValueError, "prefill_chunk_size must be at least 1, got 0"),
        (-3, ValueError, "prefill_chunk_size must be at least 1, got -3"),
        (2.5, TypeError, "prefill_chunk_size must be an integer, got float"),
        (True, TypeError, "prefill_chunk_size must be an integer, got bool"),
        ("4", TypeError, "prefill_chunk_size must be an integer, got str"),
    ],
)
def test_wrong_chunk_sizes_are_refused(trio, chunk, error, message):
    receiver, sharer, fuser = trio
    with attached(receiver, sharer, fuser), pytest.raises(error, match="c2c_ext: " + message):
        generate(receiver, prompt(), prefill_chunk_size=chunk)


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2"])
@torch.no_grad()
def test_tokens_are_read_over_what_a_cache_holds(kind, chunk):
    model = tiny_models.receiver_model(kind)
    ids, mask = left_padded((11, 6))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = read_tokens(
        "receiver", model, ids[:, :4], position_ids=positions[:, :4], mask=mask[:, :4]
    )
    again = read_tokens(
        "receiver",
        model,
        ids[:, 4:],
        position_ids=positions[:, 4:],
        cache=cache,
        mask=mask,
        chunk=chunk,
    )
    assert again is cache
    expected = plain_loop.prefill(model, ids, mask)
    for pair, whole in zip(plain_loop.kv_of(cache), expected, strict=True):
        for tensor, other in zip(pair, whole, strict=True):
            torch.testing.assert_close(tensor[0], other[0], **CLOSE)
            torch.testing.assert_close(tensor[1, :, 5:], other[1, :, 5:], **CLOSE)


class Forgetful(DynamicCache):
    """Keeps what it is given once, not twice."""

    def update(self, key, value, layer, *args, **kwargs):
        if self.get_seq_length(layer):
            return key, value
        return super().update(key, value, layer, *args, **kwargs)


@torch.no_grad()
def test_a_cache_that_did_not_grow_is_an_error():
    model = tiny_models.receiver_model()
    positions = torch.arange(11)[None]
    with pytest.raises(RuntimeError, match=r"the sharer \(Qwen3ForCausalLM\) kept no cache of"):
        read_tokens("sharer", model, prompt(1), position_ids=positions, cache=Forgetful(), chunk=10)

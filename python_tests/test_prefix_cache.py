"""PrefixCache: what transformers' models ask of a cache, and that no forward changes it."""

from __future__ import annotations

import pytest
import torch
from conftest import relative_error, same_bits
from plain_loop import cache_of, kv_of, prefill
from tiny_models import RECEIVERS, receiver_model
from transformers import Cache, DynamicCache

from c2c_ext.training.prefix_cache import PrefixCache

pytestmark = pytest.mark.usefixtures("one_thread")


def run(model, cache, tokens: int = 4) -> torch.Tensor:
    held = cache.get_seq_length()
    ids = torch.arange(2 * tokens).view(2, tokens) + 5
    return model(
        input_ids=ids,
        attention_mask=torch.ones(2, held + tokens, dtype=torch.long),
        position_ids=torch.arange(held, held + tokens).expand(2, -1),
        past_key_values=cache,
        use_cache=True,
    ).logits


@pytest.mark.parametrize("kind", RECEIVERS)
def test_models_answer_as_from_a_dynamic_cache(kind):
    model = receiver_model(kind)
    kv = prefill(model, torch.arange(18).view(2, 9) + 11)
    copies = [(k.clone(), v.clone()) for k, v in kv]
    cache = PrefixCache(kv)
    with torch.no_grad():
        first, second = run(model, cache), run(model, cache)
        expected = run(model, cache_of(kv))
    assert same_bits(first, second)
    assert relative_error(first, expected) <= 1e-6
    assert cache.get_seq_length() == 9 and len(cache.layers) == 3
    for held, copied, given in zip(kv_of(cache), copies, kv, strict=True):
        for a, b, c in zip(held, copied, given, strict=True):
            assert a is c and same_bits(a, b)


def test_it_is_a_cache_of_its_length():
    cache = PrefixCache([(torch.zeros(1, 2, 5, 3), torch.ones(1, 2, 5, 3))])
    like = DynamicCache()
    like.update(torch.zeros(1, 2, 5, 3), torch.ones(1, 2, 5, 3), 0)
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == like.get_seq_length() == 5
    assert cache.is_compileable == like.is_compileable
    assert list(cache.is_sliding) == list(like.is_sliding) == [False]
    query = 3 if not _mask_sizes_take_positions(like) else torch.arange(5, 8)
    assert cache.get_mask_sizes(query, 0) == like.get_mask_sizes(query, 0) == (8, 0)
    assert cache.is_initialized == like.is_initialized


def _mask_sizes_take_positions(cache) -> bool:
    """Versions up to 5.0 ask with the queries' positions, later ones with their number."""
    import inspect

    return "cache_position" in inspect.signature(cache.get_mask_sizes).parameters


def test_update_joins_and_keeps_the_prefix():
    key, value = (torch.randn(2, 1, 3, 4, requires_grad=True) for _ in range(2))
    cache = PrefixCache([(key, value)])
    new = torch.randn(2, 1, 2, 4)
    joined = cache.update(new, 2 * new, 0)
    assert torch.equal(joined[0], torch.cat([key, new], 2))
    assert torch.equal(joined[1], torch.cat([value, 2 * new], 2))
    (joined[0].sum() + 3 * joined[1].sum()).backward()
    assert torch.equal(key.grad, torch.ones_like(key))
    assert torch.equal(value.grad, torch.full_like(value, 3))


def test_an_empty_prefix_is_nothing():
    model = receiver_model()
    cache = PrefixCache([(torch.zeros(2, 2, 0, 12), torch.zeros(2, 2, 0, 12)) for _ in range(3)])
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        assert relative_error(run(model, cache), run(model, DynamicCache())) <= 1e-6


def test_a_layer_too_many_is_an_error():
    model = receiver_model()
    kv = prefill(model, torch.arange(6).view(2, 3) + 11)
    with torch.no_grad(), pytest.raises(IndexError):
        run(model, PrefixCache(kv[:2]))

"""The caches of an attached receiver's generate: the caller's own, kinds of them, beams."""

from __future__ import annotations

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
    prompt,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module", params=list(tiny_models.RECEIVERS))
def each_trio(request):
    return tiny_models.trio(request.param)


def new_cache(kind: str, receiver):
    if kind == "static":
        return StaticCache(config=receiver.config, max_cache_len=48)
    return DynamicCache(config=receiver.config) if kind == "sliding" else DynamicCache()


def state(cache) -> list[dict[str, object]]:
    """Everything that the layers of a cache hold, tensors by shape and dtype."""

    def described(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return int(value) if value.ndim == 0 else (tuple(value.shape), value.dtype)

    # In some versions whether a count is a number or a tensor depends on the lengths of the steps.
    return [{name: described(value) for name, value in vars(x).items()} for x in cache.layers]


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static"])
def test_the_callers_cache_ends_as_transformers_alone_would_leave_it(each_trio, kind):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    alone = new_cache(kind, receiver)
    generate(receiver, ids, past_key_values=alone)
    cache = new_cache(kind, receiver)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, past_key_values=cache)
    assert output.past_key_values is cache
    assert type(cache) is type(alone)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in alone.layers]
    assert state(cache) == state(alone)
    assert set(vars(cache)) - set(vars(alone)) == {"_c2c_fused"}
    assert (cache.layers[0].keys - alone.layers[0].keys).abs().max() > VISIBLE


def test_a_static_cache_is_used_again_after_its_reset(each_trio):
    receiver, sharer, fuser = each_trio
    cache = new_cache("static", receiver)
    with attached(receiver, sharer, fuser):
        for ids in (prompt(), prompt(2, 14, seed=3), prompt(2, 1, seed=4), prompt(2, 9, seed=5)):
            cache.reset()
            output = generate(receiver, ids, past_key_values=cache)
            kv = []
            if ids.shape[1] > 1:
                kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
            expected = plain_loop.decode(receiver, kv, ids, STEPS)
            assert_same_run(output, ids, expected, kv=False)
    assert_visible(expected, receiver, ids)


class Failure(Exception):
    pass


def fail(*args: object, **kwargs: object) -> None:
    raise Failure


@pytest.mark.parametrize("kind", ["dynamic", "sliding", "static"])
def test_a_call_that_fails_before_the_cache_is_filled_leaves_it_empty(each_trio, kind):
    receiver, sharer, fuser = each_trio
    ids = prompt()
    cache = new_cache(kind, receiver)

    def call(**settings: object) -> None:
        generate(receiver, ids, past_key_values=cache, **settings)

    with attached(receiver, sharer, fuser):
        for settings in (
            {"positions": [99]},
            {"penalty_alpha": 0.5},
            {"attention_mask": torch.ones(2, 3)},
            {"cu_seq_lens_q": torch.tensor([0, 11, 22])},
        ):
            with pytest.raises(ValueError, match="c2c_ext: "):
                call(**settings)
            assert cache.get_seq_length() == 0
        for broken in (receiver.model.layers[-1], sharer.model.layers[-1]):
            hook = broken.register_forward_hook(fail)
            with pytest.raises(Failure):
                call()
            hook.remove()
            assert cache.get_seq_length() == 0
        output = generate(receiver, ids, past_key_values=cache)  # still good for a call
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    assert_same_run(output, ids, plain_loop.decode(receiver, kv, ids, STEPS), kv=False)


@pytest.mark.parametrize("wrong", ["short", "rows", "layers"])
def test_a_cache_that_does_not_fit_is_left_empty(trio, wrong):
    receiver, sharer, fuser = trio
    ids = prompt()
    config, length = receiver.config, 32
    if wrong == "short":
        length = 6
    elif wrong == "layers":
        config = tiny_models.receiver_model(num_hidden_layers=2).config
    cache = StaticCache(config=config, max_cache_len=length)
    if wrong == "rows":
        generate(receiver, prompt(1), past_key_values=cache)
        cache.reset()
    with attached(receiver, sharer, fuser):
        with pytest.raises(
            ValueError, match="past_key_values cannot take 3 layers of 2 rows of 10"
        ):
            generate(receiver, ids, past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 3, "cache_implementation": "static"},
        {"num_return_sequences": 5, "do_sample": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_each_prompt_is_prefilled_once(trio, settings, padded):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 7, 4)) if padded else (prompt(3), None)
    seen = []
    hooks = [
        model.model.layers[0].self_attn.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(kwargs["hidden_states"].shape[:2]),
            with_kwargs=True,
        )
        for model in (receiver, sharer)
    ]
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, **settings)
    for hook in hooks:
        hook.remove()
    rows = 3 * max(settings.get("num_beams", 1), settings.get("num_return_sequences", 1))
    assert seen == [(3, 10), (3, 10)] + [(rows, 1)] * STEPS
    if "num_beams" in settings:  # rows move between the beams after the first step
        first = output.logits[0]
    else:
        first = logits_of(output)[:, 0]
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, 1, mask=mask)
    repeats = rows // 3
    torch.testing.assert_close(first, expected.logits[:, 0].repeat_interleave(repeats, 0), **CLOSE)
    assert_visible(expected, receiver, ids, mask)

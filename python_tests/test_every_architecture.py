"""Every causal language model that transformers knows works in both roles or is refused by name.

`tiny_architectures` says which; a type that it does not speak of fails.
"""

from __future__ import annotations

import re

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    CLOSE,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    logits_of,
)
from tiny_architectures import (
    NOT_BUILT_BEFORE,
    REFUSED,
    UNPADDED,
    WORKS,
    known_types,
    tiny_config,
    tiny_model,
    tried_types,
    usual_config,
)

from c2c_ext.generation import attached
from c2c_ext.model_kv import KVShape, ModelKV, UnsupportedModelError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of models that look for what a tiny one lacks
]
LENGTHS = (8, 5)


def test_every_type_has_one_verdict():
    assert not WORKS & REFUSED.keys()
    unknown = set(known_types()) - WORKS - REFUSED.keys() - NOT_BUILT_BEFORE.keys()
    assert not unknown, "say of each in tiny_architectures whether it works or how it is refused"


@pytest.mark.parametrize("kind", [kind for kind in tried_types() if kind in REFUSED])
def test_a_model_without_plain_keys_and_values_is_refused(kind, record_property):
    with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[kind])) as caught:
        ModelKV.from_config(usual_config(kind))
    assert all(reason.startswith("c2c_ext: model type '") for reason in caught.value.reasons)
    record_property("reason", caught.value.reasons[0].removeprefix("c2c_ext: "))


def assert_as_the_plain_loop(receiver, sharer, *, padded: bool = True) -> None:
    fuser = tiny_models.fuser_between(receiver, sharer)
    ids, mask = left_padded(LENGTHS)
    if not padded:
        ids, mask = ids[:1], None
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, 2, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, max_new_tokens=2)
        alone = generate(receiver, ids[-1:, -LENGTHS[1] :], max_new_tokens=2)
    assert_same_run(output, ids, expected, kv=False)
    assert_visible(expected, receiver, ids, mask)
    if padded:  # the padded row is what it is without the other
        torch.testing.assert_close(logits_of(output)[1:], logits_of(alone), **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in tried_types() if kind in WORKS])
def test_a_model_receives_from_another_of_its_type_as_the_plain_loop_does(kind):
    models = (tiny_model(tiny_config(kind), seed) for seed in (1, 2))
    assert_as_the_plain_loop(*models, padded=kind not in UNPADDED)


@pytest.mark.parametrize("kind", ["bert", "electra", "rembert", "roberta", "xlm-roberta"])
def test_an_encoder_that_is_configured_as_a_decoder_works(kind):
    models = (tiny_model(tiny_config(kind, is_decoder=True), seed) for seed in (1, 2))
    assert_as_the_plain_loop(*models)


@pytest.mark.parametrize("kind", ["bart", "prophetnet"])
def test_the_decoder_of_an_encoder_decoder_shares_by_its_own_numbers(kind):
    sharer = tiny_model(tiny_config(kind))  # its encoder has other layers and heads
    assert ModelKV.from_config(sharer.config).layers == (KVShape(4, 12),) * 3
    assert_as_the_plain_loop(tiny_models.receiver_model(), sharer, padded=False)

"""What attach, detach and attached do to a receiver, refuse and leave behind."""

from __future__ import annotations

import copy
import io
import json
import pickle
from functools import partial

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
    logits_of,
    prompt,
)
from tiny_architectures import tiny_config, tiny_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
)

from c2c_ext.generation import attach, attached, detach


@pytest.fixture(scope="module")
def trio():
    receiver, sharer = tiny_models.receiver_model("qwen3"), tiny_models.sharer_model()
    return receiver, sharer, tiny_models.fuser_between(receiver, sharer)


def test_keywords_of_the_receivers_own_prepare_inputs_stay_accepted(trio):
    receiver, sharer, fuser = trio
    seen = []

    class Flavoured(type(receiver)):
        def prepare_inputs_for_generation(self, input_ids, flavour=None, **kwargs):
            seen.append(flavour)
            return super().prepare_inputs_for_generation(input_ids, **kwargs)

    flavoured = copy.deepcopy(receiver)
    flavoured.__class__ = Flavoured
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    with attached(flavoured, sharer, fuser):
        output = generate(flavoured, ids, flavour="sour")
    assert_same_run(output, ids, plain_loop.decode(receiver, kv, ids, STEPS))
    assert seen == ["sour"] * STEPS


class Failure(Exception):
    pass


def test_an_exception_leaves_nothing_armed_or_patched(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    before, own_class = dict(vars(receiver)), type(receiver)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)

    def fail(*args: object, **kwargs: object) -> None:
        raise Failure

    attach(receiver, sharer, fuser)
    calls = receiver._c2c_attachment.calls
    for broken in (sharer.model.layers[2], receiver.model.layers[1], receiver.lm_head):
        hook = broken.register_forward_hook(fail)
        with pytest.raises(Failure):
            generate(receiver, ids)
        hook.remove()
        assert calls == {}
    # Outside generate nothing is fused, not even after a failure in the middle of a prefill.
    clean = plain_loop.prefill(receiver, ids[:, :-1])
    inputs = receiver.prepare_inputs_for_generation(
        ids, past_key_values=DynamicCache(), cache_position=torch.arange(11), use_cache=True
    )
    assert inputs["past_key_values"].get_seq_length() == 0
    assert_same_run(generate(receiver, ids), ids, expected)
    detach(receiver)
    assert type(receiver) is own_class
    assert vars(receiver) == before
    alone = plain_loop.decode(receiver, clean, ids, STEPS)
    torch.testing.assert_close(logits_of(generate(receiver, ids)), alone.logits, **CLOSE)


def test_attached_leaves_alone_what_its_body_has_detached(trio):
    receiver, sharer, fuser = trio
    original = type(receiver)
    with attached(receiver, sharer, fuser):
        detach(receiver)
    assert type(receiver) is original
    with attached(receiver, sharer, fuser):
        attach(detach(receiver), sharer, fuser)
    assert type(detach(receiver)) is original
    with pytest.raises(KeyboardInterrupt), attached(receiver, sharer, fuser):
        detach(receiver)
        raise KeyboardInterrupt


def test_attached_detaches_after_an_exception(trio):
    receiver, sharer, fuser = trio
    before, own_class = dict(vars(receiver)), type(receiver)
    with pytest.raises(Failure), attached(receiver, sharer, fuser) as same:
        assert same is receiver
        assert isinstance(receiver, own_class) and type(receiver) is not own_class
        raise Failure
    assert type(receiver) is own_class and vars(receiver) == before


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("role", ["receiver", "sharer", "headless sharer"])
def test_a_model_that_keeps_no_cache_is_named(role):
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()
    fuser = tiny_models.fuser_between(receiver, sharer)
    sharer = sharer.model if role == "headless sharer" else sharer
    model = receiver if role == "receiver" else sharer
    model.gradient_checkpointing_enable()
    name = rf"the {role.split()[-1]} \({type(model).__name__}\)"
    with attached(receiver, sharer, fuser):
        generate(receiver, prompt())  # harmless in evaluation mode
        model.train()
        with pytest.raises(RuntimeError, match=f"{name} kept no cache .* gradient checkpointing"):
            generate(receiver, prompt())
        model.eval()
        generate(receiver, prompt())
        model.base_model.forward = lambda **kwargs: None
        with pytest.raises(RuntimeError, match=f"{name} kept no cache .* its forward"):
            generate(receiver, prompt())


def test_a_decoding_loop_that_never_prepares_inputs_is_reported(trio):
    receiver, sharer, fuser = trio

    def idle(model, input_ids: Tensor, **kwargs: object) -> Tensor:
        return input_ids

    with attached(receiver, sharer, fuser):
        with pytest.raises(RuntimeError, match="without fusing the prompt"):
            receiver.generate(prompt(), custom_generate=idle, max_new_tokens=2)


def test_a_decoding_loop_that_calls_generate_is_fused(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)

    def nested(model, input_ids: Tensor, **kwargs: object):
        return generate(model, input_ids)

    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, custom_generate=nested)
        assert receiver._c2c_attachment.calls == {}
    assert_same_run(output, ids, expected)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({}, 1),
        ({"multi_query": False}, 4),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4),
    ],
    ids=str,
)
def test_falcons_heads_are_read_as_its_cache_holds_them(changes, heads):
    receiver, ids = tiny_models.falcon_model(**changes), prompt()
    sharer = tiny_models.falcon_model()
    fuser = tiny_models.fuser_between(receiver, sharer)
    assert [layer.num_heads for layer in fuser.config.receiver.layers] == [heads] * 2
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    with attached(receiver, sharer, fuser):
        assert_same_run(generate(receiver, ids), ids, expected)
    assert_visible(expected, receiver, ids)


def pickled(receiver, protocol: int):
    return pickle.loads(pickle.dumps(receiver, protocol=protocol))


def saved(receiver):
    file = io.BytesIO()
    torch.save(receiver, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("own_sharer", [False, True], ids=["two models", "own sharer"])
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, saved, *(partial(pickled, protocol=n) for n in (0, 2, 5))],
    ids=["deepcopy", "torch.save", "pickle 0", "pickle 2", "pickle 5"],
)
def test_a_copy_is_attached_and_independent(again, own_sharer):
    receiver, ids = tiny_models.receiver_model(), prompt()
    sharer = receiver if own_sharer else tiny_models.sharer_model()
    fuser = tiny_models.fuser_between(receiver, sharer)
    own_class, alone = type(receiver), generate(receiver, ids)
    attach(receiver, sharer, fuser)
    expected = logits_of(generate(receiver, ids))
    assert (logits_of(alone)[:, 0] - expected[:, 0]).abs().max() > VISIBLE
    receiver._c2c_attachment.calls[-1] = None  # as if a thread were in generate
    twin = again(receiver)
    del receiver._c2c_attachment.calls[-1]
    assert twin._c2c_attachment.calls == {}
    assert (twin._c2c_attachment.sharing.sharers[0] is twin) == own_sharer
    with torch.no_grad():  # nothing is shared
        for module in (receiver, sharer, fuser):
            for parameter in module.parameters():
                parameter.zero_()
    assert torch.equal(logits_of(generate(twin, ids)), expected)
    assert isinstance(twin, own_class) and type(twin) is not own_class
    detach(twin)
    assert type(twin) is own_class
    assert torch.equal(logits_of(generate(twin, ids)), logits_of(alone))
    detach(receiver)  # was not detached with its twin


def test_attached_receiver_saves_and_counts_only_itself(trio, tmp_path):
    receiver, sharer, fuser = trio
    state, modules = receiver.state_dict(), [name for name, _ in receiver.named_modules()]
    with attached(receiver, sharer, fuser):
        assert list(receiver.state_dict()) == list(state)
        assert [name for name, _ in receiver.named_modules()] == modules
        assert len(list(receiver.parameters())) == len(state)
        assert type(receiver).__name__ == "Qwen3ForCausalLM"
        receiver.save_pretrained(tmp_path)
        receiver.double().float()
        assert sharer.dtype == torch.float32
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3ForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(receiver)
    ids = prompt()
    assert torch.equal(again.eval()(ids).logits, receiver(ids).logits)


def test_what_an_attached_receiver_does_not_support_is_refused(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    held = plain_loop.cache_of(plain_loop.prefill(receiver, ids[:, :4]))
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match="use_cache=False"):
            generate(receiver, ids, use_cache=False)
        with pytest.raises(ValueError, match="inputs_embeds"):
            generate(receiver, None, inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(ValueError, match=r"cu_seq_lens_q is not supported .* token ids alone"):
            generate(receiver, ids, cu_seq_lens_q=torch.tensor([0, 11, 22]))
        with pytest.raises(ValueError, match=r"must be empty .* the 4 tokens .* were not fused"):
            generate(receiver, ids, past_key_values=held)
        with pytest.raises(ValueError, match=r"\[batch, tokens\], got \[11\]"):
            generate(receiver, ids[0])
        with pytest.raises(ValueError, match=r"not used by the model.*nonsense"):
            generate(receiver, ids, nonsense=1)
    assert held.get_seq_length() == 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("generate_batch", ([[1, 2, 3]],)),
        ("init_continuous_batching", ()),
        ("continuous_batching_context_manager", ()),
    ],
)
def test_continuous_batching_is_refused(trio, name, arguments):
    receiver, sharer, fuser = trio
    existed = hasattr(receiver, name)
    with attached(receiver, sharer, fuser):
        assert hasattr(receiver, name) == existed
        if existed:
            with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
                getattr(receiver, name)(*arguments)
    assert hasattr(receiver, name) == existed


def test_paged_caches_are_refused(trio):
    receiver, sharer, fuser = trio
    ours, older = "generate_batch is not supported", "Invalid `cache_implementation`"
    with attached(receiver, sharer, fuser):
        with pytest.raises((NotImplementedError, ValueError), match=f"{ours}|{older}"):
            receiver.generate(prompt(), cache_implementation="paged")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", r"'mamba': layer 0"),
        ("qwen3_next", r"'qwen3_next': layer 0 is a 'linear_attention' layer"),
        ("deepseek_v3", r"multi-head latent attention \(kv_lora_rank=16\) in layer 0"),
        ("lfm2", r"'lfm2': layer 0 is a 'conv' layer"),
    ],
)
def test_attach_names_the_layer_that_keeps_no_plain_keys_and_values(trio, kind, reason):
    receiver, sharer, fuser = trio
    model = tiny_model(tiny_config(kind))
    for pair in ((model, sharer), (receiver, model)):
        with pytest.raises(ValueError, match=rf"model type .*{reason}"):
            attach(*pair, fuser)


def test_attach_refuses_what_does_not_fit(trio):
    receiver, sharer, fuser = trio
    cases = [
        (receiver, sharer, "fuser", TypeError, r"fuser must be a c2c_ext.Fuser, got str"),
        ("receiver", sharer, fuser, TypeError, r"receiver must be a transformers model, got str"),
        (receiver, torch.nn.Linear(1, 1), fuser, TypeError, r"sharer must be .* got Linear"),
        (receiver.model, sharer, fuser, TypeError, r"Qwen3Model has no generate"),
        (sharer, sharer, fuser, ValueError, r"a receiver of 3 layers, this one has 5"),
        (receiver, receiver, fuser, ValueError, r"a sharer of 5 layers, this one has 3"),
        (
            *(tiny_models.receiver_model("llama", num_key_value_heads=4), sharer, fuser),
            *(ValueError, r"num_heads 2 in receiver layer 0, this one has 4"),
        ),
        (
            *(receiver, tiny_models.sharer_model(head_dim=8), fuser),
            *(ValueError, r"head_dim 16 in sharer layer 2, this one has 8"),
        ),
    ]
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=9, d_model=8, encoder_layers=1, decoder_layers=1,
                   encoder_attention_heads=2, decoder_attention_heads=2,
                   encoder_ffn_dim=8, decoder_ffn_dim=8)
    )  # fmt: skip
    cases.append((bart, sharer, fuser, ValueError, r"receiver must be decoder-only"))
    cases.append((receiver, bart, fuser, ValueError, r"sharer must be decoder-only"))
    for *arguments, error, message in cases:
        with pytest.raises(error, match=message):
            attach(*arguments)
    with attached(receiver, sharer, fuser):
        with pytest.raises(ValueError, match="attached already"):
            attach(receiver, sharer, fuser)
    with pytest.raises(ValueError, match="not attached"):
        detach(receiver)

"""FuserConfig: what it reads of transformers' configurations, its JSON, and every refusal."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from conftest import make_config

from c2c_ext import FuserConfig
from c2c_ext.model_kv import KVShape, ModelKV

HEADS = {"num_hidden_layers": 4, "num_attention_heads": 6, "hidden_size": 60}


SHAPES_BY_LAYER = [(4, 16), (2, 64), (4, 16)]


def model_config(kind: str, **changes: object) -> Any:
    return getattr(transformers, kind)(**{**HEADS, "num_key_value_heads": 2, **changes})


# (class, keywords, model type, KV heads, head dim)
MODELS = [
    ("Qwen2Config", {}, "qwen2", 2, 10),  # hidden_size / num_attention_heads
    ("Qwen3Config", {"head_dim": 16}, "qwen3", 2, 16),
    ("LlamaConfig", {}, "llama", 2, 10),
    ("LlamaConfig", {"head_dim": 12}, "llama", 2, 12),
    ("MistralConfig", {"head_dim": None}, "mistral", 2, 10),
    ("MistralConfig", {"head_dim": 14}, "mistral", 2, 14),
    ("GemmaConfig", {"head_dim": 18}, "gemma", 2, 18),
    ("Gemma2Config", {"head_dim": 20}, "gemma2", 2, 20),  # every other layer slides
    ("Gemma3TextConfig", {"head_dim": 22}, "gemma3_text", 2, 22),
]


@pytest.mark.parametrize(("kind", "changes", "model_type", "heads", "dim"), MODELS)
def test_reads_model(kind, changes, model_type, heads, dim):
    model = ModelKV.from_config(model_config(kind, **changes))
    assert model == ModelKV(model_type, "", (KVShape(heads, dim),) * 4)
    assert model.layers[0].width == heads * dim


def test_reads_text_part_of_a_multimodal_model():
    text = model_config("Gemma3TextConfig", head_dim=22)
    config = transformers.Gemma3Config(text_config=text.to_dict())
    assert ModelKV.from_config(config).layers == (KVShape(2, 22),) * 4


def test_layers_may_differ_in_shape():
    numbers = {"model_type": "mixed", "num_hidden_layers": 3, "num_attention_heads": 8}
    per_layer = [SimpleNamespace(num_key_value_heads=h, head_dim=d) for h, d in SHAPES_BY_LAYER]
    newer = SimpleNamespace(**numbers, per_layer_config=per_layer)
    older = SimpleNamespace(
        **numbers,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_key_value_heads=4,
        head_dim=16,
        num_global_key_value_heads=2,
        global_head_dim=64,
    )
    for config in (newer, older):
        layers = ModelKV.from_config(config).layers
        assert [(s.num_heads, s.head_dim) for s in layers] == SHAPES_BY_LAYER


def test_key_value_heads_default_to_attention_heads():
    config = transformers.GPT2Config(n_layer=2, n_head=3, n_embd=12)
    assert ModelKV.from_config(config) == ModelKV("gpt2", "", (KVShape(3, 4),) * 2)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("gpt2", "gpt2"),
        ("/home/someone/models/mine", "mine"),
        ("./models/mine/", "mine"),
        ("C:\\models\\mine", "mine"),
        ("", ""),
    ],
)
def test_name_is_never_a_path(name, kept):
    config = model_config("LlamaConfig")
    config._name_or_path = name
    assert ModelKV.from_config(config).name == kept


def test_for_models():
    receiver = model_config("Qwen3Config", head_dim=16)
    sharer = model_config("Qwen2Config", num_hidden_layers=6)
    config = FuserConfig.for_models(receiver, sharer)
    assert config.layer_map == (2, 3, 4, 5)  # last_aligned
    assert (config.hidden_size, config.intermediate_size, config.depth) == (1024, 1024, 3)
    assert (config.activation, config.dropout, config.gate_init) == ("gelu", 0.1, 1.0)
    assert config.layer_shapes(1) == (KVShape(2, 10), KVShape(2, 16))
    assert config.shape_groups() == [[0, 1, 2, 3]]
    changed = FuserConfig.for_models(
        *(receiver, sharer),
        layer_map=[5, 0, 5, 0],
        hidden_size=32,
        depth=5,
        activation="relu",
        dropout=0.0,
        gate_init=-1.0,
    )
    assert changed.layer_map == (5, 0, 5, 0)
    assert (changed.hidden_size, changed.intermediate_size, changed.depth) == (32, 32, 5)
    assert (changed.activation, changed.dropout, changed.gate_init) == ("relu", 0.0, -1.0)
    assert FuserConfig.for_models(receiver, sharer, intermediate_size=7).intermediate_size == 7


def hybrid(types: list[str]) -> Any:
    return model_config("Qwen3NextConfig", head_dim=16, layer_types=types)


MODELS_REFUSED = [
    (
        lambda: transformers.DeepseekV3Config(),
        "model type 'deepseek_v3' uses multi-head latent attention (kv_lora_rank=512)",
    ),
    (
        lambda: hybrid(["full_attention"] * 2 + ["linear_attention", "full_attention"]),
        "model type 'qwen3_next': layer 2 is a 'linear_attention' layer, which keeps no keys",
    ),
    (lambda: transformers.MambaConfig(), "model type 'mamba'"),
    (
        lambda: SimpleNamespace(model_type="other", num_kv_shared_layers=3),
        "shares the cache of some layers with others (num_kv_shared_layers=3)",
    ),
    (
        lambda: SimpleNamespace(model_type="other"),
        "model type 'other': num_hidden_layers must be in 1..1024, got None",
    ),
    (
        lambda: SimpleNamespace(model_type="other", num_hidden_layers=1025),
        "num_hidden_layers must be in 1..1024, got 1025",
    ),
    (
        lambda: SimpleNamespace(model_type="other", num_hidden_layers=1, num_key_value_heads=2),
        "layer 0 has neither head_dim nor hidden_size / num_attention_heads",
    ),
    (
        lambda: SimpleNamespace(model_type="other", num_hidden_layers=1, head_dim=8),
        "layer 0 has neither num_key_value_heads nor num_attention_heads",
    ),
]


@pytest.mark.parametrize(("make", "message"), MODELS_REFUSED, ids=[m for _, m in MODELS_REFUSED])
def test_model_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape("c2c_ext: ") + ".*" + re.escape(message)):
        ModelKV.from_config(make())


def test_full_attention_only_variant_of_a_hybrid_is_read():
    assert ModelKV.from_config(hybrid(["full_attention"] * 4)).layers == (KVShape(2, 16),) * 4


def test_json_round_trip():
    config = make_config(
        [(2, 8), (1, 20), (2, 8)], [(1, 4), (3, 6)], [1, 0, 0], depth=5, activation="silu"
    )
    assert FuserConfig.from_dict(json.loads(config.to_json())) == config
    assert config.to_json().endswith("}\n")
    assert json.loads(config.to_json())["receiver"] == {
        "model_type": "receiver",
        "name": "",
        "kv_layers": [[2, 8], [1, 20], [2, 8]],
    }
    assert config.shape_groups() == [[0], [1], [2]]


def test_missing_optional_keys_default():
    data = json.loads(make_config().to_json())
    for key in ("depth", "activation", "dropout", "gate_init"):
        del data[key]
    config = FuserConfig.from_dict(data)
    assert (config.depth, config.activation, config.dropout, config.gate_init) == (
        3,
        "gelu",
        0.1,
        1,
    )


def test_unknown_keys_warn():
    data = json.loads(make_config().to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FuserConfig.from_dict(data)
    with pytest.warns(UserWarning, match="unknown keys ignored: a_new_one, another"):
        assert FuserConfig.from_dict({**data, "another": 1, "a_new_one": 2}) == make_config()


VALUES_REFUSED = [
    ({"hidden_size": 0}, "FuserConfig.hidden_size must be in 1..262144, got 0"),
    ({"hidden_size": 2**18 + 1}, "FuserConfig.hidden_size must be in 1..262144, got 262145"),
    ({"hidden_size": 8.0}, "FuserConfig.hidden_size must be an int, got 8.0"),
    ({"intermediate_size": True}, "FuserConfig.intermediate_size must be an int, got True"),
    ({"intermediate_size": -1}, "FuserConfig.intermediate_size must be in 1..262144, got -1"),
    ({"depth": 2}, "FuserConfig.depth must be in 3..32, got 2"),
    ({"depth": 65}, "FuserConfig.depth must be in 3..32, got 65"),
    ({"activation": "tanh"}, "FuserConfig.activation must be one of gelu, relu, silu, got 'tanh'"),
    ({"dropout": 1.0}, "FuserConfig.dropout must be in [0, 1), got 1.0"),
    ({"dropout": -0.1}, "FuserConfig.dropout must be in [0, 1), got -0.1"),
    ({"dropout": "0"}, "FuserConfig.dropout must be a number, got '0'"),
    ({"gate_init": float("nan")}, "FuserConfig.gate_init must be a number, got nan"),
    ({"gate_init": float("inf")}, "FuserConfig.gate_init must be below 1e9 in size, got inf"),
    ({"gate_init": 10**400}, "FuserConfig.gate_init must be below 1e9 in size, got 1000"),
    ({"format_version": True}, "FuserConfig.format_version must be 1, got True"),
    ({"format_version": 2}, "FuserConfig.format_version must be 1, got 2: written by another"),
    ({"layer_map": [0]}, "an explicit layer_map needs one entry per receiver layer (2), got 1"),
    ({"layer_map": [0, 3]}, "layer_map[1] must be in 0..2 (sharer layers), got 3"),
]


@pytest.mark.parametrize(("changes", "message"), VALUES_REFUSED, ids=[m for _, m in VALUES_REFUSED])
def test_value_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config(**changes)


def with_value(key: str, value: object) -> Callable[[dict], object]:
    return lambda data: {**data, key: value}


def with_receiver(**changes: object) -> Callable[[dict], object]:
    return lambda data: {**data, "receiver": {**data["receiver"], **changes}}


def without(key: str) -> Callable[[dict], object]:
    return lambda data: {k: v for k, v in data.items() if k != key}


LAYERS = "FuserConfig.receiver.kv_layers"
DICTS_REFUSED = [
    (lambda _: [1], "FuserConfig: expected a JSON object, got list"),
    (without("format_version"), "FuserConfig.format_version must be 1, got None: not a"),
    (with_value("format_version", 2), "FuserConfig.format_version must be 1, got 2: not a"),
    *(
        (without(key), f"FuserConfig.{key} is missing")
        for key in ("receiver", "sharer", "layer_map", "hidden_size", "intermediate_size")
    ),
    (with_value("sharer", 3), "FuserConfig.sharer must be an object, got int"),
    (with_value("layer_map", "depth"), "FuserConfig.layer_map must be a list, got 'depth'"),
    (with_value("depth", 2**40), "FuserConfig.depth must be in 3..32, got 1099511627776"),
    (with_receiver(kv_layers="ab"), f"{LAYERS} must be a list of [num_heads, head_dim]"),
    (with_receiver(kv_layers=None), f"{LAYERS} must be a list of [num_heads, head_dim]"),
    (with_receiver(kv_layers=[]), f"{LAYERS} must have 1..1024 entries, got 0"),
    (with_receiver(kv_layers=[[1, 1]] * 1025), f"{LAYERS} must have 1..1024 entries, got 1025"),
    (with_receiver(kv_layers=[[2, 8], [2]]), f"{LAYERS}[1] must be [num_heads, head_dim], got [2]"),
    (with_receiver(kv_layers=["28"]), f"{LAYERS}[0] must be [num_heads, head_dim], got '28'"),
    (
        with_receiver(kv_layers=[[2, 8], [0, 8]]),
        f"{LAYERS}[1]: KVShape.num_heads must be an integer of at least 1, got 0",
    ),
    (
        with_receiver(kv_layers=[[2, 8.5], [2, 8]]),
        f"{LAYERS}[0]: KVShape.head_dim must be an integer of at least 1, got 8.5",
    ),
    (
        with_receiver(kv_layers=[[1024, 1024], [2, 8]]),
        f"{LAYERS}[0]: KVShape: num_heads * head_dim must be at most 262144, got 1048576",
    ),
    (with_receiver(model_type=3), "FuserConfig.receiver.model_type must be a printable string"),
    (with_receiver(name=None), "FuserConfig.receiver.name must be a printable string"),
    (with_receiver(name="\x1b[2J\nfits"), "FuserConfig.receiver.name must be a printable string"),
    (with_receiver(name="a" * 257), "must be a printable string of at most 256 characters"),
]


@pytest.mark.parametrize(("change", "message"), DICTS_REFUSED, ids=[m for _, m in DICTS_REFUSED])
def test_dict_is_refused(change, message):
    data = json.loads(make_config().to_json())
    with pytest.raises(ValueError, match=re.escape(message)):
        FuserConfig.from_dict(change(data))

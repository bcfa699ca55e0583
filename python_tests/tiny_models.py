"""Tiny random receivers, sharers and fusers whose fusion visibly changes what the receiver says."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from c2c_ext.config import FuserConfig
from c2c_ext.fuser import Fuser

VOCABULARY = 97
# Layers, heads and head dimensions all differ between receivers and sharers.
_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_RECEIVER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
_SHARER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
SLIDING_WINDOW = 5  # shorter than the prompts of the tests
_WINDOW = {"sliding_window": SLIDING_WINDOW}
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Kind of receiver: its configuration and what sets it apart.
RECEIVERS = {
    "qwen3": (Qwen3Config, {}),
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, _WINDOW),  # every layer slides
    "gemma2": (Gemma2Config, _WINDOW),  # every other layer slides; soft caps
    # Two rotary bases; the order of its layers is not that of Gemma 2.
    "gemma3": (Gemma3TextConfig, {**_WINDOW, "layer_types": [_FULL, _SLIDING, _FULL]}),
    "qwen2": (  # the last layers slide
        Qwen2Config,
        {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1, "hidden_size": 48},
    ),
    "gpt_oss": (  # attention sinks, experts
        GptOssConfig,
        {
            **_WINDOW,
            "layer_types": [_SLIDING, _FULL, _SLIDING],
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
}
SLIDING = [kind for kind, (_, changes) in RECEIVERS.items() if "sliding_window" in changes]


def trio(kind: str = "qwen3", **changes: object) -> tuple[PreTrainedModel, PreTrainedModel, Fuser]:
    """(receiver, sharer, fuser); ``changes`` to the receiver's configuration."""
    receiver, sharer = receiver_model(kind, **changes), sharer_model()
    return receiver, sharer, fuser_between(receiver, sharer)


def quintet(
    kind: str = "qwen3",
) -> tuple[PreTrainedModel, list[PreTrainedModel], list[Fuser]]:
    """(receiver, two sharers of different depths, a fuser for each)."""
    receiver, sharers = receiver_model(kind), [sharer_model(), other_sharer_model()]
    fusers = [fuser_between(receiver, sharers[0])]
    fusers.append(fuser_between(receiver, sharers[1], layer_map=[0, 0, 1], depth=3))
    return receiver, sharers, fusers


def receiver_model(kind: str = "qwen3", **changes: object) -> PreTrainedModel:
    """A 3-layer receiver; ``kind`` is a key of `RECEIVERS`."""
    config, own = RECEIVERS[kind]
    return random_model(config(**{**_COMMON, **_RECEIVER, **own, **changes}), seed=1)


def falcon_model(**changes: object) -> PreTrainedModel:
    """A 2-layer Falcon, by default with one key-value head for four attention heads."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return random_model(FalconConfig(**{**_COMMON, **shape, **changes}), seed=5)


def sharer_model(**changes: object) -> PreTrainedModel:
    """A 5-layer Llama sharer."""
    return random_model(LlamaConfig(**{**_COMMON, **_SHARER, **changes}), seed=2)


def other_sharer_model() -> PreTrainedModel:
    """A 2-layer Qwen2 sharer, shallower than the receivers."""
    shape = {
        **_SHARER,
        "num_hidden_layers": 2,
    }
    del shape["head_dim"]
    return random_model(Qwen2Config(**_COMMON, **shape), seed=3)


def fuser_between(receiver: PreTrainedModel, sharer: PreTrainedModel, **changes: object) -> Fuser:
    """A small fuser with all gates open and outputs as large as the caches themselves."""
    settings = {"hidden_size": 20, "intermediate_size": 28, "depth": 4, "dropout": 0.0, **changes}
    torch.manual_seed(4)
    fuser = Fuser(FuserConfig.for_models(receiver.config, sharer.config, **settings)).eval()
    with torch.no_grad():
        for name, parameter in fuser.named_parameters():
            if name.endswith(("out_weight", "out_bias")):
                parameter.mul_(4.0)
    return fuser


def close_all_gates(fuser: Fuser) -> None:
    """Zero is closed: a gate is open iff its logit is > 0."""
    with torch.no_grad():
        for group in fuser.groups:
            group.gate_logit.zero_()


def random_model(config: object, seed: int) -> PreTrainedModel:
    """A model in float32 of random weights so large that every prompt has its own answer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # The default initialisation is so small that every prompt gives the same answer.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model

"""A tiny configuration of every causal language model that transformers knows, and what is said of
each: that it works as receiver and as sharer, or by which words it is refused."""

from __future__ import annotations

from typing import Any

import tiny_models
import transformers
from packaging import version
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# By the names that configurations have for them.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "dim_head"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dim_ff"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "dff", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "shared_intermediate_size"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "rope_dim"), 4),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), 5),
    "head_dim": 12,
    "global_head_dim": 16,
    "mamba_d_head": 12,
    "embedding_size": 48,
    "hidden_size_per_layer_input": 8,
    "vocab_size": tiny_models.VOCABULARY,
    "vocab_size_per_layer_input": tiny_models.VOCABULARY,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_MIXED = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
_NEVER = None  # a size not to be set
# What else a type needs to be tiny, or to be itself.
_CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 3,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "num_key_value_heads": _NEVER,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _NEVER),
    },
    "gpt_bigcode": {"num_key_value_heads": _NEVER},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "lfm2": _MIXED,
    "lfm2_moe": _MIXED,
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    # Beyond their windows transformers' caches and masks disagree (PhiMoE: before version 5).
    "moshi": {"sliding_window": 64},
    "phimoe": {"sliding_window": 64},
    "mpt": {"use_cache": True},  # false by default
    "stablelm": {"hidden_size": 64},
}

# Words of the refusal of every type that cannot take part, configured as transformers does unless
# `_CHANGES` says otherwise.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_melody "
        "mvp pegasus plbart prophetnet whisper xlm-prophetnet".split(),
        "is an encoder-decoder model",
    ),
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert qdqbert "
        "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl "
        "xmod".split(),
        "is an encoder (is_decoder is false)",
    ),
    **dict.fromkeys(
        "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots3_note dots3_note_text "
        "glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear longcat_flash minicpm3 youtu".split(),
        "uses multi-head latent attention (kv_lora_rank=",
    ),
    **dict.fromkeys(
        "bamba falcon_mamba granitemoehybrid jamba lfm2 lfm2_moe lfm3 mamba mamba2 minimax "
        "nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next "
        "qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2".split(),
        "no keys and values",
    ),
    **dict.fromkeys(
        ("inkling2_text", "inkling_text", "zaya"),
        "layer, which keeps more than keys and values",
    ),
    "falcon_h1": "keeps ",  # "more than" or, before transformers 5, "a recurrent state beside"
    "deepseek_v4": "layer, which keeps compressed entries of several tokens each",
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "shares the cache of some layers with others"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "reads the cache of another model"
    ),
    "mllama": "layer 1 reads another input by cross-attention and keeps no keys and values",
    "mimo_v2_flash": "layer 0 keeps keys of 192 and values of 128 numbers per head",
    "cpmant": "puts tokens of its own before every prompt",
    "blt": "has caches of its encoder, its global model and its decoder",
    **dict.fromkeys(
        "mega open-llama openai-gpt reformer transfo-xl xlm xlnet".split(),
        "fills no cache of keys and values",
    ),
}
WORKS = frozenset(
    "afmoe apertus arcee aria_text beam biogpt bitnet bloom code_llama codegen cohere cohere2 "
    "cohere2_moe cohere_compass_text ctrl cwm dbrx diffllama doge dots1 emu3 ernie4_5 ernie4_5_moe "
    "exaone4 exaone_moe falcon flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma4 "
    "gemma4_text gemma4_unified gemma4_unified_text git glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2 "
    "gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe "
    "granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 "
    "hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama llama4 llama4_text "
    "mellum minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder "
    "moshi moss_transcribe_diarize mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi "
    "phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open "
    "stablelm starcoder2 trocr vaultgemma xglm".split()
)
# These number the tokens of a padded row from its padding on, attached or not: rows of equal
# length only. CTRL and Doge before transformers 5.17 and 5.23.
UNPADDED = frozenset({"ctrl", "doge", "git", "moss_transcribe_diarize", "trocr"})
# Not tried: transformers before the version builds none from the type's default configuration.
NOT_BUILT_BEFORE = {
    "dbrx": "5.23",
    "cohere_compass_text": "5.23",
    "emu3": "5.17",
    "gemma4_assistant": "6",
    "llama4": "5.17",
    "musicgen": "5.23",
    "musicgen_melody": "5.23",
    "phi4_multimodal": "5.17",
    "speech_to_text_2": "5.0",
}


def known_types() -> list[str]:
    """The model types that this transformers has a causal language model of."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


def tried_types() -> list[str]:
    """Those of them that it can build from a configuration."""
    here = version.parse(transformers.__version__)
    return [
        kind for kind in known_types() if here >= version.parse(NOT_BUILT_BEFORE.get(kind, "0"))
    ]


def usual_config(model_type: str) -> Any:
    """As transformers configures the type, or as `_CHANGES` does."""
    changes = _CHANGES.get(model_type, {})
    return CONFIG_MAPPING[model_type](**changes)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A configuration of a few thousand numbers, all else as transformers has it."""
    return _tiny(CONFIG_MAPPING[model_type], {**_CHANGES.get(model_type, {}), **changes})


def tiny_model(config: Any, seed: int = 1) -> PreTrainedModel:
    """A random model in float32 that never ends by itself."""
    model = tiny_models.random_model(config, seed)
    model.generation_config.eos_token_id = None
    return model


def _tiny(kind: type, changes: dict[str, Any]) -> Any:
    default = kind()
    values = {name: size for name, size in _SIZES.items() if name in vars(default)} | _TOKENS
    parts = getattr(kind, "sub_configs", {})
    for name in parts:
        part = getattr(default, name, None)
        if hasattr(part, "to_dict"):
            values[name] = _tiny(type(part), changes.get(name, {})).to_dict()
    values |= {name: value for name, value in changes.items() if name not in parts}
    return kind(**{name: value for name, value in values.items() if value is not _NEVER})

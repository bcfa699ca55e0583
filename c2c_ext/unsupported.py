"""Which models cannot share or receive a cache, and why: what their layers keep instead of plain
keys and values, one of each per token and head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Encoders that transformers also offers with a language-model head: decoders only where the
# configuration says so, their tokens see one another in both directions otherwise.
_ENCODER_TYPES = frozenset(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert qdqbert "
    "rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod".split()
)
# What the configuration does not tell of these: why their cache is none of plain keys and values.
_TYPES = {
    **dict.fromkeys(
        ("mega", "open-llama", "openai-gpt", "reformer", "transfo-xl", "xlm", "xlnet"),
        " fills no cache of keys and values",
    ),
    **dict.fromkeys(
        ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
        ": layer 0, like all others, is recurrent, which keeps a state but no keys and values",
    ),
    "falcon_h1": ": layer 0, like all others, keeps a recurrent state beside keys and values",
    "blt": " has caches of its encoder, its global model and its decoder, not one",
    "cpmant": " puts tokens of its own before every prompt and keeps their keys and values too",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        " reads the cache of another model and keeps none",
    ),
}
# Kinds of layers whose whole cache is one key and one value per token and head. Older versions of
# transformers call them "attention".
_PLAIN = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention"})
_BESIDE = "keeps more than keys and values"
_COMPRESSED = "keeps compressed entries of several tokens each, no keys and values of every token"
_KEPT = {
    "hybrid": _BESIDE,
    "hybrid_sliding": _BESIDE,
    "indexed_attention": _BESIDE,
    "minimax_m3_sparse": _BESIDE,
    "compressed_sparse_attention": _COMPRESSED,
    "heavily_compressed_attention": _COMPRESSED,
}


def reasons_against(config: Any, text: Any) -> list[str]:
    """Why the cache of a model is not one plain key and value per layer, token and head.

    Args:
        config: a transformers configuration.
        text: the part of it that describes the decoder.

    Returns:
        sentences that lack their beginning ("model type ..."); empty for a plain cache.
    """
    return [*_of_the_model(config, text), *_of_layers(config, text)]


def layer_kinds(text: Any) -> list[str]:
    """What a configuration calls its layers, one name each; empty where it does not say."""
    for name in ("layer_types", "layers_block_type"):  # the second before transformers 5
        if kinds := getattr(text, name, None):
            return [str(kind) for kind in kinds]
    if getattr(text, "model_type", None) == "granitemoehybrid":  # its model's own default
        return ["mamba"] * text.num_hidden_layers
    return []


def _of_the_model(config: Any, text: Any) -> Iterator[str]:
    if getattr(config, "is_encoder_decoder", False):
        yield " is an encoder-decoder model, not a decoder-only one"
    if _types(config, text) & _ENCODER_TYPES and not getattr(text, "is_decoder", False):
        yield " is an encoder (is_decoder is false), not a decoder-only model"
    ranks = _by_layer(text, "kv_lora_rank")
    for layer in ranks:
        yield (
            f" uses multi-head latent attention (kv_lora_rank={ranks[layer]}) in layer {layer}: "
            "its cache holds no plain keys and values"
        )
        break
    if getattr(text, "num_kv_shared_layers", 0):
        yield (
            " shares the cache of some layers with others "
            f"(num_kv_shared_layers={text.num_kv_shared_layers}): not supported"
        )
    keys, values = _by_layer(text, "head_dim"), _by_layer(text, "v_head_dim")
    for layer in keys.keys() & values.keys() if not ranks else ():
        if keys[layer] != values[layer]:
            yield (
                f": layer {layer} keeps keys of {keys[layer]} and values of {values[layer]} "
                "numbers per head (head_dim, v_head_dim): a fuser needs one size for both"
            )
            break


def _of_layers(config: Any, text: Any) -> Iterator[str]:
    first: dict[str, int] = {}
    for layer, kind in enumerate(layer_kinds(text)):
        if kind not in _PLAIN:
            first.setdefault(kind, layer)
    for kind, layer in first.items():
        what = _KEPT.get(kind, "keeps no keys and values")
        yield f": layer {layer} is a {kind!r} layer, which {what}"
    if crossing := getattr(text, "cross_attention_layers", None):
        yield (
            f": layer {min(crossing)} reads another input by cross-attention and keeps no keys and "
            "values of the prompt"
        )
    if not first:
        yield from (_TYPES[kind] for kind in _types(config, text) & _TYPES.keys())


def _types(config: Any, text: Any) -> set[str]:
    return {str(getattr(c, "model_type", "") or "") for c in (config, text)}


def _by_layer(text: Any, name: str) -> dict[int, Any]:
    """Where a number is set: by layer if layers differ, else of layer 0, for all."""
    if getattr(text, "is_heterogeneous", False):  # then the model's own field cannot be read
        layers = list(text.per_layer_config)
    else:
        layers = [text]
    found = {index: getattr(layer, name, None) for index, layer in enumerate(layers)}
    return {index: value for index, value in found.items() if value}

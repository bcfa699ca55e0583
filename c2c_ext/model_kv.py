"""The two models that a fuser stands between, as it sees them: KV shapes, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .messages import shown
from .unsupported import layer_kinds, reasons_against

# Bounds on what a configuration may ask for: a file from a stranger must not be able to make the
# loader allocate without limit. Far above any published model.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 18
MAX_NAME = 256


class UnsupportedModelError(ValueError):
    """A model whose architecture keeps no plain keys and values in every layer.

    Attributes:
        reasons: one sentence each; the message is all of them.
    """

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


@dataclass(frozen=True)
class KVShape:
    """Shape of one layer's key and value cache: ``[batch, num_heads, tokens, head_dim]``."""

    num_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"KVShape.{name} must be an integer of at least 1, got {shown(value)}"
                )
        if self.width > MAX_WIDTH:
            raise ValueError(
                f"KVShape: num_heads * head_dim must be at most {MAX_WIDTH}, got "
                f"{shown(self.width)}"
            )

    @property
    def width(self) -> int:
        """Channels of one token with all heads flattened."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class ModelKV:
    """A model as the fuser sees it: who it is, and the KV shape of each of its layers.

    Attributes:
        model_type: transformers' model type, e.g. ``"qwen3"``.
        name: hub name or directory name (never a whole path); may be empty.
        layers: one `KVShape` per layer.
    """

    model_type: str
    name: str
    layers: tuple[KVShape, ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelKV:
        """Reads a transformers configuration.

        ``head_dim`` is used where the configuration gives it and derived from
        ``hidden_size / num_attention_heads`` where not; ``num_key_value_heads`` falls back to
        ``num_attention_heads``.

        Raises:
            UnsupportedModelError: an encoder-decoder model, or one whose cache has no plain keys
                and values per layer (multi-head latent attention, recurrent layers, layers that
                reuse another layer's cache). A ValueError that says all reasons.
            ValueError: a number is missing or out of range.
        """
        if not hasattr(config, "model_type"):
            raise TypeError(
                f"c2c_ext: expected a transformers configuration, got {type(config).__name__}"
            )
        text = (
            config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        )
        model_type = str(getattr(text, "model_type", "") or "")
        where = f"c2c_ext: model type {model_type!r}"
        reasons = [where + reason for reason in reasons_against(config, text)]
        if reasons:
            raise UnsupportedModelError(*reasons)
        num_layers = _number(text, "layers", "num_hidden_layers")
        if not isinstance(num_layers, int) or not 1 <= num_layers <= MAX_LAYERS:
            raise ValueError(
                f"{where}: num_hidden_layers must be in 1..{MAX_LAYERS}, got {shown(num_layers)}"
            )
        layer_types = layer_kinds(text) or ["full_attention"] * num_layers
        if len(layer_types) < num_layers:
            raise ValueError(
                f"{where}: layer_types must have {num_layers} entries, got {len(layer_types)}"
            )
        shapes = [_layer_kv_shape(text, i, layer_types[i], where) for i in range(num_layers)]
        name = str(getattr(config, "_name_or_path", "") or "")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            name = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
        name = "".join(c for c in name if c.isprintable())[:MAX_NAME]
        return cls(model_type, name, tuple(shapes))

    def summary(self) -> str:
        """One phrase, e.g. ``qwen3 (28 layers, 8 x 128)``."""
        shapes = {f"{s.num_heads} x {s.head_dim}": None for s in self.layers}
        name = " ".join(filter(None, (self.model_type or "unnamed model", self.name)))
        return f"{name} ({len(self.layers)} layers, {' and '.join(shapes)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; layers as ``[num_heads, head_dim]`` pairs."""
        return {
            "model_type": self.model_type,
            "name": self.name,
            "kv_layers": [[s.num_heads, s.head_dim] for s in self.layers],
        }

    @classmethod
    def from_dict(cls, data: Any, field: str) -> ModelKV:
        """Inverse of `to_dict`; ``field`` names the place in error messages."""
        if not isinstance(data, Mapping):
            raise ValueError(f"FuserConfig.{field} must be an object, got {type(data).__name__}")
        layers = data.get("kv_layers")
        if not isinstance(layers, Sequence) or isinstance(layers, str):
            raise ValueError(
                f"FuserConfig.{field}.kv_layers must be a list of [num_heads, head_dim]"
            )
        if not 1 <= len(layers) <= MAX_LAYERS:
            raise ValueError(
                f"FuserConfig.{field}.kv_layers must have 1..{MAX_LAYERS} entries, "
                f"got {len(layers)}"
            )
        shapes = []
        for i, pair in enumerate(layers):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(
                    f"FuserConfig.{field}.kv_layers[{i}] must be [num_heads, head_dim], "
                    f"got {shown(pair)}"
                )
            try:
                shapes.append(KVShape(*pair))
            except ValueError as error:
                raise ValueError(f"FuserConfig.{field}.kv_layers[{i}]: {error}") from None
        for key in ("model_type", "name"):
            text = data.get(key, "")
            if not isinstance(text, str) or not text.isprintable() or len(text) > MAX_NAME:
                raise ValueError(
                    f"FuserConfig.{field}.{key} must be a printable string of at most {MAX_NAME} "
                    f"characters, got {shown(text)}"
                )
        return cls(data.get("model_type", ""), data.get("name", ""), tuple(shapes))


def _number(text: Any, decoders: str, usual: str) -> Any:
    """A number of a configuration; where it is of an encoder-decoder's decoder alone, of that.

    Args:
        decoders: the name after ``decoder_`` or ``num_decoder_``; ``usual`` then tells of the
            encoder (BartForCausalLM and the like).
    """
    if getattr(text, "is_decoder", False):
        for name in (f"decoder_{decoders}", f"num_decoder_{decoders}"):
            if number := getattr(text, name, None):
                return number
    return getattr(text, usual, None)


def _layer_kv_shape(text: Any, layer: int, layer_type: str, where: str) -> KVShape:
    per_layer = getattr(text, "per_layer_config", None)
    # As many as the encoder has where text is the decoder of an encoder-decoder.
    config = per_layer[layer] if per_layer is not None and layer < len(per_layer) else text
    heads = getattr(config, "num_key_value_heads", None)
    if not heads and getattr(config, "multi_query", False):
        # Falcon: the new architecture repeats its key-value heads before it caches them.
        heads = None if getattr(config, "new_decoder_architecture", False) else 1
    heads = heads or _number(config, "attention_heads", "num_attention_heads")
    dim = getattr(config, "head_dim", None)
    if per_layer is None and layer_type == "full_attention":
        # Gemma 4 before per_layer_config existed: global layers have their own numbers.
        dim = getattr(text, "global_head_dim", None) or dim
        heads = getattr(text, "num_global_key_value_heads", None) or heads
    if dim is None:
        hidden = getattr(config, "hidden_size", None)
        attention_heads = _number(config, "attention_heads", "num_attention_heads")
        if not hidden or not attention_heads:
            raise UnsupportedModelError(
                f"{where}: layer {layer} has neither head_dim nor hidden_size / num_attention_heads"
            )
        dim = hidden // attention_heads
    if not heads:
        raise UnsupportedModelError(
            f"{where}: layer {layer} has neither num_key_value_heads nor num_attention_heads"
        )
    try:
        return KVShape(heads, dim)
    except ValueError as error:
        raise ValueError(f"{where}: layer {layer}: {error}") from None

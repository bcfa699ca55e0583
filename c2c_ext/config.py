"""FuserConfig: what a fuser is."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .layer_map import layer_map as resolve_layer_map
from .messages import shown, shown_name
from .model_kv import MAX_WIDTH, KVShape, ModelKV
from .parameters import parameter_shapes

FORMAT_VERSION = 1
KINDS = ("key", "value")  # of streams
ACTIVATIONS = ("gelu", "relu", "silu")
PROJECTIONS = ("mlp", "linear", "transformer")
READS = ("both", "sharer")
INTEGRATIONS = ("residual", "interpolation", "replacement")
# What tells a variant of docs/differences.md from the published architecture.
VARIANT_FIELDS = (
    *("activation", "projection", "reads", "integration"),
    *("kinds", "weighting", "gate", "attention_heads"),
)
_CHOICES = {
    "activation": ACTIVATIONS,
    "projection": PROJECTIONS,
    "reads": READS,
    "integration": INTEGRATIONS,
}
# As MAX_LAYERS: a stranger's file must not ask for anything.
MAX_DEPTH = 32
MAX_SHAPE_GROUPS = 32


@dataclass(frozen=True)
class FuserConfig:
    """Everything that fixes a fuser's shape (arXiv 2510.03215, section 3).

    The defaults are the paper's fuser as its code has it. The fields from ``projection`` on select
    the variants of docs/differences.md; `uncompiled_reason` says which of them the compiled op
    does not run.

    Attributes:
        receiver: the receiver's KV layout.
        sharer: the sharer's KV layout.
        layer_map: one sharer layer per receiver layer.
        hidden_size: width of the fuser's hidden state.
        intermediate_size: inner width of its feed-forward blocks.
        depth: feed-forward blocks on the way from input to projection plus one, at least 3:
            one shared block, then ``depth - 2`` projection blocks (published ``num_layers``).
        activation: ``"gelu"`` (exact), ``"relu"`` or ``"silu"``.
        dropout: probability, training only.
        gate_init: initial value of every gate logit; a gate is open iff its logit is > 0.
        projection: how the projection P comes about. ``"mlp"``: feed-forward blocks, token by
            token. ``"linear"``: one map without bias, ``P = W c``; no hidden size, depth or
            activation. ``"transformer"``: causal attention over the sharer's tokens in place of
            the input map, then the same blocks; ``depth`` 2 is a single Transformer block.
        reads: what the projection reads: ``"both"`` caches, or the ``"sharer"``'s alone.
        integration: how the weighted projection joins the receiver's token t. ``"residual"``:
            ``t + w P``; ``"interpolation"``: ``t + w (P - t)``; ``"replacement"``: ``w P``.
        kinds: which streams exist: ``("key", "value")``, ``("key",)`` or ``("value",)``. The
            others keep the receiver's own cache.
        weighting: dynamic weighting w, one number per token and receiver head; without: w = 1.
        gate: a gate per stream; without: every stream is always fused.
        attention_heads: of a ``"transformer"``; divides hidden_size.
        format_version: of fuser_config.json.
    """

    receiver: ModelKV
    sharer: ModelKV
    layer_map: tuple[int, ...]
    hidden_size: int = 1024
    intermediate_size: int = 1024
    depth: int = 3
    activation: str = "gelu"
    dropout: float = 0.1
    gate_init: float = 1.0
    projection: str = "mlp"
    reads: str = "both"
    integration: str = "residual"
    kinds: tuple[str, ...] = KINDS
    weighting: bool = True
    gate: bool = True
    attention_heads: int = 8
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for side in ("receiver", "sharer"):
            if not isinstance(getattr(self, side), ModelKV):
                raise TypeError(
                    f"FuserConfig.{side} must be a ModelKV, got {getattr(self, side)!r:.80}"
                )
        mapped = resolve_layer_map(
            len(self.receiver.layers), len(self.sharer.layers), self.layer_map
        )
        object.__setattr__(self, "layer_map", tuple(mapped))
        _checked_int(self.hidden_size, "hidden_size", 1, MAX_WIDTH)
        _checked_int(self.intermediate_size, "intermediate_size", 1, MAX_WIDTH)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(
                    f"FuserConfig.{name} must be one of {', '.join(known)}, got {shown(value)}"
                )
        _checked_int(self.depth, "depth", 2 if self.projection == "transformer" else 3, MAX_DEPTH)
        dropout = _checked_float(self.dropout, "dropout")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"FuserConfig.dropout must be in [0, 1), got {self.dropout}")
        object.__setattr__(self, "dropout", dropout)
        object.__setattr__(self, "gate_init", _checked_float(self.gate_init, "gate_init"))
        self._check_variant()
        groups = len(self.shape_groups())
        if groups > MAX_SHAPE_GROUPS:
            raise ValueError(
                f"FuserConfig: layers must have at most {MAX_SHAPE_GROUPS} different pairs of KV "
                f"shapes, got {groups}"
            )
        if type(self.format_version) is not int or self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"FuserConfig.format_version must be {FORMAT_VERSION}, got "
                f"{shown(self.format_version)}: written by another version of c2c_ext"
            )

    def _check_variant(self) -> None:
        kinds = self.kinds
        if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
            raise ValueError(f"FuserConfig.kinds must be a sequence of kinds, got {shown(kinds)}")
        object.__setattr__(self, "kinds", tuple(kinds))
        if self.kinds not in (KINDS, KINDS[:1], KINDS[1:]):
            raise ValueError(
                f"FuserConfig.kinds must be ('key', 'value'), ('key',) or ('value',), got "
                f"{shown(kinds)}"
            )
        for name in ("weighting", "gate"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(
                    f"FuserConfig.{name} must be true or false, got {shown(getattr(self, name))}"
                )
        _checked_int(self.attention_heads, "attention_heads", 1, MAX_WIDTH)
        if self.projection == "transformer" and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"FuserConfig.attention_heads must divide hidden_size {self.hidden_size}, got "
                f"{self.attention_heads}"
            )
        if self.projection == "linear" and self.weighting:
            raise ValueError(
                "FuserConfig.weighting must be False with projection 'linear', which has no hidden "
                "state to weigh from"
            )

    @classmethod
    def for_models(
        cls,
        receiver_config: Any,
        sharer_config: Any,
        *,
        layer_map: str | Sequence[int] = "last_aligned",
        hidden_size: int = 1024,
        intermediate_size: int | None = None,
        depth: int = 3,
        activation: str = "gelu",
        dropout: float = 0.1,
        gate_init: float = 1.0,
        projection: str = "mlp",
        reads: str | None = None,
        integration: str = "residual",
        kinds: Sequence[str] = KINDS,
        weighting: bool | None = None,
        gate: bool = True,
        attention_heads: int = 8,
    ) -> FuserConfig:
        """Configuration of a fuser between two transformers models, from their configurations.

        Args:
            receiver_config: the receiver's transformers configuration.
            sharer_config: the sharer's.
            layer_map: a strategy of `c2c_ext.layer_map` or one sharer layer per receiver layer.
            intermediate_size: defaults to ``hidden_size``.
            reads: defaults to ``"sharer"`` with a linear projection, else to ``"both"``.
            weighting: defaults to False with a linear projection, else to True.
            hidden_size, depth, activation, ...: see `FuserConfig`.

        Raises:
            ValueError: a model whose cache has no plain keys and values, or a value out of range.
        """
        receiver, sharer = ModelKV.from_config(receiver_config), ModelKV.from_config(sharer_config)
        return cls(
            receiver=receiver,
            sharer=sharer,
            layer_map=tuple(resolve_layer_map(len(receiver.layers), len(sharer.layers), layer_map)),
            hidden_size=hidden_size,
            intermediate_size=hidden_size if intermediate_size is None else intermediate_size,
            depth=depth,
            activation=activation,
            dropout=dropout,
            gate_init=gate_init,
            projection=projection,
            reads=("sharer" if projection == "linear" else "both") if reads is None else reads,
            integration=integration,
            kinds=tuple(kinds) if isinstance(kinds, list | tuple) else kinds,
            weighting=projection != "linear" if weighting is None else weighting,
            gate=gate,
            attention_heads=attention_heads,
        )

    def layer_shapes(self, layer: int) -> tuple[KVShape, KVShape]:
        """(sharer, receiver) KV shapes that receiver layer ``layer`` fuses."""
        return self.sharer.layers[self.layer_map[layer]], self.receiver.layers[layer]

    def shape_groups(self) -> list[list[int]]:
        """Receiver layers with equal (sharer, receiver) KV shapes, grouped; by first layer."""
        groups: dict[tuple[KVShape, KVShape], list[int]] = {}
        for layer in range(len(self.receiver.layers)):
            groups.setdefault(self.layer_shapes(layer), []).append(layer)
        return list(groups.values())

    def num_parameters(self) -> int:
        """Parameters of a fuser with this configuration, gates included."""
        return sum(math.prod(shape) for _, shape in parameter_shapes(self))

    def settings(self) -> dict[str, Any]:
        """The fields that matter to this fuser beside models and layer map, by name."""
        names = ["projection", "reads", "integration", "kinds", "weighting", "gate"]
        if self.projection != "linear":
            names += ["hidden_size", "intermediate_size", "depth", "activation", "dropout"]
        if self.projection == "transformer":
            names.append("attention_heads")
        if self.gate:
            names.append("gate_init")
        return {name: getattr(self, name) for name in names}

    def variant(self) -> dict[str, Any]:
        """The fields by which this fuser differs from the published architecture; often empty."""
        default = {f.name: f.default for f in fields(self)}
        settings = self.settings()
        names = [name for name in VARIANT_FIELDS if name in settings]
        return {n: settings[n] for n in names if settings[n] != default[n]}

    def uncompiled_reason(self) -> str | None:
        """Why `c2c_ext.reference` runs this fuser; None if the compiled op does."""
        if self.projection == "mlp":
            return None
        return f"projection={self.projection!r} has no compiled kernels"

    def mismatches(
        self, receiver: ModelKV | None = None, sharer: ModelKV | None = None
    ) -> list[str]:
        """What keeps this fuser from working between two models; empty if it fits.

        Compares layer counts and the KV shapes of the layers that are fused or read; one sentence
        per difference, with both numbers. A model that is not given is not compared.
        """
        sides = (
            ("receiver", receiver, self.receiver, range(len(self.receiver.layers))),
            ("sharer", sharer, self.sharer, sorted(set(self.layer_map))),
        )
        problems = []
        for side, model, expected, layers in sides:
            if model is None:
                continue
            if len(model.layers) != len(expected.layers):
                problems.append(
                    f"the fuser was made for a {side} of {len(expected.layers)} layers, this one "
                    f"has {len(model.layers)}"
                )
                continue
            for i in layers:
                for number in ("num_heads", "head_dim"):
                    wanted, got = (getattr(x.layers[i], number) for x in (expected, model))
                    if wanted != got:
                        problems.append(
                            f"the fuser was made for {number} {wanted} in {side} layer {i}, this "
                            f"one has {got}"
                        )
        return problems

    def to_json(self) -> str:
        """The text of fuser_config.json."""
        data = asdict(self)
        data["receiver"], data["sharer"] = self.receiver.to_dict(), self.sharer.to_dict()
        data["layer_map"], data["kinds"] = list(self.layer_map), list(self.kinds)
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> FuserConfig:
        """Inverse of `to_json` after parsing; unknown keys warn, missing optional ones default.

        Raises:
            ValueError: a required key is missing or a value is out of range; names the key.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"FuserConfig: expected a JSON object, got {type(data).__name__}")
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"FuserConfig.format_version must be {FORMAT_VERSION}, got {shown(version)}: "
                "not a fuser_config.json of this version of c2c_ext"
            )
        known = {f.name for f in fields(cls)}
        unknown = [shown_name(key) for key in sorted(set(map(str, data)) - known)]
        if unknown:
            listed = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
            warnings.warn(f"FuserConfig: unknown keys ignored: {listed}", stacklevel=2)
        for key in ("receiver", "sharer", "layer_map", "hidden_size", "intermediate_size"):
            if key not in data:
                raise ValueError(f"FuserConfig.{key} is missing")
        values = {k: v for k, v in data.items() if k in known}
        values["receiver"] = ModelKV.from_dict(data["receiver"], "receiver")
        values["sharer"] = ModelKV.from_dict(data["sharer"], "sharer")
        if not isinstance(data["layer_map"], list):
            raise ValueError(
                f"FuserConfig.layer_map must be a list, got {shown(data['layer_map'])}"
            )
        values["layer_map"] = tuple(data["layer_map"])
        if not isinstance(data.get("kinds", []), list):
            raise ValueError(f"FuserConfig.kinds must be a list, got {shown(data['kinds'])}")
        try:
            return cls(**values)
        except TypeError as error:  # a value of the wrong type: in a file, a wrong value
            raise ValueError(str(error)) from None


def _checked_int(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"FuserConfig.{name} must be an int, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"FuserConfig.{name} must be in {low}..{high}, got {shown(value)}")
    return value


def _checked_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"FuserConfig.{name} must be a number, got {shown(value)}")
    if not abs(value) < 1e9:
        raise ValueError(f"FuserConfig.{name} must be below 1e9 in size, got {shown(value)}")
    return float(value)

"""Fusers in the on-disk format of the public C2C research code, read as data.

A directory of ``projector_{i}.pt`` (a state dict; loaded with weights_only), ``projector_{i}.json``
(class name and arguments) and ``projector_config.json``:
``{receiver model: {sharer model: {receiver layer: [[sharer layer, projector index]]}}}``.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import KINDS, FuserConfig
from .files import existing_directory, read_json
from .messages import shown, shown_name
from .model_kv import MAX_LAYERS, MAX_WIDTH, KVShape, ModelKV
from .serialization import assemble
from .state_dict import read_state_dict

if TYPE_CHECKING:
    from .fuser import Fuser

PROJECTOR_CONFIG_NAME = "projector_config.json"
PROJECTOR_CLASS = "C2CProjector"
# Arguments that fix shapes, and those that only training reads (kept where we have a place).
SHAPE_ARGUMENTS = (
    "source_dim",
    "target_dim",
    "source_num_heads",
    "target_num_heads",
    "hidden_dim",
    "intermediate_dim",
    "num_layers",
)
TRAINING_ARGUMENTS = (
    "dropout",
    "initial_temperature",
    "final_temperature",
    "anneal_steps",
    "dtype",
)
MAX_PROJECTOR_BYTES = 1 << 32
# FuserGroup's parameter -> published name, after "key_" or "value_".
PUBLISHED_NAMES = {
    "in_weight": "in.weight",
    "in_bias": "in.bias",
    "shared_norm": "mlp1.blocks.0.norm.weight",
    "shared_w1": "mlp1.blocks.0.w1.weight",
    "shared_w2": "mlp1.blocks.0.w2.weight",
    "proj_norm": "proj_mlp2.blocks.{block}.norm.weight",
    "proj_w1": "proj_mlp2.blocks.{block}.w1.weight",
    "proj_w2": "proj_mlp2.blocks.{block}.w2.weight",
    "out_weight": "proj_out.weight",
    "out_bias": "proj_out.bias",
    "weight_norm": "scalar_mlp2.blocks.0.norm.weight",
    "weight_w1": "scalar_mlp2.blocks.0.w1.weight",
    "weight_w2": "scalar_mlp2.blocks.0.w2.weight",
    "head_weight": "scalar_head.weight",
    "head_bias": "scalar_head.bias",
    "gate_logit": "gate_logit",
}
# Layers may share a projector, each with its own copy here; this many bytes more than the files
# hold, at most.
MAX_SHARED_BYTES = 1 << 30


def load_published(
    directory: str | os.PathLike, *, receiver_config: Any = None, sharer_config: Any = None
) -> Fuser:
    """Reads a published directory; see `Fuser.from_published`."""
    from .fuser import Fuser

    path = existing_directory(directory)
    mapping = _read_mapping(path / PROJECTOR_CONFIG_NAME)
    projectors = {index: _read_arguments(path, index) for index in {p for _, p in mapping}}
    config = _build_config(path, mapping, projectors, receiver_config, sharer_config)

    states = {index: _read_state(path, index, projectors[index]) for index in projectors}
    dtype = _common_dtype(states)
    _check_sharing(path, mapping, states, dtype)
    tensors: dict[str, Tensor] = {}
    for g, layers in enumerate(config.shape_groups()):
        streams = [
            _stream_tensors(states[mapping[layer][1]], kind, config.depth)
            for layer in layers
            for kind in KINDS
        ]
        for name in streams[0]:
            tensors[f"groups.{g}.{name}"] = torch.stack([s[name].to(dtype) for s in streams])
    return assemble(Fuser, config, tensors)


def read_published_config(directory: str | os.PathLike) -> FuserConfig:
    """The configuration of a published directory from its JSON files alone; reads no tensor."""
    path = existing_directory(directory)
    mapping = _read_mapping(path / PROJECTOR_CONFIG_NAME)
    projectors = {index: _read_arguments(path, index) for index in {p for _, p in mapping}}
    return _build_config(path, mapping, projectors, None, None)


def _read_mapping(path: Path) -> list[tuple[int, int]]:
    """(sharer layer, projector index) of every receiver layer."""
    data = read_json(path)
    for level in ("receiver model", "sharer model"):
        if not isinstance(data, Mapping) or len(data) != 1:
            count = len(data) if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"c2c_ext: {path} must name exactly one {level}, got {count}")
        data = next(iter(data.values()))
    if not isinstance(data, Mapping) or not 1 <= len(data) <= MAX_LAYERS:
        raise ValueError(f"c2c_ext: {path} must map 1..{MAX_LAYERS} receiver layers")
    mapping = []
    for layer in range(len(data)):
        pairs = data.get(str(layer))
        if pairs is None:
            raise ValueError(
                f"c2c_ext: {path}: receiver layers must be 0..{len(data) - 1}, {layer} is missing"
            )
        if not isinstance(pairs, list) or len(pairs) != 1:
            raise ValueError(
                f"c2c_ext: {path}: receiver layer {layer} must have exactly one "
                f"[sharer layer, projector] pair, got {shown(pairs)}"
            )
        pair = pairs[0]
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(type(x) is int and 0 <= x < MAX_LAYERS for x in pair)
        ):
            raise ValueError(
                f"c2c_ext: {path}: receiver layer {layer}: a pair must be two integers in "
                f"0..{MAX_LAYERS - 1}, got {shown(pair)}"
            )
        mapping.append((pair[0], pair[1]))
    return mapping


def _read_arguments(path: Path, index: int) -> dict[str, Any]:
    file = path / f"projector_{index}.json"
    data = read_json(file)
    if not isinstance(data, Mapping) or data.get("class") != PROJECTOR_CLASS:
        got = data.get("class") if isinstance(data, Mapping) else type(data).__name__
        raise ValueError(f"c2c_ext: {file}: class must be {PROJECTOR_CLASS!r}, got {shown(got)}")
    arguments = data.get("init_args")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"c2c_ext: {file}: init_args must be an object")
    for name in SHAPE_ARGUMENTS:
        value = arguments.get(name)
        if type(value) is not int or not 1 <= value <= MAX_WIDTH:
            raise ValueError(
                f"c2c_ext: {file}: init_args.{name} must be an integer in 1..{MAX_WIDTH}, "
                f"got {shown(value)}"
            )
    unknown = sorted(set(arguments) - set(SHAPE_ARGUMENTS) - set(TRAINING_ARGUMENTS))
    if unknown:
        listed = ", ".join(map(shown_name, unknown[:8])) + (", ..." if len(unknown) > 8 else "")
        warnings.warn(f"c2c_ext: {file}: arguments ignored: {listed}", stacklevel=4)
    return dict(arguments)


def _build_config(
    path: Path,
    mapping: list[tuple[int, int]],
    projectors: dict[int, dict[str, Any]],
    receiver_config: Any,
    sharer_config: Any,
) -> FuserConfig:
    first_index = mapping[0][1]
    first = projectors[first_index]
    for index, arguments in projectors.items():
        for name in ("hidden_dim", "intermediate_dim", "num_layers"):
            if arguments[name] != first[name]:
                raise ValueError(
                    f"c2c_ext: {path}: projectors must agree on {name}: projector_{first_index} "
                    f"has {first[name]}, projector_{index} has {arguments[name]}"
                )
    receiver_shapes = [_kv_shape(path, p, projectors[p], "target") for _, p in mapping]
    source_shapes = [_kv_shape(path, p, projectors[p], "source") for _, p in mapping]
    used = {source: shape for (source, _), shape in zip(mapping, source_shapes, strict=True)}
    for (source, _), shape in zip(mapping, source_shapes, strict=True):
        if used[source] != shape:
            raise ValueError(
                f"c2c_ext: {path}: projectors disagree on the KV shape of sharer layer {source}"
            )
    receiver = ModelKV("", "", tuple(receiver_shapes))
    if receiver_config is not None:
        receiver = _checked_model("receiver", receiver_config, dict(enumerate(receiver_shapes)))
        if len(receiver.layers) != len(receiver_shapes):
            raise ValueError(
                f"c2c_ext: receiver_config must have {len(receiver_shapes)} layers (the "
                f"projectors), got {len(receiver.layers)}"
            )
    if sharer_config is not None:
        sharer = _checked_model("sharer", sharer_config, used)
    else:
        # Layers that nothing reads have no recorded shape; they get that of a layer in use.
        spare = used[mapping[0][0]]
        sharer = ModelKV("", "", tuple(used.get(i, spare) for i in range(max(used) + 1)))
    try:
        return FuserConfig(
            receiver=receiver,
            sharer=sharer,
            layer_map=tuple(source for source, _ in mapping),
            hidden_size=first["hidden_dim"],
            intermediate_size=first["intermediate_dim"],
            depth=first["num_layers"],
            activation="gelu",  # the only one the published projector has
            dropout=first.get("dropout", 0.1),
        )
    except ValueError as error:
        raise ValueError(f"c2c_ext: {path}: {error}") from error


def _kv_shape(path: Path, index: int, arguments: Mapping[str, int], side: str) -> KVShape:
    try:
        return KVShape(arguments[f"{side}_num_heads"], arguments[f"{side}_dim"])
    except ValueError as error:
        raise ValueError(f"c2c_ext: {path / f'projector_{index}.json'}: {side}: {error}") from None


def _checked_model(side: str, model_config: Any, shapes: dict[int, KVShape]) -> ModelKV:
    model = ModelKV.from_config(model_config)
    for layer, shape in shapes.items():
        if layer >= len(model.layers):
            raise ValueError(
                f"c2c_ext: {side}_config must have more than {layer} layers (layer {layer} is "
                f"mapped), got {len(model.layers)}"
            )
        got = model.layers[layer]
        if got != shape:
            raise ValueError(
                f"c2c_ext: {side}_config layer {layer} must have {shape.num_heads} KV heads x "
                f"{shape.head_dim} (the projectors), got {got.num_heads} x {got.head_dim}"
            )
    return model


def _published_shapes(arguments: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """State-dict name -> shape of one projector."""
    h, m = arguments["hidden_dim"], arguments["intermediate_dim"]
    heads = arguments["target_num_heads"]
    width = heads * arguments["target_dim"]
    source = arguments["source_num_heads"] * arguments["source_dim"]
    shapes: dict[str, tuple[int, ...]] = {}
    for kind in KINDS:
        blocks = {f"{kind}_mlp1.blocks.0": m, f"{kind}_scalar_mlp2.blocks.0": h}
        blocks |= {f"{kind}_proj_mlp2.blocks.{i}": m for i in range(arguments["num_layers"] - 2)}
        for block, inner in blocks.items():
            shapes[f"{block}.norm.weight"] = (h,)
            shapes[f"{block}.w1.weight"] = (inner, h)
            shapes[f"{block}.w2.weight"] = (h, inner)
        shapes[f"{kind}_in.weight"], shapes[f"{kind}_in.bias"] = (h, source + width), (h,)
        shapes[f"{kind}_proj_out.weight"], shapes[f"{kind}_proj_out.bias"] = (width, h), (width,)
        shapes[f"{kind}_scalar_head.weight"] = (heads, h)
        shapes[f"{kind}_scalar_head.bias"] = (heads,)
        shapes[f"{kind}_gate_logit"] = ()
    return shapes


def _read_state(path: Path, index: int, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    file = path / f"projector_{index}.pt"
    # The temperature is training's.
    return read_state_dict(file, _published_shapes(arguments), ignored=("gate_temperature",))


def _check_sharing(
    path: Path,
    mapping: list[tuple[int, int]],
    states: Mapping[int, Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    uses = Counter(index for _, index in mapping)
    extra = sum(
        (uses[index] - 1) * sum(t.numel() for t in state.values()) * dtype.itemsize
        for index, state in states.items()
    )
    if extra > MAX_SHARED_BYTES:
        raise ValueError(
            f"c2c_ext: {path / PROJECTOR_CONFIG_NAME}: layers that share a projector would take "
            f"{extra} bytes more than the files hold, at most {MAX_SHARED_BYTES} are allowed"
        )


def _common_dtype(states: Mapping[int, Mapping[str, Tensor]]) -> torch.dtype:
    dtype = None
    for state in states.values():
        for tensor in state.values():
            dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    assert dtype is not None
    return dtype


def _stream_tensors(state: Mapping[str, Tensor], kind: str, depth: int) -> dict[str, Tensor]:
    """One projector's key or value path under the names of `FuserGroup`."""
    tensors = {}
    for name, published in PUBLISHED_NAMES.items():
        if name.startswith("proj_"):
            blocks = [state[f"{kind}_{published.format(block=i)}"] for i in range(depth - 2)]
            tensors[name] = torch.stack(blocks)
        else:
            tensors[name] = state[f"{kind}_{published}"]
    return tensors

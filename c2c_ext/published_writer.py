"""Fusers written in the on-disk format of the public C2C research code; published.py reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import KINDS, FuserConfig
from .published import PROJECTOR_CLASS, PROJECTOR_CONFIG_NAME, PUBLISHED_NAMES
from .serialization import host_tensors, write_directory

if TYPE_CHECKING:
    from .fuser import Fuser

# Training's temperature schedule, which we do not keep: the published one, at its end.
SCHEDULE = {"initial_temperature": 1.0, "final_temperature": 0.001, "anneal_steps": 1929}
# The format numbers the models: 0 is the receiver, 1 the sharer.
RECEIVER_KEY, SHARER_KEY = "0", "1"


def save_published(fuser: Fuser, directory: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a published directory; see `Fuser.save_published`."""
    config = fuser.config
    check_publishable(config)
    tensors = host_tensors(fuser)

    def write(path: Path) -> None:
        for g, layers in enumerate(config.shape_groups()):
            for i, layer in enumerate(layers):
                state = _projector_state(tensors, g, i, config.depth)
                torch.save(state, path / f"projector_{layer}.pt")
                arguments = json.dumps(_arguments(config, layer, state), indent=2)
                (path / f"projector_{layer}.json").write_text(arguments, "utf-8")
        pairs = {str(layer): [[source, layer]] for layer, source in enumerate(config.layer_map)}
        mapping = json.dumps({RECEIVER_KEY: {SHARER_KEY: pairs}})
        (path / PROJECTOR_CONFIG_NAME).write_text(mapping, "utf-8")

    write_directory(Path(directory), write, overwrite=overwrite)


def check_publishable(config: FuserConfig) -> None:
    """Raises ValueError naming the first field that the published format cannot express."""
    for name, value in config.variant().items():
        published = FuserConfig.__dataclass_fields__[name].default
        raise ValueError(
            f"c2c_ext: the published format has only fusers with {name} {published!r}, this one "
            f"has {value!r:.80}"
        )


def _projector_state(
    tensors: dict[str, Tensor], group: int, place: int, depth: int
) -> dict[str, Tensor]:
    """The state dict of one projector: both streams of the ``place``-th layer of a shape group."""
    state = {}
    for k, kind in enumerate(KINDS):
        for name, published in PUBLISHED_NAMES.items():
            stream = tensors[f"groups.{group}.{name}"][2 * place + k]
            blocks = stream[: depth - 2] if name.startswith("proj_") else [stream]
            for i, tensor in enumerate(blocks):
                # Cloned: torch.save writes a view's whole storage.
                state[f"{kind}_{published.format(block=i)}"] = tensor.clone()
    dtype = next(iter(state.values())).dtype
    state["gate_temperature"] = torch.tensor(SCHEDULE["final_temperature"], dtype=dtype)
    return state


def _arguments(config: FuserConfig, layer: int, state: dict[str, Tensor]) -> dict[str, Any]:
    sharer, receiver = config.layer_shapes(layer)
    dtype = str(state["gate_temperature"].dtype).removeprefix("torch.")
    return {
        "class": PROJECTOR_CLASS,
        "init_args": {
            "source_dim": sharer.head_dim,
            "target_dim": receiver.head_dim,
            "source_num_heads": sharer.num_heads,
            "target_num_heads": receiver.num_heads,
            "hidden_dim": config.hidden_size,
            "intermediate_dim": config.intermediate_size,
            "num_layers": config.depth,
            "dropout": config.dropout,
            **SCHEDULE,
            "dtype": {"__type__": "torch.dtype", "value": dtype},
        },
    }

"""Names and shapes of a fuser's parameters, from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import FuserConfig

ATTENTION_MAPS = ("query_weight", "key_weight", "value_weight", "merge_weight")
ATTENTION_NAMES = (
    *("source_weight", "source_bias", "query_norm", "source_norm"),
    *ATTENTION_MAPS,
)


def group_parameter_shapes(config: FuserConfig, layers: list[int]) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the shape group that holds ``layers``; dim 0 is the stream."""
    sharer, receiver = config.layer_shapes(layers[0])
    g, h, m = len(config.kinds) * len(layers), config.hidden_size, config.intermediate_size
    read_width = sharer.width + (receiver.width if config.reads == "both" else 0)
    shapes: dict[str, tuple[int, ...]] = {}
    if config.projection == "linear":
        shapes["out_weight"] = (g, receiver.width, read_width)
    else:
        p = config.depth - 2
        if config.projection == "transformer":
            if config.reads == "both":
                shapes |= {"in_weight": (g, h, receiver.width), "in_bias": (g, h)}
            shapes |= {"source_weight": (g, h, sharer.width), "source_bias": (g, h)}
            shapes |= {"query_norm": (g, h), "source_norm": (g, h)}
            shapes |= dict.fromkeys(ATTENTION_MAPS, (g, h, h))
        else:
            shapes |= {"in_weight": (g, h, read_width), "in_bias": (g, h)}
        shapes |= {"shared_norm": (g, h), "shared_w1": (g, m, h), "shared_w2": (g, h, m)}
        shapes |= {"proj_norm": (g, p, h), "proj_w1": (g, p, m, h), "proj_w2": (g, p, h, m)}
        shapes |= {"out_weight": (g, receiver.width, h), "out_bias": (g, receiver.width)}
    if config.weighting:
        shapes |= {"weight_norm": (g, h), "weight_w1": (g, h, h), "weight_w2": (g, h, h)}
        heads = receiver.num_heads
        shapes |= {"head_weight": (g, heads, h), "head_bias": (g, heads)}
    if config.gate:
        shapes["gate_logit"] = (g,)
    return shapes


def parameter_shapes(config: FuserConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(state-dict name, shape) of every parameter, without allocating any."""
    for g, layers in enumerate(config.shape_groups()):
        for name, shape in group_parameter_shapes(config, layers).items():
            yield f"groups.{g}.{name}", shape

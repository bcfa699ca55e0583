"""Which sharer layer each receiver layer reads: the layer map and its strategies."""

from __future__ import annotations

from collections.abc import Sequence

from .messages import shown

STRATEGIES = ("last_aligned", "k_nearest", "depth")


def layer_map(
    num_receiver_layers: int, num_sharer_layers: int, strategy: str | Sequence[int]
) -> list[int]:
    """Returns one sharer layer index per receiver layer.

    Args:
        num_receiver_layers: number of receiver layers, at least 1.
        num_sharer_layers: number of sharer layers, at least 1.
        strategy: one of

            - ``"last_aligned"``: the last layers are paired and the pairing walks to the front;
              receiver layers before the sharer's first read layer 0 (arXiv 2510.03215 calls it
              terminal alignment; the clamping is the published code's).
            - ``"k_nearest"``: nearest in ``i / (layers - 1)``, ties to the smaller sharer layer
              (published code, k = 1).
            - ``"depth"``: nearest in ``i / layers``, ties to the smaller sharer layer.
            - a sequence with one sharer layer per receiver layer, returned after checking.

    Raises:
        ValueError: an unknown strategy, a layer count below 1, an explicit map of the wrong
            length or with an index outside ``0 .. num_sharer_layers - 1``.
        TypeError: an explicit map holds something that is not an integer.
    """
    t, s = num_receiver_layers, num_sharer_layers
    for name, value in (("num_receiver_layers", t), ("num_sharer_layers", s)):
        if value < 1:
            raise ValueError(f"c2c_ext.layer_map: {name} must be at least 1, got {value}")
    if isinstance(strategy, str):
        if strategy == "last_aligned":
            return [min(max(s - t + i, 0), s - 1) for i in range(t)]
        if strategy == "k_nearest":
            return [
                _nearest([_fraction(k, s - 1) for k in range(s)], _fraction(i, t - 1))
                for i in range(t)
            ]
        if strategy == "depth":
            return [_nearest([k / s for k in range(s)], i / t) for i in range(t)]
        raise ValueError(
            f"c2c_ext.layer_map: unknown strategy {shown(strategy)}; known: "
            f"{', '.join(STRATEGIES)}, or a sequence with one sharer layer per receiver layer"
        )
    if not isinstance(strategy, Sequence):
        raise TypeError(
            "c2c_ext.layer_map: strategy must be a name or a sequence of sharer layers, got "
            f"{shown(strategy)}"
        )
    explicit = list(strategy)
    if len(explicit) != t:
        raise ValueError(
            f"c2c_ext.layer_map: an explicit layer_map needs one entry per receiver layer ({t}), "
            f"got {len(explicit)}"
        )
    for i, k in enumerate(explicit):
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"c2c_ext.layer_map: layer_map[{i}] must be an int, got {shown(k)}")
        if not 0 <= k < s:
            raise ValueError(
                f"c2c_ext.layer_map: layer_map[{i}] must be in 0..{s - 1} (sharer layers), got "
                f"{shown(k)}"
            )
    return explicit


def _fraction(index: int, last: int) -> float:
    return index / last if last else 0.0


def _nearest(positions: list[float], target: float) -> int:
    return min(range(len(positions)), key=lambda k: (abs(positions[k] - target), k))

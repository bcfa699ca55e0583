"""c2c_ext.layer_map: strategies against the published mappings, explicit maps, refusals."""

from __future__ import annotations

import re

import golden_data
import pytest

import c2c_ext
from c2c_ext.layer_map import STRATEGIES

# (receiver layers, sharer layers, strategy, map), worked out by hand.
BY_HAND = [
    (3, 3, "last_aligned", [0, 1, 2]),
    (5, 3, "last_aligned", [0, 0, 0, 1, 2]),
    (2, 4, "last_aligned", [2, 3]),
    (3, 1, "last_aligned", [0, 0, 0]),
    (3, 5, "k_nearest", [0, 2, 4]),
    (3, 2, "k_nearest", [0, 0, 1]),  # 1/2 is as far from 0 as from 1
    (1, 4, "k_nearest", [0]),
    (4, 1, "k_nearest", [0, 0, 0, 0]),
    (4, 4, "depth", [0, 1, 2, 3]),
    (2, 4, "depth", [0, 2]),
    (4, 2, "depth", [0, 0, 1, 1]),  # 1/4 is as far from 0 as from 1/2; 3/4 is nearest to 1/2
    (3, 2, "depth", [0, 1, 1]),
    (1, 4, "depth", [0]),
]


def golden_mappings() -> list[tuple[str, str, list[int]]]:
    mappings = golden_data.load("e2e/cases.safetensors").meta["layer_mappings"]
    return [
        (name, name.split("_", 2)[2], [mapping[str(t)][0] for t in range(len(mapping))])
        for name, mapping in mappings.items()
    ]


@pytest.mark.parametrize(("name", "strategy", "expected"), golden_mappings())
def test_published_mappings(name, strategy, expected):
    sharer_layers = {"s1": 3, "s2": 7}[name.split("_")[1]]
    assert c2c_ext.layer_map(len(expected), sharer_layers, strategy) == expected


def test_both_published_strategies_are_covered():
    assert {strategy for _, strategy, _ in golden_mappings()} == {"last_aligned", "k_nearest"}


@pytest.mark.parametrize(("receiver", "sharer", "strategy", "expected"), BY_HAND)
def test_by_hand(receiver, sharer, strategy, expected):
    assert c2c_ext.layer_map(receiver, sharer, strategy) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_counts_give_a_monotonic_map_in_range(strategy):
    for receiver in range(1, 14):
        for sharer in range(1, 14):
            mapped = c2c_ext.layer_map(receiver, sharer, strategy)
            assert len(mapped) == receiver
            assert mapped == sorted(mapped)
            assert 0 <= mapped[0] and mapped[-1] < sharer
            if receiver == sharer:
                assert mapped == list(range(sharer))


def test_explicit_map_is_returned():
    assert c2c_ext.layer_map(3, 5, (4, 0, 4)) == [4, 0, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3, "depth"), ValueError, "num_receiver_layers must be at least 1, got 0"),
        ((3, -1, [0, 0, 0]), ValueError, "num_sharer_layers must be at least 1, got -1"),
        (
            (3, 3, "nearest"),
            ValueError,
            "unknown strategy 'nearest'; known: last_aligned, k_nearest, depth",
        ),
        (
            (3, 3, [0, 1]),
            ValueError,
            "an explicit layer_map needs one entry per receiver layer (3), got 2",
        ),
        ((2, 3, [0, 3]), ValueError, "layer_map[1] must be in 0..2 (sharer layers), got 3"),
        ((2, 3, [-1, 0]), ValueError, "layer_map[0] must be in 0..2 (sharer layers), got -1"),
        ((2, 3, [0, 1.0]), TypeError, "layer_map[1] must be an int, got 1.0"),
        ((2, 3, [True, 1]), TypeError, "layer_map[0] must be an int, got True"),
    ],
)
def test_refusal(arguments, error, message):
    with pytest.raises(error, match=re.escape(f"c2c_ext.layer_map: {message}")):
        c2c_ext.layer_map(*arguments)

"""The same prompts with what says nothing about them in place of the sharer's cache."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .readings import Reading

NOISE_SEED = 0


def zeroed(reading: Reading) -> Reading:
    """With a sharer's cache of zeros."""
    return replace(
        reading, sharer=[(torch.zeros_like(k), torch.zeros_like(v)) for k, v in reading.sharer]
    )


def noisy(reading: Reading, seed: int = NOISE_SEED) -> Reading:
    """With Gaussian vectors that are as long as the sharer's, for every token and head.

    What the sharer has read decides which: a text's noise is the same on every run, wherever it
    stands.

    Raises:
        ValueError: what the sharer has read is not known.
    """
    rows = _ids(reading)
    seeds = [zlib.crc32(repr([seed, *row]).encode()) for row in rows]
    generators = [torch.Generator().manual_seed(number) for number in seeds]

    def like(t: Tensor) -> Tensor:
        drawn = torch.stack([torch.randn(t.shape[1:], generator=g) for g in generators])
        drawn = drawn.to(t.device)
        length = t.float().norm(dim=-1, keepdim=True)
        return (drawn * length / drawn.norm(dim=-1, keepdim=True)).to(t.dtype)

    return replace(reading, sharer=[(like(key), like(value)) for key, value in reading.sharer])


def mismatched(readings: Sequence[Reading]) -> list[Reading]:
    """Each with what the sharer has read for another one, as near in length as there is.

    It is the next one in the order of length, of the last one the one before; answers do not count,
    and equal texts get the same one. Of a text of another length every token meets the one at the
    same part of it.

    Args:
        readings: of one prompt each.

    Returns:
        none at all if the sharer has read the same for all of them.

    Raises:
        ValueError: a reading of several prompts, or one whose sharer's tokens are not known.
    """
    texts = [_ids(reading) for reading in readings]
    if any(len(rows) != 1 for rows in texts):
        raise ValueError("c2c_ext.analysis: mismatched needs readings of one prompt each")
    keys = [tuple(rows[0]) for rows in texts]
    by_key = dict(zip(keys, readings, strict=True))
    order = sorted(by_key, key=lambda key: (len(key), key))
    if len(order) < 2:
        return []
    other_of = dict(zip(order, [*order[1:], order[-2]], strict=True))
    pairs = [(own, by_key[other_of[key]]) for own, key in zip(readings, keys, strict=True)]
    return [
        with_sharer_of(own, other, in_proportion(own, other.sharer[0][0].shape[2]))
        for own, other in pairs
    ]


def with_sharer_of(own: Reading, other: Reading, token_map: Tensor) -> Reading:
    """``own`` with the other's sharer's cache, met by ``token_map`` int64 ``[N]``."""
    return replace(own, sharer=other.sharer, sharer_ids=other.sharer_ids, token_map=token_map)


def in_proportion(reading: Reading, tokens: int) -> Tensor:
    """The token map of a reading onto a sharer's text of so many tokens, first to first."""
    steps, reach = max(reading.sharer[0][0].shape[2] - 1, 1), tokens - 1
    place = (2 * reading.token_map * reach + steps) // (2 * steps)
    return torch.where(reading.token_map < 0, reading.token_map, place)


def _ids(reading: Reading) -> list[list[int]]:
    if reading.sharer_ids is None:
        raise ValueError("c2c_ext.analysis: what the sharer has read is not known")
    return reading.sharer_ids.tolist()

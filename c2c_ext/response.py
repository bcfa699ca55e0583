"""Generated tokens fused too (``fuse_response=k``): block by block, where they stand in the cache.

The receiver computes a block of k tokens over the fused cache, the sharers read the same tokens,
and the block is fused in place; what comes later is computed over it.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .cache_columns import held_columns
from .generation_arguments import Settings
from .position_limit import limit_of
from .sharers import SharerReading, Sharing, fuse_pairs, positions_of, vocabulary_of

# Ways to decode whose cache holds other tokens than those that were answered, from step to step.
_MOVED = "its rows move between the steps"
_DRAFTED = "its cache holds drafted tokens that may be taken back"


def check_response(
    every: Any,
    settings: Settings,
    given: dict[str, Any],
    receiver: PreTrainedModel,
    sharing: Sharing,
    length: int,
) -> int:
    """``fuse_response`` of generate.

    Args:
        every: as given.
        settings: of the call.
        given: other arguments of the call by their names; None: it was not given.
        length: tokens of the prompt.

    Raises:
        TypeError: no integer.
        ValueError: negative, or what it does not go with, by its name.
    """
    if isinstance(every, bool) or not isinstance(every, numbers.Integral):
        raise TypeError(f"c2c_ext: fuse_response must be an integer, got {type(every).__name__}")
    if every < 0:
        raise ValueError(f"c2c_ext: fuse_response must be at least 0, got {every}")
    if every == 0:
        return 0
    kind = settings["cache_implementation"] or ""
    cache = given["past_key_values"]
    refused = {
        "num_beams": ((settings["num_beams"] or 1) > 1, f"beam search: {_MOVED}"),
        "assistant_model": (given["assistant_model"] is not None, f"drafting: {_DRAFTED}"),
        "prompt_lookup_num_tokens": (settings["prompt_lookup_num_tokens"], f"drafting: {_DRAFTED}"),
        "assistant_early_exit": (settings["assistant_early_exit"], f"drafting: {_DRAFTED}"),
        "custom_generate": (
            given["custom_generate"] is not None,
            "a decoding loop of one's own: which tokens its cache holds is not known",
        ),
        "sharer_inputs": (
            given["sharer_inputs"] is not None,
            "texts of the sharers' own: where the answer would go on in them is not known",
        ),
        "sections": (
            given["sections"] is not None,
            "sharers that change along the prompt: say by sharers= who is to be fused",
        ),
        "position_ids": (
            given["position_ids"] is not None,
            "positions that are given: how they go on is not known",
        ),
        "cache_implementation": (
            "offloaded" in kind or "quantized" in kind,
            "a cache that does not keep plain keys and values in place",
        ),
        "past_key_values": (
            getattr(cache, "offloading", False)
            or any(hasattr(layer, "_quantize") for layer in getattr(cache, "layers", ())),
            "a cache that does not keep plain keys and values in place",
        ),
    }
    for name, (asked, reason) in refused.items():
        if asked:
            raise ValueError(f"c2c_ext: fuse_response does not go with {name} ({reason})")
    longest = settings["max_length"] or 0
    if settings["max_new_tokens"] is not None:
        longest = length + settings["max_new_tokens"]
    for place, sharer in enumerate(sharing.sharers):
        known, limit = vocabulary_of(sharer), limit_of(sharer)
        if known < vocabulary_of(receiver):
            raise ValueError(
                f"c2c_ext: fuse_response must have sharers that know every token the receiver can "
                f"answer, {vocabulary_of(receiver)}: the {sharing.role(place)} knows {known}"
            )
        if limit is not None and longest - 1 > limit:
            raise ValueError(
                "c2c_ext: fuse_response must have sharers with positions for the prompt and all of "
                f"max_new_tokens, {longest} tokens: the {sharing.role(place)} has {limit} "
                "(max_position_embeddings)"
            )
    return int(every)


class Response:
    """The answer of one call of generate, which grows and is fused.

    Args:
        every: tokens of a block.
        length: tokens of the prompt.
        readings: what the sharers that are selected have read, by their places.
        selected: bool ``[1 or batch, sharers]``, which of them fuse a row.
        fusion: of `fusion_checks.FUSIONS`.
    """

    def __init__(
        self,
        every: int,
        length: int,
        readings: dict[int, SharerReading],
        selected: Tensor,
        fusion: str,
    ) -> None:
        self.every, self.next, self.fusion = every, length, fusion
        self.readings, self.selected = readings, selected
        self.mask: Tensor | None = None

    @torch.no_grad()
    def fuse_due(self, cache: Any, ids: Tensor, mask: Tensor | None = None) -> None:
        """Fuses the blocks that are complete.

        Args:
            cache: a transformers Cache that holds all of ``ids`` but the last token.
            ids: ``[R, L]``, prompt and answer so far.
            mask: ``[R, L]``, nonzero where a token is real; None: as before, and all of the answer.
        """
        self.mask = self.mask if mask is None else mask
        while self.next + self.every < ids.shape[1] and self.readings:
            end = self.next + self.every
            self._fuse(cache, ids, end)
            self.next = end

    def _fuse(self, cache: Any, ids: Tensor, end: int) -> None:
        held, readings = ids.shape[1] - 1, list(self.readings.values())
        mask = self.mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask[:, :end], (0, max(end - mask.shape[1], 0)), value=1)
        for reading in readings:
            _grow(reading, ids[:, :end], mask)
            reading.read()
        base, held_here = [], []
        for layer in cache.layers:
            first, keys, values = held_columns(layer, held)
            # What a sliding layer has dropped no later token attends to: zeros stand for it.
            lost = min(max(first - self.next, 0), self.every)
            block = slice(self.next + lost - first, end - first) if lost < self.every else slice(0)
            views = keys[:, :, block], values[:, :, block]
            held_here.append((lost, views))
            base.append(tuple(_padded(view, lost) for view in views))
        allowed = [self._rows_of(reading, len(ids)) for reading in readings]
        fuse_pairs(base, readings, self.next, end, allowed, self.fusion)
        for (lost, views), fused in zip(held_here, base, strict=True):
            if lost:  # else these are views of the cache itself
                for view, new in zip(views, fused, strict=True):
                    view.copy_(new[:, :, lost:])

    def _rows_of(self, reading: SharerReading, rows: int) -> Tensor | None:
        """bool ``[rows, 1]``: where a sharer is selected; None: in all rows."""
        selected = self.selected[:, reading.place]
        if bool(selected.all()):
            return None
        return selected.repeat_interleave(rows // len(selected))[:, None]


def _grow(reading: SharerReading, ids: Tensor, mask: Tensor | None) -> None:
    """Gives a reading of ``[B, S]`` tokens the rest of ``ids [R, L]``, of which it is the start."""
    rows, held = len(ids), reading.ids.shape[1]
    if len(reading.ids) != rows:  # several answers to every prompt
        times = rows // len(reading.ids)
        reading.ids = reading.ids.repeat_interleave(times, 0)
        if reading.cache is not None:
            reading.cache.batch_repeat_interleave(times)
    place = reading.ids.device
    reading.ids = torch.cat([reading.ids, ids[:, held:].to(place)], dim=1)
    reading.mask = None if mask is None else mask.to(place)
    reading.position_ids = positions_of(reading.ids, reading.mask)


def _padded(t: Tensor, lost: int) -> Tensor:
    """``t [R, H, n, D]`` behind ``lost`` columns of zeros; itself where none is lost."""
    return t if lost == 0 else torch.nn.functional.pad(t, (0, 0, lost, 0))

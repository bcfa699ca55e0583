"""What sharers read in place of the receiver's tokens (``sharer_inputs=``), checked.

Every token given is read; only what the map or the span names reaches the receiver.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .generation_arguments import check_zeros_and_ones
from .padding import Shift
from .sharers import Sharing, vocabulary_of

_KEYS = ("input_ids", "attention_mask", "position_ids", "token_map", "span")


@dataclass(frozen=True)
class SharerInputs:
    """A text of a sharer's own, and what of it the receiver's columns are fused with."""

    ids: Tensor  # int64 [B, S]
    mask: Tensor | None  # [B, S], nonzero where a token is real; None: everywhere
    position_ids: Tensor | None  # [1 or B, S]; None: counted from the mask
    token_map: Tensor  # int64 [1 or B, P]: column of ``ids``, or -1; the last one is not used

    def moved(self, shift: Shift) -> SharerInputs:
        """For a prompt whose rows have moved."""
        return replace(self, token_map=shift.move(self.token_map))


def checked_inputs(
    given: Any, sharing: Sharing, batch: int, length: int
) -> tuple[SharerInputs | None, ...]:
    """One entry for every sharer; None: it reads the receiver's tokens.

    Args:
        given: ``sharer_inputs`` of generate: for one sharer a mapping, for several a list of a
            mapping or None for each.
        sharing: the sharers that are attached.
        batch, length: rows of the receiver's prompt and tokens of a row.

    Raises:
        TypeError: of another kind.
        ValueError: an unknown key, shapes that do not fit, a token outside the vocabulary, a map or
            span that names a column that is not there or padded.
    """
    count = len(sharing)
    if given is None:
        return (None,) * count
    if isinstance(given, Mapping):
        if count > 1:
            raise TypeError(
                f"c2c_ext: sharer_inputs must be a list of {count} mappings or None, one for every "
                "sharer attached, got one mapping"
            )
        given = [given]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(
            "c2c_ext: sharer_inputs must be a mapping with input_ids and a token_map or span, or a "
            f"list of them, got {type(given).__name__}"
        )
    if len(given) != count:
        raise ValueError(
            f"c2c_ext: sharer_inputs must have an entry for every sharer attached, {count}, got "
            f"{len(given)}"
        )
    names = ["sharer_inputs"] if count == 1 else [f"sharer_inputs[{k}]" for k in range(count)]
    return tuple(
        None
        if one is None
        else _checked(name, one, sharing.role(k), vocabulary_of(sharing.sharers[k]), batch, length)
        for k, (name, one) in enumerate(zip(names, given, strict=True))
    )


def _checked(
    name: str, given: Any, role: str, vocabulary: int, batch: int, length: int
) -> SharerInputs:
    if not isinstance(given, Mapping):
        raise TypeError(f"c2c_ext: {name} must be a mapping or None, got {type(given).__name__}")
    unknown = sorted(map(str, set(given) - set(_KEYS)))
    if unknown:
        raise ValueError(
            f"c2c_ext: {name} must have no other keys than {', '.join(_KEYS)}, got {unknown[0]}"
        )
    ids = _integers(name, "input_ids", given.get("input_ids"))
    if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] == 0:
        raise ValueError(
            f"c2c_ext: {name}'s input_ids must be [batch, tokens] = [{batch}, at least 1], got "
            f"{list(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise _shape_error(name, "attention_mask", f"{list(ids.shape)} as input_ids", mask)
        check_zeros_and_ones(f"{name}'s attention_mask", mask)
        # A padding token need not exist in the sharer; without a token a row has nothing to read.
        mask = mask.to(ids.device)
        ids = ids.masked_fill(mask == 0, 0)
        low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"c2c_ext: {name}'s input_ids must be at least 0 and below the {role}'s vocabulary "
            f"size {vocabulary}, got {low if low < 0 else high}"
        )
    position_ids = given.get("position_ids")
    if position_ids is not None:
        tokens = ids.shape[1]
        position_ids = _integers(name, "position_ids", position_ids)
        if tuple(position_ids.shape) not in ((1, tokens), (batch, tokens)):
            raise _shape_error(
                name, "position_ids", f"[{batch}, {tokens}] or [1, {tokens}]", position_ids
            )
    if (given.get("token_map") is None) == (given.get("span") is None):
        both = "neither" if given.get("span") is None else "both"
        raise ValueError(f"c2c_ext: {name} must have one of token_map and span, got {both}")
    if given.get("span") is not None:
        token_map = _span_map(name, given["span"], length, ids.shape[1])
    else:
        token_map = _own_map(name, given["token_map"], batch, length, ids.shape[1])
    token_map = token_map.to(ids.device)
    if mask is not None:
        rows = token_map.expand(batch, -1)
        named = mask.gather(1, rows.clamp(min=0)) == 0
        wrong = (named & (rows >= 0)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ValueError(
                f"c2c_ext: {name} must map to tokens that attention_mask does not mask, got column "
                f"{int(rows[row, column])} of row {row} (for prompt column {column})"
            )
    return SharerInputs(ids, mask, position_ids, token_map)


def _own_map(name: str, given: Any, batch: int, length: int, tokens: int) -> Tensor:
    token_map = _integers(name, "token_map", given)
    if tuple(token_map.shape) not in ((length,), (batch, length)):
        raise _shape_error(
            name,
            "token_map",
            f"[{length}] or [{batch}, {length}] (the prompt's shape)",
            token_map,
        )
    token_map = token_map.reshape(-1, length).clone()
    token_map[:, -1] = -1  # never fused, whatever it says
    low, high = int(token_map.min()), int(token_map.max())
    if low < -1 or high >= tokens:
        raise ValueError(
            f"c2c_ext: {name}'s token_map must be at least -1 and below {tokens}, the sharer's "
            f"tokens, got {low if low < -1 else high}"
        )
    return token_map


def _span_map(name: str, given: Any, length: int, tokens: int) -> Tensor:
    try:
        if any(isinstance(number, bool) for number in given):
            raise TypeError
        receiver_start, sharer_start, count = (operator.index(number) for number in given)
    except (TypeError, ValueError):
        raise TypeError(
            f"c2c_ext: {name}'s span must be three integers (receiver_start, sharer_start, "
            f"length), got {given!r}"
        ) from None
    for side, start, limit, reason in (
        ("receiver", receiver_start, length - 1, f" (the last of the {length} is never fused)"),
        ("sharer", sharer_start, tokens, ""),
    ):
        if start < 0 or count < 0 or start + count > limit:
            raise ValueError(
                f"c2c_ext: {name}'s span must lie in the {side}'s columns 0 .. {limit - 1}"
                f"{reason}, got start {start}, length {count}"
            )
    token_map = torch.full((1, length), -1)
    token_map[0, receiver_start : receiver_start + count] = torch.arange(
        sharer_start, sharer_start + count
    )
    return token_map


def _integers(name: str, key: str, given: Any) -> Tensor:
    if not isinstance(given, Tensor):
        got = "nothing" if given is None else type(given).__name__
        raise TypeError(f"c2c_ext: {name} must have {key} as a tensor of integers, got {got}")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"c2c_ext: {name}'s {key} must be integers, got {given.dtype}")
    if given.layout != torch.strided or given.is_meta:
        raise TypeError(
            f"c2c_ext: {name}'s {key} must be a dense tensor that holds numbers, got "
            f"{given.layout} on {given.device}"
        )
    return given.long()


def _shape_error(name: str, key: str, rule: str, given: Any) -> Exception:
    if not isinstance(given, Tensor):
        return TypeError(
            f"c2c_ext: {name}'s {key} must be a tensor {rule}, got {type(given).__name__}"
        )
    return ValueError(f"c2c_ext: {name}'s {key} must be {rule}, got {list(given.shape)}")

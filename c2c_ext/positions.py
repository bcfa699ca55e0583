"""Which tokens of a prompt are fused: columns, masks, slices, spans of each row's own tokens."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LONGEST = 1 << 62  # longer than any row, and still an int64


@dataclass(frozen=True)
class Positions:
    """A span of every row's own tokens, whatever its length: made by one of the class methods.

    Counted are the row's real tokens, padding aside, without the last prompt token, which is never
    fused. Where a row has fewer than asked for, all that are there are fused.
    """

    start: int  # counted from the front, or from the end where `from_end`
    end: int | float | None  # None: up to the end; floats are fractions of the row
    from_end: bool = False

    def __post_init__(self) -> None:
        """Accepts what the class methods make, and nothing else.

        Raises:
            TypeError, ValueError: as they do.
        """
        start, end = _count("__init__", "start", self.start), self.end
        if isinstance(end, numbers.Real) and not isinstance(end, numbers.Integral):
            end = _fraction("__init__", end)
        elif end is not None:
            end = min(_count("__init__", "end", end), _LONGEST)
            if end < min(start, _LONGEST):
                raise ValueError(
                    f"c2c_ext.Positions.__init__: end must be at least start = {start}, got {end}"
                )
        object.__setattr__(self, "start", min(start, _LONGEST))
        object.__setattr__(self, "end", end)

    @classmethod
    def span(cls, start: int, end: int | None = None) -> Positions:
        """Tokens ``start .. end - 1`` of every row; up to its end without ``end``.

        Raises:
            TypeError: no integers.
            ValueError: not ``0 <= start <= end``.
        """
        start = _count("span", "start", start)
        if end is not None and _count("span", "end", end) < start:
            raise ValueError(
                f"c2c_ext.Positions.span: end must be at least start = {start}, got {end}"
            )
        return cls(start, None if end is None else int(end))

    @classmethod
    def first(cls, count: int) -> Positions:
        """The first ``count`` tokens of every row.

        Raises:
            TypeError: no integer.
            ValueError: negative.
        """
        return cls(0, _count("first", "count", count))

    @classmethod
    def last(cls, count: int) -> Positions:
        """The last ``count`` tokens of every row, its last prompt token not counted.

        Raises:
            TypeError: no integer.
            ValueError: negative.
        """
        return cls(0, _count("last", "count", count), from_end=True)

    @classmethod
    def first_fraction(cls, fraction: float) -> Positions:
        """That proportion of every row, from its front; rounded to whole tokens, halves up.

        Raises:
            TypeError: no number.
            ValueError: not in 0 .. 1.
        """
        return cls(0, _fraction("first_fraction", fraction))

    @classmethod
    def last_fraction(cls, fraction: float) -> Positions:
        """That proportion of every row, from its end; rounded to whole tokens, halves up.

        Raises:
            TypeError: no number.
            ValueError: not in 0 .. 1.
        """
        return cls(0, _fraction("last_fraction", fraction), from_end=True)

    def columns(self, length: int, mask: Tensor | None = None) -> Tensor:
        """bool ``[B, length - 1]``, or ``[1, length - 1]`` without a mask.

        Args:
            length: tokens of the prompt, padding included.
            mask: ``[B, length]``, nonzero where a token is real; None: everywhere.
        """
        if mask is None:
            mask = torch.ones(1, length, dtype=torch.bool)
        real = mask[:, :-1] != 0
        index, total = real.cumsum(1) - 1, real.sum(1, keepdim=True)
        if self.from_end:
            index = total - 1 - index
        end = total if self.end is None else self.end
        if isinstance(end, float):
            end = (total.double() * end + 0.5).floor()
        return real & (index >= self.start) & (index < end)


def fused_columns(
    positions: Sequence[int] | slice | Tensor | Positions | None,
    batch: int,
    length: int,
    held: int = 0,
) -> Tensor | Positions | None:
    """bool ``[1 or batch, length - 1]`` from the ``positions`` of generate; None stays None.

    `Positions` stay what they are until the mask is known: see `resolved`.

    Args:
        batch, length: rows of the prompt and tokens of a row.
        held: tokens of earlier turns in the cache, which are not fused again.

    Raises:
        TypeError: neither integers nor bools.
        ValueError: another shape, a column outside the prompt, its last one, or one of an earlier
            turn.
    """
    if positions is None or isinstance(positions, Positions):
        return positions
    if isinstance(positions, slice):
        return _sliced(positions, length, held)
    given = _tensor_of(positions)
    rule = f"the last of the {length} prompt tokens is never fused"
    if given.dtype == torch.bool:
        if given.shape not in ((length,), (batch, length)):
            raise ValueError(
                f"c2c_ext: a positions mask must be [{length}] or [{batch}, {length}] (the "
                f"prompt's shape), got {list(given.shape)}"
            )
        given = given.reshape(-1, length)
        if given[:, -1].any():
            raise ValueError(f"c2c_ext: positions marks column {length - 1}: {rule}")
        if given[:, :held].any():
            column = int(given[:, :held].any(0).long().argmax())
            raise ValueError(f"c2c_ext: positions marks column {column}: {_earlier(held)}")
        return given[:, :-1]
    if given.ndim != 1:
        raise ValueError(
            "c2c_ext: positions must be a 1-D list of columns or a bool mask, got integers of "
            f"shape {list(given.shape)}"
        )
    columns = torch.zeros(1, length - 1, dtype=torch.bool)
    named = given.tolist()
    if len(named) > 2 and set(named) <= {0, 1}:
        raise ValueError(
            f"c2c_ext: positions must be columns or a mask of bools, got {len(named)} integers "
            "that are all 0 or 1: a mask would be given as bools"
        )
    for column in named:
        if length == 1:
            raise ValueError(
                "c2c_ext: positions must be empty for a prompt of one token, which has nothing to "
                f"fuse ({rule}), got {column}"
            )
        if not 0 <= column < length - 1:
            raise ValueError(
                f"c2c_ext: positions must be at least 0 and at most {length - 2} ({rule}), "
                f"got {column}"
            )
        if column < held:
            raise ValueError(
                f"c2c_ext: positions must be at least {held} ({_earlier(held)}), got {column}"
            )
        columns[0, column] = True
    return columns


def _earlier(held: int) -> str:
    return f"the {held} tokens that past_key_values holds are not fused again"


def _tensor_of(positions: Any) -> Tensor:
    """``positions`` as integers or bools."""
    if isinstance(positions, list | tuple) and len({isinstance(p, bool) for p in positions}) > 1:
        raise TypeError("c2c_ext: positions must be all columns or all bools, got some of both")
    try:
        if not isinstance(positions, Tensor) and hasattr(positions, "tolist"):
            given = torch.as_tensor(positions.tolist())  # numpy's may be reversed or read-only
        else:
            given = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            "c2c_ext: positions must be a range, slice, list, tuple, array or tensor of int64 "
            f"columns or bools, or c2c_ext.Positions, got {type(positions).__name__}: {error}"
        ) from error
    if given.layout != torch.strided or given.is_meta:
        raise TypeError(
            "c2c_ext: positions must be a dense tensor that holds numbers, got "
            f"{given.layout} on {given.device}"
        )
    if given.numel() == 0 and given.ndim == 1:
        given = given.long()  # an empty list is float32
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"c2c_ext: positions must be integers or bools, got {given.dtype}")
    return given


def resolved(positions: Positions, mask: Tensor | None, length: int, held: int = 0) -> Tensor:
    """bool ``[B, length - 1]``, or ``[1, length - 1]`` without a mask.

    Args:
        mask: ``[B, length]``, nonzero where a token is real; None: everywhere.
        length: tokens of the prompt, padding included.
        held: of them from earlier turns, which `Positions` do not count.
    """
    if held:
        real = torch.ones(1, length, dtype=torch.bool) if mask is None else mask != 0
        mask = real & (torch.arange(length, device=real.device) >= held)
    return positions.columns(length, mask)


def _sliced(positions: slice, length: int, held: int) -> Tensor:
    """bool ``[1, length - 1]`` from a slice of columns."""
    numbers_given = {}
    for name, default in (("start", held), ("stop", length - 1), ("step", 1)):
        value = getattr(positions, name)
        try:
            numbers_given[name] = default if value is None else operator.index(value)
        except TypeError:
            raise TypeError(
                f"c2c_ext: positions' slice must have an integer or None as its {name}, got "
                f"{type(value).__name__}"
            ) from None
    start, stop, step = numbers_given.values()
    if step < 1:
        raise ValueError(f"c2c_ext: positions' slice must have a step of at least 1, got {step}")
    if not 0 <= start <= stop <= length - 1:
        raise ValueError(
            f"c2c_ext: positions' slice must satisfy 0 <= start <= stop <= {length - 1} (the last "
            f"of the {length} prompt tokens is never fused), got start {start}, stop {stop}; "
            "c2c_ext.Positions.last counts from the end"
        )
    if start < held and start < stop:
        raise ValueError(
            f"c2c_ext: positions' slice must start at {held} or later ({_earlier(held)}), got "
            f"{start}"
        )
    columns = torch.zeros(1, length - 1, dtype=torch.bool)
    columns[0, start:stop:step] = True
    return columns


def _count(method: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"c2c_ext.Positions.{method}: {name} must be an integer, got {type(value).__name__}"
        )
    if value < 0:
        raise ValueError(f"c2c_ext.Positions.{method}: {name} must be at least 0, got {value}")
    return int(value)


def _fraction(method: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"c2c_ext.Positions.{method}: fraction must be a number, got {type(value).__name__}"
        )
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(
            f"c2c_ext.Positions.{method}: fraction must be at least 0 and at most 1, got {value}"
        )
    return float(value)

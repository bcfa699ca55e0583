"""Which sharers a prompt is fused with: in each row (``sharers=``) and span (``sections=``)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Columns ``start .. end - 1`` of the prompt, and who fuses them."""

    start: int
    end: int
    selected: Tensor  # bool [1 or batch, sharers], on the CPU

    def sharers(self) -> list[int]:
        """Those that at least one row selects, in the order of attach's lists."""
        return [k for k, chosen in enumerate(self.selected.any(0).tolist()) if chosen]


def spans_of(
    sharers: Any, sections: Any, batch: int, length: int, count: int, held: int = 0
) -> tuple[Span, ...]:
    """The spans that a prompt is fused in, one after the other from column ``held``.

    Without ``sections`` one span of all columns but the last; what sections leave over is none.

    Args:
        sharers, sections: as given to generate.
        batch, length: rows of the prompt and tokens of a row.
        count: sharers that are attached.
        held: tokens of earlier turns in the cache, which are not fused again.

    Raises:
        TypeError: of another kind than documented.
        ValueError: both are given; numbers out of range or of another shape.
    """
    if sections is None:
        return (Span(held, length - 1, selected_sharers("sharers", sharers, batch, count)),)
    if sharers is not None:
        raise ValueError(
            "c2c_ext: sharers and sections cannot both be given: every section names its own"
        )
    if isinstance(sections, str) or not isinstance(sections, Sequence):
        raise TypeError(
            f"c2c_ext: sections must be a list of (length, sharers), got {type(sections).__name__}"
        )
    spans, start = [], held
    for i, section in enumerate(sections):
        if isinstance(section, str) or not isinstance(section, Sequence):
            raise TypeError(f"c2c_ext: sections[{i}] must be (length, sharers), got {section!r}")
        if len(section) != 2:
            raise TypeError(
                f"c2c_ext: sections[{i}] must be (length, sharers), got {len(section)} entries"
            )
        tokens = _integer(f"sections[{i}]'s length", section[0])
        if tokens < 1:
            raise ValueError(f"c2c_ext: sections[{i}]'s length must be at least 1, got {tokens}")
        selected = selected_sharers(f"sections[{i}]'s sharers", section[1], batch, count)
        spans.append(Span(start, start + tokens, selected))
        start += tokens
    if start > length - 1:
        earlier = f", {held} are from earlier turns" if held else ""
        raise ValueError(
            f"c2c_ext: the lengths of sections must sum to at most {length - 1 - held} (the last "
            f"of the {length} prompt tokens is never fused{earlier}), got {start - held}"
        )
    return tuple(spans)


def selected_sharers(name: str, given: Any, batch: int, count: int) -> Tensor:
    """bool ``[1 or batch, count]``, on the CPU.

    Args:
        name: of the argument, for messages.
        given: None: all. Indices into attach's list, the same for all rows; a list of them for
            every row; or bools ``[count]`` or ``[batch, count]``, as a tensor, array or list.

    Raises:
        TypeError: of another kind.
        ValueError: an index out of range, or another shape.
    """
    if given is None:
        return torch.ones(1, count, dtype=torch.bool)
    if isinstance(given, Tensor) or hasattr(given, "tolist"):
        return _from_array(name, given, batch, count)
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(
            f"c2c_ext: {name} must be a list of indices, a list of them for every row, or bools, "
            f"got {type(given).__name__}"
        )
    rows = [value.tolist() if hasattr(value, "tolist") else value for value in given]
    if any(isinstance(row, Sequence) and not isinstance(row, str) for row in rows):
        for r, row in enumerate(rows):
            if isinstance(row, str) or not isinstance(row, Sequence):
                raise TypeError(
                    f"c2c_ext: {name}[{r}] must be a list of indices as other rows have it, got "
                    f"{type(row).__name__}"
                )
        if len(rows) != batch:
            raise ValueError(
                f"c2c_ext: {name} must have one list of indices for each of the {batch} rows, got "
                f"{len(rows)}"
            )
        return torch.stack([_row(f"{name}[{r}]", row, count) for r, row in enumerate(rows)])
    return _row(name, rows, count)[None]


def _from_array(name: str, given: Any, batch: int, count: int) -> Tensor:
    try:
        array = given.detach().cpu() if isinstance(given, Tensor) else torch.tensor(given.tolist())
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TypeError(
            f"c2c_ext: {name} must be an array of indices or bools, got {type(given).__name__}: "
            f"{error}"
        ) from error
    if array.dtype == torch.bool:
        if tuple(array.shape) not in ((count,), (batch, count)):
            raise ValueError(
                f"c2c_ext: {name} as bools must be [{count}] (sharers) or [{batch}, {count}] "
                f"(rows, sharers), got {list(array.shape)}"
            )
        return array.reshape(-1, count)
    if array.ndim == 1 and array.numel() == 0:
        array = array.long()
    if array.is_floating_point() or array.is_complex():
        raise TypeError(f"c2c_ext: {name} must be indices or bools, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(
            f"c2c_ext: {name} must be a 1-D array of indices or bools, got integers of shape "
            f"{list(array.shape)}; rows of indices are given as lists"
        )
    return _row(name, array.tolist(), count)[None]


def _row(name: str, row: Sequence[Any], count: int) -> Tensor:
    """bool ``[count]`` from indices or ``count`` bools."""
    if len(row) > 0 and all(isinstance(value, bool) for value in row):
        if len(row) != count:
            raise ValueError(
                f"c2c_ext: {name} as bools must be [{count}] (sharers), got [{len(row)}]"
            )
        return torch.tensor(row)
    selected = torch.zeros(count, dtype=torch.bool)
    for value in row:
        index = _integer(f"an index in {name}", value)
        if not 0 <= index < count:
            raise ValueError(
                f"c2c_ext: {name} must hold indices of at least 0 and below {count}, the number of "
                f"sharers attached, got {index}"
            )
        selected[index] = True
    return selected


def _integer(what: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"c2c_ext: {what} must be an integer, got {type(value).__name__}") from None

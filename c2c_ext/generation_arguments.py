"""What an attached receiver's `generate` takes: the checks of the prompt, its mask, its positions.

Checked before transformers sees them: a wrong shape must not reach a prefill that cuts it to size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def prompt_shape(ids: Any) -> tuple[int, int]:
    """(batch, tokens) of the ``input_ids [B, P]`` of generate; None stands for one BOS token.

    Raises:
        TypeError: not a tensor.
        ValueError: not two-dimensional, or empty.
    """
    if ids is None:
        return 1, 1
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"c2c_ext: input_ids must be a tensor [batch, tokens], got {type(ids).__name__}"
        )
    if ids.ndim != 2:
        raise ValueError(f"c2c_ext: input_ids must be [batch, tokens], got {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(
            f"c2c_ext: input_ids must hold at least one row of one token, got {list(ids.shape)}"
        )
    batch, length = ids.shape
    return batch, length


def check_prompt_tensors(attention_mask: Any, position_ids: Any, batch: int, length: int) -> None:
    """Both speak of the prompt and nothing else: an attached receiver starts from an empty cache.

    Args:
        attention_mask: None or ``[B, P]``.
        position_ids: None or ``[.., 1 or B, P]``.
        batch, length: B and P.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"c2c_ext: {name} must be a tensor, got {type(given).__name__}")
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"c2c_ext: attention_mask must be [batch, prompt tokens] = [{batch}, {length}], got "
            f"{list(attention_mask.shape)}"
        )
    if position_ids is not None and position_ids.shape[-2:] not in ((1, length), (batch, length)):
        raise ValueError(
            f"c2c_ext: position_ids must be [batch, prompt tokens] = [{batch}, {length}] or "
            f"[1, {length}], got {list(position_ids.shape)}"
        )


def fused_columns(
    positions: Sequence[int] | Tensor | None, batch: int, length: int
) -> Tensor | None:
    """bool ``[1 or batch, length - 1]`` from the ``positions`` of generate; None stays None.

    Raises:
        TypeError: neither integers nor bools.
        ValueError: another shape, a column outside the prompt, or its last one.
    """
    if positions is None:
        return None
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
        return given[:, :-1]
    if given.ndim != 1:
        raise ValueError(
            "c2c_ext: positions must be a 1-D list of columns or a bool mask, got integers of "
            f"shape {list(given.shape)}"
        )
    columns = torch.zeros(1, length - 1, dtype=torch.bool)
    for column in given.tolist():
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
        columns[0, column] = True
    return columns


def _tensor_of(positions: Any) -> Tensor:
    """``positions`` as integers or bools."""
    try:
        if not isinstance(positions, Tensor) and hasattr(positions, "tolist"):
            given = torch.as_tensor(positions.tolist())  # numpy's may be reversed or read-only
        else:
            given = torch.as_tensor(positions)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            "c2c_ext: positions must be a range, list, tuple, array or tensor of int64 columns or "
            f"bools, got {type(positions).__name__}: {error}"
        ) from error
    if given.numel() == 0 and given.ndim == 1:
        given = given.long()  # an empty list is float32
    if given.is_floating_point() or given.is_complex():
        raise TypeError(f"c2c_ext: positions must be integers or bools, got {given.dtype}")
    return given

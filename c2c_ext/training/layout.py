"""How a training batch is cut: prompts that end at one column, and what the receiver runs on."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..messages import shown

IGNORE = -100  # a label that is none, as everywhere in PyTorch


@dataclass
class Layout:
    """A batch of B rows; a row's prefix is its prompt without its last token.

    Prefixes are padded on the left to Q tokens, what follows on the right to T, and what the sharer
    reads on the left to S. Padding is token 0.
    """

    prefix_ids: Tensor  # int64 [B, Q]
    prefix_mask: Tensor  # bool [B, Q]
    rest_ids: Tensor  # int64 [B, T], from the last prompt token on
    targets: Tensor  # int64 [B, T], what the logits of a token are to predict, or -100
    sharer_ids: Tensor  # int64 [B, S]
    sharer_mask: Tensor  # bool [B, S]
    token_map: Tensor | None  # int64 [B, Q], column of sharer_ids or -1; None: all, one to one

    def to(self, device: torch.device) -> Layout:
        """The same on ``device``."""
        moved = {
            f.name: t.to(device, non_blocking=True)
            for f in fields(self)
            if (t := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)

    def receiver_rows(self) -> list[Tensor]:
        """The ids ``[n]`` that the receiver prefills, row by row."""
        return [row[keep] for row, keep in zip(self.prefix_ids, self.prefix_mask, strict=True)]

    def sharer_rows(self) -> list[Tensor]:
        """The ids ``[n]`` that the sharer prefills, row by row."""
        return [row[keep] for row, keep in zip(self.sharer_ids, self.sharer_mask, strict=True)]


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    fused_mask: Tensor | None = None,
    sharer_input_ids: Tensor | None = None,
    sharer_attention_mask: Tensor | None = None,
    token_map: Tensor | None = None,
) -> Layout:
    """Cuts a batch; see `C2CTrainingModel.forward` for the arguments.

    Done in the host's memory, where the result is too.

    Raises:
        TypeError, ValueError: a shape, dtype, mask, label or map that does not fit; the message
            names the argument, the row and what came.
    """
    ids = _checked("input_ids", input_ids, "int64 [B, L]", None)
    if len(ids) == 0:
        raise ValueError("c2c_ext.training: input_ids must have at least one row, got 0")
    mask = _mask("attention_mask", attention_mask, ids)
    starts, ends = _spans("attention_mask", mask)
    if labels is None:
        firsts = ends
        labels = torch.full_like(ids, IGNORE)
    else:
        labels = _checked("labels", labels, "int64 [B, L]", ids)
        firsts = _first_labels(labels, mask, starts)
    # The prefix ends before the prompt's last token.
    prefix_ends = firsts - 1
    prefix, rest = (starts, prefix_ends), (prefix_ends, ends)
    fused = _within(ids, prefix)
    if fused_mask is not None:
        chosen = _mask("fused_mask", fused_mask, ids)
        if bool((chosen & ~fused).any()):
            row, column = (chosen & ~fused).nonzero()[0].tolist()
            raise ValueError(
                f"c2c_ext.training: fused_mask must be true only in the prompt before its last "
                f"token, columns {starts[row]} to {prefix_ends[row] - 1} of row {row}, got true in "
                f"column {column}"
            )
        fused = chosen
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    layout = {
        "prefix_ids": _left(ids, prefix),
        "prefix_mask": _left(mask, prefix),
        "rest_ids": _right(ids, rest),
        "targets": _right(following, rest, IGNORE),
    }
    if sharer_input_ids is None:
        if sharer_attention_mask is not None:
            raise ValueError(
                "c2c_ext.training: sharer_attention_mask must come with sharer_input_ids"
            )
        sharer_ids, sharer_mask, sharer = ids, mask, prefix
    else:
        sharer_ids = _checked("sharer_input_ids", sharer_input_ids, "int64 [B, S]", None)
        if len(sharer_ids) != len(ids):
            raise ValueError(
                f"c2c_ext.training: sharer_input_ids must have {len(ids)} rows as input_ids, got "
                f"{len(sharer_ids)}"
            )
        if token_map is None:
            raise ValueError(
                "c2c_ext.training: sharer_input_ids must come with a token_map: without one both "
                "models read the same tokens"
            )
        sharer_mask = _mask("sharer_attention_mask", sharer_attention_mask, sharer_ids)
        sharer = _spans("sharer_attention_mask", sharer_mask)
    layout["sharer_ids"] = _left(sharer_ids, sharer)
    layout["sharer_mask"] = _left(sharer_mask, sharer)
    columns = torch.arange(ids.shape[1]).expand_as(ids) if token_map is None else token_map
    columns = _checked("token_map", columns, "int64 [B, L]", ids).masked_fill(~fused, -1)
    if token_map is None and bool(_left(fused, prefix).all()):
        return Layout(**layout, token_map=None)
    _check_map(columns, sharer)
    # Columns of what the sharer is given, padded on the left.
    shift = layout["sharer_ids"].shape[1] - sharer[1]
    columns = torch.where(columns >= 0, columns + shift[:, None], -1)
    return Layout(**layout, token_map=_left(columns, prefix, -1))


def _checked(name: str, tensor: Tensor, wanted: str, like: Tensor | None) -> Tensor:
    """``tensor`` in the host's memory, if it is 2-D int64, of the shape of ``like``."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"c2c_ext.training: {name} must be an int64 tensor, got {got}")
    _check_shape(name, tensor, wanted, like)
    return tensor.cpu()


def _check_shape(name: str, tensor: Tensor, wanted: str, like: Tensor | None) -> None:
    if tensor.dim() != 2 or (like is not None and tensor.shape != like.shape):
        rule = wanted if like is None else f"of shape {list(like.shape)}, as the ids are"
        raise ValueError(f"c2c_ext.training: {name} must be {rule}, got {list(tensor.shape)}")


def _mask(name: str, mask: Tensor | None, like: Tensor) -> Tensor:
    """bool in the shape of ``like``; all true without one."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"c2c_ext.training: {name} must be a tensor, got {type(mask).__name__}")
    _check_shape(name, mask, "[B, L]", like)
    mask = mask.cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"c2c_ext.training: {name} must hold 0 and 1 only, got {shown(mask.max())}"
        )
    return mask != 0


def _spans(name: str, mask: Tensor) -> tuple[Tensor, Tensor]:
    """First column of every row's tokens and the one behind them, int64 ``[B]``."""
    counts = mask.sum(1)
    starts = mask.int().argmax(1) if mask.shape[1] else counts
    ends = starts + counts
    columns = torch.arange(mask.shape[1])
    inside = (columns >= starts[:, None]) & (columns < ends[:, None])
    for row in ((counts == 0) | (inside != mask).any(1)).nonzero().flatten().tolist():
        what = "no token" if counts[row] == 0 else "padding between tokens"
        raise ValueError(
            f"c2c_ext.training: {name} must be true on one run of tokens in every row, got {what} "
            f"in row {row}"
        )
    return starts, ends


def _first_labels(labels: Tensor, mask: Tensor, starts: Tensor) -> Tensor:
    """Column of every row's first label, int64 ``[B]``."""
    is_label = labels != IGNORE
    firsts = is_label.int().argmax(1)
    for row in range(len(labels)):
        where = f"row {row}"
        if not is_label[row].any():
            raise ValueError(
                f"c2c_ext.training: labels must have a token to learn in every row (anything but "
                f"{IGNORE}), got none in {where}"
            )
        if (is_label[row] & ~mask[row]).any():
            raise ValueError(
                f"c2c_ext.training: labels must be {IGNORE} where attention_mask is 0, got "
                f"{labels[row][is_label[row] & ~mask[row]][0]} in {where}"
            )
        if firsts[row] == starts[row]:
            raise ValueError(
                f"c2c_ext.training: labels must begin behind a prompt of at least one token, got "
                f"one on the first token of {where}"
            )
    return firsts


def _check_map(columns: Tensor, sharer: tuple[Tensor, Tensor]) -> None:
    """What is mapped must be a token that the sharer reads."""
    starts, ends = (bound[:, None] for bound in sharer)
    wrong = (columns != -1) & ((columns < starts) | (columns >= ends))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"c2c_ext.training: token_map must hold -1 or columns of the tokens that the sharer "
            f"reads, {sharer[0][row]} to {sharer[1][row] - 1} in row {row}, got "
            f"{columns[row, column]} in column {column}"
        )


def _within(ids: Tensor, span: tuple[Tensor, Tensor]) -> Tensor:
    columns = torch.arange(ids.shape[1])
    return (columns >= span[0][:, None]) & (columns < span[1][:, None])


def _left(x: Tensor, span: tuple[Tensor, Tensor], fill: int = 0) -> Tensor:
    """The columns ``span[0] .. span[1] - 1`` of every row, padded on the left to the longest."""
    starts, ends = span
    width = int((ends - starts).max())
    return _gathered(x, ends[:, None] - width + torch.arange(width), span, fill)


def _right(x: Tensor, span: tuple[Tensor, Tensor], fill: int = 0) -> Tensor:
    """Likewise, padded on the right."""
    starts, ends = span
    width = int((ends - starts).max())
    return _gathered(x, starts[:, None] + torch.arange(width), span, fill)


def _gathered(x: Tensor, columns: Tensor, span: tuple[Tensor, Tensor], fill: int) -> Tensor:
    inside = (columns >= span[0][:, None]) & (columns < span[1][:, None])
    taken = x.gather(1, columns.clamp(0, max(x.shape[1] - 1, 0)))
    return taken.masked_fill(~inside, fill)

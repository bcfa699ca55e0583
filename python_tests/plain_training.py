"""A fuser's training loss written out row by row: what `C2CTrainingModel` is compared with.

Independent of the code under test: only torch, transformers' models and `c2c_ext.reference`. Rows
are not padded and go through the models one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from plain_loop import cache_of, prefill
from torch import Tensor

from c2c_ext import reference


@dataclass
class Row:
    """One sample."""

    ids: Tensor  # [n], prompt and response
    prompt: int  # tokens of the prompt
    columns: Tensor | None = None  # bool [prompt - 1], which are fused; None: all
    sharer_ids: Tensor | None = None  # [s]; None: the prompt's own
    token_map: Tensor | None = None  # [prompt - 1], index into sharer_ids or -1
    gates: list | None = None  # as `c2c_ext.reference.fuse` takes them; None: hard
    learnt: Tensor | None = None  # bool [n], which tokens are learnt; None: all behind the prompt

    def labels(self) -> Tensor:
        """int64 [n], -100 where nothing is learnt."""
        learnt = torch.arange(len(self.ids)) >= self.prompt
        if self.learnt is not None:
            learnt &= self.learnt
        return self.ids.masked_fill(~learnt, -100)


def logits_of(receiver, sharer, fuser, row: Row) -> Tensor:
    """Logits ``[n - prompt + 1, V]`` from the last prompt token on; differentiable in the fuser."""
    before = row.prompt - 1
    ids, positions = row.ids[None, before:], torch.arange(before, len(row.ids))[None]
    if before == 0:
        return receiver(input_ids=ids, position_ids=positions).logits[0]
    base = prefill(receiver, row.ids[None, :before])
    sharer_ids = row.ids[:before] if row.sharer_ids is None else row.sharer_ids
    shared = prefill(sharer, sharer_ids[None])
    shared = [(key.to(base[0][0]), value.to(base[0][0])) for key, value in shared]
    token_map = torch.arange(before) if row.token_map is None else row.token_map
    if row.columns is not None:
        token_map = token_map.masked_fill(~row.columns, -1)
    fused = reference.fuse(base, shared, fuser, token_map=token_map, gates=row.gates)
    fused = [tuple(t.to(base[0][0].dtype) for t in pair) for pair in fused]
    return receiver(
        input_ids=ids,
        attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
        position_ids=positions,
        past_key_values=cache_of(fused),
        use_cache=True,
    ).logits[0]


def loss_of(receiver, sharer, fuser, rows: list[Row]) -> Tensor:
    """Mean cross-entropy over all learnt tokens of all rows."""
    total, count = 0.0, 0
    for row in rows:
        logits = logits_of(receiver, sharer, fuser, row)
        labels = row.labels()[row.prompt :]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = total + F.cross_entropy(logits[:-1], labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def batch_of(rows: list[Row], side: str, extra: int = 0) -> dict[str, Tensor]:
    """The arguments of `C2CTrainingModel.forward`, padded on the ``"left"`` or ``"right"``.

    ``extra`` more columns of padding than needed; padding holds token 3 and true in masks.
    """
    width = max(len(row.ids) for row in rows) + extra

    def padded(values: list[Tensor], width: int, fill: int) -> Tensor:
        if side == "left":
            return torch.stack([F.pad(v, (width - len(v), 0), value=fill) for v in values])
        return torch.stack([F.pad(v, (0, width - len(v)), value=fill) for v in values])

    batch = {
        "input_ids": padded([row.ids for row in rows], width, 3),
        "attention_mask": padded([torch.ones_like(row.ids) for row in rows], width, 0),
        "labels": padded([row.labels() for row in rows], width, -100),
    }
    if any(row.columns is not None for row in rows):
        masks = [
            torch.ones(row.prompt - 1) if row.columns is None else row.columns.float()
            for row in rows
        ]
        masks = [F.pad(m, (0, len(r.ids) - len(m))) for m, r in zip(masks, rows, strict=True)]
        batch["fused_mask"] = padded(masks, width, 0).bool()
    if any(row.token_map is not None for row in rows):
        sharer_width = max(len(row.sharer_ids) for row in rows) + extra
        sharer_ids = [row.sharer_ids for row in rows]
        batch["sharer_input_ids"] = padded(sharer_ids, sharer_width, 3)
        batch["sharer_attention_mask"] = padded(
            [torch.ones_like(ids) for ids in sharer_ids], sharer_width, 0
        )
        maps = []
        for row in rows:
            shift = sharer_width - len(row.sharer_ids) if side == "left" else 0
            own = torch.where(row.token_map >= 0, row.token_map + shift, -1)
            maps.append(F.pad(own, (0, len(row.ids) - len(own)), value=-7))  # not read there
        batch["token_map"] = padded(maps, width, -9)
    return batch

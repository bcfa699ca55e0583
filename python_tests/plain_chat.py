"""A chat over fused caches written out as a plain loop: what later turns are compared with.

Independent of the code under test: only torch, transformers' models and `c2c_ext.reference`. Every
turn is given the whole conversation so far; what is new of it, but for its last token, is read by
all models over their own caches and fused. With ``every``, generated tokens are fused too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import plain_loop
import torch
from plain_loop import Decoded, KVLayers
from torch import Tensor

from c2c_ext import reference


@dataclass
class PlainChat:
    """One conversation of ``[B, L]`` tokens; nothing of it is ever run twice."""

    receiver: object
    sharers: list
    fusers: list
    fusion: str = "parallel"
    stride: int = 1  # between the positions of two tokens
    kv: KVLayers = field(default_factory=list)  # the receiver's, fused
    shared: list[KVLayers] = field(default_factory=list)  # the sharers' own

    def __post_init__(self) -> None:
        self.shared = self.shared or [[] for _ in self.sharers]

    @torch.no_grad()
    def turn(
        self,
        ids: Tensor,
        steps: int,
        *,
        mask: Tensor | None = None,
        columns: Tensor | None = None,  # bool [(B,) L - 1]
        chosen: Tensor | None = None,  # bool [B, sharers]
        every: int = 0,
        choose=None,
    ) -> Decoded:
        """Answers ``ids``, of which the caches hold the beginning; greedy by default."""
        mask = torch.ones_like(ids) if mask is None else mask
        self.read(ids, mask=mask, columns=columns, chosen=chosen)
        tokens, logits = [], []
        for step in range(steps):
            self.kv, scores = self._grown(self.receiver, self.kv, ids, mask)
            if every and step and step % every == 0:
                end = held_in(self.kv)
                self._fuse(end - every, end, ids, mask, None, chosen)
            picked = choose(scores, step) if choose else scores.argmax(-1)
            ids = torch.cat([ids, picked[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(picked[:, None])], dim=1)
            tokens.append(picked)
            logits.append(scores)
        return Decoded(torch.stack(tokens, 1), torch.stack(logits, 1), self.kv)

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        columns: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        """Reads and fuses what is new of ``ids`` but for the last token."""
        mask = torch.ones_like(ids) if mask is None else mask
        held, end = held_in(self.kv), ids.shape[1] - 1
        if held < end:
            self.kv, _ = self._grown(self.receiver, self.kv, ids[:, :end], mask[:, :end])
            self._fuse(held, end, ids, mask, columns, chosen)

    def _fuse(
        self,
        start: int,
        end: int,
        ids: Tensor,
        mask: Tensor,
        columns: Tensor | None,
        chosen: Tensor | None,
    ) -> None:
        """Fuses columns ``start .. end - 1`` with what the sharers read of them."""
        fused = mask[:, start:end].bool()
        if columns is not None:
            fused = fused & columns[..., start:end]
        clean = [(k[:, :, start:end], v[:, :, start:end]) for k, v in self.kv]
        total = clean
        for number, (sharer, fuser) in enumerate(zip(self.sharers, self.fusers, strict=True)):
            here = fused if chosen is None else fused & chosen[:, number : number + 1]
            token_map = torch.arange(end - start).expand_as(here).masked_fill(~here, -1)
            kv, _ = self._grown(sharer, self.shared[number], ids[:, :end], mask[:, :end])
            self.shared[number] = kv
            source = [(k[:, :, start:end], v[:, :, start:end]) for k, v in kv]
            if self.fusion == "sequential" or number == 0:
                total = reference.fuse(total, source, fuser, token_map=token_map)
                continue
            out = reference.fuse(clean, source, fuser, token_map=token_map)
            total = [
                tuple(t + n - c for t, n, c in zip(*pairs, strict=True))
                for pairs in zip(total, out, clean, strict=True)
            ]
        self.kv = [
            tuple(
                torch.cat([whole[:, :, :start], part, whole[:, :, end:]], dim=2)
                for whole, part in zip(pair, new, strict=True)
            )
            for pair, new in zip(self.kv, total, strict=True)
        ]

    def _grown(self, model, kv: KVLayers, ids: Tensor, mask: Tensor) -> tuple[KVLayers, Tensor]:
        """(``kv`` grown to all of ``ids``, the logits of its last token)."""
        if held_in(kv) >= ids.shape[1]:
            return kv, None
        cache, held = plain_loop.cache_of(kv), held_in(kv)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0) * self.stride
        output = model(
            input_ids=ids[:, held:],
            attention_mask=mask,
            position_ids=position_ids[:, held:],
            past_key_values=cache,
            use_cache=True,
        )
        return plain_loop.kv_of(cache), output.logits[:, -1]


def held_in(kv: KVLayers) -> int:
    return kv[0][0].shape[2] if kv else 0

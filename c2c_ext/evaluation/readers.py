"""One way of answering each: which models read a context, and what they then hold of it."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import kv_layers
from ..fuser import Fuser
from ..fusion import fuse
from ..model_kv import ModelKV
from ..prefill import read_tokens

Ids = Sequence[int]
CONTROLS = ("mismatched", "zero", "noise", "identical")
# Those whose next token comes from one distribution; routing and T2T are made of these.
READING = ("receiver", "sharer", "ensemble", "c2c", *CONTROLS)


@dataclass
class EvaluationPair:
    """What is evaluated: both models in evaluation mode on one device, reading the same token ids.

    Attributes:
        identical_fuser: between the receiver and itself, for ``"identical"``; None: ``fuser``,
            where the KV shapes of both models are the same.
        seed: of the noise.
    """

    receiver: PreTrainedModel
    sharer: PreTrainedModel
    fuser: Fuser
    identical_fuser: Fuser | None = None
    seed: int = 0

    def fuser_of(self, mode: str) -> Fuser:
        """The fuser that a fusing mode uses.

        Raises:
            ValueError: ``"identical"`` without a fuser between the receiver and itself.
        """
        if mode != "identical":
            return self.fuser
        if self.identical_fuser is not None:
            return self.identical_fuser
        own = ModelKV.from_config(self.receiver.config)
        if problems := self.fuser.config.mismatches(own, own):
            raise ValueError(
                "identical: needs a fuser between the receiver and itself, and the pair's own "
                f"does not fit: {problems[0]}"
            )
        return self.fuser


@dataclass
class Reader:
    """A model with what it holds of a batch of prefixes."""

    model: PreTrainedModel
    cache: Any
    mask: Tensor  # int64 [B, N], 0 where a row is padded

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]`` float32 of token ids ``[B, T]`` that follow, kept too.

        Args:
            mask: int64 ``[B, T]``, 0 for padding.
        """
        counted = self.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1
        self.mask = torch.cat([self.mask, mask], dim=1)
        named = "position_ids" in inspect.signature(type(self.model).forward).parameters
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **({"position_ids": counted.clamp(min=0)} if named else {}),
        )
        self.cache = output.past_key_values
        return output.logits.float()


def readers(
    mode: str, pair: EvaluationPair, prefixes: Sequence[Ids], others: Sequence[Ids] | None = None
) -> list[Reader]:
    """The models of a mode after they have read a batch of prefixes; their logits are averaged.

    Args:
        mode: one of `READING`.
        prefixes: token ids of every row, all rows at least one or all rows none.
        others: what the sharer has read instead, for ``"mismatched"``; at least one token each.

    Raises:
        ValueError: an unknown mode, or one that this pair does not allow.
    """
    if mode not in READING:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(READING)}")
    if mode in ("receiver", "sharer"):
        return [_prefill(mode, getattr(pair, mode), prefixes)]
    if mode == "ensemble":
        return [_prefill(side, getattr(pair, side), prefixes) for side in ("receiver", "sharer")]
    fuser = pair.fuser_of(mode)
    receiver = _prefill("receiver", pair.receiver, prefixes)
    if not prefixes[0]:
        return [receiver]  # nothing to fuse
    source = pair.receiver if mode == "identical" else pair.sharer
    texts = prefixes
    if mode == "mismatched":
        if others is None:
            raise ValueError("mismatched: needs what the sharer reads instead")
        texts = others
    shared = _prefill("sharer", source, texts)
    layers = kv_layers(shared.cache, "sharer_cache")
    if mode == "zero":
        layers = [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in layers]
    elif mode == "noise":
        layers = _noise(layers, texts, pair.seed)
    fuse(receiver.cache, layers, fuser, token_map=_token_map(prefixes, texts), inplace=True)
    return [receiver]


def mean_log_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Log-probabilities ``[.., V]`` of averaged logits, over the tokens that all models have."""
    common = min(t.shape[-1] for t in logits)
    cut = [t[..., :common] for t in logits] if len(logits) > 1 else list(logits)
    return torch.stack(cut).mean(0).log_softmax(-1)


def padded(rows: Sequence[Ids], side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[B, N]`` int64 of rows of different lengths; padding is token 0."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[k, start : start + len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[k, start : start + len(row)] = 1
    return ids, mask


def _prefill(role: str, model: PreTrainedModel, rows: Sequence[Ids]) -> Reader:
    ids, mask = (t.to(model.device) for t in padded(rows, "left"))
    if ids.shape[1] == 0:
        from transformers import DynamicCache

        return Reader(model, DynamicCache(), mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = read_tokens(role, model, ids, position_ids=positions, mask=mask)
    return Reader(model, cache, mask)


def _token_map(prefixes: Sequence[Ids], texts: Sequence[Ids]) -> Tensor:
    """int64 ``[B, N]``: the same token of the sharer's text, padding -1.

    A text of another length is met in proportion, first to first and last to last, so that every
    token of the receiver is fused with a real one of it.
    """
    width, held = (max(map(len, rows)) for rows in (prefixes, texts))
    token_map = torch.full((len(prefixes), width), -1)
    for k, (own, other) in enumerate(zip(prefixes, texts, strict=True)):
        steps, reach = max(len(own) - 1, 1), len(other) - 1
        place = (2 * torch.arange(len(own)) * reach + steps) // (2 * steps)
        token_map[k, width - len(own) :] = held - len(other) + place
    return token_map


def _noise(
    layers: Sequence[tuple[Tensor, Tensor]], texts: Sequence[Ids], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Gaussian vectors with the norm that each token's head has; a text's are always the same."""
    generators = [
        torch.Generator().manual_seed(zlib.crc32(repr([seed, *text]).encode())) for text in texts
    ]

    def like(t: Tensor) -> Tensor:
        noise = torch.zeros(t.shape, dtype=torch.float32)
        for k, (text, generator) in enumerate(zip(texts, generators, strict=True)):
            shape = (t.shape[1], len(text), t.shape[3])
            noise[k, :, t.shape[2] - len(text) :] = torch.randn(shape, generator=generator)
        noise = noise.to(t.device)
        norm = t.float().norm(dim=-1, keepdim=True)
        return (noise * norm / noise.norm(dim=-1, keepdim=True).clamp(min=1e-12)).to(t.dtype)

    return [(like(key), like(value)) for key, value in layers]


def in_batches(
    rows: Sequence[Ids], size: int, run: Callable[[list[int]], None], *, split: int = 0
) -> None:
    """Calls ``run`` with the places of at most ``size`` rows of like length, longest first.

    Args:
        split: rows of at most so many tokens are in batches of their own.
    """
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k]))
    for part in (
        [k for k in order if len(rows[k]) > split],
        [k for k in order if len(rows[k]) <= split],
    ):
        for start in range(0, len(part), size):
            run(part[start : start + size])

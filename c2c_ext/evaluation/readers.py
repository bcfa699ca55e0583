"""One way of answering each: which models read a context, and what they then hold of it."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import kv_layers
from ..fuser import Fuser
from ..fusion import fuse
from ..model_kv import ModelKV
from ..prefill import read_tokens
from .latency import Stopwatch

Ids = Sequence[int]
CONTROLS = ("mismatched", "zero", "noise", "identical")
# Those whose next token comes from one distribution; routing and T2T are made of these.
FUSING = ("c2c", *CONTROLS)
READING = ("receiver", "sharer", "ensemble", *FUSING)


@dataclass
class EvaluationPair:
    """What is evaluated: both models in evaluation mode on one device.

    Attributes:
        identical_fuser: between the receiver and itself, for ``"identical"``; None: ``fuser``,
            where the KV shapes of both models are the same.
        seed: of the noise.
        same_tokens: whether both read the same token ids.
        clock: what their work is measured by.
    """

    receiver: PreTrainedModel
    sharer: PreTrainedModel
    fuser: Fuser
    identical_fuser: Fuser | None = None
    seed: int = 0
    same_tokens: bool = True
    clock: Stopwatch = field(default_factory=Stopwatch, repr=False, compare=False)

    def check(self, mode: str) -> None:
        """Raises ValueError where this pair does not allow a mode; the message begins with it."""
        if mode == "ensemble" and not self.same_tokens:
            raise ValueError(
                "ensemble: averages the logits of both models, token by token, and these two have "
                "different vocabularies"
            )
        self.fuser_of(mode)

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


@dataclass(frozen=True)
class Source:
    """What is fused with a prefix.

    Attributes:
        ids: token ids that the sharer reads, at least one.
        token_map: for every token of the prefix a place in ``ids``, or -1.
    """

    ids: tuple[int, ...]
    token_map: tuple[int, ...]


@dataclass
class Reader:
    """A model with what it holds of a batch of prefixes."""

    role: str  # "receiver" or "sharer"
    model: PreTrainedModel
    cache: Any
    mask: Tensor  # int64 [B, N], 0 where a row is padded
    clock: Stopwatch

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]`` float32 of token ids ``[B, T]`` that follow, kept too.

        Args:
            mask: int64 ``[B, T]``, 0 for padding.
        """
        counted = self.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1
        self.mask = torch.cat([self.mask, mask], dim=1)
        named = "position_ids" in inspect.signature(type(self.model).forward).parameters
        with self.clock.part(f"{self.role}_decode"):
            output = self.model(
                input_ids=ids,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **({"position_ids": counted.clamp(min=0)} if named else {}),
            )
        self.cache = output.past_key_values
        return output.logits.float()

    def spread(self, rows: Sequence[int]) -> None:
        """Goes on with these rows, each as often as it is named."""
        if list(rows) != list(range(len(self.mask))):
            index = torch.tensor(list(rows), device=self.mask.device)
            self.mask = self.mask[index]
            self.cache.batch_select_indices(index)


def readers(
    mode: str,
    pair: EvaluationPair,
    prefixes: Sequence[Ids],
    sources: Sequence[Source] | None = None,
) -> list[Reader]:
    """The models of a mode after they have read a batch of prefixes; their logits are averaged.

    Args:
        mode: one of `READING`.
        prefixes: token ids of every row, all rows at least one or all rows none.
        sources: what each is fused with, where the mode fuses.

    Raises:
        ValueError: an unknown mode, or one that this pair does not allow.
    """
    if mode not in READING:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(READING)}")
    pair.check(mode)
    if mode in ("receiver", "sharer"):
        return [_prefill(mode, pair, prefixes)]
    if mode == "ensemble":
        return [_prefill(side, pair, prefixes) for side in ("receiver", "sharer")]
    receiver = _prefill("receiver", pair, prefixes)
    if not prefixes[0]:
        return [receiver]  # nothing to fuse
    if sources is None:
        raise ValueError(f"{mode}: needs what the sharer reads")
    texts = [source.ids for source in sources]
    shared = _prefill("sharer", pair, texts, identical=mode == "identical")
    layers = kv_layers(shared.cache, "sharer_cache")
    with pair.clock.part("transfer"):
        layers = [tuple(t.to(receiver.mask.device) for t in layer) for layer in layers]
    bytes_per_token = sum(t[0, :, 0].numel() * t.element_size() for kv in layers for t in kv)
    pair.clock.count("transfer_bytes", bytes_per_token * sum(map(len, texts)))
    if mode == "zero":
        layers = [(torch.zeros_like(key), torch.zeros_like(value)) for key, value in layers]
    elif mode == "noise":
        layers = _noise(layers, texts, pair.seed)
    token_map = _token_map(sources)
    with pair.clock.part("fusing"):
        fuse(receiver.cache, layers, pair.fuser_of(mode), token_map=token_map, inplace=True)
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


def _prefill(
    role: str, pair: EvaluationPair, rows: Sequence[Ids], *, identical: bool = False
) -> Reader:
    """A model's reading of a batch; the receiver's in the sharer's place where ``identical``."""
    model = getattr(pair, "receiver" if identical else role)
    ids, mask = (t.to(model.device) for t in padded(rows, "left"))
    if ids.shape[1] == 0:
        from transformers import DynamicCache

        return Reader(role, model, DynamicCache(), mask, pair.clock)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with pair.clock.part(f"{role}_prefill"):
        cache = read_tokens(role, model, ids, position_ids=positions, mask=mask)
    return Reader(role, model, cache, mask, pair.clock)


def _token_map(sources: Sequence[Source]) -> Tensor:
    """int64 ``[B, N]``: columns of the sharer's left-padded rows; a prefix's padding is -1."""
    width = max(len(source.token_map) for source in sources)
    held = max(len(source.ids) for source in sources)
    token_map = torch.full((len(sources), width), -1)
    for k, source in enumerate(sources):
        places, moved = torch.tensor(source.token_map), held - len(source.ids)
        token_map[k, width - len(places) :] = torch.where(places < 0, -1, places + moved)
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

    Equal rows are neighbours.

    Args:
        split: rows of at most so many tokens are in batches of their own.
    """
    order = sorted(range(len(rows)), key=lambda k: (-len(rows[k]), tuple(rows[k])))
    for part in (
        [k for k in order if len(rows[k]) > split],
        [k for k in order if len(rows[k]) <= split],
    ):
        for start in range(0, len(part), size):
            run(part[start : start + size])

"""Generation over a fused cache written out as plain loops: what `attach` is compared with.

Independent of the code under test: only torch, transformers' models and `c2c_ext.reference`.
Every loop decodes a fixed number of steps; prompts are ``ids [B, P]`` with an optional left-padding
``mask [B, P]``. The prompt without its last token is prefilled and fused, its last token is step 0.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from c2c_ext import reference

KVLayers = list[tuple[Tensor, Tensor]]


@dataclass
class Decoded:
    """What a loop saw."""

    tokens: Tensor  # [B, steps]
    logits: Tensor  # [B, steps, vocabulary]
    kv: KVLayers  # all tokens that were run: prompt and all decoded tokens but the last


@torch.no_grad()
def prefill(model, ids: Tensor, mask: Tensor | None = None) -> KVLayers:
    """The model's own cache of all of ``ids``."""
    cache = DynamicCache()
    _step(model, cache, ids, _full(ids, mask))
    return kv_of(cache)


@torch.no_grad()
def fused_prompt(
    receiver, sharer, fuser, ids: Tensor, mask: Tensor | None = None, columns: Tensor | None = None
) -> KVLayers:
    """The receiver's cache of ``ids[:, :-1]``, fused where ``columns [(B,) P - 1]`` is true."""
    before = None if mask is None else mask[:, :-1]
    base = prefill(receiver, ids[:, :-1], before)
    shared = prefill(sharer, ids[:, :-1], before)
    dtype = base[0][0].dtype
    shared = [(key.to(dtype), value.to(dtype)) for key, value in shared]
    fused = _full(ids[:, :-1], before).bool()
    if columns is not None:
        fused = fused & columns
    token_map = torch.arange(ids.shape[1] - 1).expand_as(fused).masked_fill(~fused, -1)
    return reference.fuse(base, shared, fuser, token_map=token_map)


@torch.no_grad()
def fused_spans(
    receiver, sharers, fusers, ids: Tensor, spans, *, mask: Tensor | None = None, fusion="parallel"
) -> KVLayers:
    """The receiver's cache of ``ids[:, :-1]``, read and fused span by span with several sharers.

    ``spans``: (tokens, for every row the sharers that it is fused with); the rest is not fused.
    """
    n = ids.shape[1] - 1
    full = _full(ids, mask)[:, :n]
    shared = [prefill(sharer, ids[:, :n], full) for sharer in sharers]
    cache, start = DynamicCache(), 0
    nobody = [[] for _ in ids]
    for tokens, rows in [*spans, (n - sum(tokens for tokens, _ in spans), nobody)]:
        end = start + tokens
        if tokens:
            _step(receiver, cache, ids[:, start:end], full[:, :end])
        base = [(key[:, :, start:end], value[:, :, start:end]) for key, value in kv_of(cache)]
        total = base
        for k, (fuser, source) in enumerate(zip(fusers, shared, strict=True)):
            chosen = torch.tensor([k in row for row in rows])[:, None] & full[:, start:end].bool()
            token_map = torch.arange(start, end).expand_as(chosen).masked_fill(~chosen, -1)
            read = base if fusion == "parallel" else total
            out = reference.fuse(read, source, fuser, token_map=token_map)
            total = [
                tuple(t + (o - r) for t, o, r in zip(*triple, strict=True))
                for triple in zip(total, out, read, strict=True)
            ]
        for layer, (key, value) in zip(cache.layers, total, strict=True):
            layer.keys[:, :, start:end], layer.values[:, :, start:end] = key, value
        start = end
    return kv_of(cache)


@torch.no_grad()
def read_on(receiver, kv: KVLayers, ids: Tensor, mask: Tensor | None = None) -> KVLayers:
    """``kv`` grown to ``ids[:, :-1]``: what it lacks of them is run over it, unfused."""
    cache, held = cache_of(kv), kv[0][0].shape[2]
    _step(receiver, cache, ids[:, held:-1], _full(ids, mask)[:, :-1])
    return kv_of(cache)


@torch.no_grad()
def decode(
    receiver, kv: KVLayers, ids: Tensor, steps: int, *, mask: Tensor | None = None, choose=None
) -> Decoded:
    """Runs the last prompt token over ``kv``, then what ``choose(logits [B, V], step)`` picks.

    Greedy by default. ``kv`` is not changed.
    """
    cache, mask = cache_of(kv), _full(ids, mask)
    token, tokens, logits = ids[:, -1:], [], []
    for step in range(steps):
        scores = _step(receiver, cache, token, mask)[:, -1]
        picked = choose(scores, step) if choose else scores.argmax(-1)
        token = picked[:, None]
        tokens.append(token)
        logits.append(scores)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    return Decoded(torch.cat(tokens, 1), torch.stack(logits, 1), kv_of(cache))


def forced(tokens: Tensor):
    """A ``choose`` that follows ``tokens [B, steps]``."""
    return lambda logits, step: tokens[:, step]


def sampled(temperature: float):
    """A ``choose`` that draws from the default generator, one draw for the batch per step."""
    return lambda logits, step: torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


class Processed:
    """A ``choose`` that sees the logits through ``processors``, each of (ids so far, logits).

    It draws from the default generator or takes the largest; ``scores`` keeps what it saw.
    """

    def __init__(self, ids: Tensor, processors, *, draw: bool) -> None:
        self.ids, self.processors, self.draw, self.scores = ids, processors, draw, []

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        scores = logits.clone()
        for processor in self.processors:
            scores = processor(self.ids, scores)
        self.scores.append(scores)
        if self.draw:
            token = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            token = scores.argmax(-1)
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        return token


class Guided:
    """Classifier-free guidance (arXiv 2306.17806) away from a prompt that ``model`` reads alone."""

    def __init__(self, model, negative_ids: Tensor | None, scale: float) -> None:
        self.model, self.scale, self.cache = model, scale, DynamicCache()
        self.negative_ids = negative_ids  # None: the last prompt token

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        unread = ids[:, -1:]
        if self.cache.get_seq_length() == 0 and self.negative_ids is not None:
            unread = self.negative_ids
        mask = torch.ones(len(ids), self.cache.get_seq_length() + unread.shape[1]).long()
        away = _step(self.model, self.cache, unread, mask)[:, -1].log_softmax(-1)
        return away + self.scale * (logits.log_softmax(-1) - away)


@torch.no_grad()
def beam_search(
    receiver, kv: KVLayers, ids: Tensor, steps: int, beams: int
) -> tuple[Tensor, Tensor]:
    """Beam search of one prompt ``[1, P]`` without end tokens; every beam rerun from the start.

    Returns:
        tokens ``[beams, steps]`` and scores ``[beams]`` (mean log-probability), best first.
    """
    held = [(torch.zeros(0, dtype=torch.long), 0.0)]
    for step in range(steps):
        grown = []
        for tokens, score in held:
            follow = torch.cat([tokens, torch.zeros(1, dtype=torch.long)])[None]
            seen = decode(receiver, kv, ids, step + 1, choose=forced(follow))
            best = seen.logits[0, step].log_softmax(-1).topk(beams)
            for gain, token in zip(best.values, best.indices, strict=True):
                grown.append((torch.cat([tokens, token[None]]), score + gain.item()))
        held = sorted(grown, key=lambda pair: -pair[1])[:beams]
    return (
        torch.stack([tokens for tokens, _ in held]),
        torch.tensor([score / steps for _, score in held]),
    )


def kv_of(cache) -> KVLayers:
    """(key, value) of every layer of a transformers cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def cache_of(kv: KVLayers) -> DynamicCache:
    """A full (never sliding) cache holding ``kv``."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(kv):
        cache.update(key, value, layer)
    return cache


def repeat_rows(kv: KVLayers, times: int) -> KVLayers:
    """Every row ``times`` times, equal rows together."""
    return [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in kv]


def _full(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids) if mask is None else mask


def _step(model, cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of ``ids [B, T]``, the last T tokens that ``mask`` speaks of."""
    own = {}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        own["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **own
    ).logits

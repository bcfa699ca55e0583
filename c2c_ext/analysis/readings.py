"""What both models have read of prompts, and the receiver's next token on any cache of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVPairs
from ..config import KINDS
from ..demo.evaluate import continue_from
from ..fuser import Fuser
from ..fusion import fuse
from ..prefill import read_tokens


@dataclass(frozen=True)
class Reading:
    """A batch of prompts of one length, read by both models; nothing of it is fused.

    Attributes:
        receiver: (key, value) ``[B, H, N, D]`` per layer: the prompts without their last tokens.
        sharer: likewise with the sharer's layers, ``[B, H, M, D]``; dtype and device of `receiver`.
        token_map: int64 ``[N]``, as `c2c_ext.fuse` takes it; -1: not fused.
        last: int64 ``[B, 1]``, the receiver's last tokens.
        answers: int64 ``[B]``, the right next tokens; None: not known.
        candidates: int64 ``[B, C]``, the tokens among which an answer is chosen; None: all.
        names: of the prompts, for people.
        sharer_ids: int64 ``[B, M]``, what the sharer has read.
    """

    receiver: KVPairs
    sharer: KVPairs
    token_map: Tensor
    last: Tensor
    answers: Tensor | None = None
    candidates: Tensor | None = None
    names: tuple[str, ...] = ()
    sharer_ids: Tensor | None = None


@torch.no_grad()
def read(
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    ids: Tensor,
    sharer_ids: Tensor,
    token_map: Tensor,
    **known: Any,
) -> Reading:
    """Both models read a batch of prompts.

    Args:
        ids: int64 ``[B, N + 1]``, the receiver's prompts, without padding.
        sharer_ids: int64 ``[B, M]``, what the sharer reads.
        token_map: int64 ``[N]``: the sharer's token for each of the receiver's but the last, or -1.
        known: ``answers``, ``candidates`` and ``names`` of the `Reading`.

    Raises:
        ValueError: shapes that do not fit each other, a place outside of what the sharer reads, or
            a model that computes NaN or infinity.
    """
    tokens = ids.shape[1] - 1
    if tokens < 1:
        raise ValueError("c2c_ext.analysis: a prompt must have at least 2 tokens, got 1")
    if len(sharer_ids) != len(ids):
        raise ValueError(
            f"c2c_ext.analysis: sharer_ids must have {len(ids)} rows as ids, got {len(sharer_ids)}"
        )
    if tuple(token_map.shape) != (tokens,):
        raise ValueError(
            f"c2c_ext.analysis: token_map must be [{tokens}], got {list(token_map.shape)}"
        )
    if int(token_map.max()) >= sharer_ids.shape[1] or int(token_map.min()) < -1:
        raise ValueError(
            f"c2c_ext.analysis: token_map must be within -1..{sharer_ids.shape[1] - 1}, got "
            f"{int(token_map.min())}..{int(token_map.max())}"
        )
    ours = _cache("receiver", receiver, ids[:, :-1])
    like = ours[0][0]
    theirs = [(k.to(like), v.to(like)) for k, v in _cache("sharer", sharer, sharer_ids)]
    known = {k: v.to(like.device) if isinstance(v, Tensor) else v for k, v in known.items()}
    return Reading(
        ours,
        theirs,
        token_map.to(like.device),
        ids[:, -1:].to(like.device),
        **known,
        sharer_ids=sharer_ids.cpu(),
    )


@torch.no_grad()
def fused(reading: Reading, fuser: Fuser, token_map: Tensor | None = None) -> KVPairs:
    """The receiver's cache as `c2c_ext.fuse` makes it; ``token_map`` in place of the reading's.

    Raises:
        ValueError: there is NaN or infinity in it.
    """
    token_map = reading.token_map if token_map is None else token_map
    cache = fuse(reading.receiver, reading.sharer, fuser, token_map=token_map)
    _check_finite("fused", cache)
    return cache


@torch.no_grad()
def next_logits(receiver: PreTrainedModel, cache: KVPairs, reading: Reading) -> Tensor:
    """Logits after the last token on a cache of the others: ``[B, C]`` of the candidates.

    Without candidates ``[B, V]``, of the whole vocabulary. ``cache`` is left as it is.

    Raises:
        ValueError: NaN among them.
    """
    return of_candidates(continue_from(receiver, cache, reading.last), reading)


def of_candidates(logits: Tensor, reading: Reading) -> Tensor:
    """Those of the candidates out of logits ``[B, V]``, in float64; see `next_logits`."""
    logits = logits.double()
    logits = logits if reading.candidates is None else logits.gather(1, reading.candidates)
    if bool(logits.isnan().any()):
        raise ValueError("c2c_ext.analysis: the receiver's logits hold NaN")
    return logits


def is_right(logits: Tensor, reading: Reading) -> Tensor:
    """bool ``[B]``: whether the largest of `next_logits` is the answer's.

    Raises:
        ValueError: the answers are not known.
    """
    if reading.answers is None:
        raise ValueError("c2c_ext.analysis: the right answers of these prompts are not known")
    chosen = logits.argmax(dim=1)
    if reading.candidates is not None:
        chosen = reading.candidates.gather(1, chosen[:, None])[:, 0]
    return chosen == reading.answers


def _cache(role: str, model: PreTrainedModel, ids: Tensor) -> KVPairs:
    ids = ids.to(model.device)
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    cache = read_tokens(role, model, ids, position_ids=places)
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    _check_finite(f"{role}'s", pairs)
    return pairs


def _check_finite(whose: str, cache: KVPairs) -> None:
    """A NaN would make every figure NaN, or an argmax out of nothing."""
    for layer, pair in enumerate(cache):
        for kind, tensor in zip(KINDS, pair, strict=True):
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"c2c_ext.analysis: the {whose} cache holds NaN or infinity (layer {layer}, "
                    f"{kind}s)"
                )

"""Trains a fuser on one token per prompt, from caches that are computed once.

`C2CTrainingModel` would prefill both models at every step, fuse all tokens of a prompt of which one
is wanted, and let the receiver read no more than the last token on the fused cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from c2c_ext import Fuser
from c2c_ext.demo.evaluate import KV, prefill
from c2c_ext.demo.train import Training, optimise
from c2c_ext.training.recipes import Recipe
from c2c_ext.training.run import new_fuser
from c2c_ext.training_op import fuse_training


@dataclass(frozen=True)
class Samples:
    """All that a fuser is trained on.

    Attributes:
        prompt: int64 ``[S, N]``, what the receiver reads.
        answer: int64 ``[S]``, the token that follows.
        shared: int64 ``[S, M]``, what the sharer reads.
        fused, read: the places of the receiver's fused token and of the sharer's token for it. The
            receiver reads what follows the fused token on the fused cache.
    """

    prompt: Tensor
    answer: Tensor
    shared: Tensor
    fused: int
    read: int


def train_fuser(
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    recipe: Recipe,
    samples: Samples,
    order: Iterator[int],
    report: Callable[[int, float], None],
) -> tuple[Fuser, dict[str, Any]]:
    """A fuser for two frozen models, and what is worth recording of its training.

    Args:
        recipe: as `c2c train` takes it; of it fuser, gates, optimizer, ``batch`` and ``max_steps``
            are read.
        order: gives the samples of the batches, one after the other.
        report: is called with step and loss.
    """
    started = time.perf_counter()
    fuser, sampler = new_fuser(recipe, receiver.config, sharer.config), recipe.sampler()
    with torch.no_grad():
        clean = prefill(receiver, samples.prompt[:, : samples.fused + 1])
        shared = _at(prefill(sharer, samples.shared), samples.read)

    def loss_at(step: int) -> Tensor:
        rows = torch.tensor([next(order) for _ in range(recipe.batch)])
        own = [(key[rows], value[rows]) for key, value in clean]
        noise = sampler.noise(fuser, len(rows), 1, recipe.seed, step=step)
        fused = fuse_training(
            _at(own, samples.fused),
            [(key[rows], value[rows]) for key, value in shared],
            fuser,
            gates=sampler.gates(fuser, noise, step),
        )
        cache = DynamicCache()
        for layer, pairs in enumerate(zip(own, fused, strict=True)):
            key, value = (torch.cat([t[:, :, :-1], new], 2) for t, new in zip(*pairs, strict=True))
            cache.update(key, value, layer)
        tail = samples.prompt[rows, samples.fused + 1 :]
        logits = receiver(input_ids=tail, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return F.cross_entropy(logits, samples.answer[rows])

    training = Training(
        steps=recipe.max_steps,
        lr=recipe.lr,
        batch=recipe.batch,
        warm_up=max(1, round(recipe.warm_up * recipe.max_steps)),
        last=recipe.lr_end,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        clip=recipe.clip,
    )
    loss = float("nan")
    for step, loss in optimise(fuser, training, loss_at):
        report(step, loss)
    return fuser.eval().requires_grad_(False), {
        "recipe": recipe.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in fuser.parameters()),
        "last_loss": round(loss, 4),
    }


def _at(pairs: KV, place: int) -> KV:
    """One token of every layer's keys and values."""
    return [(key[:, :, place : place + 1], value[:, :, place : place + 1]) for key, value in pairs]

"""Trains a fuser on batches that a world draws, in a plain loop around `C2CTrainingModel`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from c2c_ext import Fuser
from c2c_ext.training import C2CTrainingModel
from c2c_ext.training.model import parameter_groups
from c2c_ext.training.recipes import Recipe
from c2c_ext.training.run import new_fuser


@dataclass(frozen=True)
class Batch:
    """What `C2CTrainingModel` reads: prompt and answer, and which tokens are fused with which.

    Attributes:
        input_ids: int64 ``[B, L]``, prompt and answer in the receiver's tokens.
        labels: int64 ``[B, L]``, -100 but for the answer.
        fused_mask: bool ``[B, L]``.
        sharer_ids: int64 ``[B, S]``; None: the receiver's prompt.
        token_map: int64 ``[B, L]``, read where tokens are fused; with ``sharer_ids``.
    """

    input_ids: Tensor
    labels: Tensor
    fused_mask: Tensor
    sharer_ids: Tensor | None = None
    token_map: Tensor | None = None


def train_fuser(
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    recipe: Recipe,
    draw: Callable[[int], Batch],
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Fuser, dict[str, Any]]:
    """A fuser for two frozen models, and what is worth recording of its training.

    Args:
        recipe: as `c2c train` takes it, e.g. ``load_recipe("tiny").changed({"seed": 3})``; of it
            fuser, gates, optimizer and ``max_steps`` are read. Batches are as drawn.
        draw: the batch of a step; must depend on the step and its own generator alone.
        report: is called with step and loss.
    """
    steps = recipe.max_steps
    if steps < 1:
        raise ValueError(f"train_fuser: recipe.max_steps must be at least 1, got {steps}")
    fuser = new_fuser(recipe, receiver.config, sharer.config)
    gates = recipe.sampler() if fuser.config.gate else None
    model = C2CTrainingModel(
        receiver, sharer, fuser, sampler=gates, dropout=recipe.dropout, seed=recipe.seed
    )
    optimiser = torch.optim.AdamW(
        parameter_groups(fuser, recipe.weight_decay), recipe.lr, betas=(recipe.beta1, recipe.beta2)
    )
    warm_up = max(1, round(recipe.warm_up * steps))

    def scale(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(steps - warm_up, 1)
        return recipe.lr_end + (1 - recipe.lr_end) * (1 + math.cos(math.pi * progress)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
    started, loss = time.perf_counter(), float("nan")
    for step in range(steps):
        batch = draw(step)
        model.step = step
        output = model(
            batch.input_ids,
            labels=batch.labels,
            fused_mask=batch.fused_mask,
            sharer_input_ids=batch.sharer_ids,
            token_map=batch.token_map,
        )
        optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        nn.utils.clip_grad_norm_(fuser.parameters(), recipe.clip)
        optimiser.step()
        schedule.step()
        loss = output.loss.item()
        report(step, loss)
    return fuser.eval().requires_grad_(False), {
        "recipe": recipe.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
        "parameters": sum(p.numel() for p in fuser.parameters()),
        "last_loss": round(loss, 4),
    }

"""A tiny training run: random samples, tiny models, and a trainer over them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCABULARY, fuser_between, receiver_model, sharer_model
from torch.utils.data import Dataset

from c2c_ext import Fuser
from c2c_ext.training.arguments import training_arguments
from c2c_ext.training.collator import IGNORED, ChatCollator, Sample
from c2c_ext.training.model import C2CTrainingModel, parameter_groups
from c2c_ext.training.recipes import PUBLISHED, Recipe
from c2c_ext.training.trainer import C2CTrainer

RECIPE = replace(
    PUBLISHED,
    batch=4,
    micro_batch=2,
    max_steps=10,
    save_steps=5,
    lr=1e-2,
    dropout=0.0,
    anneal_steps=10,
    dtype="fp32",
    device="cpu",
    log_steps=1,
)
DDP_RECIPE = replace(RECIPE, max_steps=3, gate_per="token", dropout=0.2)
SAMPLES = 15


class Samples(Dataset):
    """Random prompts of 3 to 9 tokens with responses of 1 to 3; numbered from 1."""

    def __init__(self, count: int = SAMPLES, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, size: tuple[int, ...] = ()) -> torch.Tensor:
            return torch.randint(low, high, size, generator=generator, dtype=torch.int32)

        self.samples = []
        for number in range(1, count + 1):
            prompt, response = int(draw(3, 10)), int(draw(1, 4))
            ids = draw(3, VOCABULARY, (prompt + response,))
            labels = ids.clone()
            labels[:prompt] = IGNORED
            self.samples.append(Sample(ids, labels, number))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def place(self, number: int) -> str:
        """As `ChatDataset.place`."""
        return f"samples, line {number}"


def training_model(recipe: Recipe = RECIPE, fuser: Fuser | None = None) -> C2CTrainingModel:
    """A tiny pair with a fuser whose gates are half open."""
    receiver, sharer = receiver_model(), sharer_model()
    if fuser is None:
        fuser = fuser_between(receiver, sharer, dropout=recipe.dropout, gate_init=0.5)
    return C2CTrainingModel(receiver, sharer, fuser, sampler=recipe.sampler(), seed=recipe.seed)


def tiny_trainer(
    output: Path,
    recipe: Recipe = RECIPE,
    *,
    model: C2CTrainingModel | None = None,
    evaluation: Dataset | None = None,
    processes: int = 1,
    callbacks: list | None = None,
    **changes: Any,
) -> C2CTrainer:
    """A trainer of `training_model` on `Samples`."""
    arguments = training_arguments(
        recipe,
        output,
        samples=SAMPLES,
        evaluated=evaluation is not None,
        processes=processes,
        **{"disable_tqdm": True, **changes},
    )
    model = training_model(recipe) if model is None else model
    return C2CTrainer(model, arguments, Samples(), evaluation, ChatCollator(), callbacks=callbacks)


def state_of(trainer: C2CTrainer) -> dict[str, Any]:
    """Everything that a resumed run must have in common with one that was not stopped."""
    return {
        "fuser": dict(trainer.fuser.state_dict()),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "step": trainer.state.global_step,
        "log": [
            {k: v for k, v in entry.items() if k in ("loss", "grad_norm", "learning_rate")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }


def loss_curve(model: C2CTrainingModel, steps: int, *, batch: int = 8, lr: float = 1e-3) -> list:
    """The loss of every step of a plain AdamW loop over `Samples`: to compare backends with.

    In the fuser's dtype throughout; for float64 curves have models and fuser in it.
    """
    samples, collate = Samples(), ChatCollator()
    optimizer = torch.optim.AdamW(parameter_groups(model.fuser, 0.01), lr=lr)
    losses = []
    for step in range(steps):
        model.step = step
        rows = [samples[(step * batch + i) % len(samples)] for i in range(batch)]
        loss = model(**collate(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses

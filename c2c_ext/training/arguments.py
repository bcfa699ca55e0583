"""A recipe as transformers' TrainingArguments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from .recipes import Recipe


def training_arguments(
    recipe: Recipe,
    output: str | Path,
    *,
    samples: int,
    evaluated: bool = False,
    processes: int = 1,
    **changes: Any,
) -> TrainingArguments:
    """transformers' arguments for a recipe.

    Args:
        output: the training directory.
        samples: in the training data.
        evaluated: whether there is an evaluation dataset; the best fuser is kept then.
        processes: of torchrun.
        **changes: arguments that win over the recipe.

    Raises:
        ValueError: the batch cannot be divided over the processes.
    """
    micro, passes = recipe.micro_batches(processes)
    steps = recipe.steps(samples)
    every = min(recipe.save_steps, steps)
    evaluations = min(recipe.eval_steps or every, steps)
    if evaluated:  # a checkpoint that may be the best is one that was evaluated
        every = max(every // evaluations, 1) * evaluations
    # Said outright: transformers refuses bf16 where it has to find out that there is no GPU.
    on_cpu = recipe.device == "cpu" or not torch.accelerator.is_available()
    linear = recipe.schedule == "linear"
    if recipe.lr_end and linear:
        name, extra = "polynomial", {"lr_end": recipe.lr * recipe.lr_end, "power": 1.0}
    elif recipe.lr_end:
        name, extra = "cosine_with_min_lr", {"min_lr_rate": recipe.lr_end}
    else:
        name, extra = recipe.schedule, {}
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": passes,
        "max_steps": steps,
        "learning_rate": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "max_grad_norm": recipe.clip,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": extra,
        "warmup_steps": -int(-recipe.warm_up * steps // 1),
        "seed": recipe.seed,
        "bf16": recipe.dtype == "bf16",
        "use_cpu": on_cpu,
        "logging_steps": recipe.log_steps,
        "logging_nan_inf_filter": False,  # they stop the run
        "save_strategy": "steps",
        "save_steps": every,
        # With 1, transformers deletes all but the best at the end, and not at once.
        "save_total_limit": max(recipe.keep, 2) if evaluated else recipe.keep,
        "eval_strategy": "steps" if evaluated else "no",
        "eval_steps": evaluations if evaluated else None,
        "load_best_model_at_end": evaluated,
        "metric_for_best_model": "eval_loss" if evaluated else None,
        "greater_is_better": False if evaluated else None,
        "prediction_loss_only": True,
        "report_to": recipe.report_to,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not on_cpu and torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        **({"ddp_backend": "gloo"} if processes > 1 and on_cpu else {}),
    }
    settings |= changes
    with mixed_precision(settings["bf16"]):
        return TrainingArguments(**settings)


@contextmanager
def mixed_precision(bf16: bool) -> Iterator[None]:
    """Within it, accelerate's default is what is asked for.

    transformers before 5 passes it on through this variable and leaves it behind, so that a later
    run in float32 would go on under autocast.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    os.environ[name] = "bf16" if bf16 else "no"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before

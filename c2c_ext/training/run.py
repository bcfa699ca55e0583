"""One training run: what is loaded for it, and a fuser directory with its log out of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..alignment import TokenAligner
from ..files import write_atomically
from ..fuser import Fuser
from ..info import format_bytes
from ..model_card import HUB_ID, CardInfo
from ..model_files import load_model, load_tokenizer
from .arguments import training_arguments
from .cached_collator import CachedCollator, prompts_of
from .checkpoint import checkpoints
from .collator import ChatCollator, ChatDataset, Encoder, differing_tokens
from .data import read_conversations
from .model import C2CTrainingModel
from .prompt_cache_writer import write_prompt_caches
from .prompt_caches import PromptCaches, model_hash
from .recipes import TORCH_DTYPES, Recipe

SIDES = ("receiver", "sharer")
RECIPE_NAME = "recipe.yaml"
LOG_NAME = "training_log.json"
# What a run may be resumed with other values of: none of it changes what is computed.
FREE_ON_RESUME = (
    *("device", "backend", "recompute", "gradient_checkpointing", "prefill_chunk", "shard_models"),
    *("log_steps", "eval_steps", "save_steps", "keep", "report_to", "bad_data"),
)


@dataclass
class Setup:
    """What several runs may share.

    Attributes:
        receiver, sharer: loaded, frozen by the training model.
        train, evaluation: their data.
        collator: makes batches of them.
        fixed: what tells this data from other data when a run is resumed.
        names: of the two models and the data, for the model card.
    """

    receiver: PreTrainedModel
    sharer: PreTrainedModel
    train: ChatDataset
    evaluation: ChatDataset | None
    collator: Callable[[Any], dict[str, Any]]
    fixed: dict[str, Any]
    names: dict[str, str]


def load_setup(
    recipe: Recipe,
    receiver: str,
    sharer: str,
    data: str,
    eval_data: str | None = None,
    prompt_caches: str | None = None,
) -> Setup:
    """Loads tokenizers, data and models, in this order: the cheapest errors come first.

    Args:
        receiver, sharer, data, eval_data: see `run_train`.
        prompt_caches: a directory of what both models prefill; made if it is not there.

    Raises:
        ValueError, OSError, ImportError: bad data, tokenizers that differ and cannot be aligned, a
            model that cannot be loaded.
    """
    tokenizers = {
        side: load_tokenizer(f"--{side}", place)
        for side, place in zip(SIDES, (receiver, sharer), strict=True)
    }
    with _in_options():
        aligner = _aligner(tokenizers)
        encoder = Encoder(
            tokenizers["receiver"],
            tokenizers["sharer"],
            aligner,
            max_tokens=recipe.max_tokens,
            truncate=recipe.truncate,
            labels=recipe.labels,
            chat_template=recipe.chat_template,
        )
    train = _dataset(recipe, data, encoder, "--data")
    fixed: dict[str, Any] = {"data": _digest(train), "eval_data": None}
    if aligner is not None:
        fixed["aligner"] = aligner.strategy
    evaluation = None
    if eval_data is not None:
        evaluation = _dataset(recipe, eval_data, encoder, "--eval-data").numbered_apart()
        fixed["eval_data"] = _digest(evaluation)
    elif recipe.eval_part:
        train, evaluation = _split(train, recipe)
    pad = tokenizers["receiver"].pad_token_id or 0
    collator = ChatCollator(pad, tokenizers["sharer"].pad_token_id or 0, padding=recipe.padding)
    dtype = TORCH_DTYPES[recipe.dtype]
    models = [
        load_model(f"--{side}", place, dtype)
        for side, place in zip(SIDES, (receiver, sharer), strict=True)
    ]
    # Not their names: a model may be moved, and another one have its name.
    for side, model in zip(SIDES, models, strict=True):
        fixed[f"hash of the {side}'s configuration and weights"] = model_hash(model)
    names = {"receiver": receiver, "sharer": sharer, "data": data}
    setup = Setup(*models, train, evaluation, collator, fixed, names)
    if prompt_caches is not None:
        caches = _prompt_caches(setup, recipe, Path(prompt_caches))
        setup.collator = CachedCollator(collator, **caches)
        fixed["prompt_caches"] = True
    return setup


def _aligner(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> TokenAligner | None:
    """For tokenizers that differ; None: both models read the receiver's tokens."""
    own, other = (tokenizers[side] for side in SIDES)
    differing = differing_tokens(own, other)
    if not differing:
        return None
    if is_first():
        print(
            f"the tokenizers differ in {len(differing)} tokens: each model reads its own, aligned "
            "by character spans (docs/alignment.md)",
            file=sys.stderr,
        )
    return TokenAligner(own, other)


def new_fuser(recipe: Recipe, receiver_config: Any, sharer_config: Any) -> Fuser:
    """A float32 fuser initialised from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        fuser = Fuser(recipe.fuser_config(receiver_config, sharer_config)).float()
    if recipe.zero_output:
        with torch.no_grad():
            for name, parameter in fuser.named_parameters():
                if name.endswith(("out_weight", "out_bias")):
                    parameter.zero_()  # the fused cache starts as the receiver's own
    return fuser


def run_once(
    setup: Setup, recipe: Recipe, output: str | Path, *, resume: bool = False
) -> dict[str, Any]:
    """One training run: trains, saves fuser, recipe and log in ``output``.

    Returns:
        steps, losses, seconds and open streams, as they are in the log.

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite.
        ValueError: ``output`` holds a checkpoint of another run.
        FileExistsError: it holds a run, which is not to be resumed.
    """
    from .trainer import C2CTrainer

    output = Path(output)
    check_no_run(output, resume)
    arguments = training_arguments(
        recipe,
        output,
        samples=len(setup.train),
        evaluated=setup.evaluation is not None,
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        disable_tqdm=not sys.stderr.isatty(),  # lines instead
    )
    fuser = new_fuser(recipe, setup.receiver.config, setup.sharer.config)
    model = C2CTrainingModel(
        setup.receiver,
        setup.sharer,
        fuser,
        sampler=recipe.sampler() if fuser.config.gate else None,
        recompute=recipe.recompute,
        prefill_chunk=recipe.prefill_chunk or None,
        backend=recipe.backend,
        seed=recipe.seed,
    )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if recipe.shard_models:
        from .sharding import shard_frozen_models

        _ = arguments.device  # which starts the process group
        shard_frozen_models(model)
    settings = {k: v for k, v in recipe.to_dict().items() if k not in FREE_ON_RESUME}
    trainer = C2CTrainer(
        model,
        arguments,
        setup.train,
        setup.evaluation,
        setup.collator,
        run={**settings, **setup.fixed},
    )
    # A run that was stopped before its first checkpoint leaves a recipe that need not be this one.
    if is_first() and not ((output / RECIPE_NAME).exists() and checkpoints(output)):
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        write_atomically({output / RECIPE_NAME: lambda path: Path(path).write_text(text, "utf-8")})
    done = trainer.train(resume_from_checkpoint=resume)
    finished = "train_runtime" not in done.metrics  # before: there was nothing left to train
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "steps": trainer.state.global_step,
        "train_loss": losses[-1] if losses else None if finished else done.training_loss,
        "eval_loss": None,
        "best_step": trainer.state.best_global_step,
        "seconds": round(done.metrics.get("train_runtime", 0.0), 1),
        "open_streams": len(fuser.open_streams()),
        "streams": len(fuser.config.kinds) * len(fuser.config.layer_map),
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if torch.cuda.is_available() and recipe.device != "cpu"
        else None,
    }
    if setup.evaluation is not None:
        result["eval_loss"] = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        fuser.save_pretrained(output, card=_card(setup, recipe, result))
        if not (finished and (output / LOG_NAME).exists()):
            log = {**result, "recipe": recipe.to_dict(), "log": trainer.state.log_history}
            text = json.dumps(log, indent=1) + "\n"
            write_atomically({output / LOG_NAME: lambda path: Path(path).write_text(text, "utf-8")})
    return result


def check_no_run(output: Path, resume: bool) -> list[str]:
    """What of a training run is in ``output``; FileExistsError unless it is to be resumed."""
    held = [name for name in (RECIPE_NAME, LOG_NAME) if (output / name).exists()]
    held += [path.name for path in checkpoints(output)]
    if held and not resume:
        raise FileExistsError(
            f"--output: {output} holds a training run ({held[0]}); --resume goes on with it"
        )
    return held


def _prompt_caches(setup: Setup, recipe: Recipe, directory: Path) -> dict[str, PromptCaches]:
    """What both models prefill for every sample, from ``directory`` or written there."""
    places = {side: directory / side for side in SIDES}
    missing = [side for side, place in places.items() if not place.exists()]
    if missing and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--prompt-caches: {places[missing[0]]} is not there; write the caches with a single "
            "process first"
        )
    samples = [*setup.train.samples, *(setup.evaluation.samples if setup.evaluation else [])]
    on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    for side in missing:
        model = getattr(setup, side).eval().to("cuda" if on_gpu else "cpu")
        write_prompt_caches(
            places[side],
            model,
            prompts_of((setup.collator([sample]) for sample in samples), side),
            batch_size=recipe.micro_batch,
            prefill_chunk=recipe.prefill_chunk or None,
        )
        if is_first():
            size = sum(file.stat().st_size for file in places[side].iterdir())
            print(f"{places[side]}: {format_bytes(size)} of prompt caches", file=sys.stderr)
    return {side: PromptCaches(place, getattr(setup, side)) for side, place in places.items()}


def _card(setup: Setup, recipe: Recipe, result: Mapping[str, Any]) -> CardInfo:
    training = {
        "steps": result["steps"],
        "batch": recipe.batch,
        "learning rate": recipe.lr,
        "schedule": f"{recipe.schedule}, {recipe.warm_up:.0%} warm-up",
        "weight decay": recipe.weight_decay,
        "dropout": recipe.dropout,
        "gates": f"{recipe.gate_sampler}, {recipe.temperature_schedule} temperature, "
        f"{recipe.temperature_start:g} to {recipe.temperature_end:g} in {recipe.anneal_steps}",
        "seed": recipe.seed,
        "models in": recipe.dtype,
    }
    # A file's path says where it lies on one machine; a dataset's name is for everybody.
    name = setup.names["data"]
    is_dataset = HUB_ID.fullmatch(name) and not Path(name).exists()
    return CardInfo(training=training, datasets=[name] if is_dataset else [])


def _dataset(recipe: Recipe, source: str, encoder: Encoder, option: str) -> ChatDataset:
    try:
        conversations, bad = read_conversations(
            source, bad_data=recipe.bad_data, split=recipe.split
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{option}: {str(error).removeprefix('c2c_ext: ')}") from error
    with _in_options():
        dataset = ChatDataset(conversations, bad, encoder)
    if is_first():
        print(bad.summary(), file=sys.stderr)
        for line in bad.lines():
            print(f"  {line}", file=sys.stderr)
        if (unknown := dataset.unknown).tokens:
            print(
                f"  warning: {unknown.tokens} tokens of {unknown.samples} conversations are "
                f"{encoder.receiver.unk_token}, which stands for text that the receiver's "
                f"tokenizer does not know; {unknown.learnt} of them are learnt as responses "
                f"(first: {bad.unit} {unknown.first})",
                file=sys.stderr,
            )
    return dataset


def _digest(dataset: ChatDataset) -> str:
    """SHA-256 of what the samples hold: their source may be moved, and read otherwise."""
    digest = hashlib.sha256()
    for sample in dataset.samples:
        for value in vars(sample).values():
            digest.update(value.numpy().tobytes() if isinstance(value, Tensor) else b"")
            digest.update(f"{value.shape if isinstance(value, Tensor) else value};".encode())
    return digest.hexdigest()


@contextmanager
def _in_options() -> Iterator[None]:
    """Errors within it speak of the command's options where they spoke of keywords."""
    try:
        yield
    except ValueError as error:
        text = str(error).replace("bad_data='skip'", "--bad-data skip")
        raise ValueError(
            re.sub(r"\b(labels|chat_template)='(\w+)'", r"--set \1=\2", text)
        ) from error


def _split(dataset: ChatDataset, recipe: Recipe) -> tuple[ChatDataset, ChatDataset]:
    count = round(len(dataset) * recipe.eval_part)
    if not 0 < count < len(dataset):
        raise ValueError(
            f"recipe: eval_part {recipe.eval_part} of {len(dataset)} samples leaves "
            f"{count} to evaluate on and {len(dataset) - count} to train on"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    return dataset.part(sorted(order[count:])), dataset.part(sorted(order[:count]))


def leave_processes() -> None:
    """Leaves torchrun's group; its threads must not outlive the interpreter."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process prints: the first that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"

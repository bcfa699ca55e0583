"""C2CTrainer: transformers' Trainer for a fuser, with whole checkpoints and bitwise resuming."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..config import FuserConfig
from ..fuser import Fuser
from .arguments import mixed_precision
from .checkpoint import (
    OtherRunError,
    TrainingState,
    check_checkpoint,
    checkpoint_path,
    checkpoints,
    generator_state,
    load_optimizer,
    recover,
    restore_generators,
    rotate,
    write_checkpoint,
)
from .model import C2CTrainingModel, parameter_groups
from .trainer_state import TRAINER_STATE_NAME, read_trainer_state

SHOWN_IDS = 16


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; training stopped before it reached a parameter.

    Attributes:
        step: the optimizer step that failed, from 1.
        sample_ids: of the samples that this process had in it.
        checkpoint: the state after the steps before.
    """

    def __init__(self, message: str, step: int, sample_ids: list[int], checkpoint: Path) -> None:
        super().__init__(message)
        self.step, self.sample_ids, self.checkpoint = step, sample_ids, checkpoint


class C2CTrainer(Trainer):
    """Trains the fuser of a `C2CTrainingModel`.

    What differs from a plain Trainer: only the fuser is saved, with optimizer, scheduler and
    generators as data (`checkpoint`); gate logits and norms are not decayed (`parameter_groups`);
    the model is told the step, which temperature and noise follow; the loss is the mean over all
    response tokens of a step, whatever micro-batches and processes it is split into; a loss or
    gradient that is not finite stops training.

    Args:
        model: the two frozen models and the fuser.
        args: `c2c_ext.training.arguments` makes them from a recipe.
        train_dataset, eval_dataset, data_collator: see `ChatDataset` and `ChatCollator`; any that
            give what ``model.forward`` takes will do.
        run: what must be the same for a checkpoint to be resumed, beside gates, seed and data
            size: names to JSON values.
        **kwargs: of transformers' Trainer.

    Raises:
        TypeError, ValueError: a model or arguments that cannot be trained with.
    """

    def __init__(
        self,
        model: C2CTrainingModel,
        args: TrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        *,
        run: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(model, C2CTrainingModel):
            raise TypeError(
                f"C2CTrainer: model must be a C2CTrainingModel, got {type(model).__name__}"
            )
        if args.fp16:
            raise ValueError(
                "C2CTrainer: args.fp16 must be False: the fuser trains in float32 or under "
                "bfloat16 autocast (bf16=True)"
            )
        if args.push_to_hub:
            raise ValueError(
                "C2CTrainer: args.push_to_hub must be False: use fuser.push_to_hub when it is "
                "trained"
            )
        half = [n for n, p in model.fuser.named_parameters() if p.dtype.itemsize < 4]
        if half:
            raise ValueError(
                f"C2CTrainer: the fuser's parameters must be float32 (fuser.float()), {half[0]} is "
                f"{dict(model.fuser.named_parameters())[half[0]].dtype}"
            )
        self.training_model = model  # also where `model` is wrapped
        self._run, self._ids, self._ids_step = dict(run or {}), [], -1
        with mixed_precision(args.bf16):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                **kwargs,
            )
        # forward divides the loss of every micro-batch by the step's number of response tokens.
        self.model_accepts_loss_kwargs = True
        self.add_callback(_Watch(self))

    @property
    def fuser(self) -> Fuser:
        """What is trained."""
        return self.training_model.fuser

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Trains; see transformers' Trainer.

        Args:
            resume_from_checkpoint: a checkpoint of this run, or True for the last one in the
                output directory (from the start if there is none).

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
            FileNotFoundError, ValueError: not a whole checkpoint; names the file, and how to go on
                without it.
            OtherRunError: a checkpoint of another run; says what differs.
        """
        if self.args.should_save:
            recover(self.args.output_dir)
        self._wait_for_everyone()
        place: Path | None = None
        if resume_from_checkpoint is True:
            found = checkpoints(self.args.output_dir)
            place = found[-1] if found else None
        elif resume_from_checkpoint:
            place = Path(resume_from_checkpoint)
        if place is not None and self._check(place) >= self.args.max_steps > 0:
            return self._finished(place)
        # As a str: transformers joins it with others.
        return super().train(resume_from_checkpoint=None if place is None else str(place), **kwargs)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """One forward and backward pass; stops on a loss that is not finite."""
        step = self.state.global_step
        if step != self._ids_step:
            self._ids, self._ids_step = [], step
        if isinstance(ids := inputs.get("sample_ids"), Tensor):
            self._ids += ids.tolist()
        self.training_model.step = step
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.check_finite(torch.isfinite(loss).all(), f"the loss is {float(loss)}")
        return loss

    def check_finite(self, is_finite: Tensor, what: str) -> None:
        """Stops every process if ``is_finite`` [] is false in any; to be called by all."""
        flag = (~is_finite).to(torch.int32)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if not int(flag):
            return
        if bool(is_finite):
            what = "the loss or gradient of another process is not finite"
        done = self.state.global_step
        path = checkpoint_path(self.args.output_dir, done)
        self._save_checkpoint(self.model, None)
        raise NonFiniteError(
            f"training stopped in step {done + 1}: {what}. Samples: {self._named_ids()}. The state "
            f"after {done} steps, which is finite, is in {path}",
            done + 1,
            list(self._ids),
            path,
        )

    def locate_best(self) -> None:
        """Names the best checkpoint in the output directory, if it is there.

        The path that a resumed checkpoint holds may be from another place or machine.
        """
        state = self.state
        state.best_model_checkpoint = None
        if state.best_global_step is not None:
            path = checkpoint_path(self.args.output_dir, state.best_global_step)
            state.best_model_checkpoint = str(path) if path.is_dir() else None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the temperature and the part of the gates that are open to what is logged."""
        model = self.training_model
        if "loss" in logs and model.sampler is not None and self.fuser.config.gate:
            streams = sum(len(group.gate_logit) for group in self.fuser.groups)
            temperature = model.sampler.temperature(max(self.state.global_step - 1, 0))
            opened = len(self.fuser.open_streams()) / streams
            logs = {**logs, "temperature": temperature, "open_gates": opened}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that ``args.optim`` names, over `parameter_groups`."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(self.fuser, self.args.weight_decay)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.fuser.save_pretrained(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any, *_: Any, **__: Any) -> None:
        output, state = self.args.output_dir, self.state
        path = checkpoint_path(output, state.global_step)
        if state.best_global_step is not None:
            state.best_model_checkpoint = str(checkpoint_path(output, state.best_global_step))
        generators: list[dict[str, Any]] = [generator_state()]
        if self.args.world_size > 1:
            generators = [{} for _ in range(self.args.world_size)]
            torch.distributed.all_gather_object(generators, generator_state())
        if self.args.should_save:

            def write(directory: Path) -> None:
                self._save(str(directory))
                state.save_to_json(str(directory / TRAINER_STATE_NAME))
                if not self.args.save_only_model:
                    TrainingState(
                        step=state.global_step,
                        optimizer=self.optimizer.state_dict(),
                        scheduler=self.lr_scheduler.state_dict(),
                        generators=generators,
                        run=self._fixed(),
                    ).save(directory)

            write_checkpoint(path, write)
            if self.args.save_total_limit:
                best = state.best_model_checkpoint
                rotate(output, self.args.save_total_limit, None if best is None else Path(best))
        self._wait_for_everyone()

    def _fixed(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that saved."""
        sampler = self.training_model.sampler
        return {
            "samples": None if self.train_dataset is None else len(self.train_dataset),
            "batch": self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            "seed": self.args.seed,
            "gates": None if sampler is None else dataclasses.asdict(sampler),
            "dropout": self.fuser.config.dropout,
            **self._run,
        }

    def _finished(self, place: Path) -> TrainOutput:
        """Takes over a run that has done all its steps; transformers would do one more."""
        self._load_from_checkpoint(str(place))
        self.state = TrainerState.load_from_json(str(place / TRAINER_STATE_NAME))
        self.locate_best()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [entry["train_loss"] for entry in self.state.log_history if "train_loss" in entry]
        return TrainOutput(self.state.global_step, losses[-1] if losses else float("nan"), {})

    def _check(self, place: Path) -> int:
        with self._reading(place):
            return self._checked(place)

    def _checked(self, place: Path) -> int:
        step = check_checkpoint(place, self._fixed())
        known = [f.name for f in dataclasses.fields(TrainerState)]
        state = read_trainer_state(place, known)
        if state["global_step"] != step:
            raise ValueError(
                f"{place / TRAINER_STATE_NAME}: global_step must be {step}, as in the training "
                f"state, got {state['global_step']}"
            )
        size = self.args.train_batch_size
        if state.get("train_batch_size", size) not in (size, None):
            raise ValueError(
                f"{place / TRAINER_STATE_NAME}: train_batch_size must be {size}, got "
                f"{state['train_batch_size']}"
            )
        return step

    @contextmanager
    def _reading(self, place: str | Path) -> Iterator[None]:
        """Within it, what is wrong with a checkpoint's files comes with the way around it."""
        try:
            yield
        except OtherRunError:
            raise
        except (ValueError, OSError) as error:
            found = checkpoints(self.args.output_dir)
            before = found[found.index(Path(place)) - 1 :] if Path(place) in found[1:] else ()
            onward = f"goes on from {before[0].name}" if before else "starts anew"
            raise type(error)(
                f"{error}; with {place} moved away, a resumed run {onward}"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._reading(resume_from_checkpoint):
            saved = Fuser.from_pretrained(Path(resume_from_checkpoint))
        own, other = (_nameless(fuser.config).to_json() for fuser in (self.fuser, saved))
        if own != other:
            lines = zip(own.splitlines(), other.splitlines(), strict=False)
            now, was = next(((a.strip(), b.strip()) for a, b in lines if a != b), ("?", "?"))
            raise OtherRunError(
                f"{resume_from_checkpoint} holds a fuser of another configuration: {was}, now {now}"
            )
        self.fuser.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self._reading(checkpoint):
                load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self._reading(checkpoint):
            restored = restore_generators(Path(checkpoint), self.args.process_index)
        if not restored:
            warnings.warn(
                f"{checkpoint} has no generators for process {self.args.process_index}: the run "
                "goes on, but not bit for bit",
                stacklevel=2,
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass  # bfloat16 needs no scaler

    def _get_collator_with_removed_columns(
        self, data_collator: Callable, description: str | None = None
    ) -> Callable:
        return data_collator  # samples are no dicts of forward's arguments

    def _wait_for_everyone(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _named_ids(self) -> str:
        place = getattr(self.train_dataset, "place", str)
        names = [place(number) for number in self._ids[:SHOWN_IDS]]
        if len(self._ids) > SHOWN_IDS:
            names.append(f"... and {len(self._ids) - SHOWN_IDS} more")
        return "; ".join(names) or "unknown"


def _nameless(config: FuserConfig) -> FuserConfig:
    """The same between models of no name: a directory may be renamed."""
    models = {side: getattr(config, side) for side in ("receiver", "sharer")}
    changes = {side: dataclasses.replace(model, name="") for side, model in models.items()}
    return dataclasses.replace(config, **changes)


class _Watch(TrainerCallback):
    """What `C2CTrainer` does at points of training that have no method of their own."""

    def __init__(self, trainer: C2CTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._trainer.locate_best()
        # A resumed state brings its own, which would win over what is asked for now.
        state.compute_steps(args, state.max_steps)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        # After clipping and of the whole step: before anything reaches a parameter.
        gradients = [p.grad for p in self._trainer.fuser.parameters() if p.grad is not None]
        if gradients:
            finite = torch.stack([torch.isfinite(g).all() for g in gradients]).all()
            self._trainer.check_finite(finite, "a gradient is not finite")

"""C2CTrainer: resuming bit for bit, splitting batches, stopping on NaN, evaluation, processes."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_training_checkpoint import same
from tiny_training import (
    DDP_RECIPE,
    RECIPE,
    SAMPLES,
    Samples,
    state_of,
    tiny_trainer,
    training_model,
)
from transformers import TrainerCallback

from c2c_ext import Fuser
from c2c_ext.training.arguments import training_arguments
from c2c_ext.training.checkpoint import checkpoint_path, checkpoints
from c2c_ext.training.collator import ChatCollator
from c2c_ext.training.sharding import shard_frozen_models
from c2c_ext.training.trainer import C2CTrainer, NonFiniteError


class StopAfter(TrainerCallback):
    """Ends training after so many steps, as if it had been interrupted."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        control.should_training_stop = state.global_step == self.steps


@pytest.mark.parametrize(
    ("changes", "saved"),
    [
        # 15 samples are 4 steps an epoch: 5 is within the second epoch, 4 at its beginning.
        ({}, 5),
        ({"save_steps": 4}, 4),
        ({"dropout": 0.2, "gate_per": "token", "schedule": "cosine"}, 5),
        ({"gate_sampler": "gumbel", "micro_batch": 1}, 5),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, changes: dict, saved: int) -> None:
    recipe = replace(RECIPE, **changes)
    straight = tiny_trainer(tmp_path / "straight", recipe)
    straight.train()
    stopped = tiny_trainer(tmp_path / "parts", recipe, callbacks=[StopAfter(saved)])
    stopped.train()
    assert checkpoints(tmp_path / "parts")[-1] == checkpoint_path(tmp_path / "parts", saved)
    torch.manual_seed(12345)  # whatever happens in between
    resumed = tiny_trainer(tmp_path / "parts", recipe)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert same(state_of(resumed), state_of(straight))
    assert not same(state_of(stopped)["fuser"], state_of(straight)["fuser"])
    for name in ("fuser.safetensors", "training_state.safetensors", "training_state.json"):
        files = [checkpoint_path(tmp_path / d, 10) / name for d in ("straight", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_training_changes_the_fuser_alone_and_saves_it_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, replace(RECIPE, max_steps=2))
    model = trainer.training_model
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    after = dict(model.named_parameters())
    moved = {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"fuser"}
    short = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert {"gate_logit", "shared_norm", "in_weight", "out_bias"} <= short
    saved = Fuser.from_pretrained(checkpoint_path(tmp_path, 2))
    assert same(dict(saved.state_dict()), dict(trainer.fuser.state_dict()))
    files = {p.name for p in checkpoint_path(tmp_path, 2).iterdir()}
    assert "model.safetensors" not in files and "training_args.bin" not in files


def test_gates_and_norms_are_not_decayed(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    decayed, kept = trainer.create_optimizer().param_groups
    names = {id(p): n for n, p in trainer.fuser.named_parameters()}
    assert decayed["weight_decay"] == RECIPE.weight_decay and kept["weight_decay"] == 0
    assert all(names[id(p)].endswith(("_norm", "gate_logit")) for p in kept["params"])
    assert not any(names[id(p)].endswith(("_norm", "gate_logit")) for p in decayed["params"])


@pytest.mark.parametrize(("per", "dropout"), [("stream", 0.0), ("token", 0.2)])
def test_micro_batches_make_no_difference_but_rounding(
    tmp_path: Path, per: str, dropout: float
) -> None:
    fusers = []
    for micro in (4, 2, 1):
        recipe = replace(RECIPE, micro_batch=micro, max_steps=4, gate_per=per, dropout=dropout)
        trainer = tiny_trainer(tmp_path / str(micro), recipe)
        trainer.train()
        fusers.append(dict(trainer.fuser.state_dict()))
    for other in fusers[1:]:
        for name, tensor in fusers[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=2e-5)


def test_the_loss_is_the_mean_over_the_response_tokens_of_a_step(tmp_path: Path) -> None:
    recipe = replace(RECIPE, batch=SAMPLES, micro_batch=3, max_steps=1)
    trainer = tiny_trainer(tmp_path, recipe, save_strategy="no")
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    model = training_model(recipe)
    batch = ChatCollator()(Samples().samples)
    with torch.no_grad():
        loss = float(model(**batch).loss)
    assert abs(logged - loss) < 1e-4  # transformers before 5 logs four digits


def test_temperature_and_open_gates_are_logged(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, replace(RECIPE, max_steps=3))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    sampler = RECIPE.sampler()
    assert [e["temperature"] for e in logs] == [sampler.temperature(i) for i in range(3)]
    assert all(0 <= e["open_gates"] <= 1 for e in logs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "linear"}, [0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            {"schedule": "linear", "lr_end": 0.2},
            [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
        ),
        (
            {"schedule": "cosine", "lr_end": 0.0},
            [0, 0.5, 1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381],
        ),
        (
            {"schedule": "cosine", "lr_end": 0.5},
            [0, 0.5, 1, 0.981, 0.9268, 0.8457, 0.75, 0.6543, 0.5732, 0.519],
        ),
    ],
)
def test_schedules_warm_up_and_fall(tmp_path: Path, changes: dict, expected: list) -> None:
    trainer = tiny_trainer(tmp_path, replace(RECIPE, lr=1.0, warm_up=0.2, **changes))
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-4)


def test_evaluation_keeps_the_best_fuser(tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_steps=8, eval_steps=2, save_steps=2, keep=1, lr=0.3)
    trainer = tiny_trainer(tmp_path, recipe, evaluation=Samples(6, seed=5))
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.get)
    assert trainer.state.best_global_step == best
    saved = Fuser.from_pretrained(checkpoint_path(tmp_path, best))
    assert same(dict(trainer.fuser.state_dict()), dict(saved.state_dict()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    names = [p.name for p in checkpoints(tmp_path)]
    assert f"checkpoint-{best}" in names and len(names) <= 3


def test_a_moved_run_is_resumed_with_its_best_checkpoint(tmp_path: Path) -> None:
    recipe = replace(RECIPE, max_steps=4, eval_steps=2, save_steps=2)
    evaluation = Samples(6, seed=5)
    tiny_trainer(tmp_path / "old", recipe, evaluation=evaluation).train()
    (tmp_path / "old").rename(tmp_path / "new")
    trainer = tiny_trainer(tmp_path / "new", recipe, evaluation=evaluation)
    trainer.train(resume_from_checkpoint=True)
    best = checkpoint_path(tmp_path / "new", trainer.state.best_global_step)
    assert trainer.state.best_model_checkpoint == str(best)
    saved = Fuser.from_pretrained(best)
    assert same(dict(trainer.fuser.state_dict()), dict(saved.state_dict()))


@pytest.mark.parametrize(
    ("save", "evaluate", "steps", "expected"),
    [
        (500, 0, 10, (10, 10)),
        (5, 0, 10, (5, 5)),
        (5, 2, 10, (4, 2)),
        (2, 5, 10, (5, 5)),
        (500, 7, 5, (5, 5)),
    ],
)
def test_a_checkpoint_is_evaluated(
    tmp_path: Path, save: int, evaluate: int, steps: int, expected: tuple[int, int]
) -> None:
    recipe = replace(RECIPE, save_steps=save, eval_steps=evaluate, max_steps=steps)
    arguments = training_arguments(recipe, tmp_path, samples=SAMPLES, evaluated=True)
    assert (arguments.save_steps, arguments.eval_steps) == expected


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, replace(RECIPE, max_steps=6, save_steps=2, keep=2)).train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    trainer = tiny_trainer(tmp_path)
    model, seen = trainer.training_model, []
    forward = model.forward

    def spoilt(**inputs: object) -> object:
        output = forward(**inputs)
        seen.append((model.step, inputs["sample_ids"].tolist()))
        if model.step == 3:
            if what == "loss":
                output.loss = output.loss * torch.nan
            else:
                output.loss.register_hook(lambda g: g * torch.inf)
        return output

    monkeypatch.setattr(model, "forward", spoilt)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    ids = [i for step, some in seen if step == 3 for i in some]
    assert (error.value.step, error.value.sample_ids) == (4, ids)
    message, reason = str(error.value), "the loss is nan" if what == "loss" else "a gradient is not"
    assert message.startswith(f"training stopped in step 4: {reason}")
    assert all(f"samples, line {i}" in message for i in ids)
    assert error.value.checkpoint == checkpoint_path(tmp_path, 3)
    monkeypatch.undo()
    # What is saved is finite, and training can go on from it.
    resumed = tiny_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    straight = tiny_trainer(tmp_path / "straight")
    straight.train()
    assert same(state_of(resumed)["fuser"], state_of(straight)["fuser"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "its seed was 42, now it is 7"),
        ({"batch": 8}, "its batch was 4, now it is 8"),
        ({"anneal_steps": 3}, "its gates was .*, now it is"),
        ({"lr": 0.5}, r"the optimizer's initial_lr was 0.01, now it is 0.5"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, changes: dict, message: str) -> None:
    tiny_trainer(tmp_path, replace(RECIPE, max_steps=5)).train()
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, replace(RECIPE, **changes)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "name",
    [
        "fuser.safetensors",
        "training_state.safetensors",
        "training_state.json",
        "trainer_state.json",
    ],
)
def test_a_damaged_checkpoint_says_how_to_go_on_without_it(tmp_path: Path, name: str) -> None:
    tiny_trainer(tmp_path, replace(RECIPE, max_steps=4, save_steps=2)).train()
    last, before = (checkpoint_path(tmp_path, step) for step in (4, 2))
    for place, onward in ((last, "goes on from checkpoint-2"), (before, "starts anew")):
        file = place / name
        file.write_bytes(file.read_bytes()[:-40])
        message = re.escape(f"{name}") + f".*; with {place} moved away, a resumed run {onward}$"
        recipe = replace(RECIPE, max_steps=6, save_steps=2)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            tiny_trainer(tmp_path, recipe).train(resume_from_checkpoint=True)
        place.rename(tmp_path / f"moved-{place.name}")


def test_a_fuser_of_other_models_names_is_resumed(tmp_path: Path) -> None:
    """A model directory may be renamed."""
    tiny_trainer(tmp_path, replace(RECIPE, max_steps=2)).train()
    model = training_model()
    named = {s: replace(getattr(model.fuser.config, s), name="x") for s in ("receiver", "sharer")}
    model.fuser.config = replace(model.fuser.config, **named)
    trainer = tiny_trainer(tmp_path, replace(RECIPE, max_steps=4), model=model)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_intervals_may_change_when_resuming(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, replace(RECIPE, save_steps=2), callbacks=[StopAfter(2)]).train()
    recipe = replace(RECIPE, save_steps=3, log_steps=4)
    trainer = tiny_trainer(tmp_path, recipe)
    trainer.train(resume_from_checkpoint=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    logged = [e["step"] for e in trainer.state.log_history if "loss" in e]
    assert logged == [1, 2, 4, 8]


def test_a_fuser_of_another_shape_is_not_resumed(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, replace(RECIPE, max_steps=5)).train()
    model = training_model()
    other = model.fuser.config.to_json().replace('"depth": 4', '"depth": 3')
    (checkpoint_path(tmp_path, 5) / "fuser_config.json").write_text(other)
    with pytest.raises(ValueError, match=r"surplus|different saves|must have shape"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resuming_without_a_checkpoint_starts(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, replace(RECIPE, max_steps=2))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp16": True}, "args.fp16 must be False"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "args.push_to_hub must be False"),
    ],
)
def test_arguments_that_cannot_work_are_refused(
    tmp_path: Path, arguments: dict, message: str
) -> None:
    args = training_arguments(RECIPE, tmp_path, samples=SAMPLES)
    for name, value in arguments.items():  # some are checked by TrainingArguments itself
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        C2CTrainer(training_model(), args, Samples(), None, ChatCollator())
    with pytest.raises(TypeError, match="model must be a C2CTrainingModel, got Linear"):
        C2CTrainer(torch.nn.Linear(1, 1), args)


def test_bfloat16_autocast_trains_float32_parameters(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, replace(RECIPE, dtype="bf16", max_steps=3))
    before = trainer.fuser.state_dict()["groups.0.gate_logit"].clone()
    trainer.train()
    state = trainer.fuser.state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert not torch.equal(before, state["groups.0.gate_logit"])
    # transformers before 5 would leave it on for every later run of the process.
    assert tiny_trainer(tmp_path / "later").accelerator.mixed_precision == "no"


def test_two_processes_equal_one_but_for_rounding(tmp_path: Path) -> None:
    """Also with the frozen models' layers spread over both. Noise is keyed by sample."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(folder / "ddp_worker.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    trainer = tiny_trainer(tmp_path / "one", DDP_RECIPE)
    trainer.train()
    start = training_model().fuser.state_dict()
    for name in ("whole", "sharded"):
        two = Fuser.from_pretrained(checkpoint_path(tmp_path / name, 3)).state_dict()
        for parameter, tensor in trainer.fuser.state_dict().items():
            torch.testing.assert_close(two[parameter], tensor, rtol=1e-4, atol=2e-5)
            assert float((tensor - start[parameter]).abs().max()) > 1e-3


def test_sharding_needs_processes() -> None:
    with pytest.raises(RuntimeError, match="start them by torchrun"):
        shard_frozen_models(training_model())

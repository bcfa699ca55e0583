"""Makes the demo's two models from scratch, in minutes on one CPU thread.

`python -m c2c_ext.demo.train --seed 0 --output DIR` writes DIR/{receiver,sharer} and DIR/log.json.
The same seed gives the same bits on one machine. Their fuser is trained by `c2c train`, on what
`c2c_ext.demo.export` writes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w

LOG_EVERY = 25
IGNORE = -100  # cross_entropy's own


@dataclass(frozen=True)
class Training:
    """One optimiser run; the learning rate warms up, then falls as a cosine to `last * lr`."""

    steps: int
    lr: float
    batch: int = 64
    warm_up: int = 50
    last: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Every number of the two models' training; tuned on seed 0 alone."""

    sharer_model: dict = field(
        default_factory=lambda: {
            "hidden_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 200,
        }
    )
    receiver_model: dict = field(
        default_factory=lambda: {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "intermediate_size": 128,
        }
    )
    init_std: float = 0.05

    sharer: Training = Training(steps=500, lr=4e-3)
    omission: tuple[float, ...] = (0.0, 0.0, 0.5, 0.9)  # share of values left out, one is drawn
    other_words: float = 0.1  # weight of the loss at words that are not values
    early_exit: float = 1.0  # weight of the loss of the last layer's input

    receiver: Training = Training(steps=600, lr=3e-3)
    blank: float = 0.1  # share of batches without values: there the receiver learns to guess
    first_sizes: tuple[int, ...] = (1, 2, 2, 3)  # form sizes until `is` is learnt at K = 3
    later_sizes: tuple[int, ...] = (1, 3, 6, 12)
    questions: tuple[int, ...] = (1, 6)  # in a row, after one form
    learnt: float = 0.9
    stop: float = 0.995


class Log:
    """What happened; `save` writes it as JSON."""

    def __init__(self, seed: int, recipe: Recipe) -> None:
        self.start = time.perf_counter()
        self.data: dict = {
            "seed": seed,
            "world": w.make_world(seed).digest(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "recipe": asdict(recipe),
            "training": {},
        }

    def point(self, stage: str, step: int, **values: float) -> None:
        """Adds one point to a stage's curve and prints it."""
        curve = self.data["training"].setdefault(stage, {}).setdefault("curve", [])
        curve.append({"step": step, **{key: round(float(v), 4) for key, v in values.items()}})
        print(f"{time.perf_counter() - self.start:6.1f} s  {stage}  {curve[-1]}", flush=True)

    def done(self, stage: str, seconds: float, parameters: int) -> None:
        """Closes a stage with its wall time and the size of what it trained."""
        totals = {"seconds": round(seconds, 1), "parameters": parameters}
        self.data["training"].setdefault(stage, {}).update(totals)

    def save(self, path: Path) -> None:
        """Writes everything so far."""
        path.write_text(json.dumps(self.data, indent=1) + "\n")


def optimise(
    model: nn.Module, training: Training, loss_at: Callable[[int], Tensor]
) -> Iterator[tuple[int, float]]:
    """Takes one optimiser step after the other and yields each step's number and loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, training.lr, betas=training.betas, weight_decay=training.weight_decay
    )

    def scale(step: int) -> float:
        if step < training.warm_up:
            return (step + 1) / training.warm_up
        progress = (step - training.warm_up) / max(training.steps - training.warm_up, 1)
        return training.last + (1 - training.last) * (1 + math.cos(math.pi * progress)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, scale)
    for step in range(training.steps):
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, training.clip)
        optimiser.step()
        schedule.step()
        yield step, loss.item()


def pick(options: tuple, generator: torch.Generator):
    """One of the options, each equally likely."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def new_model(shape: dict, init_std: float) -> LlamaForCausalLM:
    """An untrained Llama over the demo's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(w.VOCABULARY),
        tie_word_embeddings=True,
        max_position_embeddings=64,
        initializer_range=init_std,
        pad_token_id=w.PAD,
        bos_token_id=w.BOS,
        eos_token_id=None,
        **shape,
    )
    return LlamaForCausalLM(config)


def sharer_batch(
    world: w.World, batch: int, omission: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Forms about any entity, with all attributes: token ids [B, N], targets [B, N] of the values
    and of the other words. Which values are left out is one draw for the batch; a blank slot has no
    target at all, so nothing tells the sharer what to do there."""
    entities = torch.randint(len(world.facts), (batch,), generator=generator)
    forms = torch.rand(batch, w.NUM_ATTRIBUTES, generator=generator).argsort(dim=1)
    filled = world.filled_form(entities, forms, world.facts[entities[:, None], forms])
    given = torch.rand(w.NUM_ATTRIBUTES, generator=generator) >= omission
    head = torch.ones(w.FORM_START, dtype=torch.bool)
    keep = torch.cat([head, torch.stack([torch.ones_like(given), given], dim=1).flatten()])
    asks = torch.cat([~head, torch.stack([given, torch.zeros_like(given)], dim=1).flatten()])
    blank = torch.cat([~head, torch.stack([~given, torch.zeros_like(given)], dim=1).flatten()])
    ids, asks, blank = filled[:, keep], asks[keep], blank[keep]
    following = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    values = following.masked_fill(~asks, IGNORE)
    return ids, values, following.masked_fill(asks | blank, IGNORE)


def train_sharer(world: w.World, recipe: Recipe, seed: int, log: Log) -> LlamaForCausalLM:
    """The knowledge base: reads and fills in forms, about all entities."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_model(recipe.sharer_model, recipe.init_std)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        # A batch may be without any target of one sort.
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)

    def loss_at(step: int) -> Tensor:
        omission = pick(recipe.omission, generator)
        ids, values, others = sharer_batch(world, recipe.sharer.batch, omission, generator)
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        # The fuser reads the last layer's keys and values, so its input must have the fact.
        early = model.lm_head(model.model.norm(out.hidden_states[-2]))
        return (
            cross_entropy(out.logits, values)
            + recipe.other_words * cross_entropy(out.logits, others)
            + recipe.early_exit * cross_entropy(early, values)
        )

    generator_eval = torch.Generator().manual_seed(seed)
    entities = torch.arange(len(world.facts))
    forms = torch.rand(len(entities), w.NUM_ATTRIBUTES, generator=generator_eval).argsort(dim=1)
    for step, loss in optimise(model, recipe.sharer, loss_at):
        if step % LOG_EVERY == 0 or step == recipe.sharer.steps - 1:
            written = ev.write_form(model, world, entities, forms)
            right = (written == world.facts[entities[:, None], forms]).float().mean()
            log.point("sharer", step, loss=loss, facts_right=right)
    return model


def receiver_batch(
    world: w.World, size: int, count: int, blank: bool, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Forms about names without facts, then `count` questions in a row: token ids [B, N], targets
    [B, count] of the answers at each question's last word, and whether [B, count] they are `is`.
    The values are drawn anew each time: the receiver can use facts, it knows none."""
    places = torch.randint(len(world.others), (batch,), generator=generator)
    entities = world.others[places]
    forms = torch.rand(batch, w.NUM_ATTRIBUTES, generator=generator).argsort(dim=1)[:, :size]
    values = torch.randint(w.NUM_VALUES, (batch, size), generator=generator)
    form = world.blank_form(entities, forms)
    if not blank:
        form = world.filled_form(entities, forms, values)
    slots = torch.randint(size, (batch, count), generator=generator)
    kinds = torch.randint(len(w.KINDS), (batch, count), generator=generator)
    asked, facts = forms.gather(1, slots), values.gather(1, slots)
    answers = world.answers(kinds, asked, facts)
    questions = [w.question(kinds[:, i], asked[:, i]) for i in range(count)]
    return torch.cat([form, *questions], dim=1), w.value_ids(asked, answers), kinds == w.IS


def train_receiver(world: w.World, recipe: Recipe, seed: int, log: Log) -> LlamaForCausalLM:
    """The model that answers: reads filled forms and questions, and knows what rivals what."""
    torch.manual_seed(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    model = new_model(recipe.receiver_model, recipe.init_std)
    sizes = recipe.first_sizes

    def loss_at(step: int) -> Tensor:
        count = pick(recipe.questions, generator)
        blank = float(torch.rand((), generator=generator)) < recipe.blank
        ids, targets, _ = receiver_batch(
            world, pick(sizes, generator), count, blank, recipe.receiver.batch, generator
        )
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=4 * count).logits
        return F.cross_entropy(logits[:, 3::4].flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def accuracy(size: int) -> tuple[float, float]:
        """Right answers to `is` and to `rivals`."""
        fixed = torch.Generator().manual_seed(size)
        ids, targets, is_fact = receiver_batch(world, size, 1, False, 512, fixed)
        right = model(input_ids=ids, logits_to_keep=1).logits.argmax(dim=-1) == targets
        return right[is_fact].float().mean().item(), right[~is_fact].float().mean().item()

    for step, loss in optimise(model, recipe.receiver, loss_at):
        if step % LOG_EVERY == 0 or step == recipe.receiver.steps - 1:
            three, twelve = accuracy(3), accuracy(w.NUM_ATTRIBUTES)
            right = dict(
                zip(("is_3", "rivals_3", "is_12", "rivals_12"), three + twelve, strict=True)
            )
            log.point("receiver", step, loss=loss, **right)
            if three[0] > recipe.learnt:
                sizes = recipe.later_sizes
            if min(*three, *twelve) >= recipe.stop:
                break
    return model


def main(arguments: list[str] | None = None) -> None:
    """Trains sharer and receiver, and saves them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the training")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the order of additions, and so every bit, depends on it
    recipe, seed, output = Recipe(), options.seed, options.output
    world, log = w.make_world(seed), Log(seed, recipe)
    output.mkdir(parents=True, exist_ok=True)

    for name, make in (("sharer", train_sharer), ("receiver", train_receiver)):
        start = time.perf_counter()
        model = make(world, recipe, seed, log)
        log.done(name, time.perf_counter() - start, sum(p.numel() for p in model.parameters()))
        model.half().save_pretrained(output / name)
    log.save(output / "log.json")


if __name__ == "__main__":
    main()

"""Makes the sentence world's sharer and receiver from scratch, each in about a minute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.evidence.worlds import sentence_world as sw
from c2c_ext.demo.train import Training, optimise, pick

LOG_EVERY = 25


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

    sharer: Training = field(default_factory=lambda: Training(steps=300, lr=2e-3, batch=96))
    every_word: float = 0.1  # weight of the loss at all words, not only at values
    early_exit: float = 1.0  # weight of the loss of the last layer's input

    receiver: Training = field(default_factory=lambda: Training(steps=600, lr=3e-3))
    facts: tuple[int, ...] = (1, 2)  # in a row
    silent: float = 0.15  # share of batches without facts: there the receiver learns to guess
    questions: tuple[int, ...] = (1, 4)  # in a row, after one set of facts
    learnt: float = 0.9  # of `is`, from which on `rivals` is asked, too
    stop: float = 0.995  # of every kind and number of facts


def new_model(shape: dict, init_std: float) -> LlamaForCausalLM:
    """An untrained Llama over the world's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(sw.VOCABULARY),
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=init_std,
        pad_token_id=sw.PAD,
        bos_token_id=sw.BOS,
        eos_token_id=None,
        **shape,
    )
    return LlamaForCausalLM(config)


def deck(size: int, generator: torch.Generator) -> Iterator[int]:
    """Numbers below `size` in random order, again and again: each as often as any other."""
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def train_sharer(world: sw.World, recipe: Recipe, seed: int, log: list) -> LlamaForCausalLM:
    """The knowledge base: states the facts about all entities, and nothing else."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_model(recipe.sharer_model, recipe.init_std)
    facts = deck(sw.NUM_KNOWN * sw.NUM_ATTRIBUTES, generator)

    def loss_at(step: int) -> Tensor:
        template = sw.STATEMENTS[step % len(sw.STATEMENTS)]
        chosen = torch.tensor(list(itertools.islice(facts, recipe.sharer.batch)))
        entities, attributes = chosen // sw.NUM_ATTRIBUTES, chosen % sw.NUM_ATTRIBUTES
        values = world.facts[entities, attributes]
        ids = sw.opened(world.sentence(template, entities, attributes, values))
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        before = sw.place_of("V", template) - 1
        # The fuser reads the last layer's keys and values, so its input must have the fact.
        early = model.lm_head(model.model.norm(out.hidden_states[-2][:, before]))
        value = ids[:, before + 1]
        every_word = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return (
            F.cross_entropy(out.logits[:, before], value)
            + recipe.every_word * every_word
            + recipe.early_exit * F.cross_entropy(early, value)
        )

    for step, loss in optimise(model, recipe.sharer, loss_at):
        if step % LOG_EVERY == 0 or step == recipe.sharer.steps - 1:
            note(log, "sharer", step, loss=loss, facts_right=facts_right(model, world))
    return model


@torch.no_grad()
def facts_right(model: LlamaForCausalLM, world: sw.World) -> float:
    """The part of all facts that the sharer tells right when asked in its own way."""
    entities = torch.arange(sw.NUM_KNOWN).repeat_interleave(sw.NUM_ATTRIBUTES)
    attributes = torch.arange(sw.NUM_ATTRIBUTES).repeat(sw.NUM_KNOWN)
    ids = sw.opened(world.sentence(sw.ASKED, entities, attributes))
    told = model(input_ids=ids, logits_to_keep=1).logits[:, -1].argmax(dim=1)
    right = told == sw.value_ids(attributes, world.facts[entities, attributes])
    return right.float().mean().item()


def receiver_batch(
    world: sw.World,
    stated: int,
    count: int,
    batch: int,
    generator: torch.Generator,
    *,
    silent: bool = False,
    kinds: int = len(sw.KINDS),
) -> tuple[Tensor, Tensor, Tensor]:
    """`stated` facts about names that have none, then `count` questions about them.

    Values are drawn anew each time: the receiver can use facts, it knows none. The facts of a row
    are of different attributes, so nothing teaches it to compare names.

    Args:
        silent: asks the same, but states nothing.
        kinds: how many of `KINDS` are asked, the first ones.

    Returns:
        token ids [B, N], targets [B, count] of the answers at each question's last word, and
        whether [B, count] the questions are `is`.
    """

    def draw(limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count, batch), generator=generator)

    entities = world.others[draw(len(world.others), stated)]
    order = torch.rand(batch, sw.NUM_ATTRIBUTES, generator=generator).argsort(dim=1)
    facts = [entities, order.T[:stated], draw(sw.NUM_VALUES, stated)]
    sentences = [
        world.sentence(pick(sw.STATED, generator), *(column[i] for column in facts))
        for i in range(stated)
    ]
    which = draw(stated, count)
    entities, attributes, values = (column.gather(0, which) for column in facts)
    asks = draw(kinds, count)
    questions = [
        world.sentence(sw.QUESTION, entities[i], attributes[i], kinds=asks[i]) for i in range(count)
    ]
    targets = sw.value_ids(attributes, world.answers(asks, attributes, values))
    told = [] if silent else sentences
    return sw.opened(*told, *questions), targets.T, (asks == sw.IS).T


def train_receiver(world: sw.World, recipe: Recipe, seed: int, log: list) -> LlamaForCausalLM:
    """The model that answers: reads facts and questions, and knows what rivals what."""
    torch.manual_seed(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    model = new_model(recipe.receiver_model, recipe.init_std)
    kinds = 1  # the first, until that is learnt

    def loss_at(step: int) -> Tensor:
        stated, count = pick(recipe.facts, generator), pick(recipe.questions, generator)
        silent = float(torch.rand((), generator=generator)) < recipe.silent
        batch = recipe.receiver.batch
        ids, targets, _ = receiver_batch(
            world, stated, count, batch, generator, silent=silent, kinds=kinds
        )
        length = sw.QUESTION_TOKENS
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=length * count).logits
        return F.cross_entropy(logits[:, length - 1 :: length].flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def accuracy() -> dict[str, float]:
        found, fixed = {}, torch.Generator().manual_seed(0)
        for stated in recipe.facts:
            ids, targets, is_fact = receiver_batch(world, stated, 1, 256, fixed)
            right = model(input_ids=ids, logits_to_keep=1).logits.argmax(dim=-1) == targets
            for kind, group in zip(sw.KINDS, (is_fact, ~is_fact), strict=True):
                found[f"{kind}_{stated}"] = right[group].float().mean().item()
        return found

    for step, loss in optimise(model, recipe.receiver, loss_at):
        if step % LOG_EVERY == 0 or step == recipe.receiver.steps - 1:
            right = accuracy()
            note(log, "receiver", step, loss=loss, **right)
            if right["is_1"] >= recipe.learnt:
                kinds = len(sw.KINDS)
            if min(right.values()) >= recipe.stop:
                break
    return model


def note(log: list, stage: str, step: int, **values: float) -> None:
    """Adds one point to a curve and prints it."""
    log.append({"step": step, **{name: round(value, 4) for name, value in values.items()}})
    print(stage, log[-1], flush=True)

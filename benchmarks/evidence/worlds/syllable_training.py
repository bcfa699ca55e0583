"""Trains the models of the syllable world: `c2c_ext.demo.train` with values of several tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from c2c_ext.demo import train as demo
from c2c_ext.demo import world as w

from . import syllable_forms as sf

IGNORE = demo.IGNORE


@dataclass(frozen=True)
class Recipe(demo.Recipe):
    """The demo's, and what values of several tokens ask for; tuned on seed 0 alone."""

    ahead: float = 1.0  # weight of the loss of the later syllables, foretold at the attribute
    sharer: demo.Training = field(default_factory=lambda: demo.Training(steps=400, lr=4e-3))
    receiver: demo.Training = field(default_factory=lambda: demo.Training(steps=900, lr=3e-3))
    # What differs from the recipe `tiny` of `c2c train`.
    fuser: dict = field(default_factory=lambda: {"batch": 128})
    fusers: tuple[str, ...] = ("fuser", "identical")


def new_heads(hidden_size: int, ahead: float) -> nn.ModuleList:
    """For each syllable after the first a map of what enters the last layer at the attribute.

    Through the final norm and the output embeddings it foretells that syllable, as heads of
    multi-token prediction do (arXiv 2404.19737). Training alone needs them: without, a sharer looks
    the second syllable up only once it has written the first, and its cache of a blank form does
    not hold it. There are none if their loss has no weight (`ahead`).
    """
    count = sf.LENGTH - 1 if ahead else 0
    return nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(count))


def sharer_batch(
    world: w.World, omission: float, batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forms about any entity, with all attributes.

    Returns token ids [B, N]; targets [B, N] of the values' syllables and of the other words; and
    [B, N, L] the whole value at each attribute that has one.
    """
    entities = torch.randint(len(world.facts), (batch,), generator=generator)
    forms = torch.rand(batch, w.NUM_ATTRIBUTES, generator=generator).argsort(dim=1)
    spelled = sf.syllable_ids(forms, world.facts[entities[:, None], forms])
    given = torch.rand(w.NUM_ATTRIBUTES, generator=generator) >= omission
    counts = [sf.LENGTH * int(g) for g in given]
    ids = sf.form(world, entities, forms, spelled, counts)
    asks = torch.zeros(ids.shape[1], dtype=torch.bool)
    blank = asks.clone()
    whole = torch.full((*ids.shape, sf.LENGTH), IGNORE)
    at = w.FORM_START
    for k, count in enumerate(counts):
        asks[at : at + count] = True
        if count:
            whole[:, at] = spelled[:, k]
        else:
            blank[at] = True
        at += 1 + count
    following = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    values = following.masked_fill(~asks, IGNORE)
    return ids, values, following.masked_fill(asks | blank, IGNORE), whole


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets; 0 where a batch has none."""
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


def train_sharer(
    world: w.World, recipe: Recipe, seed: int, log: demo.Log
) -> tuple[LlamaForCausalLM, nn.ModuleList]:
    """The knowledge base, which reads and fills in forms about all entities, and its heads."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = demo.new_model(recipe.sharer_model, recipe.init_std)
    heads = new_heads(model.config.hidden_size, recipe.ahead)

    def loss_at(step: int) -> Tensor:
        omission = demo.pick(recipe.omission, generator)
        ids, values, others, whole = sharer_batch(world, omission, recipe.sharer.batch, generator)
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        entering = out.hidden_states[-2]
        early = model.lm_head(model.model.norm(entering))
        loss = (
            cross_entropy(out.logits, values)
            + recipe.other_words * cross_entropy(out.logits, others)
            + recipe.early_exit * cross_entropy(early, values)
        )
        for place, head in enumerate(heads, start=1):
            logits = model.lm_head(model.model.norm(head(entering)))
            loss = loss + recipe.ahead * cross_entropy(logits, whole[..., place])
        return loss

    entities = torch.arange(len(world.facts))
    fixed = torch.Generator().manual_seed(seed)
    forms = torch.rand(len(entities), w.NUM_ATTRIBUTES, generator=fixed).argsort(dim=1)
    truth = sf.syllable_ids(forms, world.facts[entities[:, None], forms])
    ids = sf.filled_form(world, entities, forms, truth)
    at = w.FORM_START + torch.arange(w.NUM_ATTRIBUTES) * (1 + sf.LENGTH)
    for step, loss in demo.optimise(nn.ModuleList([model, heads]), recipe.sharer, loss_at):
        if step % demo.LOG_EVERY == 0 or step == recipe.sharer.steps - 1:
            with torch.no_grad():
                out = model(input_ids=ids, output_hidden_states=True)
                right, early = {}, model.lm_head(model.model.norm(out.hidden_states[-2]))
                for place in range(sf.LENGTH):
                    for name, logits in (("", out.logits), ("early_", early)):
                        read = logits[:, at + place].argmax(dim=-1)
                        right[f"{name}{place}"] = (read == truth[..., place]).float().mean()
            log.point("sharer", step, loss=loss, **right)
    return model, heads


def receiver_batch(
    world: w.World,
    size: int,
    count: int,
    blank: bool,
    batch: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forms about names without facts, then `count` answered questions about different slots.

    Returns token ids [B, N] without the very last syllable, targets [B, count, L] of the answers
    and whether [B, count] they are `is`.
    """
    entities = world.others[torch.randint(len(world.others), (batch,), generator=generator)]
    forms = torch.rand(batch, w.NUM_ATTRIBUTES, generator=generator).argsort(dim=1)[:, :size]
    values = torch.randint(w.NUM_VALUES, (batch, size), generator=generator)
    ids = world.blank_form(entities, forms)
    if not blank:
        ids = sf.filled_form(world, entities, forms, sf.syllable_ids(forms, values))
    slots = torch.rand(batch, size, generator=generator).argsort(dim=1)[:, :count]
    kinds = torch.randint(len(w.KINDS), (batch, count), generator=generator)
    asked, facts = forms.gather(1, slots), values.gather(1, slots)
    targets = sf.syllable_ids(asked, world.answers(kinds, asked, facts))
    parts = [ids]
    for i in range(count):
        parts += [w.question(kinds[:, i], asked[:, i]), targets[:, i]]
    return torch.cat(parts, dim=1)[:, :-1], targets, kinds == w.IS


def answer_logits(logits: Tensor, count: int) -> Tensor:
    """Of a row's last logits those [B, count, L, V] that predict the answers' syllables."""
    each = 4 + sf.LENGTH  # `question : KIND A` and the answer
    at = 3 + torch.arange(count)[:, None] * each + torch.arange(sf.LENGTH)
    return logits[:, 1 - count * each :][:, at]


def train_receiver(world: w.World, recipe: Recipe, seed: int, log: demo.Log) -> LlamaForCausalLM:
    """The model that answers: reads filled forms and questions, and knows what rivals what."""
    torch.manual_seed(seed + 1)
    generator = torch.Generator().manual_seed(seed + 1)
    model = demo.new_model(recipe.receiver_model, recipe.init_std)
    sizes = recipe.first_sizes

    def loss_at(step: int) -> Tensor:
        size = demo.pick(sizes, generator)
        count = min(size, demo.pick(recipe.questions, generator))
        blank = float(torch.rand((), generator=generator)) < recipe.blank
        ids, targets, _ = receiver_batch(
            world, size, count, blank, recipe.receiver.batch, generator
        )
        logits = model(input_ids=ids, use_cache=False).logits
        return cross_entropy(answer_logits(logits, count), targets)

    @torch.no_grad()
    def accuracy(size: int) -> tuple[float, float]:
        """Right whole answers to `is` and to `rivals`."""
        fixed = torch.Generator().manual_seed(size)
        ids, targets, is_fact = receiver_batch(world, size, 1, False, 512, fixed)
        logits = answer_logits(model(input_ids=ids).logits, 1)
        right = (logits.argmax(dim=-1) == targets).all(dim=-1)
        return right[is_fact].float().mean().item(), right[~is_fact].float().mean().item()

    for step, loss in demo.optimise(model, recipe.receiver, loss_at):
        if step % demo.LOG_EVERY == 0 or step == recipe.receiver.steps - 1:
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

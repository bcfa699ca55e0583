"""Questions that need both sharers, fusing for them, and the training of the fusers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import c2c_ext
from benchmarks.evidence.worlds import two_sharers_world as t
from benchmarks.evidence.worlds.two_sharers_training import Report, answer_ids
from c2c_ext.demo import world as w
from c2c_ext.demo.evaluate import KV, prefill
from c2c_ext.demo.train import Training, optimise, pick
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.run import new_fuser

LOG_EVERY = 25
_TRAINING = Training(
    steps=300, lr=3e-3, warm_up=20, last=0.05, betas=(0.9, 0.999), weight_decay=0.1
)


@dataclass(frozen=True)
class FuserRecipe:
    """Every number of a fuser's training; tuned on seed 0 alone."""

    hidden_size: int = 64
    gate_init: float = 4.0  # gates are hard, and stay as open as they are here
    sharer_layer: int = -1  # that every receiver layer reads
    training: Training = field(default_factory=lambda: _TRAINING)
    sizes: tuple[int, ...] = (4, 6, 12)  # of the forms
    questions: int = 3  # of one fused cache
    written: float = 0.5  # share of batches in which the other's attributes have values, as text


@dataclass
class Questions:
    """Questions [Q] of one kind, each with its form of K attributes."""

    kind: str
    entities: Tensor  # [Q]
    forms: Tensor  # [Q, K]
    asked: Tensor  # [Q, 2], of the form's attributes; the second one is for `which` alone

    def first(self, count: int | None) -> Questions:
        """The first questions, all of them for None."""
        return Questions(self.kind, self.entities[:count], self.forms[:count], self.asked[:count])

    def ids(self) -> Tensor:
        """Token ids [Q, 4 or 5] of the questions."""
        return t.question(self.kind, self.asked[:, 0], self.asked[:, 1])

    def facts(self, world: t.TwoSharerWorld, *of: Tensor) -> Tensor:
        """The values [Q, 2] of what is asked; ``of``: of these entities [Q], one per attribute."""
        first, second = of or (self.entities, self.entities)
        return torch.stack(
            [world.facts[first, self.asked[:, 0]], world.facts[second, self.asked[:, 1]]], dim=1
        )

    def answers(self, world: t.TwoSharerWorld, *of: Tensor) -> Tensor:
        """Token ids [Q] of the answers; ``of`` as for `facts`."""
        return answer_ids(world, self.kind, self.asked, self.facts(world, *of))


def forms_with(asked: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Forms [Q, size], half of them attributes of each sharer, with those asked for [Q, n]."""
    halves = []
    for sharer in range(len(t.SHARERS)):
        order = torch.rand(len(asked), w.NUM_ATTRIBUTES, generator=generator)
        order[:, t.owned(1 - sharer)] = 2.0
        own = t.owner(asked) == sharer
        order.scatter_add_(1, asked, -own.float())  # to the front
        halves.append(order.argsort(dim=1)[:, : size // 2])
    both = torch.cat(halves, dim=1)
    return both.gather(1, torch.rand(both.shape, generator=generator).argsort(dim=1))


def held_out_questions(
    world: t.TwoSharerWorld, kind: str, size: int, sharer: int | None = None
) -> Questions:
    """All questions of a kind about held-out entities, each with a form of its own.

    `is`: the six attributes that this sharer knows. `which`: six pairs, in either order, that have
    each attribute once, drawn anew for every size of forms.
    """
    generator = torch.Generator().manual_seed(1000 * world.seed + size)
    if kind == t.IS:
        pairs = torch.stack([t.owned(sharer), t.owned(sharer).roll(1)], dim=1)
    else:
        partners = t.owned(1)[torch.randperm(t.OWNED, generator=generator)]
        pairs = torch.stack([t.owned(0), partners], dim=1)
    entities = world.held_out.repeat_interleave(len(pairs))
    asked = pairs.repeat(len(world.held_out), 1)
    if kind == t.WHICH_SUM:
        swap = torch.rand(len(asked), generator=generator) < 0.5
        asked = torch.where(swap[:, None], asked.flip(1), asked)
    needed = asked[:, :1] if kind == t.IS else asked
    return Questions(kind, entities, forms_with(needed, size, generator), asked)


def token_map(forms: Tensor, sharer: int | None = None, given: Tensor | None = None) -> Tensor:
    """int64 [Q, N]: attributes are fused with the sharer's same ones; with a sharer only its own.

    Args:
        given: bool [Q, K], as many in every row, which of the receiver's attributes a value
            follows; none of them without it. The sharer reads the blank form.
    """
    given = torch.zeros_like(forms, dtype=torch.bool) if given is None else given
    places = torch.arange(w.FORM_START, w.FORM_START + forms.shape[1]).expand(forms.shape)
    if sharer is not None:
        places = places.masked_fill(t.owner(forms) != sharer, -1)
    before = given.long().cumsum(dim=1) - given.long()
    width = w.FORM_START + forms.shape[1] + int(given[0].sum())
    own = torch.arange(w.FORM_START, w.FORM_START + forms.shape[1]) + before
    return torch.full((len(forms), width), -1).scatter(1, own, places)


def read_on(receiver: PreTrainedModel, cache: KV, ids: Tensor, keep: int = 1) -> Tensor:
    """Logits [B, keep, V] of the last tokens of ids [B, N] that are read over a cache.

    The form is one section, fused, the question the next: it is read over what was fused, as
    `generate(sections=...)` reads it.
    """
    past = DynamicCache()
    for layer, (key, value) in enumerate(cache):
        past.update(key, value, layer)
    return receiver(input_ids=ids, past_key_values=past, logits_to_keep=keep).logits


def train_fuser(
    world: t.TwoSharerWorld,
    receiver: PreTrainedModel,
    sharer: PreTrainedModel,
    about: int | None,
    recipe: FuserRecipe,
    seed: int,
    report: Report,
) -> c2c_ext.Fuser:
    """A fuser trained on questions about train entities; both models stay frozen.

    Args:
        about: the place of the sharer among the two: its attributes are fused and asked for, by
            `is` and in pairs by `which`. In part of the batches the other's attributes have values,
            in the receiver's text, and are asked for as well: what is fused must leave them
            readable. These values are invented, so nothing of the other sharer is learnt.
            None: the sharer is the receiver itself. Everything is fused, one attribute of each
            half is asked for.
    """
    generator = torch.Generator().manual_seed(seed + 20)
    last = range(sharer.config.num_hidden_layers)[recipe.sharer_layer]
    init = load_recipe("tiny").changed(
        {
            "layer_map": [last] * receiver.config.num_hidden_layers,
            "hidden_size": recipe.hidden_size,
            "gate_init": recipe.gate_init,
            "seed": seed,
        }
    )
    fuser = new_fuser(init, receiver.config, sharer.config)

    def loss_at(step: int) -> Tensor:
        places = torch.randint(len(world.train), (recipe.training.batch,), generator=generator)
        entities, size = world.train[places], pick(recipe.sizes, generator)
        forms = forms_with(entities[:, None][:, :0], size, generator)
        given = torch.zeros_like(forms, dtype=torch.bool)
        written = float(torch.rand((), generator=generator)) < recipe.written
        if about is not None and written:
            given = t.owner(forms) != about
        invented = torch.randint(w.NUM_VALUES, forms.shape, generator=generator)
        values = torch.where(given, invented, world.facts[entities[:, None], forms])
        ids, targets, ends = [], [], []
        for _ in range(recipe.questions):
            kind = pick((t.IS, t.WHICH_SUM), generator)
            places = _two_of(forms, None if given.any() else about, about is None, generator)
            asked, facts = forms.gather(1, places), values.gather(1, places)
            ids.append(t.question(kind, asked[:, 0], asked[:, 1]))
            targets.append(answer_ids(world, kind, asked, facts))
            ends.append(sum(part.shape[1] for part in ids) - 1)
        with torch.no_grad():
            clean = prefill(receiver, world.form(entities, forms, values, given))
            shared = prefill(sharer, world.blank_form(entities, forms))
        # With gradients and without noise: gates stay as they are.
        fused = c2c_ext.fuse(clean, shared, fuser, token_map=token_map(forms, about, given))
        read = torch.cat(ids, dim=1)
        logits = read_on(receiver, fused, read, keep=read.shape[1])[:, ends]
        return F.cross_entropy(logits.flatten(0, 1), torch.stack(targets, dim=1).flatten())

    for step, loss in optimise(fuser, recipe.training, loss_at):
        if step % LOG_EVERY == 0 or step == recipe.training.steps - 1:
            report(step, loss=loss)
    return fuser.eval().requires_grad_(False)


def _two_of(
    forms: Tensor, sharer: int | None, one_of_each: bool, generator: torch.Generator
) -> Tensor:
    """Places [B, 2] of two attributes of each form: of this sharer's, one of each, or any two."""
    score = torch.rand(forms.shape, generator=generator)
    if sharer is not None:
        score = score.masked_fill(t.owner(forms) != sharer, 2.0)
    if not one_of_each:
        return score.argsort(dim=1)[:, :2]
    each = [score.masked_fill(t.owner(forms) != k, 2.0).argmin(1) for k in range(len(t.SHARERS))]
    places = torch.stack(each, dim=1)
    swap = torch.rand(len(forms), generator=generator) < 0.5
    return torch.where(swap[:, None], places.flip(1), places)

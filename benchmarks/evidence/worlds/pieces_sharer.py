"""The two-tokenizers world's sharer: learns and writes the facts in its own tokens.

Everything that is not said here is the demo's (`c2c_ext.demo.train`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.evidence.worlds import word_pieces as pieces
from c2c_ext.demo import world as w
from c2c_ext.demo.train import IGNORE, Log, Training, optimise, pick

LOG_EVERY = 50
TRAINING = Training(steps=500, lr=4e-3)


@dataclass(frozen=True)
class Recipe:
    """Every number of the sharer's training; tuned on seed 0 alone."""

    model: dict = field(
        default_factory=lambda: {
            "hidden_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 200,
        }
    )
    init_std: float = 0.05
    training: Training = TRAINING
    omission: tuple[float, ...] = (0.0, 0.0, 0.5, 0.9)  # share of values left out, one is drawn
    other_words: float = 0.1  # weight of the loss at pieces that are not values
    early_exit: float = 1.0  # weight of the loss of the last layer's input


def new_sharer(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained one."""
    config = LlamaConfig(
        vocab_size=len(pieces.VOCABULARY),
        tie_word_embeddings=True,
        max_position_embeddings=64,
        initializer_range=recipe.init_std,
        pad_token_id=pieces.PAD,
        bos_token_id=pieces.BOS,
        eos_token_id=None,
        **recipe.model,
    )
    return LlamaForCausalLM(config)


def batch_of(
    world: w.World, rows: int, omission: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Forms about any entity, with all attributes: ids [B, M], targets [B, M] of the values and of
    all other pieces. Which values are left out is one draw for the batch; a blank slot has no
    target at all, so nothing tells the sharer what to do there."""
    entities = torch.randint(len(world.facts), (rows,), generator=generator)
    forms = torch.rand(rows, w.NUM_ATTRIBUTES, generator=generator).argsort(dim=1)
    filled = world.filled_form(entities, forms, world.facts[entities[:, None], forms])
    given = torch.rand(w.NUM_ATTRIBUTES, generator=generator) >= omission
    head = torch.ones(w.FORM_START, dtype=torch.bool)
    keep = torch.cat([head, torch.stack([torch.ones_like(given), given], dim=1).flatten()])
    asks = torch.cat([~head, torch.stack([given, torch.zeros_like(given)], dim=1).flatten()])
    blank = torch.cat([~head, torch.stack([~given, torch.zeros_like(given)], dim=1).flatten()])
    ids, ends = pieces.pieces_of(filled[:, keep])
    following = F.pad(ids[:, 1:], (0, 1), value=IGNORE).masked_fill(ids == pieces.PAD, IGNORE)
    following = following.masked_fill(following == pieces.PAD, IGNORE)

    def at(words: Tensor) -> Tensor:
        """bool [B, M]: the last pieces of these words [N]."""
        places = ends[:, words[keep]]
        return torch.zeros_like(ids, dtype=torch.bool).scatter_(1, places, True)

    values = following.masked_fill(~at(asks), IGNORE)
    return ids, values, following.masked_fill(at(asks | blank), IGNORE)


@torch.no_grad()
def write_form(sharer: PreTrainedModel, world: w.World, entities: Tensor, forms: Tensor) -> Tensor:
    """The values [B, K] that the sharer writes into forms [B, K], one after the other.

    No token is read twice. Rows get pieces in different numbers; what fills them up is masked.
    """
    cache, written = DynamicCache(), []
    mask = torch.zeros(len(forms), 0, dtype=torch.long)
    words = world.blank_form(entities, forms[:, :1])
    for k in range(forms.shape[1]):
        if k:
            value = w.value_ids(forms[:, k - 1], written[-1])
            words = torch.stack([value, forms[:, k] + w.FIRST_ATTRIBUTE], dim=1)
        ids, ends = pieces.pieces_of(words)
        new = (ids != pieces.PAD).long()
        positions = mask.sum(dim=1, keepdim=True) + new.cumsum(dim=1) - 1
        mask = torch.cat([mask, new], dim=1)
        hidden = sharer.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state
        logits = sharer.lm_head(hidden[torch.arange(len(ids)), ends[:, -1]])
        values = pieces.value_ids(forms[:, k, None], torch.arange(w.NUM_VALUES))
        written.append(logits.gather(1, values).argmax(dim=1))
    return torch.stack(written, dim=1)


@torch.no_grad()
def read_values(sharer: PreTrainedModel, world: w.World, entities: Tensor, forms: Tensor) -> Tensor:
    """The values [B, K] that one prefill of the blank forms [B, K] gives, all slots at once."""
    words = world.blank_form(entities, forms)
    logits = word_logits(sharer, words, slice(w.FORM_START, None))
    values = pieces.value_ids(forms[..., None], torch.arange(w.NUM_VALUES))
    return logits.gather(2, values).argmax(dim=2)


def word_logits(sharer: PreTrainedModel, words: Tensor, at: slice) -> Tensor:
    """Logits [B, columns, vocabulary] behind the words [B, N] in columns `at`."""
    ids, ends = pieces.pieces_of(words)
    hidden = sharer.base_model(input_ids=ids, use_cache=False).last_hidden_state
    places = ends[:, at, None].expand(-1, -1, hidden.shape[2])
    return sharer.lm_head(hidden.gather(1, places))


def train_sharer(world: w.World, recipe: Recipe, seed: int, log: Log) -> LlamaForCausalLM:
    """The knowledge base: reads and fills in forms, about all entities."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = new_sharer(recipe)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        # A batch may be without any target of one sort.
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)

    def loss_at(step: int) -> Tensor:
        omission = pick(recipe.omission, generator)
        ids, values, others = batch_of(world, recipe.training.batch, omission, generator)
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        # The fuser reads the last layer's keys and values, so its input must have the fact.
        early = model.lm_head(model.model.norm(out.hidden_states[-2]))
        return (
            cross_entropy(out.logits, values)
            + recipe.other_words * cross_entropy(out.logits, others)
            + recipe.early_exit * cross_entropy(early, values)
        )

    entities = torch.arange(len(world.facts))
    fixed = torch.Generator().manual_seed(seed)
    forms = torch.rand(len(entities), w.NUM_ATTRIBUTES, generator=fixed).argsort(dim=1)
    for step, loss in optimise(model, recipe.training, loss_at):
        if step % LOG_EVERY == 0 or step == recipe.training.steps - 1:
            read = read_values(model, world, entities, forms)
            right = (read == world.facts[entities[:, None], forms]).float().mean()
            log.point("sharer", step, loss=loss, facts_right=right)
    return model

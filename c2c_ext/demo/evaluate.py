"""How well the demo's pair answers about held-out entities: every mode, and its controls.

Each function takes all its questions as one batch. An answer is the largest of eight logits, those
of the asked attribute's values, at the prompt's last word.

`python -m c2c_ext.demo.evaluate DIR` prints the table of DIR/{receiver,sharer,fuser}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from c2c_ext.demo import world as w
from c2c_ext.files import write_atomically
from c2c_ext.fuser import Fuser
from c2c_ext.fusion import fuse
from c2c_ext.info import describe
from c2c_ext.machine import commit_of

FORM_SIZES = (3, 6, 12)
KV = list[tuple[Tensor, Tensor]]  # key and value [B, H, N, D] of every layer


@dataclass
class Pair:
    """A receiver, a sharer and the fuser between them, with the world they were trained on."""

    world: w.World
    receiver: PreTrainedModel
    sharer: PreTrainedModel
    fuser: Fuser


def load_pair(directory: str | Path, seed: int) -> Pair:
    """The pair saved by `c2c_ext.demo.train` for that seed, in float32, ready to answer."""
    directory = Path(directory)
    models = [
        LlamaForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
        for name in ("receiver", "sharer")
    ]
    fuser = Fuser.from_pretrained(directory / "fuser").float()
    return Pair(w.make_world(seed), *(m.eval().requires_grad_(False) for m in (*models, fuser)))


@dataclass
class Questions:
    """Questions [Q], each with its form of K attributes."""

    entities: Tensor  # [Q]
    attributes: Tensor  # [Q, K]
    asked: Tensor  # [Q], one of the form's attributes
    kinds: Tensor  # [Q], places in `KINDS`

    @property
    def size(self) -> int:
        """K, the number of attributes in each form."""
        return self.attributes.shape[1]

    def question(self) -> Tensor:
        """Token ids [Q, 4] of `question : KIND A`."""
        return w.question(self.kinds, self.asked)

    def answers(self, world: w.World, entities: Tensor | None = None) -> Tensor:
        """The right values [Q], or those that would be right for other entities [Q]."""
        facts = world.facts[self.entities if entities is None else entities, self.asked]
        return world.answers(self.kinds, self.asked, facts)


def random_forms(asked: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Forms [Q, size] of different attributes in random order, the asked one [Q] among them."""
    order = torch.rand(len(asked), w.NUM_ATTRIBUTES, generator=generator)
    order.scatter_(1, asked[:, None], -1.0)
    chosen = order.argsort(dim=1)[:, :size]
    return chosen.gather(1, torch.rand(chosen.shape, generator=generator).argsort(dim=1))


def held_out_questions(world: w.World, kind: str, size: int, seed: int = 0) -> Questions:
    """All 960 questions of a kind about held-out entities, each with a random form."""
    entities = world.held_out.repeat_interleave(w.NUM_ATTRIBUTES)
    asked = torch.arange(w.NUM_ATTRIBUTES).repeat(len(world.held_out))
    forms = random_forms(asked, size, torch.Generator().manual_seed(1000 * seed + size))
    kinds = torch.full_like(asked, w.KINDS.index(kind))
    return Questions(entities, forms, asked, kinds)


def prefill(model: PreTrainedModel, ids: Tensor) -> KV:
    """The KV of token ids [B, N] as the model itself computes it."""
    cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def continue_from(model: PreTrainedModel, kv: KV, ids: Tensor) -> Tensor:
    """Logits [B, vocabulary] after token ids [B, N] that follow a cache."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(kv):
        cache.update(key, value, layer)
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def of_values(logits: Tensor, asked: Tensor) -> Tensor:
    """The logits [B, 8] of the asked attributes' [B] values, out of [B, vocabulary]."""
    return logits.gather(1, w.value_ids(asked[:, None], torch.arange(w.NUM_VALUES)))


def form_positions(size: int) -> slice:
    """Where the K attributes of a form stand: the positions that are fused."""
    return slice(w.FORM_START, w.FORM_START + size)


@torch.no_grad()
def answer_alone(model: PreTrainedModel, world: w.World, questions: Questions) -> Tensor:
    """One model reads form and question: logits [Q, 8]."""
    form = world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    return of_values(model(input_ids=prompt, logits_to_keep=1).logits[:, -1], questions.asked)


@torch.no_grad()
def answer_c2c(pair: Pair, questions: Questions, sharer_kv: KV | None = None) -> Tensor:
    """The receiver answers on the fused cache: logits [Q, 8].

    `sharer_kv` replaces the sharer's own reading of the form (the controls do that).
    """
    form = pair.world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    if sharer_kv is None:
        sharer_kv = prefill(pair.sharer, form)
    clean = prefill(pair.receiver, prompt[:, :-1])
    form_part = form_positions(questions.size)
    fused = fuse(
        clean, sharer_kv, pair.fuser, start=form_part.start, end=form_part.stop, inplace=True
    )
    return of_values(continue_from(pair.receiver, fused, prompt[:, -1:]), questions.asked)


@torch.no_grad()
def write_form(sharer: PreTrainedModel, world: w.World, entities: Tensor, forms: Tensor) -> Tensor:
    """The values [B, K] that the sharer writes into forms [B, K], one after the other."""
    written: list[Tensor] = []
    cache = DynamicCache()
    ids = world.blank_form(entities, forms[:, :1])
    for k in range(forms.shape[1]):
        if k:
            value = w.value_ids(forms[:, k - 1], written[-1])
            ids = torch.stack([value, forms[:, k] + w.FIRST_ATTRIBUTE], dim=1)
        logits = sharer(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        written.append(of_values(logits, forms[:, k]).argmax(dim=1))
    return torch.stack(written, dim=1)


@torch.no_grad()
def read_values(sharer: PreTrainedModel, world: w.World, entities: Tensor, forms: Tensor) -> Tensor:
    """The values [B, K] that one prefill of the blank forms [B, K] gives, all slots at once."""
    logits = sharer(input_ids=world.blank_form(entities, forms)).logits[:, w.FORM_START :]
    return of_values(logits.flatten(0, 1), forms.flatten()).argmax(dim=1).view(forms.shape)


@torch.no_grad()
def answer_t2t(pair: Pair, questions: Questions, write: Callable[..., Tensor]) -> Tensor:
    """The sharer fills in the whole form, the receiver reads it and answers: logits [Q, 8].

    `write` is `write_form`, as text is written, or `read_values`, which these one-word values
    allow: as cheap as the cache.
    """
    values = write(pair.sharer, pair.world, questions.entities, questions.attributes)
    form = pair.world.filled_form(questions.entities, questions.attributes, values)
    prompt = torch.cat([form, questions.question()], dim=1)
    logits = pair.receiver(input_ids=prompt, logits_to_keep=1).logits[:, -1]
    return of_values(logits, questions.asked)


def other_forms(world: w.World, questions: Questions, seed: int) -> Tensor:
    """Token ids [Q, 3 + K] of blank forms of other questions, about other entities.

    The other entities are train entities: among those each value is equally frequent, whereas the
    held-out entities other than the asked one hold its value less often than one time in eight.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(questions.asked)
    entities = torch.randint(w.NUM_TRAIN, (count,), generator=generator)
    asked = torch.randint(w.NUM_ATTRIBUTES, (count,), generator=generator)
    return world.blank_form(entities, random_forms(asked, questions.size, generator))


@torch.no_grad()
def answer_mismatched(pair: Pair, questions: Questions, seed: int) -> Tensor:
    """C2C on the cache of another question (`other_forms`): logits [Q, 8]."""
    other = prefill(pair.sharer, other_forms(pair.world, questions, seed))
    return answer_c2c(pair, questions, other)


@torch.no_grad()
def answer_zero(pair: Pair, questions: Questions) -> Tensor:
    """C2C on a sharer cache of zeros: logits [Q, 8]."""
    form = pair.world.blank_form(questions.entities, questions.attributes)
    zero = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in prefill(pair.sharer, form)]
    return answer_c2c(pair, questions, zero)


def other_entities(world: w.World, questions: Questions) -> Tensor:
    """For each question the next held-out entity [Q] with another value of what is asked."""
    asked, others = questions.asked, questions.entities.clone()
    for _ in world.held_out:
        same = world.facts[others, asked] == world.facts[questions.entities, asked]
        following = (others + 1 - w.NUM_TRAIN) % w.NUM_HELD_OUT + w.NUM_TRAIN
        others = torch.where(same, following, others)
    return others


@torch.no_grad()
def answer_swapped(pair: Pair, questions: Questions) -> tuple[Tensor, Tensor]:
    """C2C on the same form's cache about `other_entities`: logits [Q, 8], their answers [Q]."""
    others = other_entities(pair.world, questions)
    cache = prefill(pair.sharer, pair.world.blank_form(others, questions.attributes))
    return answer_c2c(pair, questions, cache), questions.answers(pair.world, others)


def chance_interval(
    count: int, level: float = 0.95, candidates: int = w.NUM_VALUES
) -> tuple[int, int]:
    """The central interval of right answers out of `count` that guessing gives with `level`.

    Exact: each tail outside of it has at most (1 - level) / 2 of the binomial distribution. A guess
    is right one time in `candidates`.
    """
    p, tail = 1 / candidates, (1 - level) / 2
    log_p, log_q, total = math.log(p), math.log1p(-p), math.lgamma(count + 1)
    pmf = [
        math.exp(
            total
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * log_p
            + (count - k) * log_q
        )
        for k in range(count + 1)
    ]
    low = next(k for k in range(count + 1) if math.fsum(pmf[: k + 1]) > tail)
    high = next(k for k in range(count, -1, -1) if math.fsum(pmf[k:]) > tail)
    return low, high


MODES = (
    *("receiver", "sharer", "routing", "T2T", "T2T at once"),
    *("C2C", "mismatched", "zero", "swapped"),
)
AT_CHANCE = ("receiver", "mismatched", "zero")  # the controls: what must know nothing
EXPECTED = 0.97  # the part of its answers that C2C must get right, and swapped must follow


def evaluate(pair: Pair, kind: str, size: int, seed: int = 0) -> dict[str, int]:
    """Right answers per mode to all held-out questions of a kind with forms of `size`.

    `swapped` counts answers that are right for the entity whose cache was given; `questions` is
    the number of questions.
    """
    questions = held_out_questions(pair.world, kind, size, seed)
    truth = questions.answers(pair.world)

    def right(logits: Tensor, truth: Tensor = truth) -> int:
        return int((logits.argmax(dim=1) == truth).sum())

    receiver = answer_alone(pair.receiver, pair.world, questions)
    sharer = answer_alone(pair.sharer, pair.world, questions)
    confidence = [logits.softmax(dim=1).amax(dim=1) for logits in (receiver, sharer)]
    routing = torch.where((confidence[0] >= confidence[1])[:, None], receiver, sharer)
    return {
        "questions": len(truth),
        "receiver": right(receiver),
        "sharer": right(sharer),
        "routing": right(routing),
        "T2T": right(answer_t2t(pair, questions, write_form)),
        "T2T at once": right(answer_t2t(pair, questions, read_values)),
        "C2C": right(answer_c2c(pair, questions)),
        "mismatched": right(answer_mismatched(pair, questions, 1000 * seed + size)),
        "zero": right(answer_zero(pair, questions)),
        "swapped": right(*answer_swapped(pair, questions)),
    }


def evaluate_all(pair: Pair, seed: int = 0) -> list[dict]:
    """`evaluate` for every form size and kind, one row each."""
    return [
        {"kind": kind, "size": size, **evaluate(pair, kind, size, seed)}
        for size in FORM_SIZES
        for kind in w.KINDS
    ]


@dataclass(frozen=True)
class Verdict:
    """What the rows of `evaluate_all` say (`judge`)."""

    good: bool  # content crossed, and no control is astray
    interval: tuple[int, int]  # within which each cell of a control must be
    lines: tuple[str, ...]  # the same in words, for people


def judge(rows: Sequence[dict], level: float = 0.95) -> Verdict:
    """Whether C2C answers right, follows the cache it is given, and all controls are at chance.

    The controls are tested together: if all of them guess, all their cells are inside the interval
    with at least `level`. By Bonferroni, each cell's interval is the exact binomial one at
    1 - (1 - level) / cells; that holds however cells depend on each other (all ask about the same
    facts, and both kinds meet the same mismatched caches).

    A guess is right one time in eight, exactly: within the held-out entities each value of an
    attribute is the fact of as many entities as any other, and no control's answer was chosen with
    regard to them. That includes the mismatched caches: their entities, drawn from the train
    entities, have the asked one's value one time in eight, and have seven others as often.
    """
    count = rows[0]["questions"]
    cells = len(rows) * len(AT_CHANCE)
    low, high = chance_interval(count, 1 - (1 - level) / cells)
    right, follows = (min(row[mode] for row in rows) for mode in ("C2C", "swapped"))
    astray = [
        f"{mode} (K = {row['size']}, {row['kind']}): {row[mode]}"
        for row in rows
        for mode in AT_CHANCE
        if not low <= row[mode] <= high
    ]
    found = f"outside are {'; '.join(astray)}" if astray else "they are"
    lines = (
        f"C2C answers at least {right / count:.1%} right everywhere ({EXPECTED:.0%} are needed).",
        f"Given another entity's cache it says that entity's fact: at least {follows / count:.1%}.",
        f"Controls that only guess are right {count // w.NUM_VALUES} times of {count} on average; "
        f"in {level:.0%} of cases all their {cells} cells are inside {low} to {high}: {found}.",
    )
    good = not astray and min(right, follows) >= EXPECTED * count
    return Verdict(good, (low, high), lines)


def table(rows: Sequence[dict]) -> str:
    """The rows of `evaluate_all` as a Markdown table, one line per mode, `is / rivals` a cell."""
    sizes = sorted({row["size"] for row in rows})
    count = rows[0]["questions"]
    lines = [
        f"| right of {count} (is / rivals) | " + " | ".join(f"K = {size}" for size in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for mode in MODES:
        cells = [
            " / ".join(str(row[mode]) for row in rows if row["size"] == size) for size in sizes
        ]
        lines.append(f"| {mode} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(path: Path, **results: object) -> None:
    """Writes results as JSON, with the date, the commit and what they were measured on."""
    commit, dirty = commit_of(Path(__file__).parents[2])
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    environment = {"date": now, "commit": commit, "dirty": dirty, **describe()}
    text = json.dumps({"environment": environment, **results}, indent=2) + "\n"
    write_atomically({path: lambda place: Path(place).write_text(text, "utf-8")})


def main(arguments: list[str] | None = None) -> int:
    """Prints the table of a pair and what it says; returns 0 if that is good, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="holds receiver, sharer and fuser")
    parser.add_argument("--seed", type=int, default=0, help="of the pair's world")
    parser.add_argument("--json", type=Path, help="also write the rows and the environment here")
    options = parser.parse_args(arguments)
    rows = evaluate_all(load_pair(options.directory, options.seed), options.seed)
    verdict = judge(rows)
    print(table(rows), *verdict.lines, sep="\n")
    if options.json is not None:
        write_results(options.json, seed=options.seed, held_out=rows)
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())

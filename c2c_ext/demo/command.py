"""`c2c demo`: the shipped pair answers, through a fused cache, what neither model knows alone."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.generation import attached

SEED = 0
ASSETS = Path(__file__).parent / "assets" / f"seed{SEED}"
SHOWN_SIZE = 6  # attributes in the forms of the questions that are shown one by one
TIMING_ROUNDS = 15

INTRODUCTION = """\
Two language models of {receiver:,} and {sharer:,} parameters and a fuser of {fuser:,}.
The sharer has learnt 240 entities by heart, 12 attributes each; it has never seen a question.
The receiver understands questions and knows which value rivals which; it has no facts.
Both read a blank form, e.g. "{form}".
The receiver is then asked "{question}". The {held_out} entities below were held out: no
fuser training saw them. Guessing is right one time in eight.
"""

NOT_CLAIMED = """\
What this does not show
  C2C is not more accurate than text here: text says everything there is to say.
  The sharer alone, though it never saw a question, gets part of the "is" questions right.
  It is faster because a prefill is parallel and writing is serial. As every value here is one
  word, all can be read off one prefill of the sharer ("T2T at once"): cheaper, and as accurate.
  If the sharer saw the question, it would write one word, and text would win.
  That skills transfer is not shown: the fuser was trained on both kinds of question.
  An open gate is no evidence of use; the controls are: mismatched, zero, swapped.
"""


def run_demo(
    entity: str | None, ask: str | None, *, rivals: bool, json_path: str | None = None
) -> int:
    """Runs the demo, or answers one question of the user's; returns the exit status.

    Args:
        entity, ask: name and attribute of the user's question; both or neither.
        rivals: ask for the rival of the attribute's value; only with a question.
        json_path: also write the table, the latencies and the environment to this file.

    Raises:
        ValueError: an unknown entity or attribute (lists those that are known), or only one given.
    """
    if (entity is None) != (ask is None):
        missing = "--ask ATTRIBUTE" if ask is None else "--entity NAME"
        raise ValueError(f"a question needs both --entity and --ask; {missing} is missing")
    if rivals and entity is None:
        raise ValueError("--rivals goes with --entity and --ask")
    if json_path is not None and entity is not None:
        raise ValueError("--json goes with the whole demo, not with --entity")
    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise ValueError(f"--json: there is no directory {Path(json_path).absolute().parent}")
    started = time.perf_counter()
    pair = _load()
    if entity is not None and ask is not None:
        _answer_one(pair, entity, ask, w.KINDS[w.RIVALS if rivals else w.IS])
        return 0
    _introduce(pair)
    _show_questions(pair)
    rows = _table(pair)
    latency = _latency(pair)
    print(NOT_CLAIMED)
    verdict = ev.judge(rows)
    print("\n".join(verdict.lines))
    if json_path is not None:
        ev.write_results(Path(json_path), held_out=rows, latency_ms=latency)
    print(f"{time.perf_counter() - started:.0f} s in all, {torch.get_num_threads()} threads")
    return 0 if verdict.good else 1


def _load() -> ev.Pair:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # bars of our own follow
    try:
        return ev.load_pair(ASSETS, SEED)
    finally:
        if was_on:
            logging.enable_progress_bar()


def _introduce(pair: ev.Pair) -> None:
    questions = _questions(pair, [(int(pair.world.held_out[0]), 0, w.IS)])
    counts = {
        name: sum(p.numel() for p in model.parameters())
        for name, model in (
            ("receiver", pair.receiver),
            ("sharer", pair.sharer),
            ("fuser", pair.fuser),
        )
    }
    form = pair.world.blank_form(questions.entities, questions.attributes)
    print(
        INTRODUCTION.format(
            **counts,
            form=w.decode(form[0]),
            question=w.decode(questions.question()[0]),
            held_out=w.NUM_HELD_OUT,
        )
    )


def _questions(pair: ev.Pair, wanted: Sequence[tuple[int, int, int]]) -> ev.Questions:
    """Questions (entity, attribute, kind), each with a form of `SHOWN_SIZE` attributes."""
    entities, asked, kinds = (torch.tensor(column) for column in zip(*wanted, strict=True))
    forms = ev.random_forms(asked, SHOWN_SIZE, torch.Generator().manual_seed(SEED))
    return ev.Questions(entities, forms, asked, kinds)


def _answers(pair: ev.Pair, questions: ev.Questions) -> dict[str, str]:
    """What each mode says to one question: the next token over the whole vocabulary."""
    world = pair.world
    form = world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    size = questions.size

    def next_word(model: torch.nn.Module, ids: Tensor, **kwargs: object) -> str:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=w.PAD,
            **kwargs,
        )
        return w.decode(output[0, -1:])

    values = ev.write_form(pair.sharer, world, questions.entities, questions.attributes)
    text = world.filled_form(questions.entities, questions.attributes, values)
    answers = {
        "receiver": next_word(pair.receiver, prompt),
        "sharer": next_word(pair.sharer, prompt),
        "T2T": next_word(pair.receiver, torch.cat([text, questions.question()], dim=1)),
    }
    with attached(pair.receiver, pair.sharer, pair.fuser) as receiver:
        fused = range(w.FORM_START, w.FORM_START + size)
        answers["C2C"] = next_word(receiver, prompt, positions=list(fused))
    return answers


def _true_answer(pair: ev.Pair, questions: ev.Questions) -> str:
    return w.decode(w.value_ids(questions.asked, questions.answers(pair.world)))


def _show_questions(pair: ev.Pair) -> None:
    attributes = [int(a) for a in torch.linspace(0, w.NUM_ATTRIBUTES - 1, 6)]
    wanted = [(int(pair.world.held_out[7 * i]), a, i % 2) for i, a in enumerate(attributes)]
    questions = _questions(pair, wanted)
    lines = [["question", "truth", "receiver", "sharer", "T2T", "C2C"]]
    for i in range(len(wanted)):
        one = ev.Questions(
            questions.entities[i : i + 1],
            questions.attributes[i : i + 1],
            questions.asked[i : i + 1],
            questions.kinds[i : i + 1],
        )
        truth = _true_answer(pair, one)
        name = pair.world.names[wanted[i][0]]
        asked = f"{name}: {w.KINDS[wanted[i][2]]} {w.ATTRIBUTES[wanted[i][1]]}"
        says = [f"{word} {'+' if word == truth else '-'}" for word in _answers(pair, one).values()]
        lines.append([asked, truth, *says])
    print(f"Answers word by word (+ right, - wrong), forms of {SHOWN_SIZE} attributes")
    _print_columns(lines)


def _answer_one(pair: ev.Pair, entity: str, ask: str, kind: str) -> None:
    number = pair.world.entity(entity)
    questions = _questions(pair, [(number, w.attribute(ask), w.KINDS.index(kind))])
    form = pair.world.blank_form(questions.entities, questions.attributes)
    held_out = number in pair.world.held_out.tolist()
    print(f'form      "{w.decode(form[0])}"')
    print(f'question  "{w.decode(questions.question()[0])}"')
    print(f"{entity} was {'held out of' if held_out else 'part of'} the fuser's training\n")
    truth = _true_answer(pair, questions)
    lines = [["truth", truth]]
    for mode, word in _answers(pair, questions).items():
        lines.append([mode, f"{word} {'+' if word == truth else '-'}"])
    _print_columns(lines)


def _table(pair: ev.Pair) -> list[dict]:
    rows = []
    jobs = [(size, kind) for size in ev.FORM_SIZES for kind in w.KINDS]
    for size, kind in _progress(jobs, "all held-out questions"):
        rows.append({"kind": kind, "size": size, **ev.evaluate(pair, kind, size, SEED)})
    print(f"Right answers of {rows[0]['questions']}, is / rivals; K attributes in the form")
    lines = [["", *(f"K = {size}" for size in ev.FORM_SIZES)]]
    for mode in ev.MODES:
        cells = []
        for size in ev.FORM_SIZES:
            cells.append(" / ".join(str(row[mode]) for row in rows if row["size"] == size))
        lines.append([mode, *cells])
    _print_columns(lines)
    print("swapped: the cache was another entity's, and the answer is that entity's fact.\n")
    return rows


def _latency(pair: ev.Pair) -> list[dict]:
    """Prints and returns median milliseconds per mode and form size."""
    modes: dict[str, Callable[[ev.Questions], Tensor]] = {
        "receiver": lambda q: ev.answer_alone(pair.receiver, pair.world, q),
        "T2T": lambda q: ev.answer_t2t(pair, q, ev.write_form),
        "T2T at once": lambda q: ev.answer_t2t(pair, q, ev.read_values),
        "C2C": lambda q: ev.answer_c2c(pair, q),
    }
    times: dict[tuple[str, int], list[float]] = {}  # deciles
    median = 4
    for size in _progress(ev.FORM_SIZES, "latency"):
        questions = _questions(pair, [(int(pair.world.held_out[0]), 0, w.IS)])
        forms = ev.random_forms(questions.asked, size, torch.Generator().manual_seed(SEED))
        questions = replace(questions, attributes=forms)
        samples: dict[str, list[float]] = {mode: [] for mode in modes}
        for round_ in range(TIMING_ROUNDS + 2):
            for mode, answer in modes.items():  # alternating: a slow moment hits all of them
                start = time.perf_counter()
                answer(questions)
                if round_ >= 2:  # the first two warm up
                    samples[mode].append(time.perf_counter() - start)
        for mode in modes:
            times[mode, size] = [1e3 * t for t in statistics.quantiles(samples[mode], n=10)]
    print(f"Milliseconds from form to answer, batch 1, median of {TIMING_ROUNDS}, alternating")
    lines = [["", *(f"K = {size}" for size in ev.FORM_SIZES)]]
    for mode in modes:
        lines.append([mode, *(f"{times[mode, size][median]:.1f}" for size in ev.FORM_SIZES)])
    ratios = [times["T2T", s][median] / times["C2C", s][median] for s in ev.FORM_SIZES]
    lines.append(["T2T : C2C", *(f"{ratio:.1f} x" for ratio in ratios)])
    _print_columns(lines)
    return [
        {"mode": mode, "size": size}
        | {name: round(t[i], 2) for name, i in (("p20", 1), ("median", median), ("p80", 7))}
        for (mode, size), t in times.items()
    ]


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print(
            "  "
            + "   ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)).rstrip()
        )
    print()


def _progress(items: Sequence, label: str) -> Iterator:
    """Iterates behind a progress bar on a terminal's standard error; the bar needs rich."""
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        for i, item in enumerate(items):
            print(f"\r{label}: {i}/{len(items)}", end="", file=sys.stderr, flush=True)
            yield item
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
        return
    yield from track(items, label, console=Console(stderr=True), transient=True)

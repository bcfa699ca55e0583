"""What the shipped pair's fuser needs: its recipe with one thing changed, trained and asked again.

`python -m benchmarks.evidence.ablations --seeds 0 1` trains a fuser for every variant in
ablations.yaml and every seed (of the training: models, facts and questions stay the shipped
pair's) and writes benchmarks/results/evidence/ablations.json after each. Beside the questions about
held-out entities, which no variant was trained on, the same ones are asked about train entities: a
fuser that is right about these alone has learnt them by heart.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.evidence.outcomes import Cell
from benchmarks.tables import markdown
from c2c_ext import Fuser
from c2c_ext.analysis.chart import bar_chart
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import export
from c2c_ext.demo import world as w
from c2c_ext.machine import environment
from c2c_ext.measure import write_text
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.run import Setup, load_setup, run_once
from c2c_ext.training.sweep import load_variants

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
BASE = "tiny"
HELD_OUT, TRAIN = "held-out", "train"  # entities, in cells' names
CONTROLS = ("mismatched", "zero")
Job = tuple[str, dict[str, Any], int]  # variant, its changes, seed of the training


def cells_of(pair: ev.Pair) -> list[Cell]:
    """Which questions a pair answers right, about held-out and about train entities."""
    cells = []
    for size, kind in _asked():
        questions = ev.held_out_questions(pair.world, kind, size)
        known = replace(questions, entities=questions.entities - len(pair.world.train))
        right = {
            "c2c": ev.answer_c2c(pair, questions),
            "mismatched": ev.answer_mismatched(pair, questions, size),
            "zero": ev.answer_zero(pair, questions),
        }
        cells.append(_cell(HELD_OUT, pair.world, questions, right))
        cells.append(_cell(TRAIN, pair.world, known, {"c2c": ev.answer_c2c(pair, known)}))
    return cells


def baselines_of(pair: ev.Pair) -> list[Cell]:
    """Which held-out questions the receiver answers right alone, and by the sharer's text."""
    cells = []
    for size, kind in _asked():
        questions = ev.held_out_questions(pair.world, kind, size)
        right = {
            "receiver": ev.answer_alone(pair.receiver, pair.world, questions),
            "t2t": ev.answer_t2t(pair, questions, ev.write_form),
        }
        cells.append(_cell(HELD_OUT, pair.world, questions, right))
    return cells


def _asked() -> list[tuple[int, str]]:
    return [(size, kind) for size in ev.FORM_SIZES for kind in w.KINDS]


def _name(entities: str, size: int, kind: str) -> str:
    return f"{entities}, {kind}, K = {size}"


def _cell(
    entities: str,
    world: w.World,
    questions: ev.Questions,
    logits: Mapping[str, torch.Tensor],  # [Q, 8] by mode
) -> Cell:
    truth = questions.answers(world)
    right = {mode: one.argmax(dim=1) == truth for mode, one in logits.items()}
    kind = w.KINDS[int(questions.kinds[0])]
    return Cell(_name(entities, questions.size, kind), w.NUM_VALUES, right)


@functools.lru_cache(maxsize=1)
def _setup(work: Path) -> tuple[Setup, ev.Pair]:
    """Models and data, once in every process; the pair has the shipped fuser."""
    torch.set_num_threads(1)  # the order of additions, and so every bit, depends on it
    transformers.utils.logging.disable_progress_bar()
    places = [str(work / name) for name in ("receiver", "sharer", "train.jsonl")]
    return load_setup(load_recipe(BASE), *places), ev.load_pair(export.ASSETS, export.SEED)


def run_variant(work: Path, settings: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """Trains one variant with one seed by `c2c train`'s own code, asks it, and says what came out.

    Args:
        work: holds what `c2c_ext.demo.export` writes; the training's files are removed again.
        settings: of the recipe, for all variants.
    """
    from c2c_ext.training.trainer import NonFiniteError

    name, changes, seed = job
    setup, shipped = _setup(work)
    recipe = load_recipe(BASE).changed({**settings, **changes, "seed": seed})
    config = recipe.fuser_config(setup.receiver.config, setup.sharer.config)
    row = {
        "variant": name,
        "changes": changes,
        "seed": seed,
        "layer_map": list(config.layer_map),
        "parameters": config.num_parameters(),
    }
    directory = work / f"{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was stopped
    started, cpu = time.perf_counter(), time.process_time()
    try:
        result = run_once(setup, recipe, directory)
    except NonFiniteError as error:
        return {**row, "diverged_in_step": error.step}
    else:
        fuser = Fuser.from_pretrained(directory).float().eval().requires_grad_(False)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    names = ("steps", "train_loss", "open_streams", "streams")
    return {
        **row,
        **{key: result[key] for key in names},
        "cells": [cell.to_json() for cell in cells_of(replace(shipped, fuser=fuser))],
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def changed_code() -> bool | None:
    """Whether tracked files, results apart, differ from the commit; None outside of a checkout."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "-uno", "--", "."]
    try:
        done = subprocess.run(
            [*command, ":!benchmarks/results"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return bool(done.stdout.strip())


def header(work: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The results file without runs: what all of them share."""
    pair = _setup(work)[1]
    return {
        "environment": {**environment(), "changed_code": changed_code()},
        "world": {"seed": export.SEED, "digest": pair.world.digest()},
        "recipe": load_recipe(BASE).changed(settings).to_dict(),
        "training_questions": len(_setup(work)[0].train),
        "baselines": [cell.to_json() for cell in baselines_of(pair)],
        "runs": [],
    }


def resumed(
    document: dict[str, Any], old: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """``document`` with the runs of ``old`` whose variant is still what it was.

    Raises:
        ValueError: the old file is of other code or another recipe; says which.
    """
    for key in ("commit", "changed_code", "torch", "transformers"):
        was, now = (data["environment"].get(key) for data in (old, document))
        if was != now or (key == "changed_code" and was is not False):
            raise ValueError(f"--resume: the file was written with {key} {was}, this is {now}")
    for key in ("recipe", "world", "training_questions"):
        if old[key] != document[key]:
            raise ValueError(f"--resume: the file was written with another {key}")
    runs = [run for run in old["runs"] if variants.get(run["variant"]) == run["changes"]]
    return {**document, "environment": old["environment"], "runs": runs}


def results_of(
    jobs: Sequence[Job], run: Callable[[Job], dict[str, Any]], processes: int
) -> Iterator[dict[str, Any]]:
    """What each job gives, as it comes."""
    if processes == 1:
        yield from map(run, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # not hours later, after all others
            raise


def save(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1) + "\n")


def _counts(rows: Sequence[Mapping[str, Any]], entities: str, mode: str) -> tuple[int, int]:
    """Right answers and questions over all cells about some entities."""
    cells = [Cell.from_json(row) for row in rows if row["cell"].startswith(entities)]
    return sum(cell.count(mode) for cell in cells), sum(cell.questions for cell in cells)


def _by_variant(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each variant by seed, in the order of the recipe file."""
    order = [*load_variants(VARIANTS, load_recipe(BASE))]
    names = {run["variant"] for run in document["runs"]}
    if unknown := names - set(order):
        raise ValueError(f"{VARIANTS.name} has no variant {', '.join(sorted(unknown))}")
    runs = sorted(document["runs"], key=lambda run: run["seed"])
    return {n: [run for run in runs if run["variant"] == n] for n in order if n in names}


def table(path: Path) -> str:
    """Markdown of a results file: a row per variant, in it a line per seed."""
    document = json.loads(path.read_text("utf-8"))
    rows = [
        (name, "", "", "", "", mode, [document["baselines"]])
        for name, mode in (("receiver alone", "receiver"), ("text (T2T)", "t2t"))
    ]
    for name, runs in _by_variant(document).items():
        ran = [run for run in runs if "cells" in run]
        losses = [f"{run['train_loss']:.3f}" for run in ran]
        losses += [f"diverged (seed {run['seed']})" for run in runs if run not in ran]
        size = f"{runs[0]['parameters']:,}".replace(",", " ")
        seeds = "<br>".join(str(run["seed"]) for run in ran)
        gates = "<br>".join(map(_gates, ran))
        rows.append(
            (name, size, seeds, "<br>".join(losses), gates, "c2c", [r["cells"] for r in ran])
        )
    count = _counts(document["baselines"], HELD_OUT, "receiver")[1]
    each = document["baselines"][0]["questions"]
    heads = ["variant", "parameters", "seed", "loss", "gates open"]
    heads += [f"K = {size}: is / rivals" for size in ev.FORM_SIZES]
    heads += ["held-out", "train", *CONTROLS]
    lines = []
    for *said, mode, runs in rows:
        for size in ev.FORM_SIZES:
            said.append("<br>".join(_of_size(cells, mode, size) for cells in runs))
        columns = [(HELD_OUT, mode), (TRAIN, mode), *((HELD_OUT, one) for one in CONTROLS)]
        if mode != "c2c":
            columns = columns[:1]
        for column in columns:
            said.append("<br>".join(str(_counts(cells, *column)[0]) for cells in runs))
        lines.append(said + [""] * (len(heads) - len(said)))
    said = document["environment"]
    return (
        f"Right of {each} questions about held-out entities each; then of all {count} of them, of "
        f"{count} about train entities, and of the held-out ones under two controls.\n\n"
        + markdown(heads, lines)
        + f"\nMeasured on {said['date'][:10]} at {(said['commit'] or 'no commit')[:7]}"
        + ("" if said["changed_code"] is False else " and changes")
        + f", {said['cpu']}, torch {said['torch']}, transformers {said['transformers']} "
        + f"([{path.name}](../benchmarks/results/evidence/{path.name})).\n"
    )


def _gates(run: Mapping[str, Any]) -> str:
    gated = run["changes"].get("gate", True)
    return f"{run['open_streams']} of {run['streams']}" if gated else "none"


def _of_size(rows: Sequence[Mapping[str, Any]], mode: str, size: int) -> str:
    right = {row["cell"]: row["modes"].get(mode, {}).get("right") for row in rows}
    return " / ".join(str(right[_name(HELD_OUT, size, kind)]) for kind in w.KINDS)


def drawing(path: Path) -> str:
    """SVG of a results file: right answers about held-out entities, mean of a variant's seeds."""
    document = json.loads(path.read_text("utf-8"))
    bars = []
    for name, runs in _by_variant(document).items():
        right = [_counts(run["cells"], HELD_OUT, "c2c")[0] for run in runs if "cells" in run]
        if right:
            bars.append((name, round(sum(right) / len(right))))
    count = _counts(document["baselines"], HELD_OUT, "receiver")[1]
    note = f"mean of the seeds; guessing: {count // w.NUM_VALUES}; {path.name}"
    return bar_chart(f"Right of {count} questions about held-out entities", note, bars)


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.ablations", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="S")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="default: all")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--rows", type=int, default=export.ROWS, help="questions to train on")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "evidence" / "ablations")
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json")
    parser.add_argument("--resume", action="store_true", help="keep the runs in --output")
    options = parser.parse_args(arguments)
    variants = load_variants(VARIANTS, load_recipe(BASE))
    names = options.only or list(variants)
    if unknown := [name for name in names if name not in variants]:
        parser.error(f"--only: {VARIANTS.name} has {', '.join(variants)}; got {', '.join(unknown)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    settings = {}
    if options.steps is not None:
        settings = {"max_steps": options.steps, "anneal_steps": options.steps}
    jobs: list[Job] = [(name, variants[name], seed) for seed in options.seeds for name in names]
    export.main([str(options.work), "--rows", str(options.rows)])
    document = header(options.work, settings)
    if options.resume and options.output.exists():
        old = json.loads(options.output.read_text("utf-8"))
        try:
            document = resumed(document, old, variants)
        except ValueError as error:
            parser.error(str(error))
    done = {(run["variant"], run["seed"]) for run in document["runs"]}
    left = [job for job in jobs if (job[0], job[2]) not in done]
    run = functools.partial(run_variant, options.work, settings)
    for number, row in enumerate(results_of(left, run, options.jobs), 1):
        document["runs"].append(row)
        save(options.output, document)
        print(f"{number} of {len(left)}: {row['variant']}, seed {row['seed']}", flush=True)
    if options.output.exists():
        print(table(options.output), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

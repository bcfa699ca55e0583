"""`c2c eval`: every mode answers the same tasks, and the tables say whether content crossed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..chat.models import ChatModels, load_models
from ..files import checked_target
from ..messages import shown_name
from .latency import Stopwatch, latency, latency_table
from .modes import MODES
from .readers import EvaluationPair
from .results import (
    Answers,
    multiplicity,
    of_first_filter,
    pooled,
    right_or_wrong,
    summarise,
    table,
)
from .text_to_text import T2T_PROMPT, Wording

POOL = "all tasks"


def run_eval(
    *,
    receiver: str | None,
    sharer: str | None,
    fuser: str | None,
    identical_fuser: str | None,
    tasks: Sequence[str],
    include_path: str | None,
    modes: Sequence[str] | None,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    chat_template: bool,
    system: str | None,
    metric: str | None,
    t2t_tokens: int,
    t2t_prompt: str | None,
    greedy: bool,
    rolling_block: int,
    dtype: str,
    device: str,
    synchronize: bool,
    json: str | None,
) -> int:
    """Prints a table of each task, of all together and of the latency, and returns 0.

    Args:
        receiver, sharer, fuser, dtype, device: see `load_models`.
        identical_fuser: see `EvaluationPair`.
        tasks: names that the harness knows, or of task files in ``include_path``.
        modes: of `MODES`; None: all that the pair and the tasks allow.
        limit: questions of each task.
        num_fewshot: examples before each question; None: as the task says.
        batch_size: contexts at a time.
        chat_template: ask in the receiver's chat template.
        system: a message before all others.
        metric: see `right_or_wrong`.
        t2t_tokens, t2t_prompt: see `Wording`.
        greedy: see `load_tasks`.
        rolling_block: see `C2CModel`.
        synchronize: see `Stopwatch.waits_for`.
        json: a file for all results.

    Raises:
        ValueError, OSError: an option or a file breaks a rule, or the extra is missing; nothing has
            been asked yet, but for what only an answer can show.
    """
    for option, value in (
        ("--batch-size", batch_size),
        ("--limit", limit),
        ("--t2t-tokens", t2t_tokens),
        ("--rolling-block", rolling_block),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot must be at least 0, got {num_fewshot}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path: {shown_name(include_path)} is no directory")
    for mode in modes or ():
        if mode not in MODES:
            raise ValueError(f"--modes: there are {', '.join(MODES)}, got {shown_name(mode)}")
    try:
        wording = Wording(
            prompt=T2T_PROMPT if t2t_prompt is None else t2t_prompt, tokens=t2t_tokens
        )
    except ValueError as error:
        raise ValueError(f"--t2t-prompt: {error}") from error
    target = None if json is None else checked_target("--json", json)
    try:
        import lm_eval  # noqa: F401 - asked before anything is loaded

        from .harness import evaluation_pair
        from .tasks import find_tasks, load_tasks, refusals
    except ImportError as error:
        raise ValueError(
            f"needs the extra eval: pip install 'c2c_ext[eval]' ({error.name} is missing)"
        ) from error
    manager, names = find_tasks(tasks, include_path)
    loaded = load_models(receiver, sharer, fuser, dtype=dtype, device=device)
    pair = evaluation_pair(loaded, identical_fuser)
    if chat_template:
        for side in ("receiver",) if pair.same_tokens else ("receiver", "sharer"):
            if not loaded.tokenizers[side].chat_template:
                raise ValueError(f"--chat-template: the {side}'s tokenizer has none")
    if synchronize and loaded.receiver.device.type != "cuda":
        raise ValueError("--synchronize goes with a GPU: on a CPU the parts are told apart anyway")
    asked = load_tasks(
        manager, names, limit=limit, num_fewshot=num_fewshot, greedy=greedy, metric=metric
    )
    refused = refusals(asked, pair)
    chosen = list(dict.fromkeys(modes or MODES))
    for mode in [mode for mode in chosen if mode in refused]:
        if modes is not None:
            raise ValueError(f"--modes: {refused[mode]}")
        chosen.remove(mode)
        print(f"without {refused[mode]}", flush=True)

    def run(mode: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return _run(
            mode,
            loaded,
            replace(pair, clock=Stopwatch(loaded.receiver.device if synchronize else None)),
            questions=sum(asked.questions.values()),
            batch_size=batch_size,
            wording=wording,
            rolling_block=rolling_block,
            harness={
                "task_dict": asked.for_a_run(),
                "limit": limit,
                "apply_chat_template": chat_template,
                "system_instruction": system,
            },
        )

    runs, details = _of_modes(chosen, run)
    results = _results(runs, asked.members, metric)
    _show(results, details, metric)
    if target is not None:
        from ..demo.evaluate import write_results

        settings = {
            "tasks": list(tasks),
            "modes": chosen,
            "without": {mode: reason for mode, reason in refused.items() if modes is None},
            "limit": limit,
            "num_fewshot": num_fewshot,
            "batch_size": batch_size,
            "chat_template": chat_template,
            "system": system,
            "same_tokens": pair.same_tokens,
            "rolling_block": rolling_block,
            "t2t": {"prompt": wording.prompt, "reading": wording.reading, "tokens": t2t_tokens},
            "dtype": str(loaded.receiver.dtype).removeprefix("torch."),
            "device": str(loaded.receiver.device),
        }
        write_results(target, models=loaded.names, settings=settings, modes=details, **results)
    return 0


def _of_modes(
    chosen: Sequence[str], run: Callable[[str], tuple[dict[str, Any], dict[str, Any]]]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    both = {mode: run(mode) for mode in chosen}
    return (
        {mode: found for mode, (found, _) in both.items()},
        {mode: detail for mode, (_, detail) in both.items()},
    )


def _run(
    mode: str,
    loaded: ChatModels,
    pair: EvaluationPair,
    *,
    questions: int,
    batch_size: int,
    wording: Wording,
    rolling_block: int,
    harness: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the harness found in one mode, and what the mode took."""
    from lm_eval import evaluate

    from .harness import C2CModel

    model = C2CModel(
        mode=mode,
        batch_size=batch_size,
        wording=wording,
        rolling_block=rolling_block,
        loaded=loaded,
        pair=pair,
    )
    start = time.perf_counter()
    found = evaluate(lm=model, bootstrap_iters=0, fewshot_as_multiturn=True, **harness)
    total = time.perf_counter() - start
    took = latency(pair.clock, loaded.receiver.device, questions=questions, total=total)
    return found, {
        **took,
        "truncated": model.truncated,
        "texts_written": len(model.written),
        "tokens_written": sum(model.written),
        "tokens_answered": model.answered,
    }


def _results(
    runs: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]], metric: str | None
) -> dict[str, Any]:
    """Every task's results, those of tasks together, and how many verdicts there are."""
    first = next(iter(runs.values()))["samples"]
    tasks = {name: _task(name, runs, metric) for name in first}
    answers = {
        name: Answers(found["right"], [s["doc_hash"] for s in of_first_filter(first[name])])
        for name, found in tasks.items()
        if found["right"] is not None
    }
    pools = {**groups, POOL: list(answers)}
    together: dict[str, Any] = {}
    for pool, names in pools.items():
        held = {name: answers[name] for name in names if name in answers}
        if len(held) > 1 and all(list(held) != row["tasks"] for row in together.values()):
            together[pool] = pooled(held)
    verdicts = {name: tasks[name]["verdict"] for name in answers if tasks[name]["verdict"]}
    several = multiplicity(verdicts) if len(verdicts) > 1 else None
    return {"tasks": tasks, "pooled": together, "multiplicity": several}


def _task(name: str, runs: Mapping[str, Mapping[str, Any]], metric: str | None) -> dict[str, Any]:
    """A task's results over all modes: the harness's own figures, and ours where there are any."""
    own = {
        mode: {
            "aggregates": {
                key: value if math.isfinite(value) else str(value)  # JSON has no infinity
                for key, value in run["results"].get(name, {}).items()
                if isinstance(value, (int, float))
            }
        }
        for mode, run in runs.items()
    }
    samples = {mode: run["samples"][name] for mode, run in runs.items()}
    chosen = right_or_wrong(samples, metric)
    if chosen is None:
        return {"metric": None, "right": None, "harness": own}
    answers = {mode: of_first_filter(logged) for mode, logged in samples.items()}
    right = {mode: [bool(s[chosen]) for s in asked] for mode, asked in answers.items()}
    filter_name = next(iter(answers.values()))[0]["filter"]
    label = chosen if filter_name == "none" else f"{chosen}, {filter_name}"
    return {"metric": label, "right": right, "harness": own, **summarise(right)}


def _show(
    results: Mapping[str, Any], details: Mapping[str, Mapping[str, Any]], metric: str | None
) -> None:
    for name, found in results["tasks"].items():
        if found["right"] is None:
            values = {mode: row["aggregates"] for mode, row in found["harness"].items()}
            by = "" if metric is None else f" by {shown_name(metric)}"
            print(f"{shown_name(name)}: no answers that are right or wrong{by}; {values}\n")
        else:
            print(table(shown_name(name), shown_name(found["metric"]), found), end="\n\n")
    for pool, found in results["pooled"].items():
        left_out = f", {found['repeated']} repeated questions left out" if found["repeated"] else ""
        print(
            table(shown_name(pool), f"{len(found['tasks'])} tasks pooled{left_out}", found),
            end="\n\n",
        )
    if results["multiplicity"]:
        print(shown_name(results["multiplicity"]["line"], 4000), end="\n\n")
    print(latency_table(details), end="\n\n")

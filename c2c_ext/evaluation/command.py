"""`c2c eval`: every mode answers the same tasks, and the table says whether content crossed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..chat.models import load_models
from ..messages import shown_name
from .modes import MODES
from .readers import EvaluationPair
from .results import right_answers, summarise, table
from .text_to_text import T2T_PROMPT, Wording


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
    metric: str | None,
    t2t_tokens: int,
    t2t_prompt: str | None,
    dtype: str,
    device: str,
    json: str | None,
) -> int:
    """Prints a table of each task, and returns 0.

    Args:
        receiver, sharer, fuser, dtype, device: see `load_models`.
        identical_fuser: see `EvaluationPair`.
        tasks: names that the harness knows, or of task files in ``include_path``.
        modes: of `MODES`; None: all, without ``"identical"`` where the fuser does not fit.
        limit: questions of each task.
        num_fewshot: examples before each question; None: as the task says.
        batch_size: contexts at a time.
        chat_template: ask in the receiver's chat template.
        metric: see `right_answers`.
        t2t_tokens, t2t_prompt: see `Wording`.
        json: a file for all results.

    Raises:
        ValueError, OSError: an option or a file breaks a rule, or the extra is missing.
    """
    for option, value in (
        ("--batch-size", batch_size),
        ("--limit", limit),
        ("--t2t-tokens", t2t_tokens),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"--num-fewshot must be at least 0, got {num_fewshot}")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"--include-path: {include_path} is no directory")
    for mode in modes or ():
        if mode not in MODES:
            raise ValueError(f"--modes: there are {', '.join(MODES)}, got {shown_name(mode)}")
    try:
        wording = Wording(prompt=t2t_prompt or T2T_PROMPT, tokens=t2t_tokens)
    except ValueError as error:
        raise ValueError(f"--t2t-prompt: {error}") from error
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from .harness import C2CModel
    except ImportError as error:
        raise ValueError(
            f"needs the extra eval: pip install 'c2c_ext[eval]' ({error.name} is missing)"
        ) from error
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"--tasks: the harness knows no {shown_name(unknown[0])}")
    loaded = load_models(receiver, sharer, fuser, dtype=dtype, device=device)
    chosen = list(dict.fromkeys(modes or MODES))
    if modes is None and identical_fuser is None:
        try:
            EvaluationPair(loaded.receiver, loaded.sharer, loaded.fuser).fuser_of("identical")
        except ValueError as error:
            chosen.remove("identical")
            print(f"without {error}", flush=True)
    runs: dict[str, dict[str, Any]] = {}
    details: dict[str, dict[str, Any]] = {}
    for mode in chosen:
        model = C2CModel(
            mode=mode,
            identical_fuser=identical_fuser,
            batch_size=batch_size,
            wording=wording,
            loaded=loaded,
        )
        start = time.perf_counter()
        runs[mode] = simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat_template,
            bootstrap_iters=0,
            # Nothing here is drawn but the examples, by a generator of their own.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        details[mode] = {
            "seconds": time.perf_counter() - start,
            "truncated": model.truncated,
            "texts_written": len(model.written),
            "tokens_written": sum(model.written),
        }
    found = {name: _task(name, runs, metric) for name in runs[chosen[0]]["samples"]}
    for name, result in found.items():
        if result["right"] is None:
            values = {mode: row["aggregates"] for mode, row in result["harness"].items()}
            print(f"{name}: no answers that are right or wrong; {values}\n")
        else:
            print(table(name, result["metric"], result), end="\n\n")
    if json is not None:
        from ..demo.evaluate import write_results

        settings = {
            "tasks": list(tasks),
            "modes": chosen,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "chat_template": chat_template,
            "t2t": {"prompt": wording.prompt, "reading": wording.reading, "tokens": t2t_tokens},
            "dtype": str(loaded.receiver.dtype).removeprefix("torch."),
        }
        write_results(
            Path(json), models=loaded.names, settings=settings, modes=details, tasks=found
        )
    return 0


def _task(name: str, runs: dict[str, dict[str, Any]], metric: str | None) -> dict[str, Any]:
    """A task's results over all modes: the harness's own figures, and ours where there are any."""
    own = {
        mode: {
            "aggregates": {
                key: value
                for key, value in run["results"].get(name, {}).items()
                if isinstance(value, (int, float))
            }
        }
        for mode, run in runs.items()
    }
    answers = {mode: right_answers(run["samples"][name], metric) for mode, run in runs.items()}
    if any(answer is None for answer in answers.values()):
        return {"metric": None, "right": None, "harness": own}
    right = {mode: answer[1] for mode, answer in answers.items() if answer is not None}
    (label,) = {answer[0] for answer in answers.values() if answer is not None}
    return {"metric": label, "right": right, "harness": own, **summarise(right)}

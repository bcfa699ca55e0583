"""The tasks of a run, loaded and checked before any model answers.

Task files may name Python code, which the harness then runs, and hold templates: they are programs,
and their errors can be of any kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lm_eval.tasks import TaskManager

from ..messages import shown_name
from .harness import check_generation, rolling_refusal
from .modes import MODES
from .readers import EvaluationPair

Result = TypeVar("Result")
GREEDY = {"do_sample": False, "temperature": 0.0}
FEWSHOT_SEED = 1234  # the harness's own
KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice")


@dataclass
class Tasks:
    """What is asked.

    Attributes:
        leaves: every single task by name.
        groups: the harness's groups by name.
        questions: of each single task, after the limit.
    """

    leaves: dict[str, Any]
    groups: dict[str, Any]
    questions: dict[str, int]

    @property
    def members(self) -> dict[str, list[str]]:
        """The names of the single tasks in every group of several."""
        inside = {
            name: [task.task_name for task in group.get_all_tasks()]
            for name, group in self.groups.items()
        }
        return {name: tasks for name, tasks in inside.items() if len(tasks) > 1}

    def for_a_run(self) -> dict[str, Any]:
        """As the harness takes them; every run draws the same few-shot examples."""
        for task in self.leaves.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        children = {name: group.child_names for name, group in self.groups.items()}
        return {"tasks": self.leaves, "groups": self.groups, "group_map": children}


def find_tasks(names: Sequence[str], include_path: str | None) -> tuple[TaskManager, list[str]]:
    """The harness's index of tasks, and the names in it that are meant.

    Args:
        names: of tasks, groups or tags; may be patterns, as of files.
        include_path: a directory with task files.

    Raises:
        ValueError: a name that is none.
    """
    if include_path is not None:
        # The harness reads thousands of its own files, which takes longer than a small task.
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_own(own, name) for name in names):
            return own, list(dict.fromkeys(names))
    manager = TaskManager(include_path=include_path)
    found: dict[str, None] = {}
    for name in names:
        exact = name in manager.task_index
        matching = [name] if exact else manager.match_tasks([name])
        if not matching:
            hint = "; a file that is no YAML is passed over" if include_path is not None else ""
            raise ValueError(
                f"--tasks: the harness knows no {shown_name(name) or repr(name)}{hint}"
            )
        found.update(dict.fromkeys(matching))
    return manager, list(found)


def _is_own(manager: TaskManager, name: str) -> bool:
    """Whether a manager knows a task, and all of a group's."""
    if name not in manager.all_groups:
        return name in manager.all_subtasks
    inside = (manager.task_index[name].cfg or {}).get("task") or []
    inside = [inside] if isinstance(inside, str) else inside
    return all(isinstance(task, str) and _is_own(manager, task) for task in inside)


def load_tasks(
    manager: TaskManager,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    greedy: bool = False,
    metric: str | None = None,
) -> Tasks:
    """Loads tasks with their data, and makes their questions once.

    Args:
        names: as `find_tasks` gave them.
        limit: questions of each.
        num_fewshot: examples before each question, where a task does not say that it has none;
            None: as the task says.
        greedy: whether tasks that ask for sampling are decoded greedily all the same.

        metric: that every task must have whose answers can be right or wrong.

    Raises:
        ValueError: a task that cannot be loaded, has no question, or asks for what is not done
            here; names it.
    """
    leaves: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for name in names:
        loaded = _attempt(name, "cannot be loaded", lambda name=name: manager.load([name]))
        groups |= loaded["groups"]
        if both := leaves.keys() & loaded["tasks"].keys():
            raise ValueError(
                f"--tasks: {shown_name(min(both))} is named twice, alone or in a group"
            )
        leaves |= loaded["tasks"]
    for task in leaves.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        elif num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        if greedy and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value=GREEDY, update=True)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    questions = {name: _checked(name, task, limit, metric) for name, task in leaves.items()}
    return Tasks(leaves, groups, questions)


def refusals(tasks: Tasks, pair: EvaluationPair) -> dict[str, str]:
    """Why modes cannot be evaluated, by mode; each begins with the mode's name."""
    kinds = {task.OUTPUT_TYPE for task in tasks.leaves.values()}
    found = {}
    for mode in MODES:
        try:
            pair.check(mode)
        except ValueError as error:
            found[mode] = str(error)
            continue
        if "loglikelihood_rolling" in kinds and (reason := rolling_refusal(mode, pair)):
            found[mode] = reason
    for kind in kinds:  # what is mismatched is another question that is asked in the same way
        named = [name for name, task in tasks.leaves.items() if task.OUTPUT_TYPE == kind]
        if sum(tasks.questions[name] for name in named) < 2:
            found["mismatched"] = (
                f"mismatched: needs the context of another question, and there is only one: "
                f"{shown_name(named[0])}"
            )
    return found


def _checked(name: str, task: Any, limit: int | None, metric: str | None) -> int:
    """How many questions a task asks."""
    kind, label = getattr(task, "OUTPUT_TYPE", None), shown_name(name)
    if kind not in KINDS:
        raise ValueError(f"--tasks: {label} is of the kind {kind}, and must be one of {KINDS}")
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"--tasks: {label} runs code that a model has written, which is refused")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"--tasks: {label} needs images or sounds; these models read text")
    if kind == "generate_until":
        try:
            check_generation(dict(task.config.generation_kwargs or {}), label)
        except ValueError as error:
            raise ValueError(f"--tasks: {error}") from error
    measured = list(task.aggregation())
    if metric is not None and kind != "loglikelihood_rolling" and metric not in measured:
        raise ValueError(
            f"--metric: {label} measures {', '.join(map(shown_name, measured))}, got "
            f"{shown_name(metric)}"
        )
    count = _attempt(name, "has no questions that can be read", lambda: len(task.eval_docs))
    if count == 0:
        raise ValueError(f"--tasks: {label} has no questions")
    count = count if limit is None else min(limit, count)
    # Not kept: few-shot examples and chat templates are the run's. But errors come before it.
    _attempt(
        name,
        "makes no requests of its questions",
        lambda: task.build_all_requests(limit=limit, rank=0, world_size=1),
    )
    if kind != "loglikelihood_rolling" and any(
        kind != "generate_until" and not str(instance.args[1]).strip()
        for instance in task.instances
    ):
        raise ValueError(f"--tasks: {label} has an answer or option without text")
    return count


def _attempt(name: str, problem: str, action: Callable[[], Result]) -> Result:
    """What ``action`` gives; whatever a task's own code raises is one error that names the task."""
    try:
        return action()
    except Exception as error:
        if isinstance(error, StopIteration):  # the harness looks for the first question
            problem, reason = "has no questions", ""
        else:
            reason = f": {type(error).__name__}: {shown_name(' '.join(str(error).split()), 200)}"
        raise ValueError(f"--tasks: {shown_name(name)} {problem}{reason}") from error

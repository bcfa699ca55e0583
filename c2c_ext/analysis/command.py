"""`c2c analyze`: models and questions loaded, one analysis run, its rows printed and written."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..chat.models import ChatModels, load_models
from ..chat.text import printable
from ..demo.world import NUM_ATTRIBUTES
from ..files import checked_target
from ..machine import environment
from ..measure import document, write_json, write_text
from ..messages import shown_name
from . import retention, solved
from .arguments import ANALYSES
from .attention_outputs import cosine_rows
from .curves import layer_rows, position_rows
from .drawings import drawn
from .effective_rank import rank_rows
from .file_questions import file_questions
from .questions import FORM_SIZE, Questions, shipped_questions
from .tables import shown
from .weight_maps import weight_rows


def run_analyze(
    what: str,
    *,
    receiver: str | None = None,
    sharer: str | None = None,
    fuser: str | None = None,
    questions: str | None = None,
    limit: int | None = None,
    form_size: int | None = None,
    filled: bool = False,
    t2t_tokens: int | None = None,
    t2t_prompt: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    json_path: str | None = None,
    svg_path: str | None = None,
) -> int:
    """Prints one analysis as tables; returns the exit status.

    Args:
        what: a key of `ANALYSES`.
        receiver, sharer, fuser, dtype, device: see `load_models`; none: the shipped pair.
        questions: see `file_questions`; needed with models of one's own, and only with them.
        limit: questions at most, see `sample`; of the shipped pair's two kinds, of each.
        form_size: attributes in the shipped pair's forms, 1..12; None: `FORM_SIZE`.
        filled: see `shipped_questions`; with ``"attention"``.
        t2t_tokens: that the sharer may write, with ``"solved"``; None: 128, or the whole form.
        t2t_prompt: what it is asked for, see `load_models`; with ``"solved"``.
        json_path: also write all rows, arguments and environment to this file.
        svg_path: also draw them to this file.

    Raises:
        ValueError, OSError: an option or a file breaks a rule; names it. Nothing is written.
    """
    if what not in ANALYSES:
        raise ValueError(f"must be one of {', '.join(ANALYSES)}, got {what!r}")
    own = any(place is not None for place in (receiver, sharer, fuser))
    _check_options(what, own, questions, limit, form_size, filled, t2t_tokens, t2t_prompt)
    targets = _targets(questions, json_path, svg_path)
    models = _loaded(receiver, sharer, fuser, dtype=dtype, device=device, t2t_prompt=t2t_prompt)
    with torch.no_grad():
        if questions is None:
            asked = shipped_questions(models, limit, form_size or FORM_SIZE, filled=filled)
        else:
            asked = file_questions(models, questions, limit)
        rows, more = _analysed(what, models, asked, t2t_tokens or asked.t2t_tokens)
    count = sum(len(reading.last) for reading in asked.readings)
    where = environment()
    arguments = {
        "what": what,
        **{name: models.names[name] for name in ("receiver", "sharer", "fuser")},
        "questions": asked.source,
        "limit": limit,
    }
    if not own:
        arguments |= {"form_size": form_size or FORM_SIZE, "filled": filled}
    if what == "solved":
        arguments |= {"t2t_tokens": t2t_tokens or asked.t2t_tokens, "t2t_prompt": t2t_prompt}
    data = document("analyze", arguments, where, None, rows, [], complete=True) | more
    print(shown(what, data))
    print(f"\n{ANALYSES[what]}; {count} questions: {printable(asked.source)}")
    if "--json" in targets:
        write_json(targets["--json"], data)
    if "--svg" in targets:
        commit = (where["commit"] or "no commit")[:10] + ("-dirty" if where["dirty"] else "")
        note = f"{count} questions, torch {where['torch']}, {where['date'][:10]}, {commit}"
        title = f"{ANALYSES[what]}: {models.names['fuser']}"
        write_text(targets["--svg"], drawn(what, title, note, data))
    return 0


def _check_options(
    what: str,
    own: bool,
    questions: str | None,
    limit: int | None,
    form_size: int | None,
    filled: bool,
    t2t_tokens: int | None,
    t2t_prompt: str | None,
) -> None:
    """Raises ValueError, naming the option, for what can be told before anything is loaded."""
    for option, number in (("--limit", limit), ("--t2t-tokens", t2t_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    for option, value in (("--t2t-tokens", t2t_tokens), ("--t2t-prompt", t2t_prompt)):
        if value is not None and what != "solved":
            raise ValueError(f"{option} goes with solved, not with {what}")
    if t2t_prompt is not None and "{question}" not in t2t_prompt:
        raise ValueError(
            f"--t2t-prompt must have the placeholder {{question}}, got {shown_name(t2t_prompt)}"
        )
    if own and questions is None:
        raise ValueError("--questions: models of your own need a file of questions")
    if not own and questions is not None:
        raise ValueError(
            "--questions goes with models of your own: the shipped pair has its own questions"
        )
    if filled and (own or what != "attention"):
        raise ValueError("--filled goes with the shipped pair and attention: forms to be read")
    if own and form_size is not None:
        raise ValueError("--form-size goes with the shipped pair, not with models of your own")
    if form_size is not None and not 1 <= form_size <= NUM_ATTRIBUTES:
        raise ValueError(f"--form-size must be within 1..{NUM_ATTRIBUTES}, got {form_size}")


def _targets(questions: str | None, json_path: str | None, svg_path: str | None) -> dict[str, Path]:
    """By option the file to write."""
    targets = {
        option: checked_target(option, place)
        for option, place in (("--json", json_path), ("--svg", svg_path))
        if place is not None
    }
    if len(set(targets.values())) < len(targets):
        raise ValueError("--json and --svg must be different files")
    for option, target in targets.items():
        if questions is not None and target == Path(questions).resolve():
            raise ValueError(f"{option} must be another file than --questions, got {target}")
    return targets


def _analysed(
    what: str, models: ChatModels, asked: Questions, t2t_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of an analysis, and what else its file holds."""
    receiver, fuser, readings = models.receiver, models.fuser, asked.readings
    if what == "rank":
        return rank_rows(readings, fuser), {}
    if what == "weights":
        return weight_rows(readings, fuser), {}
    if what == "layers":
        return layer_rows(receiver, fuser, readings), {}
    if what == "positions":
        return position_rows(receiver, fuser, readings), {}
    if what == "attention":
        seen = retention.observe(receiver, fuser, readings, asked.mismatched)
        return cosine_rows(seen.cosines[0]), {
            "conditions": retention.condition_rows(seen),
            "layers": retention.layer_auc_rows(seen),
            "across": retention.across_rows(seen),
        }
    right = solved.answers(models, asked, t2t_tokens)
    names = [name for reading in readings for name in reading.names]
    rows = [
        {"question": name, "solved_by": [mode for mode in right if bool(right[mode][i])]}
        for i, name in enumerate(names)
    ]
    judged = solved.verdict_of(right)
    return rows, {
        "modes": solved.mode_rows(right),
        "verdict": None if judged is None else asdict(judged),
        "patterns": solved.patterns({mode: right[mode] for mode in solved.PATTERNED}),
        "pairs": solved.pairs(right),
    }


def _loaded(*places: str | None, **options: Any) -> ChatModels:
    """`load_models`; transformers warns of nothing meanwhile."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return load_models(*places, **options)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

"""`c2c chat`: options checked, models loaded, and the conversation in the terminal started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .models import ChatModels, load_models
from .session import Session, Settings


def run_chat(mode: str, **options: Any) -> int:
    """Chats in the terminal; returns the exit status (1: a question that was piped in failed).

    Args:
        mode: one of `session.MODES`, or ``"all"``.
        **options: see `prepared`.

    Raises:
        ValueError, OSError: an option or a file breaks a rule; names it.
    """
    from .terminal import Terminal

    with prepared(**options) as (models, settings):
        return Terminal(Session(models, settings), mode, sys.stdin, sys.stdout, sys.stderr).run()


@contextmanager
def prepared(
    *,
    receiver: str | None,
    sharer: str | None,
    fuser: str | None,
    dtype: str,
    device: str,
    t2t_prompt: str | None,
    max_new_tokens: int | None,
    t2t_tokens: int | None,
    temperature: float,
    system: str,
) -> Iterator[tuple[ChatModels, Settings]]:
    """The models and settings that options ask for; transformers warns of nothing meanwhile.

    Args:
        receiver, sharer, fuser, dtype, device, t2t_prompt: see `load_models`.
        max_new_tokens, t2t_tokens, temperature, system: see `Settings`.

    Raises:
        ValueError, OSError: an option or a file breaks a rule; names it.
    """
    from transformers.utils import logging

    try:
        settings = Settings(max_new_tokens, t2t_tokens, temperature, system)
    except ValueError as error:  # begins with the field
        field, _, rest = str(error).partition(" ")
        raise ValueError(f"--{field.replace('_', '-')} {rest}") from error
    if receiver is None and system:
        raise ValueError("--system goes with models of your own: the shipped pair reads forms")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield (
            load_models(receiver, sharer, fuser, dtype=dtype, device=device, t2t_prompt=t2t_prompt),
            settings,
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

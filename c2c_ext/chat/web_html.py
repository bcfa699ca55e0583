"""The parts of the web page that show text of models and users: HTML in which all of it is escaped.

gradio's own chat component renders HTML and Markdown, if only what it thinks harmless.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from .prompts import Message
from .session import MODES, Answer
from .text import printable
from .words import LABELS, describe

CSS = """
.gradio-container {max-width: 1180px !important; margin: auto}
#heat {overflow-x: auto; background: white}
#chat {height: 300px; overflow-y: auto; padding: 12px; border-radius: 6px;
       border: 1px solid var(--border-color-primary); background: var(--background-fill-primary);
       display: flex; flex-direction: column-reverse}  /* so that the end is seen */
#chat > div {margin-bottom: auto}
#chat .turn {white-space: pre-wrap; overflow-wrap: anywhere; width: fit-content; max-width: 80%;
             margin: 6px 0; padding: 6px 12px; border-radius: 8px;
             background: var(--background-fill-secondary)}
#chat .user {margin-left: auto; background: var(--color-accent-soft)}
.quiet {opacity: 0.75; font-size: 14px}
#status {padding: 8px 4px 0 4px; min-height: 30px; font-variant-numeric: tabular-nums}
#wrote {padding: 2px 4px; white-space: pre-wrap; overflow-wrap: anywhere}
#sides {display: grid; grid-template-columns: repeat(4, 1fr); gap: 10px; margin-top: 8px}
#sides .card {padding: 10px 12px; border-radius: 6px; min-height: 110px;
              border: 1px solid var(--border-color-primary)}
#sides .said {white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 6px}
#sides h4 {margin: 0}
footer {display: none !important}
"""


def panel(
    messages: Sequence[Message],
    status: str = "",
    background: str = "",
    cards: Mapping[str, Answer | str] | None = None,
) -> str:
    """Conversation, what is said about the answer, and the answers side by side.

    Args:
        messages: system messages are left out.
        status: one line.
        background: what the sharer wrote for the receiver.
        cards: by mode, an answer, or a sentence on why there is none; None: no cards.
    """
    turns = "".join(
        f"<div class='turn {'user' if message['role'] == 'user' else 'model'}'>"
        f"{_escaped(message['content']) or '&nbsp;'}</div>"
        for message in messages
        if message["role"] != "system"
    )
    parts = [
        f"<div id='chat'><div>{turns or _HINT}</div></div>",
        f"<div id='status' class='quiet'>{_escaped(status)}</div>",
    ]
    if background:
        text = f"the sharer wrote: {_escaped(background)}"
        parts.append(f"<div id='wrote' class='quiet'>{text}</div>")
    if cards is not None:
        parts.append(f"<div id='sides'>{''.join(_card(mode, cards) for mode in MODES)}</div>")
    return "".join(parts)


_HINT = "<span class='quiet'>The conversation will be here.</span>"


def _card(mode: str, cards: Mapping[str, Answer | str]) -> str:
    """One mode's answer; a mode that is not in ``cards`` waits."""
    given = cards.get(mode, "waits ...")
    if isinstance(given, str):
        about, said, wrote = given, "", ""
    else:
        about = describe(given) if given.seconds else "answers ..."
        said, wrote = given.text, given.background
    note = f"<div class='quiet said'>the sharer wrote: {_escaped(wrote)}</div>" if wrote else ""
    return (
        f"<div class='card' id='answer-{mode}'><h4>{LABELS[mode]}</h4>"
        f"<div class='quiet'>{_escaped(about)}</div>"
        f"<div class='said answer'>{_escaped(said)}</div>{note}</div>"
    )


def _escaped(text: str) -> str:
    return html.escape(printable(text))

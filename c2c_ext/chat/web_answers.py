"""What the events of the web page do: a conversation per browser tab, on models that all share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import gradio as gr

from .fused_prompt import fused_prompt
from .heat_map import caption, heat_map
from .models import ChatModels
from .prompts import Message
from .session import Answer, Reply, Session, Settings
from .web_html import panel
from .words import LABELS, describe, one_line

MAX_QUESTION = 8000  # characters
History = list[dict[str, str]]
Shown = tuple[Any, ...]  # panel, conversation, question, messages that were fused


class Answers:
    """The page's events; `History` is the conversation, kept by gradio on the server.

    Args:
        models: that answer.
        settings: of the answers.
    """

    def __init__(self, models: ChatModels, settings: Settings) -> None:
        self._models, self._settings = models, settings
        self._running: dict[str | None, Reply] = {}  # by browser tab

    def stop(self, request: gr.Request) -> None:
        """Ends what is being answered to this tab, after the token that is being computed."""
        reply = self._running.get(request.session_hash)
        if reply is not None:
            reply.stop()

    def reset(self, request: gr.Request) -> Shown:
        """An empty page."""
        self.stop(request)
        return panel([]), [], "", [], gr.update(visible=False)

    def ask(
        self, question: str, mode: str, messages: History, request: gr.Request
    ) -> Iterator[Shown]:
        """Streams an answer in one mode."""
        session, user = self._session(question, messages)
        before = list(session.messages)
        yield panel([*before, user], "reading ..."), before, "", []
        try:
            _check(question)
            reply = session.ask(user["content"], mode)
            with self._answering(request, reply) as pieces:
                for _ in pieces:
                    text, wrote = reply.answer.text, reply.answer.background
                    now = [*before, user, {"role": "assistant", "content": text}]
                    doing = "answering ..." if text else "the sharer writes ..."
                    yield panel(now, doing, wrote), now if text else before, gr.skip(), []
        except Exception as error:  # whatever a model raises: the page says it and goes on
            yield self._refused(error, question, before)
            return
        answer = reply.answer
        status = describe(answer) + self._truth([*before, user])
        fused = [*before, user] if mode == "c2c" else []
        shown = panel(session.messages, status, answer.background)
        yield shown, session.messages, gr.skip(), fused

    def compare(
        self, question: str, mode: str, messages: History, request: gr.Request
    ) -> Iterator[Shown]:
        """Streams an answer in every mode, one after the other; keeps that of ``mode``."""
        session, user = self._session(question, messages)
        before = list(session.messages)
        asked = [*before, user]
        cards: dict[str, Answer | str] = {}
        fused: Sequence[Message] = []
        notes = []
        yield panel(asked, "comparing ...", cards=cards), before, "", []
        try:
            _check(question)
            replies = session.compare(user["content"], mode)
        except ValueError as error:
            yield self._refused(error, question, before)
            return
        with closing(replies):
            for reply in replies:
                try:
                    with self._answering(request, reply) as pieces:
                        for _ in pieces:
                            cards[reply.mode] = reply.answer
                            shown = panel(asked, "comparing ...", cards=cards)
                            yield shown, before, gr.skip(), []
                    cards[reply.mode] = reply.answer
                    if reply.mode == "c2c":
                        fused = asked
                except Exception as error:  # the other modes may answer
                    cards[reply.mode] = f"failed: {one_line(error)}"
                    notes.append(f"{LABELS[reply.mode]} failed")
                if reply.answer.stopped:
                    notes.append("stopped")
                    break
        kept = session.messages
        notes.append(
            f"no answer of {LABELS[mode]}: nothing joined the conversation"
            if kept == before
            else f"kept: the answer of {LABELS[mode]}"
        )
        status = "; ".join(notes) + self._truth(asked)
        yield panel(kept, status, cards=cards), kept, gr.skip(), fused

    def draw(self, asked: History, view: str) -> tuple[str, Any]:
        """The heat map of the messages that were fused last, or nothing."""
        if not asked:
            return "", gr.update(visible=False)
        try:
            prompt = fused_prompt(self._models, asked)
        except Exception as error:
            return panel([], f"no weights: {one_line(error)}"), gr.update(visible=True)
        return f"<p>{caption(prompt)}</p>{heat_map(prompt, view)}", gr.update(visible=True)

    @contextmanager
    def _answering(self, request: gr.Request, reply: Reply) -> Iterator[Iterator[Any]]:
        """The pieces of a reply, which `stop` stops meanwhile."""
        self._running[request.session_hash] = reply
        try:
            with closing(iter(reply)) as pieces:
                yield pieces
        finally:
            del self._running[request.session_hash]

    def _session(self, question: str, messages: History) -> tuple[Session, Message]:
        session = Session(self._models, self._settings)
        if messages:
            session.messages = list(messages)
        return session, {"role": "user", "content": str(question).strip()[:MAX_QUESTION]}

    def _refused(self, error: Exception, question: str, before: History) -> Shown:
        """The page as before the question, which can be corrected."""
        shown = panel(before, f"not answered: {one_line(error)}")
        return shown, before, question[:MAX_QUESTION], []

    def _truth(self, messages: Sequence[Message]) -> str:
        try:
            truth = self._models.prompts.truth(messages)
        except ValueError:
            return ""
        return "" if truth is None else f"; right is: {truth}"


def _check(question: str) -> None:
    if not question.strip():
        raise ValueError("there is no question")
    if len(question) > MAX_QUESTION:
        raise ValueError(
            f"a question may have {MAX_QUESTION} characters, this one has {len(question)}"
        )

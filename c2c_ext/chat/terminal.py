"""`c2c chat`: the conversation in a terminal, or with questions piped in, one a line."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TextIO

from ..messages import shown
from .session import MODES, Answer, Reply, Session
from .text import columns, encodable, printable
from .words import LABELS, describe, one_line

ALL = "all"  # a question is answered in every mode
KEPT = "c2c"  # whose answer then joins the conversation
MAX_QUESTION = 1 << 20  # characters of a line
HELP = """\
/mode [{modes}]   who answers (now: {mode})
/compare [QUESTION]   all four side by side, with times; without a question: the last one again
/reset   forgets the conversation
/help    this
/quit    ends, as Ctrl-D does; Ctrl-C stops an answer"""


class Terminal:
    """Reads questions and commands line by line, prints answers as they come.

    On a terminal there are a prompt, hints and times. Elsewhere only answers are printed, each
    ending with a newline, and what goes wrong on standard error.

    Args:
        session: that is talked to.
        mode: one of `MODES`, or `ALL`.
        source, target, errors: standard input, output and error.
    """

    def __init__(
        self, session: Session, mode: str, source: TextIO, target: TextIO, errors: TextIO
    ) -> None:
        self._session, self._mode = session, mode
        self._source, self._target, self._errors = source, target, errors
        self._interactive = source.isatty() and target.isatty()
        self._last: tuple[list, str] | None = None  # history and question, to compare again
        self._failures = 0
        if hasattr(source, "reconfigure"):
            source.reconfigure(errors="replace")  # bytes that are no text are a bad question

    def run(self) -> int:
        """Until the input ends; returns the exit status: 1 if a question or command failed."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing and history for input()
            self._say(self._greeting())
        for line in self._lines():
            text = line.strip()
            try:
                if text in ("/quit", "/exit"):
                    break
                if text.startswith("/"):
                    self._command(*text[1:].split(maxsplit=1))
                elif text:
                    self._question(text)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._say("\n(stopped)")
            except BrokenPipeError:
                raise
            except Exception as error:  # whatever a model raises must not end the conversation
                self._failed(error)
        return 1 if self._failures and not self._interactive else 0

    def _command(self, name: str = "", argument: str = "") -> None:
        if name == "mode":
            if argument not in (*MODES, ALL, ""):
                raise ValueError(
                    f"/mode: there are {', '.join((*MODES, ALL))}, got {shown(argument)}"
                )
            self._mode = argument or self._mode
            if self._interactive or not argument:
                self._say(f"mode {self._mode}")
        elif name == "compare":
            self._compare(argument)
        elif name == "reset":
            self._session.reset()
            self._last = None
            if self._interactive:
                self._say("(a new conversation)")
        elif name == "help":
            self._say(self._help())
        else:
            raise ValueError(f"unknown command {shown('/' + name)}; /help lists them")

    def _question(self, question: str) -> None:
        self._last = (list(self._session.messages), question)
        if self._mode == ALL:
            self._side_by_side(self._session.compare(question, KEPT))
            return
        reply = self._session.ask(question, self._mode)
        written = background = False
        try:
            with contextlib.closing(iter(reply)) as pieces:
                for piece in pieces:
                    if piece.background and not self._interactive:
                        continue
                    if piece.background != background:
                        background = piece.background
                        self._write("(the sharer writes) " if background else "\n")
                    self._write(printable(piece.text))
                    written = True
        except Exception:
            if written:
                self._say("")
            raise
        self._say("")
        if self._interactive:
            self._say(self._times(reply.answer))

    def _compare(self, question: str) -> None:
        if question:
            self._last = (list(self._session.messages), question)
            keep = KEPT if self._mode == ALL else self._mode
            self._side_by_side(self._session.compare(question, keep))
            return
        if self._last is None:
            raise ValueError("/compare: there is no question yet")
        messages, question = self._last
        self._side_by_side(self._session.compare(question, keep=None, history=messages))

    def _side_by_side(self, replies: Iterator[Reply]) -> None:
        blocks: list[tuple[str, ...]] = []  # label, times, answer, what the sharer wrote
        errors: list[Exception] = []
        with contextlib.closing(replies):
            for reply in replies:
                if self._interactive:
                    self._write(f"\r({LABELS[reply.mode]} ...)".ljust(30))
                try:
                    for _ in reply:
                        pass
                    answer, wrote = printable(reply.answer.text), printable(reply.answer.background)
                    wrote = f"\n(the sharer wrote: {wrote})" if wrote else ""
                    blocks.append((LABELS[reply.mode], describe(reply.answer), answer, wrote))
                except Exception as error:  # the other modes may answer
                    errors.append(error)
                    blocks.append((LABELS[reply.mode], "failed", one_line(error), ""))
        if self._interactive:
            self._write("\r" + " " * 30 + "\r")
        if len(errors) == len(blocks) and len(set(map(one_line, errors))) == 1:
            raise errors[0]
        self._failures += len(errors)
        width = shutil.get_terminal_size().columns if self._interactive else 100
        self._say(columns([row for row in zip(*blocks, strict=True) if any(row)], width))
        if truth := self._truth():
            self._say(f"(right is: {truth})")

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._say("\n(/quit or Ctrl-D ends)")
                continue
            except EOFError:
                if self._interactive:
                    self._say("")
                return
            if len(line.rstrip("\n")) > MAX_QUESTION:
                self._failed(
                    ValueError(f"a question may have {MAX_QUESTION} characters, this one has more")
                )
                continue
            yield line

    def _read(self) -> str:
        if self._interactive:
            return input(f"{self._mode}> ")
        line = self._source.readline(MAX_QUESTION + 1)
        if not line:
            raise EOFError
        rest = line
        while len(rest) > MAX_QUESTION and not rest.endswith("\n"):
            rest = self._source.readline(MAX_QUESTION + 1)  # the rest of this line is read past
        return line

    def _greeting(self) -> str:
        names = self._session.models.names
        lines = [
            f"receiver: {names['receiver']}, sharer: {names['sharer']}, fuser: {names['fuser']}",
            *filter(None, [self._session.models.prompts.help]),
            "/help lists the commands.",
        ]
        return "\n".join(map(printable, lines))

    def _help(self) -> str:
        text = HELP.format(modes="|".join((*MODES, ALL)), mode=self._mode)
        prompts = self._session.models.prompts
        if prompts.help:
            text += f"\n\n{prompts.help}"
        if prompts.examples:
            text += "\nTry:\n" + "\n".join(f"  {example}" for example in prompts.examples)
        return text

    def _times(self, answer: Answer) -> str:
        text = f"[{describe(answer)}]"
        truth = self._truth()
        return text if truth is None else f"{text} (right is: {truth})"

    def _truth(self) -> str | None:
        if self._last is None:
            return None
        messages, question = self._last
        asked = [*messages, {"role": "user", "content": question}]
        return self._session.models.prompts.truth(asked)

    def _failed(self, error: BaseException) -> None:
        self._failures += 1
        print(f"c2c chat: {one_line(error)}", file=self._errors, flush=True)

    def _say(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        self._target.write(encodable(text, self._target.encoding))
        self._target.flush()

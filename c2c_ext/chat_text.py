"""A conversation as a chat template renders it, and where in it every message's content is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .messages import shown_name
from .token_spans import check_text

SYSTEM = ("error", "merge")
# What reasoning models write before their answer, and many templates drop from earlier turns.
_THINKING = ("<think>", "</think>")
# Stands for a piece while its place is looked for: private-use characters that no template has.
_MARK = "\ue0c2{}\ue0c3"
_MARKS = re.compile("\ue0c2([0-9]+)\ue0c3")


@dataclass(frozen=True)
class Piece:
    """A part of a message's content without the whitespace around it.

    Attributes:
        message: its message's place in the conversation.
        text: not empty.
        thinking: whether it is reasoning, which a template may drop.
    """

    message: int
    text: str
    thinking: bool = False


@dataclass(frozen=True)
class Rendered:
    """One side's text.

    Attributes:
        text: the whole of it.
        spans: for every piece of the conversation the first character and last + 1; None: the
            template has dropped it.
        add_special_tokens: whether the tokenizer puts its own around the text; a template does so
            itself.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    add_special_tokens: bool = False


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages, if each is a mapping of a role and a content, both strings.

    Raises:
        TypeError, ValueError: names the message and the rule.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"TokenAligner: messages must be a list of messages, got {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("TokenAligner: messages must have at least one message, got none")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"TokenAligner: messages[{i}] must be a mapping, got {type(message).__name__}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(
                    f"TokenAligner: messages[{i}][{key!r}] must be a string, got "
                    f"{type(message.get(key)).__name__}"
                )
        if message["role"] == "tool" or "tool_calls" in message:
            raise ValueError(
                f"TokenAligner: messages[{i}] calls a tool or answers for one; tools are not "
                "supported"
            )
        check_text(message["content"], f"messages[{i}]['content']")
    return [dict(message) for message in messages]


def pieces_of(messages: Sequence[Mapping[str, str]]) -> tuple[Piece, ...]:
    """What is looked for in the rendered text, in order; empty contents have no piece."""
    return tuple(piece for i, m in enumerate(messages) for piece in _split(i, m)[1])


def plain_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """The contents as they are, one a line, and the end-of-sequence token after each response."""
    end = tokenizer.eos_token or "\n"
    return "".join(m["content"] + (end if m["role"] == "assistant" else "\n") for m in messages)


def render_plain(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> Rendered:
    """`plain_text` with its spans; nothing is dropped."""
    pieces = pieces_of(messages)
    marked = plain_text(tokenizer, _marked(messages))
    text, spans = _filled(marked, pieces)
    return Rendered(text, spans, add_special_tokens=True)


def render(
    tokenizer: PreTrainedTokenizerBase,
    side: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    system: str = "error",
    **options: Any,
) -> Rendered:
    """Renders a conversation by the tokenizer's chat template and finds the contents.

    The template runs twice: on the messages, and on messages whose contents are replaced by marks.
    Where the marks come out is where the contents are; a word of the template that is also a
    message's content is not taken for it. Where the template treats the two differently, the
    contents are looked for in the text, in order.

    Args:
        side: "receiver" or "sharer", for error messages.
        system: ``"merge"``: a system message that the template refuses or drops is put in front of
            the user's first message, with an empty line between; ``"error"``: it is an error.
        options: passed to the template.

    Raises:
        ValueError: no template, the template refuses the messages, or a message's content is not
            in what it renders.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"TokenAligner: the {side}'s tokenizer has no chat template")
    pieces = pieces_of(messages)
    options["add_generation_prompt"] = add_generation_prompt
    try:
        return _rendered(tokenizer, side, messages, pieces, options)
    except ValueError as error:
        roles = [message["role"] for message in messages[:2]]
        if roles != ["system", "user"]:
            raise
        try:
            merged = _rendered(tokenizer, side, messages, pieces, options, merge=True)
        except ValueError:  # the system message is not what is wrong
            raise error from None
        if system == "merge":
            return merged
        raise ValueError(
            f"{error}; system='merge' puts a system message in front of the user's first one"
        ) from error


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    side: str,
    messages: Sequence[Mapping[str, str]],
    pieces: Sequence[Piece],
    options: Mapping[str, Any],
    *,
    merge: bool = False,
) -> Rendered:
    arranged = _merged if merge else list
    try:
        text = tokenizer.apply_chat_template(arranged(messages), tokenize=False, **options)
    except Exception as error:  # a template may raise anything, and says why
        reason = shown_name(" ".join(str(error).split()), 200)
        raise ValueError(
            f"TokenAligner: the {side}'s chat template refuses the messages: {reason}"
        ) from error
    try:
        marked = tokenizer.apply_chat_template(
            arranged(_marked(messages)), tokenize=False, **options
        )
        filled, spans = _filled(marked, pieces)
    except Exception:  # the template looks into the contents, and may do what it likes
        filled, spans = None, ()
    if filled != text:
        spans = _searched(text, pieces)
    for piece, span in zip(pieces, spans, strict=True):
        if span is None and not piece.thinking:
            role = shown_name(messages[piece.message]["role"])
            raise ValueError(
                f"TokenAligner: the content of messages[{piece.message}] ({role}) is not in what "
                f"the {side}'s chat template renders, which drops or changes it"
            )
    return Rendered(text, tuple(spans))


def _split(index: int, message: Mapping[str, str]) -> tuple[list[str], list[Piece]]:
    """A content as fixed text, piece, fixed text, ...: one more text than pieces."""
    content = message["content"]
    opening, closing = _THINKING
    sections = [("", content, False)]
    if message["role"] == "assistant" and content.lstrip().startswith(opening):
        before, _, rest = content.partition(opening)
        thinking, found, answer = rest.partition(closing)
        if found:
            sections = [(before + opening, thinking, True), (closing, answer, False)]
    fixed, pieces = [""], []
    for before, section, is_thinking in sections:
        text = section.strip()
        start = len(section) - len(section.lstrip())
        fixed[-1] += before + section[:start]
        if text:
            pieces.append(Piece(index, text, is_thinking))
            fixed.append(section[start + len(text) :])
    return fixed, pieces


def _marked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages with a numbered mark for every piece."""
    marked, count = [], 0
    for i, message in enumerate(messages):
        fixed, _ = _split(i, message)
        content = fixed[0]
        for after in fixed[1:]:
            content += _MARK.format(count) + after
            count += 1
        marked.append({**message, "content": content})
    return marked


def _filled(marked: str, pieces: Sequence[Piece]) -> tuple[str, tuple[tuple[int, int] | None, ...]]:
    """The text with the pieces for their marks, and where they are (where first, if repeated)."""
    spans: list[tuple[int, int] | None] = [None] * len(pieces)
    parts, length, done = [], 0, 0
    for mark in _MARKS.finditer(marked):
        number = int(mark.group(1))
        before, piece = marked[done : mark.start()], pieces[number].text
        length += len(before)
        spans[number] = spans[number] or (length, length + len(piece))
        length += len(piece)
        parts += [before, piece]
        done = mark.end()
    return "".join([*parts, marked[done:]]), tuple(spans)


def _searched(text: str, pieces: Sequence[Piece]) -> list[tuple[int, int] | None]:
    """Where the pieces are, each behind the one before it."""
    spans: list[tuple[int, int] | None] = []
    done = 0
    for piece in pieces:
        start = text.find(piece.text, done)
        spans.append(None if start < 0 else (start, start + len(piece.text)))
        done = done if start < 0 else start + len(piece.text)
    return spans


def _merged(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The system message's content in front of the user's, which follows it."""
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]

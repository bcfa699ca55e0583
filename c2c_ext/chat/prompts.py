"""What the models read of a conversation: their chat templates, or plain text without one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..messages import shown_name

Message = Mapping[str, str]  # "role": "system", "user" or "assistant"; "content"

SIDES = ("receiver", "sharer")
# Text-to-text: what the sharer is asked for, and what the receiver reads of it.
T2T_PROMPT = (
    "In one or two sentences, write down what somebody has to know to answer the question below. "
    "Do not answer it.\n\n{question}"
)
T2T_READING = "{text}\n\n{question}"
SAME_VOCABULARY = 0.99  # the part of the larger vocabulary that both must share


class Prompts(Protocol):
    """How one pair of models is talked to.

    Attributes:
        max_new_tokens: of an answer, unless the user says otherwise.
        t2t_tokens: that the sharer may write for the receiver, likewise.
        help: what a user has to know about the language of these models; may be empty.
        examples: questions to try; may be empty.
    """

    max_new_tokens: int
    t2t_tokens: int
    help: str
    examples: Sequence[str]

    def encode(self, side: str, messages: Sequence[Message]) -> Tensor:
        """Token ids ``[1, P]`` that this side reads when it answers the last message alone.

        Raises:
            ValueError: messages that these models cannot read; says why.
        """

    def shared(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The arguments of an attached receiver's generate: ``input_ids`` and what is fused."""

    def background(
        self,
        messages: Sequence[Message],
        tokens: int,
        generate: Callable[[Tensor], Iterator[str]],
    ) -> Iterator[str]:
        """What the sharer writes to help the receiver, piece by piece.

        Args:
            tokens: that it may write.
            generate: the text that the sharer generates after token ids ``[1, P]``.
        """

    def with_background(self, messages: Sequence[Message], text: str) -> Tensor:
        """Token ids ``[1, P]`` that the receiver reads when the sharer has written ``text``."""

    def truth(self, messages: Sequence[Message]) -> str | None:
        """The right answer to the last message, where that is known."""


class ChatPrompts:
    """Prompts for any two models with tokenizers.

    A model without a chat template reads the contents of all messages, one a line.

    Args:
        tokenizers: by side.
        t2t_prompt: what the sharer reads in place of the last message; has ``{question}``.
        t2t_reading: what the receiver then reads in its place; has ``{text}`` and ``{question}``.

    Raises:
        ValueError: a placeholder is missing.
    """

    max_new_tokens = 256
    t2t_tokens = 128
    help = ""
    examples: Sequence[str] = ()

    def __init__(
        self,
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        t2t_prompt: str = T2T_PROMPT,
        t2t_reading: str = T2T_READING,
    ) -> None:
        for name, text, needed in (
            ("t2t_prompt", t2t_prompt, ("{question}",)),
            ("t2t_reading", t2t_reading, ("{text}", "{question}")),
        ):
            for placeholder in needed:
                if placeholder not in text:
                    raise ValueError(
                        f"c2c_ext: {name} must have the placeholder {placeholder}, got "
                        f"{shown_name(text)}"
                    )
        self.tokenizers = dict(tokenizers)
        self.t2t_prompt, self.t2t_reading = t2t_prompt, t2t_reading
        self.same_tokens = have_same_tokens(*(self.tokenizers[side] for side in SIDES))

    def encode(self, side: str, messages: Sequence[Message]) -> Tensor:
        """See `Prompts.encode`."""
        tokenizer = self.tokenizers[side]
        if tokenizer.chat_template:
            try:
                ids = tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )["input_ids"]
            except Exception as error:  # a template is code of its own, and may raise what it likes
                text = shown_name(" ".join(str(error).split()), 200)
                raise ValueError(
                    f"the {side}'s chat template refuses the conversation: {text}"
                ) from error
        else:
            ids = tokenizer(_plain(messages))["input_ids"]
        if not ids:
            raise ValueError(f"the {side}'s tokenizer makes no token of this")
        return torch.tensor([ids])

    def shared(self, messages: Sequence[Message]) -> dict[str, Any]:
        """See `Prompts.shared`.

        Where the tokenizers differ, the sharer reads its own tokens of the same conversation, and
        a token map says which of them each receiver token is fused with.
        """
        if self.same_tokens:
            return {"input_ids": self.encode("receiver", messages)}
        from ..alignment import TokenAligner

        aligner = TokenAligner(*(self.tokenizers[side] for side in SIDES))
        talk = [dict(message) for message in messages]
        if any(self.tokenizers[side].chat_template for side in SIDES):
            aligned = aligner.apply_chat_template(talk)
        else:
            aligned = aligner(_plain(messages))
        return {**aligned.receiver, "sharer_inputs": aligned.sharer_inputs}

    def background(
        self,
        messages: Sequence[Message],
        tokens: int,
        generate: Callable[[Tensor], Iterator[str]],
    ) -> Iterator[str]:
        """See `Prompts.background`."""
        task = _filled(self.t2t_prompt, question=messages[-1]["content"])
        yield from generate(self.encode("sharer", _with_last(messages, task)))

    def with_background(self, messages: Sequence[Message], text: str) -> Tensor:
        """See `Prompts.with_background`."""
        reading = _filled(self.t2t_reading, text=text, question=messages[-1]["content"])
        return self.encode("receiver", _with_last(messages, reading))

    def truth(self, messages: Sequence[Message]) -> str | None:
        """Unknown."""
        return None


def have_same_tokens(
    receiver_tokenizer: PreTrainedTokenizerBase, sharer_tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether the sharer can read the receiver's token ids.

    Every token that both have must have one id; generations of one tokenizer differ by a few
    special tokens that were added.
    """
    own, other = receiver_tokenizer.get_vocab(), sharer_tokenizer.get_vocab()
    common = own.keys() & other.keys()
    larger = max(len(own), len(other))
    return len(common) >= SAME_VOCABULARY * larger and all(own[t] == other[t] for t in common)


def _plain(messages: Sequence[Message]) -> str:
    """What a model without a chat template reads."""
    return "\n".join(message["content"] for message in messages)


def _filled(template: str, **values: str) -> str:
    """``template`` with its placeholders replaced; braces elsewhere mean nothing."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found[1]], template)


def _with_last(messages: Sequence[Message], content: str) -> list[Message]:
    """``messages`` with another content of the last one."""
    return [*messages[:-1], {**messages[-1], "content": content}]

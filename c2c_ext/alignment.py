"""TokenAligner: which sharer token goes with which receiver token, when their tokenizers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from . import reencoding
from .aligned import AlignedBatch, Alignment, batch_of
from .chat_text import SYSTEM, Rendered, check_messages, render
from .messages import shown
from .token_places import Places, in_other_text, places_of, reached
from .token_spans import TokenSpans, check_has_offsets, check_text, token_spans

STRATEGIES = ("span", *reencoding.STRATEGIES)
# Arguments of a tokenizer's own apply_chat_template that have no meaning here.
_REFUSED = (
    *("documents", "tokenize", "padding", "truncation", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "chat_template"),
)


class TokenAligner:
    """Tokenizes text for a receiver and a sharer and maps the one's tokens to the other's.

    With the strategy ``"span"`` both tokenize the whole text as they would alone. A receiver token
    maps to the last sharer token that ends at or before the end of it, both ends counted in
    characters of the text (`TokenSpans.ends`), and to -1 where there is none. Special tokens that a
    tokenizer puts around the text, and what a chat template puts around the messages, map to the
    last token of content before them, -1 before the first; nothing maps to such a token of the
    sharer. Two tokenizers of one vocabulary that make the same of a text map one to one.

    ``"first"`` and ``"longest"`` re-encode every receiver token alone, see `reencoding`.

    Args:
        receiver_tokenizer, sharer_tokenizer: fast ones (the published strategies take any for
            texts without a chat template).
        strategy: ``"span"``, ``"first"`` or ``"longest"``.

    Raises:
        TypeError, ValueError: not tokenizers, without character offsets, an unknown strategy.
    """

    def __init__(
        self,
        receiver_tokenizer: PreTrainedTokenizerBase,
        sharer_tokenizer: PreTrainedTokenizerBase,
        strategy: str = "span",
    ) -> None:
        for side, tokenizer in (("receiver", receiver_tokenizer), ("sharer", sharer_tokenizer)):
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise TypeError(
                    f"TokenAligner: {side}_tokenizer must be a transformers tokenizer, got "
                    f"{type(tokenizer).__name__}"
                )
        if strategy not in STRATEGIES:
            raise ValueError(
                f"TokenAligner: strategy must be one of {', '.join(STRATEGIES)}, got "
                f"{shown(strategy)}"
            )
        self.receiver, self.sharer, self.strategy = receiver_tokenizer, sharer_tokenizer, strategy
        self._reencode = None
        if strategy == "span":
            self._check_offsets()
        else:
            self._reencode = reencoding.Reencoder(receiver_tokenizer, sharer_tokenizer, strategy)
        self._same = receiver_tokenizer.get_vocab() == sharer_tokenizer.get_vocab()

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> AlignedBatch:
        """Tokenizes one or more texts for both models.

        Args:
            text: one text or several.
            padding_side: ``"left"`` or ``"right"``, of both models' rows.
            max_length: the most receiver tokens of a row; those behind are cut off (a special token
                at the end too), and the sharer's behind the last that is mapped.

        Raises:
            TypeError, ValueError: no text, or one that is no Unicode or has no tokens; an argument
                out of range. Names the text.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Sequence):
            raise TypeError(
                f"TokenAligner: text must be a string or a list of them, got {type(text).__name__}"
            )
        names = ["text"] if isinstance(text, str) else [f"text[{i}]" for i in range(len(texts))]
        for value, name in zip(texts, names, strict=True):
            check_text(value, name)
        return batch_of(
            [self.align(t) for t in texts],
            names,
            self.receiver,
            self.sharer,
            padding_side=padding_side,
            max_length=max_length,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]],
        *,
        add_generation_prompt: bool = True,
        system: str = "error",
        padding_side: str = "left",
        max_length: int | None = None,
        **template_options: Any,
    ) -> AlignedBatch:
        """Renders one or more conversations by each side's own chat template and aligns contents.

        Args:
            messages: a conversation (role and content, both strings, in every message), or several.
            add_generation_prompt: whether the assistant's turn is opened at the end.
            system: what to do where a template refuses or drops a system message: ``"error"``, or
                ``"merge"``: put it in front of the user's first message, for that side.
            padding_side, max_length: as for texts.
            template_options: passed to both templates, as ``enable_thinking``.

        Raises:
            TypeError, ValueError: messages that are none, tools, a tokenizer without a template, a
                template that refuses the messages or drops or changes a content (``<think>`` parts
                of the assistant's may be dropped). Names the message and the side.
        """
        several = (
            isinstance(messages, Sequence)
            and not isinstance(messages, str)
            and any(isinstance(m, Sequence) and not isinstance(m, str) for m in messages)
        )
        talks = list(messages) if several else [messages]
        names = [f"conversation {i}" for i in range(len(talks))] if several else ["messages"]
        options = {"add_generation_prompt": add_generation_prompt, "system": system}
        rows = []
        for talk, name in zip(talks, names, strict=True):
            try:
                rows.append(self.align_chat(talk, **options, **template_options))
            except (TypeError, ValueError) as error:
                if not several:
                    raise
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{error} (in {name})") from error
        return batch_of(
            rows,
            names,
            self.receiver,
            self.sharer,
            padding_side=padding_side,
            max_length=max_length,
        )

    def align(self, text: str) -> Alignment:
        """One text without padding; see `__call__`."""
        check_text(text)
        if self._reencode is None:
            own, other = (token_spans(t, text) for t in (self.receiver, self.sharer))
            return self._matched(own, other, reached(own), ~other.added, other.ends)
        own = token_spans(self.receiver, text) if self.receiver.is_fast else None
        ids = self.receiver(text, truncation=False, verbose=False)["input_ids"]
        return Alignment(list(ids), self._reencode(ids), list(range(len(ids))), own)

    def align_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        system: str = "error",
        **template_options: Any,
    ) -> Alignment:
        """One conversation without padding; see `apply_chat_template`."""
        if system not in SYSTEM:
            raise ValueError(
                f"TokenAligner: system must be one of {', '.join(SYSTEM)}, got {shown(system)}"
            )
        if template_options.pop("tools", None):
            raise ValueError("TokenAligner: tools are not supported, got some")
        for name in _REFUSED:
            if name in template_options:
                raise TypeError(f"TokenAligner.apply_chat_template takes no {name}")
        checked = check_messages(messages)
        rendered = [
            render(
                tokenizer,
                side,
                checked,
                add_generation_prompt=add_generation_prompt,
                system=system,
                **template_options,
            )
            for side, tokenizer in (("receiver", self.receiver), ("sharer", self.sharer))
        ]
        return self.align_rendered(*rendered)

    def align_rendered(self, receiver: Rendered, sharer: Rendered) -> Alignment:
        """One conversation that both sides have rendered, with the same pieces."""
        self._check_offsets()
        own, other = (
            token_spans(tokenizer, side.text, add_special_tokens=side.add_special_tokens)
            for tokenizer, side in ((self.receiver, receiver), (self.sharer, sharer))
        )
        own_places, places = places_of(own, receiver.spans), places_of(other, sharer.spans)
        if self._reencode is not None:
            ids, token_map = self._reencoded_chat(own, own_places, other, places)
            return Alignment(own.ids, ids, token_map, own)
        targets = in_other_text(own_places, receiver.spans, sharer.spans)
        return self._matched(own, other, targets, places.inside, places.clipped)

    def _matched(
        self,
        own: TokenSpans,
        other: TokenSpans,
        targets: np.ndarray,
        content: np.ndarray,
        ends: np.ndarray,
    ) -> Alignment:
        """For every target the last sharer token of content that ends at or before it.

        Args:
            own, other: what the receiver and the sharer read.
            targets: float64 ``[len(own)]``, characters of the sharer's text; -inf: none.
            content: bool ``[len(other)]``, the tokens that may be mapped to.
            ends: float64 ``[len(other)]``, where they end.
        """
        if self._same and own.text == other.text and own.ids == other.ids:
            return Alignment(own.ids, other.ids, list(range(len(own))), own, other)
        candidates = np.flatnonzero(content)
        last = np.searchsorted(np.maximum.accumulate(ends[candidates]), targets, side="right")
        found = np.concatenate([[-1], candidates])[last]
        return Alignment(own.ids, other.ids, found.tolist(), own, other)

    def _reencoded_chat(
        self, own: TokenSpans, own_places: Places, other: TokenSpans, places: Places
    ) -> tuple[list[int], list[int]]:
        """The sharer's template with the receiver's tokens of content, re-encoded, in it.

        Only they are mapped, as the published training does.
        """
        made = self._reencode(own.ids)
        ids: list[int] = []
        token_map = [-1] * len(own)
        for number in range(-1, len(places.order)):
            if number >= 0:
                in_piece = own_places.inside & (own_places.piece == places.order[number])
                for i in np.flatnonzero(in_piece).tolist():
                    token_map[i] = len(ids)
                    ids.append(made[i])
            behind = ~places.inside & (places.number == number)
            ids += [other.ids[i] for i in np.flatnonzero(behind).tolist()]
        return ids, token_map

    def _check_offsets(self) -> None:
        for side in ("receiver", "sharer"):
            check_has_offsets(getattr(self, side), side)

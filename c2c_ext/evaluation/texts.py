"""What both models read of a request: token ids, chat templates, and the map between them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..alignment import TokenAligner
from ..chat.prompts import SIDES, have_same_tokens
from ..chat_text import Rendered, render
from ..messages import shown
from .modes import Item, SharerText

MAX_LENGTH = 2048  # where neither model has a bound


@dataclass(frozen=True)
class _Chat:
    """A conversation as both sides' templates render it."""

    messages: tuple[Mapping[str, str], ...]
    generation: bool  # whether an answer of the assistant's is opened, or its last one goes on
    sides: Mapping[str, Rendered]  # the receiver's alone where both read the same tokens


class Texts:
    """Makes `Item`s of text for two models with tokenizers.

    Where their vocabularies differ, each reads its own tokens of the text, in its own chat template
    where there is one, and what a receiver token is fused with is what `TokenAligner` maps it to.
    What is too long loses the beginning of its context, for the model that it is too long for: a
    receiver token whose partner is lost is not fused.

    Args:
        tokenizers: by side.
        limits: tokens that each model was made for, by side; None: no bound.

    Raises:
        ValueError: the vocabularies differ, and a tokenizer gives no character offsets.

    Attributes:
        same_tokens: whether both models read the same token ids.
        limits: tokens that each may read and write in all, by side.
        truncated: how many contexts were too long.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        limits: Mapping[str, int | None],
    ) -> None:
        self.tokenizers = dict(tokenizers)
        self.same_tokens = have_same_tokens(*(self.tokenizers[side] for side in SIDES))
        self._aligner = None
        if not self.same_tokens:
            self._aligner = TokenAligner(*(self.tokenizers[side] for side in SIDES))
        bounds = {side: limits[side] for side in SIDES}
        if self.same_tokens:
            common = min((limit for limit in bounds.values() if limit is not None), default=None)
            bounds = dict.fromkeys(SIDES, common)
        self.limits = {
            side: MAX_LENGTH if limit is None else limit for side, limit in bounds.items()
        }
        self.truncated = 0
        self._chats: dict[str, _Chat] = {}  # by the receiver's rendering
        self._templated: dict[str, set[str]] = {side: set() for side in SIDES}
        self._last_map: tuple[str, tuple[int, ...]] | None = None

    @property
    def room(self) -> int:
        """Tokens that may be generated at most: half of what the models were made for."""
        return max(min(self.limits.values()) // 2, 1)

    def chat(self, messages: Sequence[Mapping[str, str]], generation: bool = True) -> str:
        """The receiver's rendering of a conversation, which `item` knows again as its context.

        A system message that a template refuses goes in front of the user's first one.

        Args:
            generation: whether an answer of the assistant's is opened; else its last message goes
                on.

        Raises:
            ValueError: no template, or one that refuses the messages; names the side.
        """
        talk = [dict(message) for message in messages]
        sides = {
            side: render(
                self.tokenizers[side],
                side,
                talk,
                add_generation_prompt=generation,
                system="merge",
                **({} if generation else {"continue_final_message": True}),
            )
            for side in (SIDES[:1] if self.same_tokens else SIDES)
        }
        text = sides["receiver"].text
        self._chats[text] = _Chat(tuple(talk), generation, sides)
        for side, rendered in sides.items():
            self._templated[side].add(rendered.text)
        return text

    def question(self, context: str) -> str:
        """The last user message of a conversation that `chat` rendered, or the plain context."""
        chat = self._chats.get(context)
        users = [m["content"] for m in chat.messages if m["role"] == "user"] if chat else []
        return users[-1] if users else context

    def with_question(self, context: str, question: str) -> str:
        """The context with another last user message, or that alone where it is no conversation."""
        chat = self._chats.get(context)
        places = [k for k, m in enumerate(chat.messages) if m["role"] == "user"] if chat else []
        if chat is None or not places:
            return question
        messages = list(chat.messages)
        messages[places[-1]] = {**messages[places[-1]], "content": question}
        return self.chat(messages, chat.generation)

    def asked_of_sharer(self, prompt: str, context: str) -> list[int]:
        """The sharer's token ids of a prompt, as a conversation where the context is one."""
        tokenizer = self.tokenizers["sharer"]
        if context not in self._chats or not tokenizer.chat_template:
            return self._encode("sharer", prompt)
        talk = [{"role": "user", "content": prompt}]
        text = render(tokenizer, "sharer", talk, add_generation_prompt=True).text
        return self._encode("sharer", text, special=False)

    def item(
        self,
        context: str,
        continuation: str | None,
        *,
        group: Hashable,
        document: Hashable,
        new: int = 0,
    ) -> Item:
        """A request in tokens.

        Args:
            context: may be empty.
            continuation: to be scored; None: something is to be generated.
            new: tokens that may be generated.

        Raises:
            ValueError: nothing is left to read, or no room for it.
        """
        start, rest = self._split("receiver", context, continuation)
        if self.same_tokens:
            cut = self.cut("receiver", start, len(rest) + new)
            return Item(cut, tuple(rest), group, document)
        text = context
        if context in self._chats:
            text = self._chats[context].sides["sharer"].text
        other = self._split("sharer", text, continuation)
        own_map = self._map(context if continuation is None else context.rstrip(), context)
        return self._pair(
            (start, rest), other, own_map[: len(start)], new, group=group, document=document
        )

    def blocks(self, mode: str, text: str, size: int, document: Hashable) -> list[Item]:
        """A text in blocks of ``size`` tokens of the model that scores, each after all earlier."""
        side = "sharer" if mode == "sharer" else "receiver"
        ids = [self._first(side), *self._encode(side, text, special=False)]
        other: list[int] = []
        token_map: list[int] = []
        if not (self.same_tokens or mode == "sharer"):
            plain = Rendered(text, ((0, len(text)),))
            aligned = self._aligner.align_rendered(plain, plain)
            other = [self._first("sharer"), *aligned.sharer_ids]
            token_map = [-1, *(place + 1 if place >= 0 else -1 for place in aligned.token_map)]
        size = min(size, self.limits[side])
        items = []
        for start in range(1, len(ids), size):
            block, group = tuple(ids[start : start + size]), (document, start)
            kept = max(self.limits[side] - len(block), 1)
            context = tuple(ids[:start][-kept:])
            sharer = None
            if other:
                places = token_map[start - len(context) : start]
                read = other[: max(max(places), 0) + 1]  # before the block
                sharer = self._sharer_text(read, (), places, self.limits["sharer"])
            items.append(Item(context, block, group, document, sharer))
        return items

    def cut(self, side: str, ids: Sequence[int], more: int) -> tuple[int, ...]:
        """The end of a context that leaves room for ``more`` tokens."""
        room = self.limits[side] - more
        if room < 1:
            raise ValueError(
                f"an answer of {more} tokens leaves no room for its question: the {side} was made "
                f"for {self.limits[side]}"
            )
        self.truncated += len(ids) > room
        return tuple(ids[-room:])

    def decode(self, side: str, ids: Sequence[int]) -> str:
        """The text of a side's token ids, without special tokens."""
        return self.tokenizers[side].decode(list(ids), skip_special_tokens=True)

    def _pair(
        self,
        own: tuple[Sequence[int], Sequence[int]],
        other: tuple[Sequence[int], Sequence[int]],
        token_map: Sequence[int],
        new: int,
        *,
        group: Hashable,
        document: Hashable,
    ) -> Item:
        before = self.truncated
        context = self.cut("receiver", own[0], len(own[1]) + new)
        kept = self.cut("sharer", other[0], len(other[1]) + new)
        self.truncated = min(self.truncated, before + 1)  # one context, whichever model it was
        sharer = self._sharer_text(
            other[0], other[1], token_map[len(own[0]) - len(context) :], len(kept)
        )
        return Item(context, tuple(own[1]), group, document, sharer)

    @staticmethod
    def _sharer_text(
        ids: Sequence[int], rest: Sequence[int], token_map: Sequence[int], kept: int
    ) -> SharerText:
        """What is left of the sharer's text when it keeps its last ``kept`` tokens."""
        lost = max(len(ids) - kept, 0)
        moved = tuple(place - lost if place >= lost else -1 for place in token_map)
        return SharerText(tuple(ids[lost:]), tuple(rest), moved)

    def _map(self, text: str, context: str) -> tuple[int, ...]:
        """The token map of a context, without the white space behind it where that is cut off."""
        if not text:
            return (-1,)
        if self._last_map is None or self._last_map[0] != text:  # options have one context
            chat = self._chats.get(context)
            if chat is None:
                sides = [
                    Rendered(text, ((0, len(text)),), self._puts_its_own(side, text))
                    for side in SIDES
                ]
            else:
                sides = [chat.sides[side] for side in SIDES]
            self._last_map = (text, tuple(self._aligner.align_rendered(*sides).token_map))
        return self._last_map[1]

    def _encode(self, side: str, text: str, special: bool = True) -> list[int]:
        """Token ids; a text that a chat template made, or that begins with BOS, has its own."""
        tokenizer = self.tokenizers[side]
        special = special and self._puts_its_own(side, text)
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        end = tokenizer.eos_token_id
        # An end behind a text that goes on is not meant.
        if special and len(ids) > 1 and ids[-1] == end and not text.endswith(tokenizer.eos_token):
            ids.pop()
        return ids

    def _puts_its_own(self, side: str, text: str) -> bool:
        """Whether the tokenizer puts its special tokens around a text."""
        bos = self.tokenizers[side].bos_token
        return not (bos and text.startswith(bos))

    def _split(
        self, side: str, context: str, continuation: str | None
    ) -> tuple[list[int], list[int]]:
        """Token ids of both, cut where the tokens of the context end in those of the whole."""
        special = context not in self._templated[side]
        if continuation is None:
            return self._encode(side, context, special) or [self._first(side)], []
        if not context:
            rest = self._encode(side, continuation, special=False)
            first = self._first(side)
            start, rest = ([first], rest) if rest[:1] != [first] else (rest[:1], rest[1:])
        else:
            bare = context.rstrip()  # spaces belong to the word that follows
            start = self._encode(side, bare, special)
            whole = self._encode(side, bare + context[len(bare) :] + continuation, special)
            # One word of both, as chat templates join them before some tokenizers: cut it here.
            rest = whole[len(start) :] or self._encode(side, continuation, special=False)
        if not rest or not start:
            raise ValueError(
                f"a request makes no tokens for the {side}: {shown(context)} and "
                f"{shown(continuation)}"
            )
        return start, rest

    def _first(self, side: str) -> int:
        """The token that stands before a text without context."""
        tokenizer = self.tokenizers[side]
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(f"the {side}'s tokenizer has neither BOS nor EOS to begin a text with")

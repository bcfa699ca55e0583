"""From conversations to batches: chat template, labels on responses only, padding, alignment."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..alignment import TokenAligner
from ..chat_text import plain_text, render, render_plain
from ..messages import shown, shown_name
from .data import BadData, Conversation

IGNORED = -100  # the label of what is not learnt, as transformers has it
CHAT_TEMPLATES = ("tokenizer", "plain")
LABELS = ("last", "all")
PADDING = ("right", "left")


@dataclass(frozen=True)
class Sample:
    """One conversation as token ids.

    Attributes:
        input_ids: of the receiver, prompt and response.
        labels: the ids that are learnt, elsewhere `IGNORED`; same length.
        number: of the record it came from, from 1; what noise is keyed by.
        positions: first and last + 1 of the fused positions; None: the whole prompt.
        sharer_ids: of the sharer, where an aligner is used: the prompt alone.
        token_map: for every prompt token of the receiver a place in ``sharer_ids``, or -1.
    """

    input_ids: Tensor
    labels: Tensor
    number: int
    positions: tuple[int, int] | None = None
    sharer_ids: Tensor | None = None
    token_map: Tensor | None = None

    @property
    def prompt_length(self) -> int:
        """Tokens before the first that is learnt."""
        return int((self.labels != IGNORED).to(torch.uint8).argmax())


class Encoder:
    """Conversations to `Sample`.

    Without an aligner the sharer reads the receiver's token ids, as an attached receiver has it
    read them; both tokenizers must then be the same. With one, each model reads the conversation
    through its own tokenizer and chat template.

    Args:
        receiver_tokenizer: the receiver's; its chat template is used.
        sharer_tokenizer: the sharer's. None: it is the same, the caller made sure.
        aligner: of these two tokenizers.
        max_tokens: the longest sample, prompt and response.
        truncate: whether a response that is too long is cut; otherwise the sample is refused.
            A prompt that leaves no room for a response always is.
        labels: ``"last"``: the last response is learnt; ``"all"``: all responses are. What is fused
            is what comes before the first of them.
        chat_template: ``"tokenizer"``: its own; ``"plain"``: the contents of the messages, one per
            line, and the end-of-sequence token after each response.

    Raises:
        ValueError: the tokenizers differ and there is no aligner, no chat template where one is
            needed, or a value out of range.
    """

    def __init__(
        self,
        receiver_tokenizer: PreTrainedTokenizerBase,
        sharer_tokenizer: PreTrainedTokenizerBase | None = None,
        aligner: TokenAligner | None = None,
        *,
        max_tokens: int = 2048,
        truncate: bool = False,
        labels: str = "last",
        chat_template: str = "tokenizer",
    ) -> None:
        for name, value, known in (
            ("labels", labels, LABELS),
            ("chat_template", chat_template, CHAT_TEMPLATES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
        if type(max_tokens) is not int or max_tokens < 3:
            raise ValueError(
                f"max_tokens must be an integer of at least 3, got {shown(max_tokens)}"
            )
        if aligner is not None and not isinstance(aligner, TokenAligner):
            raise TypeError(f"aligner must be a TokenAligner, got {type(aligner).__name__}")
        if aligner is not None and (
            aligner.receiver is not receiver_tokenizer or aligner.sharer is not sharer_tokenizer
        ):
            raise ValueError("aligner: must have been made of the same two tokenizers")
        if aligner is None and sharer_tokenizer is not None:
            check_same_tokens(receiver_tokenizer, sharer_tokenizer)
        self.receiver, self.sharer, self.aligner = receiver_tokenizer, sharer_tokenizer, aligner
        self.max_tokens, self.truncate, self.labels = max_tokens, truncate, labels
        self.plain = chat_template == "plain"
        read = {"receiver": receiver_tokenizer}
        if aligner is not None:
            read["sharer"] = sharer_tokenizer
        for side, tokenizer in read.items():
            if not self.plain and not tokenizer.chat_template:
                raise ValueError(
                    f"the {side}'s tokenizer has no chat template; chat_template='plain' takes the "
                    "messages' contents as they are, one per line"
                )

    def __call__(self, conversation: Conversation) -> Sample:
        """Raises ValueError saying why a conversation cannot be a sample."""
        messages = list(conversation.messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        learnt = turns if self.labels == "all" else turns[-1:]
        ids, labels = self._tokens(messages, learnt)
        if not labels:
            raise ValueError("the response has no tokens")
        prompt = next(i for i, label in enumerate(labels) if label != IGNORED)
        if prompt < 2:
            raise ValueError(f"the prompt must have at least 2 tokens to be fused, has {prompt}")
        if len(ids) > self.max_tokens and not (self.truncate and prompt < self.max_tokens):
            of_it = f" ({prompt} of them the prompt)" if self.truncate else ""
            raise ValueError(f"must have at most {self.max_tokens} tokens, has {len(ids)}{of_it}")
        positions = conversation.positions
        if positions is not None and positions[1] > prompt - 1:
            raise ValueError(
                f"positions must end by {prompt - 1}, before the last of the prompt's {prompt} "
                f"tokens, got {list(positions)}"
            )
        sharer_ids = token_map = None
        if self.aligner is not None:
            sharer_ids, token_map = self._align(messages[: learnt[0]], ids[:prompt])
        ids, labels = ids[: self.max_tokens], labels[: self.max_tokens]
        return Sample(
            torch.tensor(ids, dtype=torch.int32),
            torch.tensor(labels, dtype=torch.int32),
            conversation.number,
            positions,
            sharer_ids,
            token_map,
        )

    @property
    def unknown_id(self) -> int | None:
        """The receiver's id for what it cannot read; None where it has none of its own."""
        own = self.receiver
        # Where nothing is unknown, bytes say, some name a token that has another use.
        used = (own.eos_token_id, own.bos_token_id, own.pad_token_id)
        return None if own.unk_token_id in used else own.unk_token_id

    def _tokens(self, messages: list[dict], learnt: list[int]) -> tuple[list[int], list[int]]:
        """Token ids and labels; ends with the last token that is learnt."""
        ids: list[int] = []
        labels: list[int] = []
        done = ""
        for turn in learnt:
            prompt = self._text(self.receiver, messages[:turn], prompt=True)
            whole = self._text(self.receiver, messages[: turn + 1], prompt=False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(
                    "the chat template renders the beginning of the conversation differently when "
                    f"messages[{turn}] follows; its response cannot be told from the prompt"
                    + (" (labels='last' may work)" if self.labels == "all" else "")
                )
            new = self._continued(ids, done, prompt)
            ids, labels = ids + new, labels + [IGNORED] * len(new)
            new = self._continued(ids, prompt, whole)
            end = self.receiver.eos_token_id
            # What a template puts behind the end of a response is never generated.
            learn = len(new) - new[::-1].index(end) if end in new else len(new)
            ids, labels = ids + new, labels + new[:learn] + [IGNORED] * (len(new) - learn)
            done = whole
        while labels and labels[-1] == IGNORED:
            ids.pop(), labels.pop()
        return ids, labels

    def _continued(self, ids: list[int], done: str, text: str) -> list[int]:
        """The tokens that follow ``ids``, those of ``done``, in ``text``, which begins with it."""
        whole = self._ids(self.receiver, text)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        # The prompt's last token would be another with the response behind it; at inference it is
        # tokenized by itself, and so it is here.
        return list(self.receiver(text[len(done) :], add_special_tokens=False)["input_ids"])

    def _text(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict], prompt: bool) -> str:
        if self.plain:
            return plain_text(tokenizer, messages)
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template may raise anything, and says why
            text = shown_name(" ".join(str(error).split()), 200)
            raise ValueError(f"the chat template refuses it: {text}") from error

    def _ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        # A template writes its special tokens itself, plain text gets the tokenizer's.
        return list(tokenizer(text, add_special_tokens=self.plain)["input_ids"])

    def _align(self, messages: list[dict], receiver_ids: list[int]) -> tuple[Tensor, Tensor]:
        """What the sharer reads of a prompt, and the map to it."""
        if self.plain:
            sides = [
                render_plain(tokenizer, messages) for tokenizer in (self.receiver, self.sharer)
            ]
        else:
            # The receiver's text is given; the sharer may read a system message where it can.
            sides = [
                render(tokenizer, side, messages, add_generation_prompt=True, system=system)
                for side, tokenizer, system in (
                    ("receiver", self.receiver, "error"),
                    ("sharer", self.sharer, "merge"),
                )
            ]
        aligned = self.aligner.align_rendered(*sides)
        if aligned.receiver_ids != receiver_ids:
            raise ValueError("the receiver's chat template renders the prompt in several ways")
        if not aligned.sharer_ids:
            raise ValueError("the prompt has no tokens for the sharer")
        return tuple(
            torch.tensor(values, dtype=torch.int32)
            for values in (aligned.sharer_ids, aligned.token_map)
        )


def check_same_tokens(
    receiver_tokenizer: PreTrainedTokenizerBase, sharer_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError, naming a token, unless both tokenizers give their tokens the same ids."""
    if differing := differing_tokens(receiver_tokenizer, sharer_tokenizer):
        example = differing[0]
        own, other = (t.get_vocab().get(example) for t in (receiver_tokenizer, sharer_tokenizer))
        raise ValueError(
            f"the tokenizers differ: {len(differing)} tokens have another id in one of them or "
            f"none ({shown(example)}: {own} for the receiver, {other} for the sharer); without an "
            "aligner both models must read the same token ids"
        )


def differing_tokens(
    receiver_tokenizer: PreTrainedTokenizerBase, sharer_tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The tokens, sorted, that have another id in one of the tokenizers than in the other."""
    own, other = receiver_tokenizer.get_vocab(), sharer_tokenizer.get_vocab()
    if own == other:
        return []
    return sorted(t for t in own.keys() | other.keys() if own.get(t) != other.get(t))


@dataclass
class UnknownTokens:
    """What a tokenizer could not read and wrote its unknown token for.

    Attributes:
        first: number of the first record that has any.
        samples: records that have any.
        tokens, learnt: unknown tokens in all, and those of them that are learnt.
    """

    first: int = 0
    samples: int = 0
    tokens: int = 0
    learnt: int = 0

    def add(self, sample: Sample, unknown: int) -> None:
        """Counts one sample's tokens of the id ``unknown``."""
        if count := int((sample.input_ids == unknown).sum()):
            self.first = self.first or sample.number
            self.samples += 1
            self.tokens += count
            self.learnt += int((sample.labels == unknown).sum())


class ChatDataset(Dataset):
    """The samples of a source, in its order.

    Args:
        conversations: of `read_conversations`.
        bad: from there too; conversations that cannot be samples are added to it.
        encoder: makes the samples.

    Attributes:
        unknown: what the receiver's tokenizer could not read.

    Raises:
        ValueError: bad records that are refused, or nothing is left.
    """

    def __init__(
        self, conversations: Sequence[Conversation], bad: BadData, encoder: Encoder
    ) -> None:
        self.bad, self.samples, self.unknown = bad, [], UnknownTokens()
        for conversation in conversations:
            try:
                self.samples.append(encoder(conversation))
            except ValueError as error:
                bad.add(conversation.number, str(error))
                continue
            if encoder.unknown_id is not None:
                self.unknown.add(self.samples[-1], encoder.unknown_id)
        bad.kept = len(self.samples)
        bad.check()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def part(self, indices: Sequence[int]) -> ChatDataset:
        """Some of the samples as a dataset of their own."""
        part = copy.copy(self)
        part.samples = [self.samples[i] for i in indices]
        return part

    def numbered_apart(self) -> ChatDataset:
        """The same with negative sample ids, which no other dataset has."""
        part = copy.copy(self)
        part.samples = [replace(sample, number=-sample.number) for sample in self.samples]
        return part

    def place(self, number: int) -> str:
        """How a message names the record that a sample id stands for."""
        return self.bad.place(number)


class ChatCollator:
    """Samples to a batch that `C2CTrainingModel.forward` takes.

    Rows are padded to the longest. ``labels`` are `IGNORED` where nothing is learnt,
    ``sample_ids`` [B] are the records' numbers. ``fused_mask`` [B, L] is there if any sample says
    what is fused; ``sharer_input_ids``, ``sharer_attention_mask`` [B, S] and ``token_map`` [B, L]
    (columns of the former, -1: none) if an aligner was used.

    Args:
        pad_token_id: what the receiver's padding holds; any id will do, it is masked.
        sharer_pad_token_id: the sharer's.
        padding: ``"right"`` or ``"left"``.
    """

    def __init__(
        self, pad_token_id: int = 0, sharer_pad_token_id: int = 0, *, padding: str = "right"
    ) -> None:
        if padding not in PADDING:
            raise ValueError(f"padding must be one of {', '.join(PADDING)}, got {shown(padding)}")
        self.pad, self.sharer_pad, self.left = pad_token_id, sharer_pad_token_id, padding == "left"

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        ids = [sample.input_ids for sample in samples]
        batch = {
            "input_ids": self._rows(ids, self.pad),
            "attention_mask": self._rows([torch.ones_like(row) for row in ids], 0),
            "labels": self._rows([sample.labels for sample in samples], IGNORED),
            "sample_ids": torch.tensor([sample.number for sample in samples]),
        }
        if any(sample.positions is not None for sample in samples):
            masks = [torch.zeros(len(row), dtype=torch.bool) for row in ids]
            for mask, sample in zip(masks, samples, strict=True):
                first, end = sample.positions or (0, sample.prompt_length - 1)
                mask[first:end] = True
            batch["fused_mask"] = self._rows(masks, False).bool()
        if any(sample.sharer_ids is not None for sample in samples):
            sharer = [sample.sharer_ids for sample in samples]
            batch["sharer_input_ids"] = self._rows(sharer, self.sharer_pad)
            ones = [torch.ones_like(row) for row in sharer]
            batch["sharer_attention_mask"] = self._rows(ones, 0)
            width, maps = batch["sharer_input_ids"].shape[1], []
            for sample in samples:
                moved = width - len(sample.sharer_ids) if self.left else 0
                places = torch.full((len(sample.input_ids),), -1)
                mapped = sample.token_map[: len(places)]
                places[: len(mapped)] = torch.where(mapped >= 0, mapped + moved, -1)
                maps.append(places)
            batch["token_map"] = self._rows(maps, -1)
        return batch

    def _rows(self, rows: Sequence[Tensor], fill: int) -> Tensor:
        """int64 [B, longest] of rows of unequal length."""
        length = max(len(row) for row in rows)
        out = torch.full((len(rows), length), fill, dtype=torch.int64)
        for line, row in zip(out, rows, strict=True):
            start = length - len(row) if self.left else 0
            line[start : start + len(row)] = row
        return out

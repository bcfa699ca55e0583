"""Where in a text every token of a fast tokenizer begins and ends, whatever the tokenizer's habits.

A tokenizer reports character offsets. Some leave out a leading space or attach a trailing one, some
report the same character for several tokens (the bytes of an emoji), some drop or join characters.
`TokenSpans.ends` is made so that two tokenizers' ends can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from .messages import shown

_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}  # SentencePiece's byte fallback
_PREPENDED = "\u2581"  # what SentencePiece writes for a space, and puts before a text without one


@dataclass(frozen=True)
class TokenSpans:
    """The tokens of one text.

    Attributes:
        text: what was tokenized.
        ids: token ids.
        offsets: int64 ``[n, 2]``, first character and last + 1, as the tokenizer reports them.
        added: bool ``[n]``: special tokens that the tokenizer put around the text.
        ends: float64 ``[n]``, not decreasing over the tokens that are not added: where in the text
            a token ends, in characters. A token ends behind its last character that is no
            whitespace (one of whitespace alone: behind its last); characters that no token has
            (dropped, or joined with the one before) belong to the token before them; a token that
            holds only part of its last character ends inside it, at the byte where that is known,
            else at equal parts. Meaningless for added tokens.
    """

    text: str
    ids: list[int]
    offsets: np.ndarray
    added: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> TokenSpans:
        """The first ``count`` tokens."""
        return TokenSpans(
            self.text,
            self.ids[:count],
            self.offsets[:count],
            self.added[:count],
            self.ends[:count],
        )


def check_text(text: str, name: str = "text") -> None:
    """Raises TypeError or ValueError unless ``text`` is a string that tokenizers can read."""
    if not isinstance(text, str):
        raise TypeError(f"TokenAligner: {name} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"TokenAligner: {name} must be Unicode text, got half a surrogate pair "
            f"{shown(text[error.start])} at character {error.start}"
        ) from error


def check_has_offsets(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    """Raises ValueError for a tokenizer that cannot say where in the text its tokens are."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"TokenAligner: the {side}'s tokenizer ({type(tokenizer).__name__}) gives no character "
            "offsets; a fast one is needed (one with a tokenizer.json)"
        )


def token_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> TokenSpans:
    """Tokenizes ``text`` as a whole, without truncation.

    Args:
        tokenizer: a fast one, see `check_has_offsets`.
        text: see `check_text`.
        add_special_tokens: whether the tokenizer puts its own around it.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,  # a text longer than the model is no matter of the tokenizer
    )
    ids = list(encoded["input_ids"])
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    added = np.array(encoded["special_tokens_mask"], dtype=bool)
    ends = offsets[:, 1].astype(np.float64)
    own = np.flatnonzero(~added)
    if len(own):
        ends[own] = _ends(text, offsets[own], tokenizer, [ids[i] for i in own])
    return TokenSpans(text, ids, offsets, added, ends)


def _ends(
    text: str, offsets: np.ndarray, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> np.ndarray:
    starts, stops = offsets[:, 0], offsets[:, 1]
    length = len(text)
    space = np.fromiter(map(str.isspace, text), bool, length)
    # What follows begins before this one ends: they share a character, which is not complete yet.
    partial = np.zeros(len(ids), dtype=bool)
    partial[:-1] = (starts[1:] < stops[:-1]) & (starts[1:] < stops[1:]) & (starts[:-1] < stops[:-1])

    ends = stops.copy()
    # Characters of nobody go to the last token that ends before them.
    depth = np.zeros(length + 1, dtype=np.int64)
    np.add.at(depth, starts, 1)
    np.add.at(depth, stops, -1)
    orphans = np.flatnonzero((np.cumsum(depth)[:length] == 0) & ~space)
    if len(orphans):
        parents = np.searchsorted(np.maximum.accumulate(stops), orphans, side="right") - 1
        np.maximum.at(ends, parents[parents >= 0], orphans[parents >= 0] + 1)
    # Whitespace at a token's end is some tokenizers' way to write what others put in front.
    solid = np.where(space, 0, np.arange(1, length + 1))
    last_solid = np.concatenate([[0], np.maximum.accumulate(solid)]) if length else np.zeros(1, int)
    trimmed = last_solid[ends]
    ends = np.where((trimmed > starts) & ~partial, trimmed, ends).astype(np.float64)

    if partial.any():
        parts = np.flatnonzero(partial)
        # Rounded so that moving an end by whole characters is exact.
        shares = np.round(np.array(_shares(text, stops, partial, tokenizer, ids)) * 2**20) / 2**20
        ends[parts] = stops[parts] - 1 + shares
    return np.maximum.accumulate(ends)


def _shares(
    text: str,
    stops: np.ndarray,
    partial: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
) -> list[float]:
    """How much of its last character every token marked in ``partial`` completes, 0 to 1."""
    parts = np.flatnonzero(partial)
    involved = np.unique(np.concatenate([parts, parts + 1])).tolist()
    strings = tokenizer.convert_ids_to_tokens([ids[i] for i in involved])
    tokens = dict(zip(involved, strings, strict=True))
    byte_level = is_byte_level(tokenizer)
    before = [0, *np.cumsum([len(character.encode()) for character in text]).tolist()]  # bytes
    shares: list[float] = []
    for run in np.split(parts, np.flatnonzero(np.diff(parts) > 1) + 1):  # each one is closed by
        run_end = int(stops[run[-1] + 1])  # the token behind it
        own: list[float] = []
        behind: int | None = 0  # bytes from a token's end to the run's
        for i in run[::-1].tolist():
            size = _bytes_of(tokens[i + 1], byte_level)
            behind = None if behind is None or size is None else behind + size
            character = int(stops[i]) - 1
            width = before[character + 1] - before[character]
            done = -1 if behind is None else before[run_end] - behind - before[character]
            # Out of range where the tokenizer changed the character: it has other bytes then.
            own.append(done / width if 0 <= done < width else np.nan)
        shares += _in_equal_parts(own[::-1], stops[run], [tokens[i] for i in run.tolist()])
    return shares


def _in_equal_parts(
    shares: Sequence[float], stops: np.ndarray, tokens: Sequence[str]
) -> list[float]:
    """Unknown shares (NaN) of a run's tokens filled in; a prepended space has none of the text."""
    filled = []
    for _, group in groupby(range(len(tokens)), key=lambda i: stops[i]):  # of one character
        group = list(group)
        real = [i for i in group if tokens[i] != _PREPENDED]
        equal = {i: (rank + 1) / (len(real) + 1) for rank, i in enumerate(real)}
        filled += [
            0.0 if i not in equal else equal[i] if np.isnan(shares[i]) else shares[i] for i in group
        ]
    return filled


def _bytes_of(token: str, byte_level: bool) -> int | None:
    """How many bytes of text a token is; None where its string does not say so."""
    return len(token) if byte_level else 1 if token in _BYTE_TOKENS else None


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a character of a token's string stands for a byte, as in GPT-2's vocabulary."""
    backend = tokenizer.backend_tokenizer
    for part in (backend.pre_tokenizer, backend.decoder):
        try:
            if part is not None and b'"ByteLevel"' in part.__getstate__():
                return True
        except Exception:  # a part written in Python cannot be asked
            continue
    return False

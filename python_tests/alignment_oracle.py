"""Character spans and token maps the slow way: lists of characters, one comparison at a time."""

from __future__ import annotations

from fractions import Fraction

from transformers import PreTrainedTokenizerFast


def slow_ends(tokenizer: PreTrainedTokenizerFast, text: str, byte_level: bool) -> list:
    """For every token where it ends in ``text``, a Fraction; None: a special token around it."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    own = [i for i in range(len(tokens)) if not encoded["special_tokens_mask"][i]]
    if byte_level:
        held = _bytes_held(text, [tokens[i] for i in own])
    else:
        held = _parts_held(
            text, [tokens[i] for i in own], [encoded["offset_mapping"][i] for i in own]
        )
    ends: list = [None] * len(tokens)
    for i, parts in zip(own, held, strict=True):
        ends[i] = _end(text, parts)
    # Offsets of a tokenizer that reorders characters may go back; what was read stays read.
    reached = Fraction(0)
    for i in own:
        ends[i] = reached = max(reached, ends[i])
    return ends


def slow_map(own: list, other: list) -> list[int]:
    """For every receiver end the last sharer token that ends at or before it."""
    mapped, before = [], None
    for end in own:
        before = end if end is not None else before  # special: as the token before
        found = -1
        for j, other_end in enumerate(other):
            if before is not None and other_end is not None and other_end <= before:
                found = j
        mapped.append(found)
    return mapped


def _bytes_held(text: str, tokens: list[str]) -> list[list[tuple[int, int, int]]]:
    """(character, part of it from 1, parts it has) for every byte of every token."""
    stream = [
        (c, b + 1, len(character.encode()))
        for c, character in enumerate(text)
        for b in range(len(character.encode()))
    ]
    if sum(map(len, tokens)) == len(stream) + 1:  # a space was put in front
        stream.insert(0, (0, 0, 1))
    assert sum(map(len, tokens)) == len(stream)
    held = []
    for token in tokens:
        held.append(stream[: len(token)])
        stream = stream[len(token) :]
    return held


def _parts_held(
    text: str, tokens: list[str], offsets: list[tuple[int, int]]
) -> list[list[tuple[int, int, int]]]:
    """Likewise from offsets: those that report one character share it equally."""
    held: list[list[tuple[int, int, int]]] = [[] for _ in tokens]
    latest = -1  # the token that has the last character so far
    for c, character in enumerate(text):
        holders = [i for i, (start, end) in enumerate(offsets) if start <= c < end]
        if not holders and latest >= 0 and not character.isspace():
            holders = [latest]
        real = [i for i in holders if tokens[i] != "▁" or i == holders[-1]]
        for i in holders:
            held[i].append((c, real.index(i) + 1 if i in real else 0, len(real)))
        latest = max([latest, *holders])
    return held


def _end(text: str, parts: list[tuple[int, int, int]]) -> Fraction:
    if not parts:
        return Fraction(0)
    character, part, count = parts[-1]
    if part == count:  # complete: whitespace at the end does not count, if there is more
        solid = [c for c, _, _ in parts if not text[c].isspace()]
        return Fraction(solid[-1] + 1 if solid else character + 1)
    return character + Fraction(part, count)

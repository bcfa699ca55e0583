"""Another tokenizer for the form world: names and attributes in pieces, ids in another order.

The demo's own tokenizer makes one token of every word. This one, a WordPiece tokenizer, cuts a name
into its two halves (`Cor ##bin`), an attribute into two or three pieces (`in ##stru ##ment`), and
leaves the rest whole. `pieces_of` says in what ids a text of the demo's token ids is read, which is
how batches are made quickly; the tests hold it against the tokenizers themselves.
"""

from __future__ import annotations

import random
from itertools import takewhile

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from c2c_ext.demo import world as w

INNER = "##"  # in front of every piece but a word's first

_ATTRIBUTES = (
    *("col|our", "an|im|al", "met|al", "dr|ink", "tr|ee", "fr|uit", "in|stru|ment", "to|ol"),
    *("wea|th|er", "sp|ort", "cl|oth", "sh|ape"),
)
_NAMES_A_GROUP = 20  # that begin alike


def _cut(word: str) -> tuple[str, ...]:
    """The pieces of a word, as they are spelt."""
    if word in w.VALUES_OF:
        return tuple(_ATTRIBUTES[w.attribute(word)].split("|"))
    if word in _FIRST_HALF_OF:
        half = _FIRST_HALF_OF[word]
        return half, word[len(half) :]
    return (word,)


def _first_halves() -> dict[str, str]:
    halves = {}
    for start in range(0, len(w.NAMES), _NAMES_A_GROUP):
        group = w.NAMES[start : start + _NAMES_A_GROUP]
        ends = zip(min(group), max(group), strict=False)  # what these two begin with, all do
        half = "".join(a for a, _ in takewhile(lambda letters: letters[0] == letters[1], ends))
        halves.update(dict.fromkeys(group, half))
    return halves


_FIRST_HALF_OF = _first_halves()
# Of every word of the demo's vocabulary, in its order.
PIECES = tuple(
    tuple(INNER * (i > 0) + piece for i, piece in enumerate(_cut(word))) for word in w.VOCABULARY
)


def _vocabulary() -> tuple[str, ...]:
    pieces = sorted({piece for word in PIECES for piece in word} - set(w.SPECIAL[:2]))
    draw = random.Random(0)
    return tuple(sorted(pieces, key=lambda _: draw.random())) + w.SPECIAL[:2]


VOCABULARY = _vocabulary()
PAD, BOS = (VOCABULARY.index(word) for word in w.SPECIAL[:2])
_MOST = max(map(len, PIECES))
# [the demo's vocabulary, _MOST], filled up with PAD.
_TABLE = torch.tensor(
    [[VOCABULARY.index(p) for p in pieces] + [PAD] * (_MOST - len(pieces)) for pieces in PIECES]
)
_COUNTS = torch.tensor([len(pieces) for pieces in PIECES])


def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; its texts are words between spaces, as the demo's."""
    model = models.WordPiece(
        {piece: i for i, piece in enumerate(VOCABULARY)},
        unk_token="<pad>",
        continuing_subword_prefix=INNER,
    )
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.WordPiece(INNER, cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=w.SPECIAL[1], pad_token=w.SPECIAL[0]
    )


def pieces_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of the demo's token ids [B, N] in this tokenizer's.

    Returns:
        ids [B, M], padded on the right with PAD up to the longest row, and the place [B, N] of
        every word's last piece in its row.
    """
    rows = _TABLE[ids].flatten(1)
    order = (rows == PAD).long().argsort(dim=1, stable=True)
    ends = _COUNTS[ids].cumsum(dim=1)
    return rows.gather(1, order)[:, : int(ends.amax())], ends - 1


def value_ids(attributes: Tensor, values: Tensor) -> Tensor:
    """Token ids of values of attributes, one piece each; both broadcast."""
    return _TABLE[w.value_ids(attributes, values), 0]

"""The published token strategies: every receiver token re-encoded alone by the sharer's tokenizer.

For fusers that were trained so (arXiv 2510.03215, section 3.3, which takes the longest; the public
code's default is the first). The sharer then reads pieces of text that its tokenizer would not have
made; new fusers are better off with character spans.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

STRATEGIES = ("first", "longest")


class Reencoder:
    """Receiver tokens to sharer tokens, one for one; remembers what it has seen.

    A special token becomes the sharer's token of the same role (unknown, beginning, end, padding),
    else the one of the same string. Any other is decoded and encoded again; of several tokens
    ``"first"`` takes the first and ``"longest"`` the one that decodes to most characters, the first
    of equals. What the sharer's tokenizer has no token for becomes its unknown token, without one
    token 0, as in the public code.
    """

    def __init__(
        self,
        receiver_tokenizer: PreTrainedTokenizerBase,
        sharer_tokenizer: PreTrainedTokenizerBase,
        strategy: str,
    ) -> None:
        self.receiver, self.sharer, self.longest = (
            receiver_tokenizer,
            sharer_tokenizer,
            strategy == "longest",
        )
        self.unknown = sharer_tokenizer.unk_token_id or 0
        self.special = set(receiver_tokenizer.all_special_ids)
        self.known: dict[int, int] = {}

    def __call__(self, receiver_ids: Sequence[int]) -> list[int]:
        """The sharer's token for every token of the receiver."""
        for token in set(receiver_ids) - self.known.keys():
            self.known[token] = self._special(token) if token in self.special else self._one(token)
        return [self.known[token] for token in receiver_ids]

    def _one(self, token: int) -> int:
        text = _decoded(self.receiver, token)
        ids = self.sharer.encode(text, add_special_tokens=False)
        if not ids:
            return self.unknown
        if not self.longest:
            return ids[0]
        return max(ids, key=lambda i: len(_decoded(self.sharer, i)))  # the first of equals

    def _special(self, token: int) -> int:
        # Padding is the end of the sequence where a tokenizer has none.
        for name, stand_in in (("unk", None), ("bos", None), ("eos", None), ("pad", "eos")):
            own, other = (_role(t, name, stand_in) for t in (self.receiver, self.sharer))
            if token == own and other is not None:
                return other
        ids = self.sharer.convert_tokens_to_ids(_decoded(self.receiver, token))
        return self.unknown if ids is None else ids


def _role(tokenizer: PreTrainedTokenizerBase, name: str, stand_in: str | None) -> int | None:
    token = getattr(tokenizer, f"{name}_token_id")
    return getattr(tokenizer, f"{stand_in}_token_id") if token is None and stand_in else token


def _decoded(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)

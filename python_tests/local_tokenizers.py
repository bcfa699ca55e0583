"""Tokenizers made on the spot: one token a word, and one a letter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tiny_models import VOCABULARY
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<sys>", "<user>", "<bot>", "<unk>")
WORDS = tuple(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))
# Like most: every turn ends with </s> and a newline, here the word w0, that is never generated.
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}"
    "{% if m['role'] == 'system' %} <sys> {{ m['content'] }} </s> w0"
    "{% elif m['role'] == 'user' %} <user> {{ m['content'] }} </s> w0"
    "{% else %} <bot> {{ m['content'] }} </s> w0{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <bot>{% endif %}"
)


def word_tokenizer(
    words: Sequence[str] = WORDS, *, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """One token a word; as many as `tiny_models` have."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer, chat_template)


def letter_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a letter or digit; the special tokens stay whole."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"<[a-z/]+>|."), "isolated"),
        ]
    )
    return _wrapped(tokenizer, chat_template)


def _wrapped(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """A JSON-lines file; strings and bytes are written as they are."""
    with path.open("wb") as file:
        for record in records:
            if isinstance(record, str):
                record = record.encode()
            elif not isinstance(record, bytes):
                record = json.dumps(record).encode()
            file.write(record + b"\n")
    return path

"""Small tokenizers of the usual kinds, trained on the spot from a few sentences."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, a naïve café in São Paulo!",
    "日本語のテスト。你好、世界。 한국어",
    "ﬁne ligatures, \uff21 fullwidth letters, e\u0301 accents 😀",
    "  indented code\n\tand tabs\r\n",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = (
    "byte_level",
    "byte_level_trimmed",
    "metaspace_unigram",
    "metaspace_bpe",
    "space_behind",
    "wordpiece_nfkc",
    "unigram_squeezed",
)


@cache
def _backend(kind: str) -> Tokenizer:
    quiet = {"special_tokens": SPECIAL, "show_progress": False}
    if kind.startswith("byte_level"):
        trimmed = kind.endswith("trimmed")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=trimmed)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, **quiet)
    elif kind == "metaspace_unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **quiet)
    elif kind == "metaspace_bpe":  # falls back to bytes, as Llama 2
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        quiet["special_tokens"] = SPECIAL + BYTES
        trainer = trainers.BpeTrainer(vocab_size=420, limit_alphabet=40, **quiet)
    elif kind == "space_behind":  # merges across words: "lazy▁", and adds a token in front
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[^▁]*▁+"), "isolated")
        tokenizer.decoder = decoders.Replace("▁", " ")
        trainer = trainers.BpeTrainer(vocab_size=250, **quiet)
    elif kind == "wordpiece_nfkc":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.StripAccents()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=200, **quiet)
    else:  # T5's way: whitespace is squeezed, spaces are prepended to words
        assert kind == "unigram_squeezed", kind
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **quiet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if kind in ("space_behind", "wordpiece_nfkc"):
        ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        template = "<s> $A </s>" if kind == "wordpiece_nfkc" else "<s> $A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B", special_tokens=ids
        )
    return tokenizer


def trained_tokenizer(kind: str, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One of `KINDS`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind).to_str()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def cutting_tokenizer(
    *tokens: str, chat_template: str | None = None, **special: str
) -> PreTrainedTokenizerFast:
    """Cuts a text into the given tokens, the longest first; any other character is unknown."""
    order = sorted(tokens, key=len, reverse=True)
    pattern = "|".join(re.escape(token).replace("\\ ", " ") for token in order)
    names = [special.get(f"{role}_token", f"<{role}>") for role in ("unk", "bos", "eos", "pad")]
    vocabulary = {token: i for i, token in enumerate([*names, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), names, strict=True)),
        chat_template=chat_template,
    )

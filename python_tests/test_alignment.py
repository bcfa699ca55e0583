"""TokenAligner on texts: maps by hand, against a slow oracle, batches, bad input."""

import pytest
import torch
from alignment_oracle import slow_ends, slow_map
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from trained_tokenizers import KINDS, cutting_tokenizer, trained_tokenizer
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import c2c_ext
from c2c_ext import TokenAligner
from c2c_ext.token_spans import token_spans


def mapped(aligner: TokenAligner, text: str) -> list[tuple[str, str | None]]:
    """(receiver token, sharer token or None) for every token of the receiver."""
    row = aligner.align(text)
    own = aligner.receiver.convert_ids_to_tokens(row.receiver_ids)
    other = aligner.sharer.convert_ids_to_tokens(row.sharer_ids)
    return [
        (token, None if place < 0 else other[place])
        for token, place in zip(own, row.token_map, strict=True)
    ]


@pytest.mark.parametrize(
    ("receiver", "sharer", "expected"),
    [
        # One to one, one to many, many to one.
        ("ab|cd", "ab|cd", [0, 1]),
        ("abcd", "a|b|cd", [2]),
        ("a|b|cd", "abcd", [-1, -1, 0]),
        # Boundaries that cross: never a token that has read further.
        ("ab|c|def", "a|bc|de|f", [0, 1, 3]),
        ("abc|def", "ab|cde|f", [0, 2]),
        # A space in front, behind or alone: the words go together all the same.
        ("ab| cd| ef", "ab |cd |ef", [0, 1, 2]),
        ("ab |cd |ef", "ab| cd| ef", [0, 1, 2]),
        ("ab| |cd", "ab| cd", [0, 0, 1]),
        ("ab| cd", "ab| |cd", [0, 2]),
        ("ab | cd", "ab|  cd", [0, 1]),
        ("ab|.\n\n|c", "ab|.|\n\n|c", [0, 1, 3]),
        # Characters of several code points; a joiner is a character too.
        ("e|\u0301|x", "e\u0301|x", [-1, 0, 1]),
        ("e\u0301|x", "e|\u0301|x", [1, 2]),
        ("👩\u200d💻|!", "👩|\u200d|💻|!", [2, 3]),
        ("日本|語", "日|本語", [0, 1]),
    ],
)
def test_maps_by_hand(receiver: str, sharer: str, expected: list[int]) -> None:
    own, other = receiver.split("|"), sharer.split("|")
    aligner = TokenAligner(cutting_tokenizer(*own), cutting_tokenizer(*other, "never"))
    row = aligner.align("".join(own))
    assert aligner.receiver.convert_ids_to_tokens(row.receiver_ids) == own
    assert aligner.sharer.convert_ids_to_tokens(row.sharer_ids) == other
    assert row.token_map == expected


def byte_level(*merges: str) -> PreTrainedTokenizerFast:
    """Single bytes and the given pairs of them, in GPT-2's letters for bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split("+")) for merge in merges]
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_of_one_character_are_told_apart() -> None:
    single = byte_level()
    assert len(single("😀")["input_ids"]) == 4
    whole = cutting_tokenizer("a", "😀", "b")
    # Not before its last byte has a token read the character.
    assert TokenAligner(single, whole).align("a😀b").token_map == [0, 0, 0, 0, 1, 2]
    assert TokenAligner(whole, single).align("a😀b").token_map == [0, 4, 5]
    # 😀 is F0 9F 98 80, ð Ł ĺ Ģ in letters.
    thirds = byte_level("ð+Ł", "ðŁ+ĺ")
    assert mapped(TokenAligner(thirds, byte_level("ð+Ł")), "😀") == [("ðŁĺ", "ĺ"), ("Ģ", "Ģ")]
    ends = byte_level("Ł+ĺ", "Łĺ+Ģ")
    assert mapped(TokenAligner(thirds, ends), "😀") == [("ðŁĺ", "ð"), ("Ģ", "ŁĺĢ")]
    assert mapped(TokenAligner(ends, thirds), "😀") == [("ð", None), ("ŁĺĢ", "Ģ")]
    # A token that ends one character and begins the next: 日 is E6 97 A5, 本 is E6 9C AC.
    across = byte_level("¥+æ")
    assert mapped(TokenAligner(across, single), "日本")[2:] == [("¥æ", "æ"), ("ľ", "ľ"), ("¬", "¬")]


def test_characters_that_a_normalizer_changes_keep_their_place() -> None:
    nfkc = trained_tokenizer("wordpiece_nfkc")
    single = cutting_tokenizer(*"ﬁe\u0301㎏x12")
    assert mapped(TokenAligner(nfkc, single), "e\u0301 x ㎏")[1:-1] == [
        ("é", "\u0301"),  # both code points became one
        ("x", "x"),
        ("k", "<unk>"),  # half of ㎏ has been read: the space before it
        ("##g", "㎏"),
    ]
    places = TokenAligner(single, nfkc).align("㎏x").token_map
    names = nfkc.convert_ids_to_tokens(nfkc("㎏x")["input_ids"])
    assert [names[p] for p in places] == ["##g", "##x"]


def test_characters_that_a_normalizer_drops_belong_to_the_token_before() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "c": 2}, "<unk>"))
    backend.normalizer = normalizers.Replace("#", "")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    dropping = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    aligner = TokenAligner(cutting_tokenizer("ab", "#", " ", "c"), dropping)
    assert mapped(aligner, "ab## c") == [
        ("ab", None),  # the sharer's "ab" has read "##" too
        ("#", None),
        ("#", "ab"),
        (" ", "ab"),
        ("c", "c"),
    ]


def test_special_tokens_around_a_text_follow_what_is_before_them() -> None:
    framed, plain = trained_tokenizer("wordpiece_nfkc"), cutting_tokenizer("the", " dog")
    assert mapped(TokenAligner(framed, plain), "the dog") == [
        ("<s>", None),
        ("the", "the"),
        ("dog", " dog"),
        ("</s>", " dog"),
    ]
    # None of the sharer's is mapped to, not even before its first token of text.
    letters = cutting_tokenizer(*"the", " dog")
    assert mapped(TokenAligner(letters, framed), "the dog") == [
        ("t", None),
        ("h", None),
        ("e", "the"),
        (" dog", "dog"),
    ]


def test_special_tokens_in_a_text_are_text() -> None:
    own, other = trained_tokenizer("byte_level"), trained_tokenizer("metaspace_bpe")
    result = mapped(TokenAligner(own, other), "the</s>")
    assert result[-1] == ("</s>", "</s>")


@pytest.mark.parametrize("text", ["The lazy dog", " \t x", "e\u0301 😀", "trailing  ", "a</s>b"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_tokenizer_on_both_sides_is_the_identity(kind: str, text: str) -> None:
    aligner = TokenAligner(trained_tokenizer(kind), trained_tokenizer(kind))
    row = aligner.align(text)
    assert row.token_map == list(range(len(row.receiver_ids))) and row.token_map
    assert row.sharer_ids == row.receiver_ids


def test_trimmed_offsets_map_as_whole_ones_do() -> None:
    """The same tokens, but their offsets leave out the space in front."""
    text = " The lazy dog,  naïve café\n\n世界 😀"
    other = trained_tokenizer("metaspace_unigram")
    whole, trimmed = trained_tokenizer("byte_level"), trained_tokenizer("byte_level")
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(
        trim_offsets=True, add_prefix_space=False
    )
    reported = [t(text, return_offsets_mapping=True) for t in (whole, trimmed)]
    assert reported[0]["input_ids"] == reported[1]["input_ids"]
    assert reported[0]["offset_mapping"] != reported[1]["offset_mapping"]
    for pair in ((whole, other), (other, whole)):
        swapped = [trimmed if t is whole else t for t in pair]
        assert TokenAligner(*pair).align(text) == TokenAligner(*swapped).align(text)


CHARACTERS = st.one_of(
    st.sampled_from("The lazydog.,!  \n\t"),
    st.sampled_from("éïãÅ\u0301\u0308ﬁ㎏½²ﷺİẛ①\u200b\u200d\u00a0\u3000\u2028日本語한각😀👩💻🇩🇪"),
    st.characters(codec="utf-8", exclude_characters="<▁"),
)


@pytest.mark.parametrize("receiver", KINDS)
@seed(7)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(text=st.text(CHARACTERS, max_size=40), sharer=st.sampled_from(KINDS))
@example(text="ﷺ ㎏ 日本e\u0301 ", sharer="unigram_squeezed")
@example(text="\u3000\u00a0x 😀", sharer="byte_level")
def test_maps_are_those_of_a_slow_oracle(receiver: str, text: str, sharer: str) -> None:
    ends = {}
    for kind in (receiver, sharer):
        tokenizer = trained_tokenizer(kind)
        expected = slow_ends(tokenizer, text, kind.startswith("byte_level"))
        spans = token_spans(tokenizer, text)
        for end, wanted, added in zip(spans.ends, expected, spans.added, strict=True):
            assert added == (wanted is None)
            assert added or float(end) == pytest.approx(float(wanted), abs=1e-6), (kind, expected)
        ends[kind] = expected
    if receiver != sharer:
        row = TokenAligner(trained_tokenizer(receiver), trained_tokenizer(sharer)).align(text)
        assert row.token_map == slow_map(ends[receiver], ends[sharer])


def test_the_oracle_tells_maps_apart() -> None:
    """Ends one character off are seen: the comparison above is no tautology."""
    ends = slow_ends(trained_tokenizer("byte_level"), "The dog", True)
    assert slow_map(ends, ends) == list(range(len(ends)))
    assert slow_map([end - 1 for end in ends], ends) != list(range(len(ends)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_the_texts_alone(side: str) -> None:
    aligner = TokenAligner(trained_tokenizer("byte_level"), trained_tokenizer("space_behind"))
    texts = ["The lazy dog jumps.", "x", "日本 😀 Hello"]
    batch = aligner(texts, padding_side=side)
    own, other = batch.receiver, batch.sharer_inputs
    assert set(own) == {"input_ids", "attention_mask"}
    assert set(other) == {"input_ids", "attention_mask", "token_map"}
    assert all(t.dtype == torch.int64 for t in (*own.values(), *other.values()))
    assert own["input_ids"].shape == own["attention_mask"].shape == other["token_map"].shape
    assert other["input_ids"].shape == other["attention_mask"].shape
    assert len({len(row.sharer_ids) for row in batch.alignments}) > 1
    for i, text in enumerate(texts):
        alone = aligner.align(text)
        for ids, tensors in ((alone.receiver_ids, own), (alone.sharer_ids, other)):
            mask = tensors["attention_mask"][i].bool()
            assert tensors["input_ids"][i][mask].tolist() == ids
            assert mask.sum() == len(ids)
            assert mask[-1 if side == "left" else 0]
        mask = own["attention_mask"][i].bool()
        assert (other["token_map"][i][~mask] == -1).all()
        got = other["token_map"][i][mask].tolist()
        padding = other["input_ids"].shape[1] - len(alone.sharer_ids) if side == "left" else 0
        assert got == [p + padding if p >= 0 else -1 for p in alone.token_map]
    single = aligner("x", padding_side=side)
    assert single.receiver["input_ids"].tolist() == [aligner.align("x").receiver_ids]
    assert batch.to("cpu").sharer_inputs["token_map"].equal(other["token_map"])


def test_a_long_text_is_cut_on_both_sides() -> None:
    aligner = TokenAligner(cutting_tokenizer("ab", "cd", "ef"), cutting_tokenizer("abc", *"def"))
    assert aligner.align("abcdef").token_map == [-1, 1, 3]
    cut = aligner(["abcdef", "ab"], max_length=2, padding_side="right")
    assert cut.receiver["input_ids"].shape == (2, 2)
    assert cut.sharer_inputs["token_map"].tolist() == [[-1, 1], [1, -1]]
    assert [len(row.sharer_ids) for row in cut.alignments] == [2, 2]
    # A tokenizer's own settings for truncation play no part.
    aligner.receiver.backend_tokenizer.enable_truncation(1)
    assert aligner.align("abcdef").token_map == [-1, 1, 3]


def test_the_published_strategies_re_encode_every_token() -> None:
    own = cutting_tokenizer("abcd", "x", "é", "<s>", unk_token="<?>", bos_token="[B]")
    own.add_special_tokens({"additional_special_tokens": ["<tool>", "<both>"]})
    other = cutting_tokenizer("a", "bc", "d", "x", "xy", bos_token="[start]")
    other.add_special_tokens({"additional_special_tokens": ["<both>"]})
    text = "[B]abcdxé<tool><both>x"
    for strategy, of_abcd in (("first", "a"), ("longest", "bc")):
        row = TokenAligner(own, other, strategy).align(text)
        tokens = own.convert_ids_to_tokens(row.receiver_ids)
        assert tokens == ["[B]", "abcd", "x", "é", "<tool>", "<both>", "x"]
        made = other.convert_ids_to_tokens(row.sharer_ids)
        # By role, re-encoded, the same, unknown, unknown, by its string, the same.
        assert made == ["[start]", of_abcd, "x", "<unk>", "<unk>", "<both>", "x"]
        assert row.token_map == list(range(len(tokens)))
    # Of equally long ones the first.
    assert mapped(TokenAligner(cutting_tokenizer("ab"), cutting_tokenizer(*"ba"), "longest"), "ab")[
        0
    ] == ("ab", "a")


class SlowTokenizer(PreTrainedTokenizer):
    """One token a letter, in Python: no offsets."""

    @property
    def vocab_size(self) -> int:
        return 26

    def get_vocab(self) -> dict[str, int]:
        return {chr(97 + i): i for i in range(26)}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token) - 97

    def _convert_id_to_token(self, index: int) -> str:
        return chr(97 + index)

    def build_inputs_with_special_tokens(self, ids: list[int], other: object = None) -> list[int]:
        return ids

    def save_vocabulary(self, *args: object, **kwargs: object) -> tuple:
        return ()


def test_a_tokenizer_without_offsets_is_refused_where_they_are_needed() -> None:
    slow, fast = SlowTokenizer(), cutting_tokenizer("ab")
    for pair, side in (((slow, fast), "receiver"), ((fast, slow), "sharer")):
        with pytest.raises(
            ValueError, match=rf"{side}'s tokenizer \(SlowTokenizer\) gives no char"
        ):
            TokenAligner(*pair)
    assert TokenAligner(slow, fast, "first").align("ab").sharer_ids == [0, 0]
    assert mapped(TokenAligner(fast, slow, "first"), "ab") == [("ab", "a")]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: a(""), ValueError, "text has no tokens for the receiver"),
        (lambda a: a(["ab", " "]), ValueError, r"text\[1\] has no tokens for the sharer"),
        (lambda a: a([]), ValueError, "at least one text is needed, got none"),
        (lambda a: a(3), TypeError, "text must be a string or a list of them, got int"),
        (lambda a: a(["ab", None]), TypeError, r"text\[1\] must be a string, got NoneType"),
        (lambda a: a(b"ab"), TypeError, r"text\[0\] must be a string, got int"),
        (lambda a: a("ab\ud800"), ValueError, "half a surrogate pair '.ud800' at character 2"),
        (lambda a: a("ab", padding_side="both"), ValueError, "one of left, right, got 'both'"),
        (lambda a: a("ab", max_length=0), ValueError, "max_length must be None or .* got 0"),
        (lambda a: a("ab", max_length=True), ValueError, "max_length must be None or .* got True"),
    ],
)
def test_bad_texts_are_named(call, error: type, message: str) -> None:
    aligner = TokenAligner(cutting_tokenizer("ab"), trained_tokenizer("unigram_squeezed"))
    with pytest.raises(error, match=message):
        call(aligner)


def test_bad_arguments_are_named() -> None:
    tokenizer = cutting_tokenizer("ab")
    with pytest.raises(ValueError, match="one of span, first, longest, got 'best'"):
        TokenAligner(tokenizer, tokenizer, "best")
    with pytest.raises(TypeError, match="sharer_tokenizer must be a transformers tokenizer, got s"):
        TokenAligner(tokenizer, "gpt2")


def test_an_empty_text_between_special_tokens_has_a_row() -> None:
    framed = trained_tokenizer("wordpiece_nfkc")
    batch = TokenAligner(framed, trained_tokenizer("space_behind"))(["", "the dog"])
    assert batch.alignments[0].token_map == [-1, -1]
    assert batch.alignments[0].sharer_ids == [framed.bos_token_id]


def test_the_aligner_is_exported() -> None:
    assert c2c_ext.TokenAligner is TokenAligner and "TokenAligner" in c2c_ext.__all__

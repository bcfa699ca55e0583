"""Samples and batches: what is learnt, what is fused, padding, two tokenizers."""

import pytest
import torch
from local_tokenizers import letter_tokenizer, turns, word_tokenizer

from c2c_ext import TokenAligner
from c2c_ext.training.collator import IGNORED, ChatCollator, ChatDataset, Encoder, Sample
from c2c_ext.training.data import BadData, Conversation


def conversation(*contents: str, number: int = 7, **kwargs: object) -> Conversation:
    return Conversation(tuple(turns(*contents)), number, **kwargs)


def texts(sample: Sample, labels: bool = False) -> str:
    tokenizer = word_tokenizer()
    ids = sample.labels if labels else sample.input_ids
    return " ".join(
        "." if i == IGNORED else tokenizer.convert_ids_to_tokens(i) for i in ids.tolist()
    )


def test_the_prompt_is_what_generate_would_get() -> None:
    tokenizer = word_tokenizer()
    talk = conversation("w1 w2", "w3", "w4", "w5 w6")
    sample = Encoder(tokenizer)(talk)
    prompt = tokenizer.apply_chat_template(
        list(talk.messages[:-1]), add_generation_prompt=True, tokenize=False
    )
    expected = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert sample.input_ids[: sample.prompt_length].tolist() == expected
    assert sample.number == 7


def test_the_last_response_is_learnt_up_to_its_end() -> None:
    sample = Encoder(word_tokenizer())(conversation("w1", "w2", "w3", "w4 w5"))
    assert texts(sample) == (
        "<s> <user> w1 </s> w0 <bot> w2 </s> w0 <user> w3 </s> w0 <bot> w4 w5 </s>"
    )
    assert texts(sample, labels=True) == ". " * 14 + "w4 w5 </s>"


def test_all_responses_are_learnt_where_asked() -> None:
    sample = Encoder(word_tokenizer(), labels="all")(conversation("w1", "w2", "w3", "w4 w5"))
    assert texts(sample, labels=True) == ". . . . . . w2 </s> . . . . . . w4 w5 </s>"
    assert sample.prompt_length == 6


def test_plain_text_needs_no_template() -> None:
    tokenizer = word_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match="no chat template; chat_template='plain' takes"):
        Encoder(tokenizer)
    sample = Encoder(tokenizer, chat_template="plain")(conversation("w1 w2", "w3"))
    assert texts(sample) == "w1 w2 w3 </s>"
    assert texts(sample, labels=True) == ". . w3 </s>"


def test_a_response_that_changes_the_prompts_tokens_is_tokenized_by_itself() -> None:
    tokenizer = letter_tokenizer(chat_template=None)
    # As byte pairs do: "ab" is one token where both letters stand together.
    tokenizer.add_tokens(["ab"])
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = template
    sample = Encoder(tokenizer)(conversation("xa", "by"))
    assert tokenizer.convert_ids_to_tokens(sample.input_ids.tolist()) == ["x", "a", "b", "y"]
    assert sample.prompt_length == 2


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    template = "{{ messages | length }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    encoder = Encoder(word_tokenizer(chat_template=template))
    with pytest.raises(ValueError, match="renders the beginning of the conversation differently"):
        encoder(conversation("w1", "w2"))


def test_a_template_that_raises_is_quoted() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    encoder = Encoder(word_tokenizer(chat_template=template))
    with pytest.raises(ValueError, match="the chat template refuses it: roles must alternate"):
        encoder(conversation("w1", "w2"))


def test_a_long_sample_is_refused_or_cut() -> None:
    talk = conversation("w1", "w2 w3 w4")  # 6 + 4 tokens
    assert len(Encoder(word_tokenizer(), max_tokens=10)(talk).input_ids) == 10
    with pytest.raises(ValueError, match="must have at most 9 tokens, has 10"):
        Encoder(word_tokenizer(), max_tokens=9)(talk)
    cut = Encoder(word_tokenizer(), max_tokens=8, truncate=True)(talk)
    assert texts(cut, labels=True) == ". . . . . . w2 w3"
    with pytest.raises(ValueError, match=r"at most 6 tokens, has 10 \(6 of them the prompt\)"):
        Encoder(word_tokenizer(), max_tokens=6, truncate=True)(talk)


def test_a_prompt_of_one_token_cannot_be_fused() -> None:
    encoder = Encoder(word_tokenizer(), chat_template="plain")
    with pytest.raises(ValueError, match="prompt must have at least 2 tokens to be fused, has 1"):
        encoder(conversation("w1", "w2"))


def test_positions_end_before_the_last_prompt_token() -> None:
    encoder = Encoder(word_tokenizer())
    assert encoder(conversation("w1", "w2", positions=(1, 5))).positions == (1, 5)
    with pytest.raises(ValueError, match=r"positions must end by 5, .* got \[1, 6\]"):
        encoder(conversation("w1", "w2", positions=(1, 6)))


def test_differing_tokenizers_are_refused_without_an_aligner() -> None:
    Encoder(word_tokenizer(), word_tokenizer())
    with pytest.raises(ValueError, match=r"the tokenizers differ: .* without an aligner both"):
        Encoder(word_tokenizer(), letter_tokenizer())
    swapped = word_tokenizer(words=[*word_tokenizer().get_vocab()][-2:])
    with pytest.raises(ValueError, match="the tokenizers differ"):
        Encoder(word_tokenizer(), swapped)
    pair = (word_tokenizer(), letter_tokenizer())
    with pytest.raises(TypeError, match="aligner must be a TokenAligner, got function"):
        Encoder(*pair, lambda own, other: [])
    for others in ((pair[0], None), (word_tokenizer(), pair[1])):
        with pytest.raises(ValueError, match="aligner: must have been made of the same two"):
            Encoder(*others, TokenAligner(*pair))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "first"}, "labels must be one of last, all, got 'first'"),
        ({"chat_template": "own"}, "chat_template must be one of tokenizer, plain"),
        ({"max_tokens": 2}, "max_tokens must be an integer of at least 3, got 2"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder(word_tokenizer(), **changes)
    with pytest.raises(ValueError, match="padding must be one of right, left, got 'both'"):
        ChatCollator(padding="both")


def batch_of(padding: str, *samples: Sample) -> dict[str, torch.Tensor]:
    return ChatCollator(3, 4, padding=padding)(samples)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_are_padded_on_the_side_asked_for(padding: str) -> None:
    encoder = Encoder(word_tokenizer())
    samples = [encoder(conversation("w1", "w2", number=4)), encoder(conversation("w1 w2", "w3 w4"))]
    batch = batch_of(padding, *samples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "sample_ids"}
    assert all(t.dtype == torch.int64 for t in batch.values())
    assert batch["sample_ids"].tolist() == [4, 7]
    short, long = (sample.input_ids.tolist() for sample in samples)
    pad = [3] * (len(long) - len(short))
    assert pad
    assert batch["input_ids"].tolist() == [
        pad + short if padding == "left" else short + pad,
        long,
    ]
    assert torch.equal(batch["attention_mask"].sum(1), torch.tensor([len(short), len(long)]))
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    learnt = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][learnt], batch["input_ids"][learnt])


@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_become_a_mask(padding: str) -> None:
    encoder = Encoder(word_tokenizer())
    own = encoder(conversation("w1", "w2", positions=(1, 3)))
    whole = encoder(conversation("w1 w2", "w3"))
    mask = batch_of(padding, own, whole)["fused_mask"]
    assert mask.dtype == torch.bool
    start = 1 if padding == "left" else 0
    assert mask[0].nonzero().flatten().tolist() == [start + 1, start + 2]
    assert mask[1].nonzero().flatten().tolist() == list(range(whole.prompt_length - 1))


def aligned_encoder(strategy: str = "span", **settings: object) -> Encoder:
    pair = (word_tokenizer(), letter_tokenizer())
    if settings.get("chat_template") != "plain":
        pair[1].chat_template = pair[1].chat_template.replace("<s>", "<s> <sys>", 1)
    return Encoder(*pair, TokenAligner(*pair, strategy), **settings)


def mapped(sample: Sample) -> list[tuple[str, str | None]]:
    own = word_tokenizer().convert_ids_to_tokens(sample.input_ids[: sample.prompt_length].tolist())
    letters = letter_tokenizer().convert_ids_to_tokens(sample.sharer_ids.tolist())
    places = sample.token_map.tolist()
    return [(t, letters[p] if p >= 0 else None) for t, p in zip(own, places, strict=True)]


def test_an_aligner_gives_the_sharer_its_own_tokens() -> None:
    sample = aligned_encoder()(conversation("w12 w34", "w3", "w4", "w5"))
    letters = letter_tokenizer().convert_ids_to_tokens(sample.sharer_ids.tolist())
    assert " ".join(letters) == (
        "<s> <sys> <user> w 1 2 w 3 4 </s> w 0 <bot> w 3 </s> w 0 <user> w 4 </s> w 0 <bot>"
    )
    glue = ("</s>", "w0", "<bot>")
    assert mapped(sample) == [
        *[("<s>", None), ("<user>", None), ("w12", "2"), ("w34", "4"), *((t, "4") for t in glue)],
        *[("w3", "3"), ("</s>", "3"), ("w0", "3"), ("<user>", "3")],
        *[("w4", "4"), *((t, "4") for t in glue)],
    ]
    assert sample.token_map[2:4].tolist() == [5, 8]
    # What is learnt is what it is without a sharer of other tokens.
    alone = Encoder(word_tokenizer())(conversation("w12 w34", "w3", "w4", "w5"))
    assert sample.input_ids.equal(alone.input_ids) and sample.labels.equal(alone.labels)


def test_an_aligner_reads_plain_text_too() -> None:
    sample = aligned_encoder(chat_template="plain")(conversation("w12 w3", "w4", "w5", "w6"))
    assert mapped(sample) == [("w12", "2"), ("w3", "3"), ("w4", "4"), ("</s>", "4"), ("w5", "5")]


def test_a_sharer_without_system_messages_reads_them_in_the_first_message() -> None:
    encoder = aligned_encoder()
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    encoder.sharer.chat_template = refusing + encoder.sharer.chat_template
    talk = Conversation(tuple(turns("w1", "w2", system="w34")), 1)
    sample = encoder(talk)
    letters = letter_tokenizer().convert_ids_to_tokens(sample.sharer_ids.tolist())
    assert " ".join(letters) == "<s> <sys> <user> w 3 4 w 1 </s> w 0 <bot>"
    assert mapped(sample)[:3] == [("<s>", None), ("<sys>", None), ("w34", "4")]
    assert ("w1", "1") in mapped(sample)


def test_an_aligner_may_re_encode_as_published() -> None:
    sample = aligned_encoder("first")(conversation("w12 w34", "w3"))
    letters = letter_tokenizer().convert_ids_to_tokens(sample.sharer_ids.tolist())
    assert " ".join(letters) == "<s> <sys> <user> w w </s> w 0 <bot>"
    assert sample.token_map.tolist() == [-1, -1, 3, 4, -1, -1, -1]


@pytest.mark.parametrize("labels", ["last", "all"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_maps_move_with_the_padding(padding: str, labels: str) -> None:
    encoder = aligned_encoder(labels=labels)
    samples = [
        encoder(conversation("w1", "w2")),
        encoder(conversation("w12 w34", "w3", "w4", "w5")),
    ]
    batch = batch_of(padding, *samples)
    sharer, mask = batch["sharer_input_ids"], batch["sharer_attention_mask"]
    assert batch["token_map"].shape == batch["input_ids"].shape
    assert sharer.shape == mask.shape and (sharer[mask == 0] == 4).all()
    for row, sample in enumerate(samples):
        own = batch["attention_mask"][row].bool()
        places = batch["token_map"][row][own]
        picked = [-1 if p < 0 else int(sharer[row, p]) for p in places]
        wanted = [-1 if p < 0 else int(sample.sharer_ids[p]) for p in sample.token_map]
        assert max(wanted) > 0
        assert picked == wanted + [-1] * (len(picked) - len(wanted))
        assert (batch["token_map"][row][~own] == -1).all()


def test_a_prompt_that_cannot_be_aligned_is_named() -> None:
    encoder = aligned_encoder()
    encoder.sharer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"messages\[0\] \(user\) is not in what the sharer's"):
        encoder(conversation("w1", "w2"))


def test_a_dataset_reports_what_cannot_be_a_sample() -> None:
    encoder = Encoder(word_tokenizer(), max_tokens=10)
    talks = [
        conversation("w1", "w2", number=1),
        conversation("w1", "w2 w3 w4 w5", number=2),
        conversation("w3", "w4", number=5),
    ]
    with pytest.raises(ValueError, match="x, line 2: must have at most 10 tokens, has 11"):
        ChatDataset(talks, BadData("x", "line", "refuse"), encoder)
    bad = BadData("x", "line", "skip")
    dataset = ChatDataset(talks, bad, encoder)
    assert [s.number for s in dataset] == [1, 5] and (bad.kept, bad.count) == (2, 1)
    assert dataset.place(5) == "x, line 5"
    assert [s.number for s in dataset.part([1])] == [5] and len(dataset) == 2

"""What two models of different vocabularies read of a request, and what the modes make of it."""

import pytest
import torch
from local_tokenizers import CHAT_TEMPLATE, letter_tokenizer, turns, word_tokenizer
from tiny_models import close_all_gates, fuser_between, trio
from transformers import DynamicCache

from c2c_ext import TokenAligner, attached, fuse
from c2c_ext.evaluation import texts as texts_module
from c2c_ext.evaluation.modes import generate, mismatched_items, score
from c2c_ext.evaluation.readers import CONTROLS, EvaluationPair
from c2c_ext.evaluation.texts import MAX_LENGTH, Texts

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXTS = ("w1 w23 w4 w56 w7", "w8 w90 w1 w2 w3 w45 w6", "w12 w3 w4")
OPTIONS = (" w5 w61", " w72")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
UNBOUND = {"receiver": None, "sharer": None}


@pytest.fixture(scope="module")
def pair() -> EvaluationPair:
    receiver, sharer, fuser = trio()
    own = fuser_between(receiver, receiver)
    return EvaluationPair(receiver, sharer, fuser, own, same_tokens=False)


@pytest.fixture
def texts() -> Texts:
    return make_texts()


def make_texts(**limits: int) -> Texts:
    tokenizers = {"receiver": word_tokenizer(), "sharer": letter_tokenizer()}
    return Texts(tokenizers, {**UNBOUND, **limits})


def items_of(texts: Texts, contexts=CONTEXTS, options=OPTIONS) -> list:
    return [
        texts.item(context, option, group=k, document=k)
        for k, context in enumerate(contexts)
        for option in options
    ]


@torch.no_grad()
def plain_score(pair: EvaluationPair, aligner: TokenAligner, context: str, option: str) -> float:
    """One row, read and fused by hand."""
    aligned = aligner(context)
    ids = [*aligned.receiver["input_ids"][0].tolist()]
    caches = []
    for model, tokens in (
        (pair.receiver, torch.tensor([ids[:-1]])),
        (pair.sharer, aligned.sharer_inputs["input_ids"]),
    ):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
    token_map = aligned.sharer_inputs["token_map"][0, :-1]
    cache = DynamicCache()
    for k, (key, value) in enumerate(fuse(*caches, pair.fuser, token_map=token_map)):
        cache.update(key, value, k)
    rest = aligner.receiver(option, add_special_tokens=False)["input_ids"]
    tail = torch.tensor([[ids[-1], *rest[:-1]]])
    logs = pair.receiver(input_ids=tail, past_key_values=cache).logits.log_softmax(-1)[0]
    return sum(float(logs[k, token]) for k, token in enumerate(rest))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_over_two_vocabularies_equal_a_plain_loop(batch_size, pair, texts) -> None:
    aligner = TokenAligner(word_tokenizer(), letter_tokenizer())
    items = items_of(texts)
    found = score("c2c", pair, items, batch_size)
    asked = [(context, option) for context in CONTEXTS for option in OPTIONS]
    expected = [plain_score(pair, aligner, *one) for one in asked]
    assert [s.log_likelihood for s in found] == pytest.approx(expected, abs=2e-4)
    alone = score("receiver", pair, items)
    assert all(
        abs(a.log_likelihood - b.log_likelihood) > 0.01 for a, b in zip(found, alone, strict=True)
    )


@pytest.mark.parametrize("system", [None, "w9 w8"])
@pytest.mark.parametrize("chat", [False, True])
def test_answers_equal_an_attached_receivers(chat, system, pair, texts) -> None:
    aligner = TokenAligner(word_tokenizer(), letter_tokenizer())
    for content in CONTEXTS:
        if chat:
            talk = turns(content, system=system)
            context, aligned = texts.chat(talk), aligner.apply_chat_template(talk)
        else:
            context, aligned = content, aligner(content)
        item = texts.item(context, None, group=0, document=0, new=5)
        assert list(item.context) == aligned.receiver["input_ids"][0].tolist()
        with attached(pair.receiver, pair.sharer, pair.fuser) as receiver:
            expected = receiver.generate(
                **aligned.receiver,
                sharer_inputs=aligned.sharer_inputs,
                max_new_tokens=5,
                do_sample=False,
            )[0, len(item.context) :]
        assert list(generate("c2c", pair, [item], 5)[0].ids) == expected.tolist()


def test_two_equal_vocabularies_score_alike_whichever_way_they_are_read(pair, monkeypatch) -> None:
    tokenizers = dict.fromkeys(("receiver", "sharer"), word_tokenizer())
    same = Texts(tokenizers, UNBOUND)
    monkeypatch.setattr(texts_module, "have_same_tokens", lambda *tokenizers: False)
    apart = Texts(tokenizers, UNBOUND)
    assert same.same_tokens and not apart.same_tokens
    items = items_of(same), items_of(apart)
    assert items[0][0].sharer is None and items[1][0].sharer is not None
    for mode in ("sharer", "routing", "c2c", *CONTROLS):
        found = [[s.log_likelihood for s in score(mode, pair, rows)] for rows in items]
        assert found[0] == pytest.approx(found[1], abs=2e-4), mode


def test_the_sharer_scores_and_answers_in_its_own_tokens(pair, texts) -> None:
    letters = letter_tokenizer()
    item = texts.item(CONTEXTS[0], OPTIONS[0], group=0, document=0)
    assert list(item.sharer.context) == letters(CONTEXTS[0])["input_ids"]
    assert list(item.sharer.continuation) == letters(OPTIONS[0])["input_ids"]
    said = generate("sharer", pair, [item], 4)[0]
    assert said.side == "sharer"
    with torch.no_grad():
        ids = torch.tensor([letters(CONTEXTS[0])["input_ids"]])
        own = pair.sharer.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        whole = torch.tensor([letters(CONTEXTS[0] + OPTIONS[0])["input_ids"]])
        logs = pair.sharer(input_ids=whole).logits.log_softmax(-1)[0]
    assert list(said.ids) == own.tolist()
    places = range(ids.shape[1], whole.shape[1])
    expected = sum(float(logs[k - 1, whole[0, k]]) for k in places)
    assert score("sharer", pair, [item])[0].log_likelihood == pytest.approx(expected, abs=2e-4)


def test_routing_takes_the_surer_model_in_its_own_tokens(pair, texts) -> None:
    items = items_of(texts)
    own, other, routed = (score(mode, pair, items) for mode in ("receiver", "sharer", "routing"))
    for k in range(0, len(items), 2):
        assert routed[k : k + 2] in (own[k : k + 2], other[k : k + 2])
    answers = {mode: generate(mode, pair, items, 3) for mode in ("receiver", "sharer", "routing")}
    for k, answer in enumerate(answers["routing"]):
        both = answers["receiver"][k], answers["sharer"][k]
        assert answer == max(both, key=lambda said: said.confidence)
    assert {answer.side for answer in answers["routing"]} == {"receiver", "sharer"}


def test_an_ensemble_of_two_vocabularies_is_refused(pair, texts) -> None:
    with pytest.raises(ValueError, match="ensemble: averages the logits of both models"):
        score("ensemble", pair, items_of(texts))


@pytest.mark.parametrize("mode", ["c2c", *CONTROLS])
def test_closed_gates_over_two_vocabularies_score_as_the_receiver(mode, pair, texts) -> None:
    items = items_of(texts)
    receiver, _, fuser = trio()
    closed = [fuser, fuser_between(receiver, receiver)]
    for one in closed:
        close_all_gates(one)
    shut = EvaluationPair(pair.receiver, pair.sharer, *closed, same_tokens=False)
    own = [s.log_likelihood for s in score("receiver", pair, items)]
    assert [s.log_likelihood for s in score(mode, shut, items)] == pytest.approx(own, abs=1e-5)
    changed = [s.log_likelihood for s in score(mode, pair, items)]
    assert max(abs(a - b) for a, b in zip(own, changed, strict=True)) > 0.01


def test_a_mismatched_cache_is_of_another_text_and_every_token_meets_one(pair, texts) -> None:
    items = items_of(texts)
    for item, other in zip(items, mismatched_items(items), strict=True):
        assert other.document != item.document and other.sharer.context != item.sharer.context
    from c2c_ext.evaluation.modes import _sources

    for item, source in zip(items, _sources("mismatched", pair, items), strict=True):
        assert source.ids != item.sharer.context[: len(source.ids)]
        places = [place for place in source.token_map if place >= 0]
        assert [p >= 0 for p in source.token_map] == [p >= 0 for p in item.sharer.token_map[:-1]]
        assert places == sorted(places) and places[-1] == len(source.ids) - 1


def test_a_context_of_no_or_one_token_is_the_receivers_own(pair, texts) -> None:
    for context in ("", "w5"):
        item = texts.item(context, " w6 w7", group=0, document=0)
        assert len(item.context) == 1
        assert score("c2c", pair, [item]) == score("receiver", pair, [item])


def test_long_contexts_lose_their_beginning_on_the_side_that_they_are_too_long_for() -> None:
    long = make_texts(sharer=8)
    item = long.item("w1 w23 w4 w56 w7", " w8", group=0, document=0)
    assert len(item.context) == 5  # the receiver reads all
    letters = letter_tokenizer()("w1 w23 w4 w56 w7")["input_ids"]
    assert list(item.sharer.context) == letters[-6:]  # two are left for " w8"
    # Of w1w23w4w56w7 4w56w7 is left, and words meet their last letters.
    assert item.sharer.token_map == (-1, -1, 0, 3, 5)
    assert long.truncated == 1
    short = make_texts(receiver=4)
    item = short.item("w1 w23 w4 w56 w7", " w8", group=0, document=0)
    assert len(item.context) == 3
    assert list(item.sharer.context) == letters
    assert item.sharer.token_map[-1] == len(letters) - 1
    with pytest.raises(ValueError, match="an answer of 5 tokens leaves no room for its question"):
        short.item("w1", " w1 w2 w3 w4 w5", group=0, document=0)
    assert make_texts().limits == {"receiver": MAX_LENGTH, "sharer": MAX_LENGTH}


@pytest.mark.parametrize("size", [2, 3, 100])
def test_rolling_blocks_cover_the_text_in_the_tokens_of_who_scores(size, pair, texts) -> None:
    text = " ".join(CONTEXTS)
    words, letters = word_tokenizer()(text)["input_ids"], letter_tokenizer()(text)["input_ids"]
    for mode, ids in (("receiver", words), ("sharer", letters), ("c2c", words)):
        blocks = texts.blocks(mode, text, size, 0)
        assert [token for block in blocks for token in block.continuation] == ids
        assert all(list(b.context[1:]) == ids[: len(b.context) - 1] for b in blocks)
    later = texts.blocks("c2c", text, size, 0)[-1]
    if size < 100:
        # What is fused was read before the block began: none of the sharer's later tokens.
        done = len(
            letter_tokenizer()(" ".join(text.split()[: len(later.context) - 1]))["input_ids"]
        )
        assert max(later.sharer.token_map) == done
        assert score("c2c", pair, [later]) != score("receiver", pair, [later])


def test_blocks_of_a_text_too_long_for_the_sharer_keep_what_is_just_before_them() -> None:
    text = " ".join(CONTEXTS)
    letters = letter_tokenizer()(text)["input_ids"]
    blocks = make_texts(sharer=6).blocks("c2c", text, 3, 0)
    for block in blocks[1:]:
        read = sum(len(word) for word in text.split()[: len(block.context) - 1])
        assert list(block.sharer.context) == letters[read - 6 : read]
        assert block.sharer.token_map[-1] == 5


def test_a_refused_system_message_goes_in_front_of_the_users_first() -> None:
    tokenizers = {
        "receiver": word_tokenizer(chat_template=NO_SYSTEM + CHAT_TEMPLATE),
        "sharer": letter_tokenizer(),
    }
    texts = Texts(tokenizers, UNBOUND)
    rendered = texts.chat(turns("w1 w2", system="w3"))
    assert rendered == "<s> <user> w3\n\nw1 w2 </s> w0 <bot>"
    assert texts.question(rendered) == "w1 w2"
    item = texts.item(rendered, " w4", group=0, document=0)
    assert item.sharer.context[:2] == tuple(letter_tokenizer()("<s> <sys>")["input_ids"])


def test_an_answer_that_has_begun_goes_on_in_both_templates(texts) -> None:
    rendered = texts.chat(
        [*turns("w1 w2"), {"role": "assistant", "content": "w3 w4"}], generation=False
    )
    assert rendered == "<s> <user> w1 w2 </s> w0 <bot> w3 w4"
    item = texts.item(rendered, " w5", group=0, document=0)
    assert list(item.context) == word_tokenizer()(rendered)["input_ids"]
    assert texts.with_question(rendered, "w9").endswith("<user> w9 </s> w0 <bot> w3 w4")


def test_templates_that_are_missing_or_refuse_are_named() -> None:
    bare = Texts(
        {"receiver": word_tokenizer(), "sharer": letter_tokenizer(chat_template=None)}, UNBOUND
    )
    with pytest.raises(ValueError, match="the sharer's tokenizer has no chat template"):
        bare.chat(turns("w1"))
    assert list(bare.asked_of_sharer("w1", "plain")) == letter_tokenizer()("w1")["input_ids"]


def test_an_end_that_a_tokenizer_puts_behind_is_no_part_of_a_context() -> None:
    from tokenizers import processors

    words = word_tokenizer()
    ids = [(token, words.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    texts = Texts({"receiver": words, "sharer": words}, UNBOUND)
    item = texts.item("w1 w2", " w3", group=0, document=0)
    assert words.convert_ids_to_tokens(item.context) == ["<s>", "w1", "w2"]
    assert words.convert_ids_to_tokens(item.continuation) == ["w3"]
    asked = texts.item("w1 w2", None, group=0, document=0)
    assert words.convert_ids_to_tokens(asked.context) == ["<s>", "w1", "w2"]


@pytest.mark.parametrize("other", [word_tokenizer, letter_tokenizer])
def test_a_rendered_conversation_gets_no_second_beginning(other) -> None:
    from tokenizers import processors

    tokenizers = {
        "receiver": word_tokenizer(chat_template=CHAT_TEMPLATE.removeprefix("<s>")),
        "sharer": other(chat_template=CHAT_TEMPLATE.removeprefix("<s>")),
    }
    for tokenizer in tokenizers.values():
        first = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=first
        )
    texts = Texts(tokenizers, UNBOUND)
    begin, user = (tokenizers["receiver"].convert_tokens_to_ids(t) for t in ("<s>", "<user>"))
    rendered = texts.chat(turns("w1 w2"))
    for context, token in ((rendered, user), ("w1 w2", begin)):
        item = texts.item(context, " w3", group=0, document=0)
        assert item.context[0] == token and begin not in item.context[1:]
        if item.sharer is not None:
            assert item.sharer.context[0] == token and begin not in item.sharer.context[1:]
            assert item.sharer.token_map[0] == -1  # what stands before the content
    prompt = texts.asked_of_sharer("w1 w2", rendered)
    assert prompt[0] == user and begin not in prompt
    assert texts.asked_of_sharer("w1 w2", "plain")[0] == begin

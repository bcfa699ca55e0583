"""Conversations without a user interface: modes, turns, stopping, failing, times."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from chat_models import chat_models
from local_tokenizers import letter_tokenizer, word_tokenizer
from torch import Tensor

from c2c_ext import TokenAligner
from c2c_ext.chat.models import ChatModels, load_models
from c2c_ext.chat.prompts import ChatPrompts
from c2c_ext.chat.session import MODES, Reply, Session, Settings
from c2c_ext.demo import world as w
from c2c_ext.generation import attached

TOKENS = 6
QUESTION = "w3 w14 w15 w9 w2 w6"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> ChatModels:
    return chat_models()


@pytest.fixture
def session(models: ChatModels) -> Session:
    return Session(models, Settings(max_new_tokens=TOKENS, t2t_tokens=4))


@pytest.fixture(scope="module")
def shipped() -> ChatModels:
    return load_models()


def run(reply: Reply) -> str:
    text = "".join(piece.text for piece in reply if not piece.background)
    assert reply.answer.text == text
    return text


def ids_of(models: ChatModels, side: str, *contents: str) -> Tensor:
    """What the template gives for user and assistant in turn."""
    text = "<s>"
    for i, content in enumerate(contents):
        text += f" {'<bot>' if i % 2 else '<user>'} {content} </s> w0"
    return models.tokenizers[side](text + " <bot>", return_tensors="pt")["input_ids"]


def written(models: ChatModels, side: str, ids: Tensor, tokens: int = TOKENS) -> str:
    model = getattr(models, side)
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return models.tokenizers[side].decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def expected(models: ChatModels, mode: str, *contents: str) -> str:
    if mode == "t2t":
        *before, question = contents
        task = ids_of(models, "sharer", *before, f"w1 {question}")
        text = written(models, "sharer", task, 4)
        return written(
            models, "receiver", ids_of(models, "receiver", *before, f"{text} w2 {question}")
        )
    if mode == "c2c":
        with attached(models.receiver, models.sharer, models.fuser):
            return written(models, "receiver", ids_of(models, "receiver", *contents))
    return written(models, mode, ids_of(models, mode, *contents))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_as_its_models_do_and_reads_the_whole_conversation(
    models: ChatModels, session: Session, mode: str
) -> None:
    first = run(session.ask(QUESTION, mode))
    assert first == expected(models, mode, QUESTION)
    second = run(session.ask("w8 w5", mode))
    assert second == expected(models, mode, QUESTION, first, "w8 w5")
    assert [m["content"] for m in session.messages] == [QUESTION, first, "w8 w5", second]
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2


def test_the_modes_differ(models: ChatModels) -> None:
    assert len({expected(models, mode, QUESTION) for mode in MODES}) == len(MODES)


def test_different_tokenizers_are_aligned() -> None:
    models = chat_models(None, letter_tokenizer())
    session = Session(models, Settings(max_new_tokens=TOKENS))
    text = run(session.ask(QUESTION, "c2c"))
    aligner = TokenAligner(models.tokenizers["receiver"], models.tokenizers["sharer"])
    aligned = aligner.apply_chat_template([{"role": "user", "content": QUESTION}])
    assert bool((aligned.sharer_inputs["token_map"] >= 0).any())
    with attached(models.receiver, models.sharer, models.fuser) as receiver:
        out = receiver.generate(
            **aligned.receiver,
            sharer_inputs=aligned.sharer_inputs,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    ids = out[0, aligned.receiver["input_ids"].shape[1] :]
    assert text == models.tokenizers["receiver"].decode(ids, skip_special_tokens=True)
    assert text != written(models, "receiver", ids_of(models, "receiver", QUESTION))


def test_compare_asks_every_mode_the_same_and_keeps_one_answer(
    models: ChatModels, session: Session
) -> None:
    run(session.ask(QUESTION, "receiver"))
    before = list(session.messages)
    answers = {reply.mode: run(reply) for reply in session.compare("w8", keep="sharer")}
    contents = [m["content"] for m in before]
    assert answers == {mode: expected(models, mode, *contents, "w8") for mode in MODES}
    assert session.messages[2:] == [
        {"role": "user", "content": "w8"},
        {"role": "assistant", "content": answers["sharer"]},
    ]
    again = {reply.mode: run(reply) for reply in session.compare("w8", None, before)}
    assert again == answers
    assert len(session.messages) == 4


def test_an_answer_has_its_times_and_counts(session: Session) -> None:
    reply = session.ask(QUESTION, "t2t")
    pieces = list(reply)
    answer = reply.answer
    assert answer.background == "".join(p.text for p in pieces if p.background) != ""
    assert len([p for p in pieces if not p.background]) > 1  # it streams
    assert answer.tokens == TOKENS and not answer.stopped
    assert 0 < answer.background_seconds < answer.first_token_seconds <= answer.seconds


def test_reset_leaves_the_system_message(models: ChatModels) -> None:
    session = Session(models, Settings(max_new_tokens=1, system="w7"))
    run(session.ask(QUESTION, "receiver"))
    assert [m["role"] for m in session.messages] == ["system", "user", "assistant"]
    session.reset()
    assert session.messages == [{"role": "system", "content": "w7"}]


def test_temperature_samples(models: ChatModels) -> None:
    torch.manual_seed(0)
    texts = {
        run(Session(models, Settings(max_new_tokens=8, temperature=3.0)).ask(QUESTION, "c2c"))
        for _ in range(3)
    }
    assert len(texts) == 3


@pytest.fixture
def endless(models: ChatModels) -> Iterator[list[Reply]]:
    """Receiver and sharer wait, at their fourth step, until the reply in the list is stopped."""
    replies: list[Reply] = []

    def wait(*_: object) -> None:
        reply = replies[-1]
        if reply._generation.tokens >= 3:
            while not reply._generation.stopped:
                time.sleep(0.001)

    hooks = [m.register_forward_hook(wait) for m in (models.receiver, models.sharer)]
    yield replies
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["close", "stop"])
def test_stopping_ends_the_generation_and_keeps_what_there_is(
    models: ChatModels, session: Session, endless: list[Reply], mode: str, how: str
) -> None:
    original = type(models.receiver)
    reply = session.ask(QUESTION, mode)
    endless.append(reply)
    pieces = iter(reply)
    next(pieces)
    if how == "close":
        pieces.close()
    else:
        reply.stop()
        list(pieces)
    assert reply.answer.stopped
    assert reply.answer.tokens <= 4
    assert not [t for t in threading.enumerate() if t.name == "c2c generate"]
    assert type(models.receiver) is original and not models.lock.locked()
    kept = session.messages[1:]
    assert kept == ([{"role": "assistant", "content": reply.answer.text}] if kept else [])
    assert bool(kept) == bool(reply.answer.text) == (mode != "t2t")


def test_after_a_stop_the_session_answers_as_before(
    models: ChatModels, session: Session, endless: list[Reply]
) -> None:
    reply = session.ask(QUESTION, "c2c")
    endless.append(reply)
    with pytest.raises(KeyboardInterrupt), closing(iter(reply)) as pieces:
        for _ in pieces:
            raise KeyboardInterrupt
    short = Session(models, Settings(max_new_tokens=2))
    endless.append(short.ask(QUESTION, "c2c"))
    text = run(endless[-1])
    assert text == expected_prefix(models, 2)


def expected_prefix(models: ChatModels, tokens: int) -> str:
    with attached(models.receiver, models.sharer, models.fuser):
        return written(models, "receiver", ids_of(models, "receiver", QUESTION), tokens)


def test_a_failing_mode_does_not_lose_the_conversation(
    models: ChatModels, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(session.ask(QUESTION, "receiver"))
    before = list(session.messages)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(models.sharer, "forward", fail)
        patch.setattr(models.sharer.base_model, "forward", fail)
        for mode in ("sharer", "t2t", "c2c"):
            with pytest.raises(RuntimeError, match="out of memory"):
                run(session.ask("w8", mode))
            assert session.messages == before
        assert run(session.ask("w8", "receiver"))
    session.messages = before
    assert run(session.ask("w8", "c2c")) == expected(models, "c2c", QUESTION, first, "w8")


def test_sessions_that_share_models_take_turns(models: ChatModels) -> None:
    truth = expected(models, "c2c", QUESTION), expected(models, "receiver", QUESTION)
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        session = Session(models, Settings(max_new_tokens=TOKENS))
        answers[number] = run(session.ask(QUESTION, ("c2c", "receiver")[number % 2]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: truth[i % 2] for i in range(4)}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("receiver", "300 tokens to read .* 6 to write .* the 256 that the receiver was made for"),
        ("c2c", "more than the 256 that the receiver"),
        ("sharer", "more than the 256 that the sharer"),
        ("t2t", "more than the 256 that the sharer"),
        ("both", "unknown mode 'both'; there are receiver, sharer, t2t, c2c"),
    ],
)
def test_what_cannot_be_answered_is_refused(session: Session, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(session.ask("w1 " * 295, mode))  # the template has five more
    assert session.messages == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"t2t_tokens": -1}, "t2t_tokens must be at least 1, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_without_a_chat_template_the_models_read_plain_text() -> None:
    plain = word_tokenizer(chat_template=None)
    prompts = ChatPrompts({"receiver": plain, "sharer": word_tokenizer()})
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    assert prompts.encode("receiver", messages).tolist() == [plain("w1 w2 w3")["input_ids"]]
    assert prompts.encode("sharer", messages).shape[1] > 3


def test_a_template_that_refuses_is_one_clear_error() -> None:
    refusing = word_tokenizer(chat_template="{{ raise_exception('roles\nmust alternate') }}")
    prompts = ChatPrompts({"receiver": refusing, "sharer": refusing})
    with pytest.raises(ValueError, match=r"the receiver's chat template refuses .*: roles must"):
        prompts.encode("receiver", [{"role": "user", "content": "w1"}])


def test_an_empty_prompt_is_refused() -> None:
    plain = word_tokenizer(chat_template=None)
    prompts = ChatPrompts({"receiver": plain, "sharer": plain})
    with pytest.raises(ValueError, match="the receiver's tokenizer makes no token"):
        prompts.encode("receiver", [{"role": "user", "content": " "}])


def test_braces_in_a_question_mean_nothing() -> None:
    tokenizers = dict.fromkeys(("receiver", "sharer"), letter_tokenizer(chat_template=None))
    prompts = ChatPrompts(tokenizers, "a{question}b", "{question}{text}{question}")
    read: list[Tensor] = []
    messages = [{"role": "user", "content": "{text}"}]
    list(prompts.background(messages, 1, lambda ids: read.append(ids) or iter(())))
    (ids,) = read
    assert ids.tolist() == [tokenizers["sharer"]("a{text}b")["input_ids"]]
    assert prompts.with_background(messages, "{question}").tolist() == [
        tokenizers["receiver"]("{text}{question}{text}")["input_ids"]
    ]


@pytest.mark.parametrize("reading", [{"t2t_prompt": "x"}, {"t2t_reading": "{text}"}])
def test_a_missing_placeholder_is_refused(reading: dict) -> None:
    tokenizers = dict.fromkeys(("receiver", "sharer"), word_tokenizer())
    with pytest.raises(ValueError, match=r"must have the placeholder \{question\}"):
        ChatPrompts(tokenizers, **reading)


def test_the_shipped_pair_answers_its_examples(shipped: ChatModels) -> None:
    right = dict.fromkeys(MODES, 0)
    for mode in MODES:
        session = Session(shipped, Settings())
        for example in shipped.prompts.examples:
            text = run(session.ask(example, mode))
            right[mode] += text == shipped.prompts.truth(session.messages[:-1])
    count = len(shipped.prompts.examples)
    assert right["c2c"] == right["t2t"] == count
    assert right["receiver"] < count and right["sharer"] < count


def test_the_shipped_sharer_writes_within_its_budget(shipped: ChatModels) -> None:
    session = Session(shipped, Settings(t2t_tokens=2))
    reply = session.ask("Corbin : metal drink colour question : is metal", "t2t")
    list(reply)
    words = reply.answer.background.split()
    assert words[:3] == ["Corbin", ":", "metal"] and len(words) == 6
    assert reply.answer.text == words[3]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("hello there", "not in the demo's vocabulary: hello, there"),
        ("question : is metal", "there is no form to ask about yet; try: Corbin"),
        ("Corbin : metal", "not a question in the language of this pair; try: Corbin"),
        ("Corbin : question : is metal", "not a question in the language of this pair"),
        ("metal : metal question : is metal", "unknown entity 'metal'; known are"),
        ("Corbin : red question : is metal", "unknown attribute 'red'"),
        ("Corbin : metal metal question : is metal", "in the form only once"),
        ("Corbin : drink tree question : is metal", "the form does not have 'metal', only drink"),
    ],
)
@pytest.mark.parametrize("mode", ["c2c", "t2t"])
def test_the_shipped_pair_says_what_it_cannot_read(
    shipped: ChatModels, question: str, message: str, mode: str
) -> None:
    session = Session(shipped, Settings())
    with pytest.raises(ValueError, match=message):
        run(session.ask(question, mode))
    assert session.messages == []


def test_the_shipped_pairs_help_names_its_words(shipped: ChatModels) -> None:
    assert all(attribute in shipped.prompts.help for attribute in w.ATTRIBUTES)
    assert shipped.prompts.examples[0] in shipped.prompts.help

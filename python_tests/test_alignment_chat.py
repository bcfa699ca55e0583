"""TokenAligner on conversations: two templates, contents found where they are, glue, bad input."""

import pytest
from local_tokenizers import turns
from trained_tokenizers import KINDS, cutting_tokenizer, trained_tokenizer

from c2c_ext import TokenAligner
from c2c_ext.alignment import Alignment

OPEN = "{% if add_generation_prompt %}"
COLON = "{% for m in messages %}{{m.role[0]}}:{{m.content}};{% endfor %}" + OPEN + "a:{% endif %}"
BRACKETS = (
    "^{% for m in messages %}[{{m.role[0]}}]{{m.content|trim}} {% endfor %}"
    + OPEN
    + "[a]{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{{m.content}}<|im_end|>\n{% endfor %}"
    + OPEN
    + "<|im_start|>assistant\n{% endif %}"
)
# As Gemma: no system message. As some Mistrals: it comes in front of the last user message.
REFUSING = (
    "{% if messages[0].role == 'system' %}{{raise_exception('no system')}}{% endif %}" + COLON
)
IGNORING = COLON.replace("messages %}", "messages if m.role != 'system' %}")
MOVING = (
    "{% for m in messages if m.role != 'system' %}{{m.role[0]}}:"
    "{% if loop.last %}{{messages[0].content}}/{% endif %}{{m.content}};{% endfor %}"
)
# As Qwen 3: reasoning of earlier turns is dropped.
FORGETTING = (
    "{% for m in messages %}{{m.role[0]}}:"
    "{% if not loop.last and '</think>' in m.content %}{{m.content.split('</think>')[1]|trim}}"
    "{% else %}{{m.content}}{% endif %};{% endfor %}"
)


def letters(template: str) -> object:
    return cutting_tokenizer(*"abcdefu:;[]s", chat_template=template)


def pairs(template: str) -> object:
    return cutting_tokenizer("ab", "cd", "ef", "a:", "u:", "s:", ";", chat_template=template)


def texts(aligner: TokenAligner, row: Alignment) -> list[tuple[str, str | None]]:
    own, other = (
        [side.text[a:b] for a, b in side.offsets.tolist()] for side in (row.receiver, row.sharer)
    )
    return [(t, other[p] if p >= 0 else None) for t, p in zip(own, row.token_map, strict=True)]


def test_contents_are_aligned_and_glue_follows_them() -> None:
    aligner = TokenAligner(pairs(COLON), letters(BRACKETS))
    row = aligner.align_chat(turns("abcd", "ef", "ab"))
    assert row.receiver.text == "u:abcd;a:ef;u:ab;a:"
    assert row.sharer.text == "^[u]abcd [a]ef [u]ab [a]"
    # Places in the sharer's text, one letter a token.
    assert row.token_map == [-1, 5, 7, 7, 7, 13, 13, 13, 19, 19, 19]
    back = TokenAligner(letters(BRACKETS), pairs(COLON)).align_chat(turns("abcd", "ef", "ab"))
    # ^[u]a  bc  d [a]e  f [u]a  b [a]
    assert back.token_map == [-1] * 5 + [1] * 2 + [2] * 6 + [5] * 6 + [8] * 5


def test_a_generation_prompt_is_glue() -> None:
    aligner = TokenAligner(pairs(COLON), letters(BRACKETS))
    row = aligner.align_chat(turns("abcd"), add_generation_prompt=False)
    assert row.receiver.text == "u:abcd;" and row.token_map == [-1, 5, 7, 7]
    assert aligner.align_chat(turns("abcd")).token_map == [-1, 5, 7, 7, 7]


def test_a_word_of_the_template_is_not_taken_for_content() -> None:
    """The content "user" stands in the template's "user" too, before it."""
    aligner = TokenAligner(
        cutting_tokenizer("user", chat_template=CHATML), cutting_tokenizer("user", "[", "]", "^")
    )
    aligner.sharer.chat_template = "^{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}"
    row = aligner.align_chat(turns("user"), add_generation_prompt=False)
    own = aligner.receiver.convert_ids_to_tokens(row.receiver_ids)
    first, second = (i for i, token in enumerate(own) if token == "user")
    assert row.sharer.text == "^[user]user"
    assert row.token_map[:second] == [-1] * second and first < second
    assert row.token_map[second:] == [4] * (len(own) - second)


def test_whitespace_that_a_template_strips_is_no_matter() -> None:
    aligner = TokenAligner(letters(COLON), letters(BRACKETS))
    row = aligner.align_chat([{"role": "user", "content": " \nab c "}], add_generation_prompt=False)
    assert row.sharer.text == "^[u]ab c "
    assert texts(aligner, row) == [
        *[(character, None) for character in "u: \n"],
        *[("a", "a"), ("b", "b"), (" ", " "), ("c", "c"), (" ", "c"), (";", "c")],
    ]


def test_equal_renderings_of_one_tokenizer_are_the_identity() -> None:
    aligner = TokenAligner(letters(COLON), letters(COLON))
    row = aligner.align_chat(turns("ab", "c", "d"))
    assert row.token_map == list(range(len(row.receiver_ids)))
    # The same tokens, but other templates.
    other = TokenAligner(letters(COLON), letters(BRACKETS)).align_chat(turns("ab", "c", "d"))
    assert other.token_map[:2] == [-1, -1]


def test_a_tokens_that_has_content_and_glue_is_content() -> None:
    aligner = TokenAligner(cutting_tokenizer("u:a", "b;", chat_template=COLON), letters(BRACKETS))
    row = aligner.align_chat(turns("ab"), add_generation_prompt=False)
    assert texts(aligner, row) == [("u:a", "a"), ("b;", "b")]
    back = TokenAligner(letters(BRACKETS), aligner.receiver)
    row = back.align_chat(turns("ab"), add_generation_prompt=False)
    assert texts(back, row)[4:] == [("a", "u:a"), ("b", "b;"), (" ", "b;")]


@pytest.mark.parametrize("receiver", KINDS)
@pytest.mark.parametrize("sharer", KINDS)
def test_contents_meet_whatever_the_tokenizers(receiver: str, sharer: str) -> None:
    """Behind each message the sharer has read all of it, and nothing of the next."""
    talk = turns("Hello\n world 😀", "e\u0301㎏  naïve", "user: 日本", system="The lazy dog.")
    aligner = TokenAligner(trained_tokenizer(receiver, CHATML), trained_tokenizer(sharer, BRACKETS))
    row = aligner.align_chat(talk)
    assert row.receiver.text.count("<|im_start|>") == 5
    begins, stops = {}, {}
    for side in ("receiver", "sharer"):
        text, done = getattr(row, side).text, 0
        for i, message in enumerate(talk):
            role = {"receiver": f"{message['role']}\n", "sharer": f"[{message['role'][0]}]"}[side]
            begin = text.index(role + message["content"], done) + len(role)
            begins[side, i], stops[side, i] = begin, (done := begin + len(message["content"]))
    for i in range(len(talk)):
        for token, ((start, end), place) in enumerate(
            zip(row.receiver.offsets.tolist(), row.token_map, strict=True)
        ):
            last = next((j for j in reversed(range(4)) if begins["receiver", j] < end), -1)
            if last != i:
                continue
            spans = row.sharer.offsets.tolist()
            if start >= stops["receiver", i]:  # glue behind message i
                assert spans[place][0] < stops["sharer", i]
                following = [k for k in range(place + 1, len(spans)) if spans[k][1] > spans[k][0]]
                assert spans[following[0]][1] > stops["sharer", i] - 1, token
            assert place < 0 or spans[place][0] < stops["sharer", i]


@pytest.mark.parametrize("template", [REFUSING, IGNORING])
def test_a_system_message_that_one_template_lacks_is_named_or_merged(template: str) -> None:
    talk = turns("ab", "c", "d", system="ef")
    aligner = TokenAligner(pairs(COLON), letters(template))
    with pytest.raises(ValueError, match=r"the sharer's chat template .*; system='merge' puts "):
        aligner.align_chat(talk)
    row = aligner.align_chat(talk, system="merge")
    assert row.sharer.text == "u:ef\n\nab;a:c;u:d;a:"
    assert row.receiver.text == "s:ef;u:ab;a:c;u:d;a:"
    assert texts(aligner, row)[:6] == [
        *[("s:", None), ("ef", "f"), (";", "f"), ("u:", "f"), ("ab", "b"), (";", "b")]
    ]
    swapped = TokenAligner(letters(template), pairs(COLON)).align_chat(talk, system="merge")
    assert swapped.receiver.text == row.sharer.text
    alone = [talk[0], *talk[2:]]
    with pytest.raises(ValueError, match=r"the sharer's chat template (refuses|renders|.*drops)"):
        aligner.align_chat(alone, system="merge")
    with pytest.raises(ValueError, match="system must be one of error, merge, got 'drop'"):
        aligner.align_chat(talk, system="drop")


def test_another_error_than_the_system_messages_gives_no_advice_about_it() -> None:
    template = "{{raise_exception('roles must alternate')}}"
    with pytest.raises(
        ValueError, match=r"the receiver's .* refuses the messages: roles must alter"
    ) as caught:
        TokenAligner(letters(template), letters(COLON)).align_chat(turns("ab", system="c"))
    assert "merge" not in str(caught.value)


def test_a_template_may_move_the_system_message() -> None:
    talk = turns("ab", "c", "d", system="ef")
    aligner = TokenAligner(letters(COLON), letters(MOVING))
    row = aligner.align_chat(talk, add_generation_prompt=False)
    assert row.sharer.text == "u:ab;a:c;u:ef/d;"
    # The receiver's system message meets the sharer's, though that comes later.
    assert texts(aligner, row)[2:10] == [
        *[("e", "e"), ("f", "f"), (";", "f"), ("u", "f"), (":", "f"), ("a", "a"), ("b", "b")],
        (";", "b"),
    ]


def test_thinking_that_a_template_drops_is_left_out() -> None:
    talk = turns("ab", "<think>\ncc\n</think>\n\nd", "e")
    aligner = TokenAligner(letters(COLON), letters(FORGETTING))
    row = aligner.align_chat(talk, add_generation_prompt=False)
    assert row.sharer.text == "u:ab;a:d;u:e;"
    found = [t for t in texts(aligner, row) if t[0] in "abcde"]
    dropped = [("c", "b"), ("c", "b")]
    assert [t for t in found if t[0] in "abc"][:2] == [("a", "a"), ("b", "b")]
    assert dropped == [t for t in found if t[0] == "c"] and ("d", "d") in found
    assert found[-1] == ("e", "e")
    back = TokenAligner(letters(FORGETTING), letters(COLON))
    row = back.align_chat(talk, add_generation_prompt=False)
    assert ("d", "d") in texts(back, row) and ("e", "e") in texts(back, row)


@pytest.mark.parametrize("strategy", ["first", "longest"])
def test_published_strategies_re_encode_the_contents_only(strategy: str) -> None:
    aligner = TokenAligner(pairs(COLON), letters(BRACKETS), strategy)
    row = aligner.align_chat(turns("abcd", "ef"))
    own = aligner.receiver.convert_ids_to_tokens(row.receiver_ids)
    other = aligner.sharer.convert_ids_to_tokens(row.sharer_ids)
    assert own == ["u:", "ab", "cd", ";", "a:", "ef", ";", "a:"]
    assert "".join(t if t != "<unk>" else "?" for t in other) == "?[u]ac?[a]e?[a]"
    assert [None if p < 0 else other[p] for p in row.token_map] == [
        *[None, "a", "c", None, None, "e", None, None]
    ]


def test_several_conversations_are_a_batch() -> None:
    aligner = TokenAligner(pairs(COLON), letters(BRACKETS))
    talks = [turns("abcd", "ef", "ab"), turns("cd")]
    batch = aligner.apply_chat_template(talks)
    assert [a.token_map for a in batch.alignments] == [
        aligner.align_chat(t).token_map for t in talks
    ]
    assert batch.receiver["input_ids"].shape == batch.sharer_inputs["token_map"].shape
    one = aligner.apply_chat_template(talks[0])
    assert one.receiver["input_ids"].tolist() == [batch.alignments[0].receiver_ids]
    with pytest.raises(ValueError, match=r"messages\[0\] calls a tool .* \(in conversation 1\)"):
        aligner.apply_chat_template([talks[0], [{"role": "tool", "content": "x"}]])


def test_options_reach_both_templates() -> None:
    template = "{% if loud %}!{% endif %}" + COLON
    aligner = TokenAligner(letters(template), pairs(template))
    row = aligner.align_chat(turns("ab"), loud=True)
    assert row.receiver.text[0] == row.sharer.text[0] == "!"


def test_a_content_that_a_template_changes_is_named() -> None:
    shouting = COLON.replace("m.content", "m.content|upper")
    aligner = TokenAligner(letters(COLON), letters(shouting))
    with pytest.raises(
        ValueError, match=r"messages\[1\] \(assistant\) is not in what the sharer's chat template"
    ):
        aligner.align_chat([turns("AB")[0], *turns("AB", "cd")[1:], *turns("x")])
    # Where it looks different only because the template looks into it, it is found.
    measuring = "{{messages[0].content|length}}" + COLON
    row = TokenAligner(letters(COLON), letters(measuring)).align_chat(turns("ab"))
    assert row.sharer.text == "2u:ab;a:" and row.token_map == [-1, -1, 3, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ([], ValueError, "messages must have at least one message, got none"),
        ("hello", TypeError, "messages must be a list of messages, got str"),
        ({"role": "user", "content": "x"}, TypeError, "must be a list of messages, got dict"),
        ([3], TypeError, r"messages\[0\] must be a mapping, got int"),
        ([{"role": "user"}], TypeError, r"messages\[0\]\['content'\] must be a string, got NoneT"),
        ([{"content": "x"}], TypeError, r"messages\[0\]\['role'\] must be a string, got NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], TypeError, "a string, got list"),
        (
            [{"role": "user", "content": "\udc80"}],
            ValueError,
            r"messages\[0\]\['content'\] must be",
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": []}],
            ValueError,
            "tools are not supported",
        ),
    ],
)
def test_bad_messages_are_named(messages, error: type, message: str) -> None:
    aligner = TokenAligner(letters(COLON), pairs(COLON))
    with pytest.raises(error, match=message):
        aligner.apply_chat_template(messages)


def test_bad_options_are_named() -> None:
    aligner = TokenAligner(letters(COLON), pairs(COLON))
    with pytest.raises(ValueError, match="tools are not supported"):
        aligner.apply_chat_template(turns("ab"), tools=[{"name": "x"}])
    with pytest.raises(TypeError, match="apply_chat_template takes no tokenize"):
        aligner.apply_chat_template(turns("ab"), tokenize=False)
    aligner.sharer.chat_template = None
    with pytest.raises(ValueError, match="the sharer's tokenizer has no chat template"):
        aligner.apply_chat_template(turns("ab"))

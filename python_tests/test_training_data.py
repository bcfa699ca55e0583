"""Conversations from files and datasets: what is read, and how bad records are reported."""

import sys
import types
from pathlib import Path

import pytest
from local_tokenizers import turns, write_lines

from c2c_ext.training import data
from c2c_ext.training.data import is_file_place, read_conversations

GOOD = {"messages": turns("w1 w2", "w3")}


def test_conversations_are_read_in_order(tmp_path: Path) -> None:
    records = [GOOD, "", {"messages": turns("a", "b", "c", "d", system="s"), "positions": [1, 3]}]
    read, bad = read_conversations(write_lines(tmp_path / "x.jsonl", records))
    assert [c.number for c in read] == [1, 3]
    assert read[0].messages == tuple(GOOD["messages"]) and read[0].positions is None
    assert [m["role"] for m in read[1].messages] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert read[1].positions == (1, 3)
    bad.check()
    assert bad.summary() == f"{tmp_path / 'x.jsonl'}: 2 conversations, 0 bad lines"


BAD = {
    "not JSON": ("{messages: []}", "is not valid JSON"),
    "half a line": ('{"messages": [{"role": "user"', "is not valid JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "is not valid JSON"),
    "binary": (b"\x00\x01\x02", "is not valid JSON"),
    "twice a key": ('{"messages": [], "messages": []}', "duplicate keys: messages"),
    "nested": ("[" * 100_000, "nested too deeply"),
    "no object": ("[1]", "must be an object with messages, got list"),
    "other keys": ({"text": "x"}, "messages is missing (keys: text)"),
    "messages no list": ({"messages": "hello"}, "messages must be a list"),
    "no messages": ({"messages": []}, "messages must be a list with a message in it"),
    "message no object": ({"messages": ["x"]}, "messages[0] must be an object, got str"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role is missing"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    "role no string": ({"messages": [{"role": 1, "content": "x"}]}, "role must be a string"),
    "content no string": (
        {"messages": [{"role": "user", "content": ["x"]}]},
        "messages[0].content must be a string, got list",
    ),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        "role must be one of system, user, assistant, got 'robot'",
    ),
    "no assistant": ({"messages": turns("x")}, "no message is the assistant's"),
    "no last assistant": ({"messages": turns("x", "y", "z")}, "the last message must be the ass"),
    "no prompt": ({"messages": turns("x", "y")[1:]}, "the first message is the assistant's"),
    "empty response": ({"messages": turns("x", " \n")}, "messages[1].content, the response, is"),
    "empty first response": (
        {"messages": turns("x", "", "y", "z")},
        "messages[1].content, the response, is empty",
    ),
    "half a character": ({"messages": turns("\ud800", "y")}, "holds a lone surrogate"),
    "positions": ({**GOOD, "positions": [3, 3]}, "positions must be [first, end]"),
    "positions of another type": ({**GOOD, "positions": [True, 2]}, "positions must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    path = write_lines(tmp_path / "x.jsonl", [GOOD, line, GOOD])
    read, bad = read_conversations(path)
    assert [c.number for c in read] == [1, 3]
    with pytest.raises(ValueError) as error:
        bad.check()
    assert "2 conversations, 1 bad lines (bad_data='skip' leaves them out)" in str(error.value)
    assert f"{path}, line 2: " in str(error.value) and message in str(error.value)
    assert len(str(error.value)) < 1000


def test_skipping_keeps_the_rest_and_counts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [GOOD, "{", "[]", GOOD])
    read, bad = read_conversations(path, bad_data="skip")
    bad.check()
    assert [c.number for c in read] == [1, 4]
    assert bad.summary().endswith("2 conversations, 2 bad lines skipped")
    assert [line.split(": ")[0] for line in bad.lines()] == [f"{path}, line 2", f"{path}, line 3"]


def test_nothing_left_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    _, bad = read_conversations(write_lines(tmp_path / "x.jsonl", ["{"]), bad_data="skip")
    with pytest.raises(ValueError, match=r"holds no conversation that can be used\n.*line 1"):
        bad.check()


def test_many_bad_lines_are_cut_short(tmp_path: Path) -> None:
    _, bad = read_conversations(write_lines(tmp_path / "x.jsonl", ["{"] * 50))
    assert len(bad.lines()) == data.SHOWN_PROBLEMS + 1 and bad.lines()[-1] == "... and 40 more"


def test_a_huge_line_is_refused_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 100)
    path = write_lines(tmp_path / "x.jsonl", [GOOD, "x" * 1050, GOOD, "y" * 200])
    read, bad = read_conversations(path, bad_data="skip")
    assert [c.number for c in read] == [1, 3]
    assert [line.split(": ", 1)[1] for line in bad.lines()] == [
        "must be at most 100 bytes long"
    ] * 2


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("talks.jsonl", True),
        ("a/b/c", True),
        (__file__, True),
        ("org/chats", False),
        ("chats", False),
    ],
)
def test_a_files_place_is_told_from_a_datasets_name(source: str, expected: bool) -> None:
    assert is_file_place(source) == expected


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing or not a regular file"):
        read_conversations(tmp_path / name)


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad_data must be one of refuse, skip, got 'ignore'"):
        read_conversations(write_lines(tmp_path / "x.jsonl", [GOOD]), bad_data="ignore")


def test_a_dataset_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"no file org/chats; .* install the datasets library"):
        read_conversations("org/chats")


def test_a_dataset_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict]:
        asked.append((name, split))
        return [GOOD, {"text": "x"}]

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    read, bad = read_conversations("org/chats", split="test")
    assert asked == [("org/chats", "test")] and [c.number for c in read] == [1]
    with pytest.raises(ValueError, match="org/chats, row 2: messages is missing"):
        bad.check()


def test_a_dataset_that_cannot_be_loaded_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise RuntimeError("no network\nat all")

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(ValueError, match=r"cannot be loaded .* no network at all"):
        read_conversations("org/chats")

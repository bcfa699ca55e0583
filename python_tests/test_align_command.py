"""`c2c align`: what it prints, colours, machine-readable output, hostile text, bad input."""

import json
import re
import sys
from pathlib import Path

import pytest
from test_alignment_chat import BRACKETS, COLON
from trained_tokenizers import cutting_tokenizer, trained_tokenizer

from c2c_ext import TokenAligner, align_command
from c2c_ext.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("align")
    cutting_tokenizer("ab", " cd", "😀", chat_template=COLON).save_pretrained(place / "receiver")
    cutting_tokenizer(*"abcd ", chat_template=BRACKETS).save_pretrained(place / "sharer")
    trained_tokenizer("byte_level").save_pretrained(place / "bytes")
    (place / "empty").mkdir()
    return place


def align(place: Path, text: str, *options: str, sharer: str = "sharer") -> int:
    sides = ["--receiver", str(place / "receiver"), "--sharer", str(place / sharer)]
    return main(["align", *sides, *options, "--", text])


class Terminal:
    """A standard output that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_both_tokenizations_and_the_map_are_printed(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    assert align(place, "ab cd") == 0
    assert capsys.readouterr().out.splitlines() == [
        "receiver, 2 tokens",
        "ab| cd",
        "",
        "sharer, 5 tokens",
        "a|b| |c|d",
        "",
        "   receiver        sharer",
        "0  ab        -> 1  b",
        "1   cd       -> 4  d",
        "",
        "2 of 2 receiver tokens mapped, to 2 of 5 sharer tokens (strategy span)",
    ]


def test_chats_go_through_both_templates(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert align(place, "ab", "--chat") == 0
    out = capsys.readouterr().out
    assert "u|:|ab|;|a|:" in out and "^|[|u|]|a|b| |[|a|]" in out
    assert re.search(r"^0  u +-> -$", out, re.M) and re.search(r"^2  ab +-> 5  b$", out, re.M)
    assert align(place, "ab cd", "--chat", "--strategy", "longest") == 0
    assert "(strategy longest)" in capsys.readouterr().out


def test_a_token_has_the_colour_of_what_it_maps_to(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert align(place, "ab😀") == 0
    own, other = terminal.text.splitlines()[1], terminal.text.splitlines()[4]
    colours = re.compile(r"\x1b\[30;(\d+)m([^\x1b]+)\x1b\[0m")
    by_text = {text: colour for colour, text in colours.findall(other)}
    assert by_text["b"] != by_text["😀"]
    assert colours.findall(own) == [(by_text["b"], "ab"), (by_text["😀"], "😀")]
    for setting, coloured in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", setting)
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        assert align(place, "ab") == 0
        assert ("\x1b[" in terminal.text) is coloured


def test_machines_get_ids_offsets_and_map(place: Path, tmp_path: Path) -> None:
    assert align(place, "ab cd", "--json", str(tmp_path / "x.json")) == 0
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["map"] == [1, 4] and report["strategy"] == "span"
    assert report["receiver"]["text"] == report["sharer"]["text"] == "ab cd"
    token = report["receiver"]["tokens"][1]
    assert (token["token"], token["start"], token["end"]) == (" cd", 2, 5)
    assert align(place, "ab cd", "--strategy", "first", "--json", str(tmp_path / "y.json")) == 0
    made = json.loads((tmp_path / "y.json").read_text())["sharer"]
    assert made["text"] is None and [t["token"] for t in made["tokens"]] == ["a", " "]


def test_nothing_of_a_text_can_steer_the_terminal(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    text = "a\x1b[2Jb\x07\x9b31m\r\u202e\u2066\n\x7fc\ue000"
    for sharer in ("sharer", "bytes"):
        assert align(place, text, sharer=sharer) == 0
        out = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in out), ascii(out)
        assert "\\x1b" in out and "\\u202e" in out and "\\n" in out
    assert align_command.printable("é 日本 😀 a\u0301") == "é 日本 😀 a\u0301"


def test_parts_of_a_character_are_shown_as_tokens(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    assert align(place, "日", sharer="bytes") == 0
    assert "日" in capsys.readouterr().out.splitlines()[1]
    row = TokenAligner(trained_tokenizer("byte_level"), cutting_tokenizer("㎏"))
    report = align_command.describe(row, row.align("㎏"))
    assert align_command.lines(report, False)[1] == "ã|İ|\u0131"


def test_an_output_that_is_no_unicode_gets_escapes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    terminal.encoding = "ascii"
    monkeypatch.setattr(sys, "stdout", terminal)
    assert align(place, "😀") == 0
    assert "\\U0001f600" in terminal.text and terminal.text.isascii()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "TEXT must not be empty"),
        ("x" * 65537, [], "TEXT must have at most 65536 characters, has 65537"),
        ("\udcff", [], "text must be Unicode text, got half a surrogate pair"),
        ("ab", ["--sharer", "/nowhere"], "--sharer: no model at /nowhere"),
        ("ab", ["--json", "/nowhere/x"], "--json: there is no directory /nowhere"),
    ],
)
def test_bad_input_is_one_clear_error(
    place: Path, capsys: pytest.CaptureFixture, text: str, options: list[str], message: str
) -> None:
    assert align(place, text, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("c2c align: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_a_directory_without_a_tokenizer_is_named(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    for sharer in ("empty", "sharer/tokenizer.json"):
        assert align(place, "ab", sharer=sharer) == 2
        err = capsys.readouterr().err
        assert f"--sharer: {place / 'empty'} has no tokenizer that can be read" in err or (
            "--sharer: no model at" in err
        )
    assert align(place, "ab", "--chat", sharer="bytes") == 2
    assert "the sharer's tokenizer has no chat template" in capsys.readouterr().err


def test_both_models_are_required(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["align", "ab"])
    assert caught.value.code == 2
    assert "required: --receiver, --sharer" in capsys.readouterr().err

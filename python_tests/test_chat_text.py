"""Text for a terminal: nothing in it is obeyed, columns stay columns."""

import pytest

from c2c_ext.chat.text import columns, encodable, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("a\tb\nc", "a\tb\nc"),
        ("over\rwritten\x08\x7f", "over␍written␈␡"),
        ("\x9b31m", "\ufffd31m"),  # C1: CSI in one character
        ("abc\u202edef\u2066", "abc\ufffddef\ufffd"),  # reorders what follows
        ("\ud800\u2028\ufeff", "\ufffd\ufffd\ufffd"),
        ("Grüße, 世界 👩\u200d🔬\u00a0!", "Grüße, 世界 👩\u200d🔬 !"),
    ],
)
def test_nothing_that_a_terminal_obeys_is_left(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert "".join(map(printable, text)) == shown  # as pieces of a stream


def test_what_an_encoding_lacks_is_replaced() -> None:
    assert encodable("naïve ␛", "ascii") == "na?ve ?"
    assert encodable("naïve ␛", None) == "naïve ␛"


def test_columns_wrap_and_stay_apart() -> None:
    table = columns([("a", "b"), ("one two three four", "世界" * 10)], width=30)
    lines = table.split("\n")
    assert lines[0] == "a" + " " * 15 + "b"
    assert lines[1] == "one two three   " + "世界" * 3 + "世"
    assert lines[2].startswith("four" + " " * 12 + "界")
    assert "".join(lines[1:]).count("世") == 10


def test_columns_keep_lines_of_a_text() -> None:
    assert columns([("x\n\ny", "1")], width=40) == "x" + " " * 20 + "1\n\ny"

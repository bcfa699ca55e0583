"""`c2c chat` as it is used: through pipes, on a terminal, with bad options and hostile output."""

from __future__ import annotations

import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from chat_models import save_chat_models
from local_tokenizers import WORDS, letter_tokenizer, word_tokenizer

from c2c_ext.chat import terminal, web
from c2c_ext.cli import main

FORM = "Corbin : metal drink colour question : is metal"
COMMAND = [sys.executable, "-m", "c2c_ext.cli", "chat"]
PATIENCE = 60  # seconds, for machines under load
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def own_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a trio of random models; no answer of theirs ends by itself."""
    return save_chat_models(tmp_path_factory.mktemp("models"))


def chat(monkeypatch: pytest.MonkeyPatch, text: str, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *options])


def test_piped_questions_are_answered_one_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert chat(monkeypatch, f"{FORM}\n\nquestion : rivals metal\n/mode t2t\n{FORM}") == 0
    captured = capsys.readouterr()
    assert captured.out == "silver\ncopper\nsilver\n"
    assert captured.err == ""


def test_compare_shows_all_modes_with_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = f"{FORM}\n/compare\n/compare question : rivals metal\n/mode all\n{FORM}\n/mode"
    assert chat(monkeypatch, script) == 0
    out = capsys.readouterr().out
    assert out.count("receiver alone           sharer alone             text to text") == 3
    assert out.count("cache to cache") == out.count("(right is:") == 3
    assert "first token" in out and " ms" in out and "1 token" in out
    assert "(the sharer wrote:" in out and out.endswith("mode all\n")


def test_a_mode_that_fails_leaves_the_others_their_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, own_models: list[str]
) -> None:
    options = ["--max-new-tokens", "4", "--t2t-tokens", str((1 << 20) - 3)]
    assert chat(monkeypatch, "w3\n/mode all\nw3", *own_models, *options) == 1
    out = capsys.readouterr().out
    assert out.count("failed") == 1 and "too long:" in out
    assert out.count("4 tokens") == 3


def test_errors_are_one_line_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commands = "/compare\nnonsense\n/compare\n/bogus \x1b[0m\n/mode both\n/"
    script = f"{commands}\n{FORM}\n/reset\nquestion : is tree"
    assert chat(monkeypatch, script) == 1
    captured = capsys.readouterr()
    assert captured.out == "silver\n"
    lines = captured.err.splitlines()
    assert all(line.startswith("c2c chat: ") for line in lines)
    for line, message in zip(
        lines,
        [
            "/compare: there is no question yet",
            "not in the demo's vocabulary: nonsense",
            "not in the demo's vocabulary: nonsense",
            "unknown command '/bogus'; /help lists them",
            "/mode: there are receiver, sharer, t2t, c2c, all, got 'both'",
            "unknown command '/'",
            "there is no form to ask about yet",
        ],
        strict=True,
    ):
        assert message in line


def test_quit_ends_before_the_input_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert chat(monkeypatch, f"/help\n/quit\n{FORM}\n") == 0
    out = capsys.readouterr().out
    assert "/compare [QUESTION]" in out and "silver" not in out


def test_a_line_that_is_too_long_is_refused_and_read_past(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(terminal, "MAX_QUESTION", 60)
    assert chat(monkeypatch, "x" * 60 + f"\n{'y' * 61}\n{'z ' * 200}\n{FORM}\n") == 1
    captured = capsys.readouterr()
    assert captured.out == "silver\n"
    errors = captured.err.splitlines()
    assert "not in the demo's vocabulary" in errors[0]  # 60 characters are not too long
    assert errors[1:] == ["c2c chat: a question may have 60 characters, this one has more"] * 2


def test_models_of_ones_own_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, own_models: list[str]
) -> None:
    script = "w3 w14\n/mode sharer\nw3 w14\n/mode t2t\nw3"
    options = ["--max-new-tokens", "5", "--t2t-tokens", "3", "--system", "w8", "--dtype", "fp32"]
    assert chat(monkeypatch, script, *own_models, *options, "--t2t-prompt", "w1 {question}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(len(line.split()) <= 5 for line in lines)
    assert lines[0] != lines[1]


def test_escapes_of_a_model_do_not_reach_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    hostile = word_tokenizer([f"\x1b[{i}m\x07\x9b" for i in range(len(WORDS))])
    options = save_chat_models(tmp_path, hostile)
    assert chat(monkeypatch, "a\n/compare", *options, "--max-new-tokens", "8") == 0
    out = capsys.readouterr().out
    assert "␛[" in out and "␇" in out
    assert not {"\x1b", "\x07", "\x9b"} & set(out)


def test_models_of_different_tokenizers_answer_in_every_mode(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, own_models: list[str]
) -> None:
    letters = Path(own_models[3]).parent / "letters"
    shutil.copytree(own_models[3], letters)
    letter_tokenizer().save_pretrained(letters)
    options = [*own_models[:3], str(letters), *own_models[4:], "--max-new-tokens", "4"]
    assert chat(monkeypatch, "w3 w14\n/compare", *options) == 0
    out = capsys.readouterr().out
    assert "failed" not in out and out.count("4 tokens") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--receiver", "x"], "--sharer and --fuser missing"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--temperature", "-1"], "--temperature must be at least 0 and finite, got -1.0"),
        (["--t2t-prompt", "{question}"], "--t2t-prompt goes with models of your own"),
        (["--system", "x"], "--system goes with models of your own"),
        (["--dtype", "bf16"], "--dtype: the shipped pair runs in fp32, got bf16"),
        (["--device", "cuda"], "--device: the shipped pair runs on the CPU, got 'cuda'"),
    ],
)
def test_bad_options_are_one_clear_line(
    capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert main(["chat", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("c2c chat: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, "/nowhere", "--receiver: /nowhere has no tokenizer that can be read"),
        (5, "/nowhere", "--fuser: directory_or_repo_id: no fuser directory at /nowhere"),
        (3, "receiver", "--fuser: "),  # the receiver as a sharer: another number of layers
        (None, ["--device", "abc"], "--device: 'abc' cannot be used"),
        (None, ["--t2t-prompt", "x"], "must have the placeholder {question}, got x"),
    ],
)
def test_models_that_are_not_there_or_do_not_fit_are_one_clear_line(
    capsys: pytest.CaptureFixture,
    own_models: list[str],
    place: int | None,
    value: str | list[str],
    message: str,
) -> None:
    options = list(own_models)
    if place is None:
        options += value
    else:
        options[place] = options[1] if value == "receiver" else value
    assert main(["chat", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "65536"], "--port must be in 0..65535, got 65536"),
        (["--host", "256.0.0.1"], "--host 256.0.0.1 --port 7860 cannot be used"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
    ],
)
def test_c2c_web_says_what_is_wrong_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: list[str],
    message: str,
) -> None:
    page = types.ModuleType("c2c_ext.chat.web_page")  # without gradio
    page.launch = None
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    assert main(["web", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("c2c web: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert os.environ.pop("GRADIO_ANALYTICS_ENABLED") == "False"


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_c2c_web_warns_where_others_can_reach_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, host: str, warned: bool
) -> None:
    served: list[tuple[str, int, bool]] = []

    def launch(models: object, settings: object, *where: object) -> types.SimpleNamespace:
        served.append(where)
        return types.SimpleNamespace(close=lambda verbose: None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    page = types.ModuleType("c2c_ext.chat.web_page")  # without gradio
    page.launch = launch
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    monkeypatch.setattr(web, "_wait", interrupt)
    assert main(["web", "--host", host, "--port", "0"]) == 0
    captured = capsys.readouterr()
    assert ("no password" in captured.err) is warned
    ((at, port, loopback),) = served
    assert (at, loopback) == (host, not warned) and f"http://{host}:{port} " in captured.out
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_without_gradio_c2c_web_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("web_page", "web_answers"):
        monkeypatch.delitem(sys.modules, f"c2c_ext.chat.{name}", raising=False)
    assert main(["web"]) == 2
    captured = capsys.readouterr()
    assert 'pip install "c2c_ext[web]"' in captured.err and captured.err.count("\n") == 1
    del os.environ["GRADIO_ANALYTICS_ENABLED"]


def test_c2c_chat_does_not_import_gradio() -> None:
    code = (
        "import sys; from c2c_ext.cli import main; import c2c_ext.chat.terminal, c2c_ext.chat.web;"
        "assert 'gradio' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_one_bad_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, errors: str
) -> None:
    source = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n" + FORM.encode()), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", source)
    assert main(["chat"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "silver\n"
    assert "not in the demo's vocabulary" in captured.err and captured.err.count("\n") == 1


class Terminal:
    """A process on a pseudo-terminal; killed at the end if it is still there."""

    def __init__(self, *options: str) -> None:
        self._unread = b""
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            # A shell that runs the tests in the background has them, and their children, ignore it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.environ |= {"TERM": "dumb", "COLUMNS": "100"}
            os.execv(sys.executable, [*COMMAND, *options])

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self.terminal)

    def until(self, text: str) -> str:
        """Everything that is printed up to and including ``text``."""
        while text.encode() not in self._unread:
            self._unread += self._read(f"{text!r} did not come: {self._unread!r}")
        out, found, self._unread = self._unread.partition(text.encode())
        return (out + found).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def interrupt(self, text: str) -> None:
        """Presses Ctrl-C at a prompt until ``text`` is printed.

        Python's readline takes notice of one that comes before it waits for keys at the next key.
        """
        for _ in range(PATIENCE):
            self.type("\x03")
            if select.select([self.terminal], [], [], 1.0)[0]:
                break
        self.until(text)

    def status(self) -> int:
        """The exit status, once what is printed last was read."""
        while True:
            try:
                self._read("it does not end")
            except OSError:  # the other end is closed
                break
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.process = 0
        return status

    def _read(self, complaint: str) -> bytes:
        ready, _, _ = select.select([self.terminal], [], [], PATIENCE)
        assert ready, complaint
        return os.read(self.terminal, 1 << 16)


def test_a_terminal_has_prompts_hints_and_times() -> None:
    with Terminal() as shell:
        greeting = shell.until("c2c> ")
        assert "The shipped pair speaks a small language" in greeting and FORM in greeting
        shell.type(FORM + "\n")
        out = shell.until("c2c> ")
        assert "silver" in out and "(right is: silver)" in out and "first token" in out
        shell.type("/mode t2t\n")
        shell.until("t2t> ")
        shell.type("question : rivals metal\n")
        out = shell.until("t2t> ")
        assert "(the sharer writes) Corbin : metal silver" in out and "(right is: copper)" in out
        shell.type("/compare\n")
        out = shell.until("t2t> ")
        assert "cache to cache" in out and "(right is: copper)" in out
        shell.interrupt("(/quit or Ctrl-D ends)")
        shell.until("t2t> ")
        shell.type("\x04")
        assert shell.status() == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(own_models: list[str]) -> None:
    with Terminal(*own_models, "--max-new-tokens", "1000000") as shell:
        for mode in ("c2c", "sharer"):
            shell.until("> ")
            shell.type(f"/mode {mode}\n")
            shell.until(f"{mode}> ")
            shell.type("w3 w14 w15\n")
            shell.until("w15")  # the echo
            shell.until(" w")
            shell.type("\x03")
            shell.until("(stopped)")
        shell.until("> ")
        shell.type("/quit\n")
        assert shell.status() == 0

"""`c2c web` in a real browser: answers, streaming, stopping, weights, and what must not happen.

Run by `make test-web`; without gradio and Chromium these tests fail, they are not skipped.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from browser import PATIENCE, Browser
from chat_models import chat_models
from local_tokenizers import WORDS, word_tokenizer
from selenium.webdriver.common.keys import Keys

from c2c_ext.chat import web
from c2c_ext.chat.models import ChatModels, load_models
from c2c_ext.chat.session import MODES, Reply, Settings
from c2c_ext.chat.web_answers import MAX_QUESTION
from c2c_ext.chat.web_page import launch

FORM = "Corbin : metal drink colour question : is metal"
HOSTILE = (
    "<script>document.title='pwned'</script>",
    "<img/src=x/onerror=document.title='pwned'>",
    "${document.title='pwned'}",
    "{{document.title='pwned'}}",
)
TOKENS = 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


class Server:
    """A page on a free port of this machine."""

    def __init__(self, models: ChatModels, settings: Settings) -> None:
        self.models, self.port = models, web.free_port("127.0.0.1", 0)
        self.blocks = launch(models, settings, "127.0.0.1", self.port, loopback=True)
        self.address = f"http://127.0.0.1:{self.port}/"

    def status(self, path: str, data: bytes | None = None, **headers: str) -> int:
        """The HTTP status of a request."""
        request = urllib.request.Request(self.address + path, data)
        for name, value in headers.items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def shipped() -> Iterator[Server]:
    server = Server(load_models(), Settings())
    yield server
    server.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """Random models, some of whose words are HTML."""
    words = [HOSTILE[i % 4] + str(i) if i % 5 == 0 else f"w{i}" for i in range(len(WORDS))]
    models = chat_models(word_tokenizer(words), word_tokenizer(words))
    server = Server(models, Settings(max_new_tokens=TOKENS))
    yield server
    server.blocks.close(verbose=False)


@pytest.fixture
def held(own: Server) -> Iterator[threading.Event]:
    """The receiver waits from its third step on, until the event is set."""
    release, steps = threading.Event(), [0]

    def wait(*_: object) -> None:
        steps[0] += 1
        if steps[0] > 2:
            release.wait(PATIENCE)

    hook = own.models.receiver.register_forward_hook(wait)
    yield release
    release.set()
    hook.remove()


def test_the_page_answers_and_shows_what_was_fused(browser: Browser, shipped: Server) -> None:
    browser.requested()
    browser.open(shipped.address)
    browser.ask(FORM)
    browser.wait(lambda: "right is: silver" in browser.status, "the first answer")
    assert browser.chat == [FORM, "silver"]
    assert "first token" in browser.status and "1 token" in browser.status
    titles = browser.wait(lambda: titles_of(browser), "the heat map")
    assert len(titles) == 2 * 3 * 4 * 10  # key and value, layers, heads, tokens
    assert sum("not fused" not in title for title in titles) == 2 * 3 * 4 * 3
    assert any(title.startswith("layer 2, head 3, value, colour: 0.") for title in titles)
    text = browser.one("#heat").text
    for label in ("Keys", "Values", "receiver token", "sharer token", "dynamic weight", "0.75"):
        assert label in text

    browser.one("#view input[value='mean over heads']").click()
    browser.wait(lambda: len(titles_of(browser)) == 2 * 3 * 10, "a row per layer")

    browser.mode("t2t")
    browser.ask("question : rivals metal")
    browser.wait(lambda: "right is: copper" in browser.status, "the second answer")
    assert browser.chat[2:] == ["question : rivals metal", "copper"]
    wrote = "the sharer wrote: Corbin : metal silver drink lemonade colour red"
    assert browser.one("#wrote").text == wrote
    browser.wait(lambda: not browser.shows("#heat"), "no weights: text to text fuses nothing")

    browser.mode("c2c")
    browser.question.send_keys("question : rivals drink")
    browser.one("#compare").click()
    browser.wait(lambda: "kept: the answer of cache to cache" in browser.status, "the comparison")
    truth = browser.status.rpartition(" ")[2]
    assert browser.answer("c2c") == browser.answer("t2t") == truth
    assert browser.answer("receiver") not in ("", truth)
    assert wrote in browser.one("#answer-t2t").text
    assert "first token" in browser.one("#answer-sharer").text
    assert browser.chat[4:] == ["question : rivals drink", truth]
    browser.wait(lambda: browser.shows("#heat svg"), "the heat map of the comparison")
    browser.one("#view input[value='every head']").click()
    browser.wait(lambda: len(titles_of(browser)) == 2 * 3 * 4 * 10, "a row per head")
    browser.picture("web")

    browser.one("#reset").click()
    browser.wait(lambda: browser.status == "" and not browser.chat, "a new conversation")
    browser.ask("question : is metal")
    browser.wait(lambda: "there is no form to ask about yet" in browser.status, "the refusal")
    assert browser.question.get_attribute("value") == "question : is metal"
    # Nothing but this server was asked for anything.
    assert {a[: len(shipped.address)] for a in browser.requested()} == {shipped.address}


def titles_of(browser: Browser) -> list[str]:
    script = "return [...document.querySelectorAll('#heat rect title')].map(t => t.textContent)"
    return browser.driver.execute_script(script)


def test_an_answer_streams(browser: Browser, own: Server, held: threading.Event) -> None:
    browser.open(own.address)
    browser.ask("w1 w2")
    browser.wait(lambda: browser.status == "answering ..." and len(browser.chat) > 1, "a piece")
    begun = " ".join(browser.chat[1:])
    held.set()
    browser.wait(lambda: f"{TOKENS} tokens" in browser.status, "the end")
    whole = " ".join(browser.chat[1:])
    assert whole.startswith(begun) and len(whole) > len(begun)


@pytest.mark.parametrize("how", ["button", "closed tab"])
def test_stopping_frees_the_models(
    browser: Browser,
    own: Server,
    held: threading.Event,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped, stop = threading.Event(), Reply.stop
    monkeypatch.setattr(Reply, "stop", lambda reply: (stop(reply), stopped.set()))
    browser.open(own.address)
    driver = browser.driver
    if how == "closed tab":
        driver.switch_to.new_window("tab")
        browser.open(own.address)
    browser.ask("w1 w2")
    browser.wait(lambda: browser.status == "answering ...", "a piece")
    if how == "button":
        browser.one("#stop").click()
    else:
        driver.close()
        driver.switch_to.window(driver.window_handles[0])
    assert stopped.wait(PATIENCE)
    held.set()  # the step that was running ends
    if how == "button":
        browser.wait(lambda: browser.status.startswith("stopped, first token"), "the stop")
        assert len(browser.chat) > 1  # what there was stays
    browser.ask("w3")
    browser.wait(lambda: f"{TOKENS} tokens" in browser.status, "the next answer")
    assert not own.models.lock.locked()


def test_html_of_models_and_users_is_not_rendered(browser: Browser, own: Server) -> None:
    browser.open(own.address)
    question = f"w1 {' '.join(HOSTILE)} {HOSTILE[0]}0"
    for number, mode in enumerate(MODES, start=1):
        browser.mode(mode)
        browser.ask(question)
        browser.wait(lambda n=number: len(browser.chat) == 2 * n, mode)
        browser.wait(lambda: f"{TOKENS} tokens" in browser.status, mode)
    browser.question.send_keys(question)
    browser.one("#compare").click()
    browser.wait(lambda: "kept" in browser.status, "the comparison")
    browser.wait(lambda: browser.shows("#heat svg"), "the heat map")
    assert last_turn_is_seen(browser)
    said = browser.one("#chat").text
    assert [text for text in HOSTILE if text not in said] == []
    # The models say such words too.
    assert any(text in browser.answer(mode) for text in HOSTILE for mode in MODES)
    assert any("<script>doc" in title for title in titles_of(browser))
    inside = "#panel script, #panel img, #heat script, #heat img"
    assert (
        browser.driver.execute_script(f'return document.querySelectorAll("{inside}").length') == 0
    )
    assert browser.driver.title == "c2c"


def last_turn_is_seen(browser: Browser) -> bool:
    """Whether a conversation that is longer than its place shows its end."""
    return browser.driver.execute_script(
        "const chat = document.querySelector('#chat'), turns = chat.querySelectorAll('.turn');"
        "const place = chat.getBoundingClientRect();"
        "const last = turns[turns.length - 1].getBoundingClientRect();"
        "return chat.scrollHeight > chat.clientHeight && last.top > place.top"
        " && last.bottom <= place.bottom"
    )


def test_a_failing_model_does_not_lose_the_conversation(
    browser: Browser, own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.open(own.address)
    browser.mode("receiver")
    browser.ask("w1")
    browser.wait(lambda: f"{TOKENS} tokens" in browser.status, "an answer")
    before = browser.chat

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("<b>out of</b> memory")

    with monkeypatch.context() as patch:
        patch.setattr(own.models.sharer, "forward", fail)
        browser.mode("sharer")
        browser.ask("w2")
        browser.wait(lambda: browser.status == "not answered: <b>out of</b> memory", "the error")
    assert browser.chat == before
    browser.ask("w2")
    browser.wait(lambda: f"{TOKENS} tokens" in browser.status, "an answer")
    assert browser.chat[: len(before)] == before


def test_the_length_of_a_question_is_limited_by_the_server_too(
    browser: Browser, own: Server
) -> None:
    browser.open(own.address)
    box = browser.question
    assert box.get_attribute("maxlength") == str(MAX_QUESTION)
    browser.driver.execute_script("arguments[0].removeAttribute('maxlength')", box)
    browser.driver.execute_script(
        "arguments[0].value = 'w '.repeat(9000);"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        box,
    )
    box.send_keys(Keys.ENTER)
    browser.wait(lambda: "not answered: a question may have 8000" in browser.status, "the refusal")


@pytest.mark.parametrize(
    "path",
    [
        *("gradio_api/upload", "upload", "gradio_api/run/predict", "gradio_api/call/ask"),
        *("gradio_api/component_server", "login", "gradio_api/vibe-code"),
    ],
)
def test_nothing_but_the_page_can_be_posted_to(shipped: Server, path: str) -> None:
    assert shipped.status(path, b"{}") == 404


@pytest.mark.parametrize(
    "path",
    [
        *("gradio_api/file=/etc/passwd", "gradio_api/file/etc/passwd", "file=/etc/passwd"),
        *("gradio_api/proxy=http://127.0.0.1/", "monitoring", "gradio_api/vibe-code"),
        *("docs", "openapi.json", "gradio_api/deep_link", "static/../../../etc/passwd"),
        *("assets/%2e%2e/%2e%2e/etc/passwd", "gradio_api/upload_progress?upload_id=1"),
    ],
)
def test_no_file_and_nothing_else_can_be_read(shipped: Server, path: str) -> None:
    assert shipped.status(path) == 404


def test_other_hosts_and_other_sites_are_refused(shipped: Server) -> None:
    assert shipped.status("") == 200
    assert shipped.status("", Host=f"localhost:{shipped.port}") == 200
    assert shipped.status("", Host="example.org") == 403  # a name that was made to point here
    join = "gradio_api/queue/join"
    assert shipped.status(join, b"{}", Origin="http://example.org") == 403
    assert shipped.status(join, b"{}", Origin=shipped.address.rstrip("/")) != 403
    with closing(http.client.HTTPConnection("127.0.0.1", shipped.port)) as connection:
        connection.putrequest("POST", f"/{join}")
        connection.putheader("Content-Length", str((1 << 20) + 1))
        connection.endheaders()
        assert connection.getresponse().status == 413


def test_only_this_machine_is_served(shipped: Server) -> None:
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
    assert f"0100007F:{shipped.port:04X}" in listening
    assert f"00000000:{shipped.port:04X}" not in listening


def test_the_command_serves_until_it_is_interrupted() -> None:
    environment = {**os.environ, "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "c2c_ext.cli", "web", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell that runs the tests in the background has them, and their children, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    line = process.stdout.readline()
    assert line.startswith("c2c web: http://127.0.0.1:"), process.stderr.read()
    with urllib.request.urlopen(line.split()[2], timeout=PATIENCE) as response:
        assert response.status == 200
        assert "default-src 'self'" in response.headers["content-security-policy"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "", "")

"""c2c analyze: its tables, files and drawings, and what it says to bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from chat_models import save_chat_models
from local_tokenizers import letter_tokenizer

from c2c_ext import Fuser
from c2c_ext.analysis import questions as qs
from c2c_ext.analysis.arguments import ANALYSES
from c2c_ext.analysis.chart import Panel, bar_chart, line_chart, weight_map
from c2c_ext.analysis.file_questions import file_questions
from c2c_ext.chat.models import load_models
from c2c_ext.cli import main

LINES = [("w1 w2 w3", "w4"), ("w9 w8 w7 w6", "w5 w6"), ("w20", "w21")]


def conversation(prompt: str, answer: str, **more: object) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **more}) + "\n"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Options that name a tiny trio, and a file of questions."""
    place = tmp_path_factory.mktemp("trio")
    options = save_chat_models(place)
    file = place / "questions.jsonl"
    file.write_text("".join(conversation(*line) for line in LINES))
    return options, file


@pytest.mark.parametrize("what", ANALYSES)
def test_the_shipped_pair_is_analysed_drawn_and_written(
    what: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.svg"]
    written = ["--json", str(files[0]), "--svg", str(files[1])]
    assert main(["analyze", what, "--limit", "4", *written]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{ANALYSES[what]}; 8 questions: the shipped pair's held-out questions" in out
    data = json.loads(files[0].read_text())
    assert data["benchmark"] == "analyze" and data["arguments"]["what"] == what
    assert {"date", "commit", "torch", "transformers", "cpu"} <= data["environment"].keys()
    assert data["rows"]
    root = ElementTree.parse(files[1]).getroot()
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    assert ANALYSES[what] in text and "8 questions" in text
    assert "nan" not in files[1].read_text()


def test_a_limit_draws_the_same_questions_every_time() -> None:
    assert qs.sample(5, None).tolist() == qs.sample(5, 9).tolist() == [0, 1, 2, 3, 4]
    drawn = qs.sample(960, 40)
    assert torch.equal(drawn, qs.sample(960, 40)) and len(drawn.unique()) == 40
    assert torch.equal(drawn, drawn.sort().values) and int(drawn.max()) > 800


@pytest.mark.parametrize("what", ANALYSES)
def test_own_models_are_analysed(
    what: str, own: tuple, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    options, file = own
    target = tmp_path / "a.json"
    arguments = [*options, "--questions", str(file), "--json", str(target)]
    if what == "solved":
        arguments += ["--t2t-tokens", "2"]
    assert main(["analyze", what, *arguments]) == 0
    assert f"3 questions: {file}" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    if what == "solved":
        assert [row["question"] for row in rows] == ["line 1", "line 2", "line 3"]


def test_only_the_positions_of_a_record_are_fused(own: tuple, tmp_path: Path) -> None:
    options, _ = own
    models = load_models(*options[1::2])
    file = tmp_path / "q.jsonl"
    file.write_text(conversation("w1 w2 w3", "w4", positions=[1, 3]))
    (reading,) = file_questions(models, str(file)).readings
    fused = [place for place in reading.token_map.tolist() if place >= 0]
    assert fused == [1, 2] and reading.token_map.tolist()[1:3] == [1, 2]
    tokens = models.tokenizers["receiver"]
    assert tokens.decode(reading.answers) == "w4"
    file.write_text(conversation("w1 w2 w3", "w4", positions=[1, 300]))
    with pytest.raises(ValueError, match=r"line 1: positions must end at most at \d+, .* got 300"):
        file_questions(models, str(file))


def test_other_tokenizers_are_aligned(own: tuple, tmp_path: Path) -> None:
    options, _ = own
    models = load_models(*options[1::2])
    tokenizers = {**models.tokenizers, "sharer": letter_tokenizer()}
    models.prompts = type(models.prompts)(tokenizers)
    models.tokenizers = tokenizers
    file = tmp_path / "q.jsonl"
    file.write_text(conversation("w1 w2 w30", "w4"))
    asked = file_questions(models, str(file))
    (reading,) = asked.readings
    assert reading.sharer[0][0].shape[2] > reading.receiver[0][0].shape[2]
    assert int(reading.token_map.max()) >= reading.receiver[0][0].shape[2]
    assert asked.ask_sharer()[0].tolist() in ([True], [False])
    assert asked.mismatched == []  # there is no other question


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rank", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["rank", "--questions", "q"], "--questions goes with models of your own"),
        (["rank", "--receiver", "x", "--questions", "q"], "--sharer and --fuser missing"),
        (["rank", "--receiver", "x"], "--questions: models of your own need a file"),
        (["rank", "--json", "/no/such/a"], "--json: there is no directory /no/such"),
        (["rank", "--svg", "/no/such/a"], "--svg: there is no directory /no/such"),
        (["rank", "--svg", "x", "--json", "x"], "--json and --svg must be different files"),
        (["rank", "--device", "cuda:0"], "--device: the shipped pair runs on the CPU"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("c2c analyze: ") and out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--questions: there is no file"),
        ("{}\n", "messages is missing"),
        ("", "no conversation that can be used"),
        (conversation("w1", "w2") + conversation("w1", "w2", positions=[0, 90]), "line 2: "),
    ],
)
def test_bad_questions_are_named_and_nothing_is_written(
    text: str | None, message: str, own: tuple, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    file, target = tmp_path / "q.jsonl", tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    options = [*own[0], "--questions", str(file), "--json", str(target)]
    assert main(["analyze", "layers", *options]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_closed_gates_are_shown_as_such(own: tuple, tmp_path: Path) -> None:
    options, file = own
    fuser = Fuser.from_pretrained(options[options.index("--fuser") + 1])
    with torch.no_grad():
        for group in fuser.groups:
            group.gate_logit.fill_(-1.0)
    fuser.save_pretrained(tmp_path / "closed")
    models = [*options[:4], "--fuser", str(tmp_path / "closed"), "--questions", str(file)]
    for what in ("weights", "attention", "layers"):
        written = ["--json", str(tmp_path / f"{what}.json"), "--svg", str(tmp_path / "a.svg")]
        assert main(["analyze", what, *models, *written]) == 0
        if what == "weights":
            assert "url(#closed)" in (tmp_path / "a.svg").read_text()
    rows = {
        what: json.loads((tmp_path / f"{what}.json").read_text())["rows"]
        for what in ("weights", "attention", "layers")
    }
    assert not any(row["open"] for row in rows["weights"])
    assert all(row["min"] > 1 - 1e-9 for row in rows["attention"])
    assert all(row["kl"] == 0 and row["as_fused"] == 3 for row in rows["layers"])


def test_drawings_escape_what_strangers_have_named() -> None:
    name = "<script>\x1b[31m&"
    for svg in (
        line_chart(name, name, [Panel(name, name, {name: [(0, 1.0), (1, 1.0)]})]),
        line_chart(name, name, [Panel(name, name, {name: [(0, math.nan)]})]),
        bar_chart(name, name, [(name, 0)]),
        weight_map(name, name, [(name, [(0.2, True), (0.9, False)])]),
    ):
        root = ElementTree.fromstring(svg)
        assert "script" not in {element.tag.split("}")[1] for element in root.iter()}
        assert "<script>" in " ".join(root.itertext()) and "nan" not in svg

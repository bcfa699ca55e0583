"""The c2c command line: info on pairs that fit and do not, the demo and its bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

import c2c_ext
from c2c_ext import Fuser
from c2c_ext.cli import main
from c2c_ext.demo import command
from c2c_ext.demo import evaluate as ev

E2E = Path(__file__).parent / "golden" / "e2e"


def info(receiver: str, sharer: str, fuser: Path) -> int:
    models = ["--receiver", str(E2E / receiver), "--sharer", str(E2E / sharer)]
    return main(["info", *models, "--fuser", str(fuser)])


def test_info_prints_versions(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for label in ("c2c_ext", "torch", "transformers", "cpu", "CUDA architectures"):
        assert f"\n{label}" in "\n" + out


def test_info_says_what_fits(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    published = E2E / "fuser_s1_k_nearest"
    assert info("receiver", "sharer1", published) == 0
    assert "fits                 receiver, sharer" in capsys.readouterr().out
    configs = {
        f"{side}_config": AutoConfig.from_pretrained(E2E / name)
        for side, name in (("receiver", "receiver"), ("sharer", "sharer1"))
    }
    Fuser.from_published(published, **configs).save_pretrained(tmp_path)
    assert info("receiver", "sharer1", tmp_path) == 0
    assert "qwen2 sharer1 (3 layers, 5 x 8) -> qwen3 receiver" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("receiver", "sharer", "message"),
    [
        ("receiver", "sharer2", "a sharer of 3 layers, this one has 7"),
        ("sharer1", "sharer1", "a receiver of 5 layers, this one has 3"),
    ],
)
def test_info_names_the_number_that_differs(
    capsys: pytest.CaptureFixture, receiver: str, sharer: str, message: str
) -> None:
    assert info(receiver, sharer, E2E / "fuser_s1_k_nearest") == 1
    assert message in capsys.readouterr().out


def test_info_names_the_head_that_differs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    data = json.loads((E2E / "sharer1" / "config.json").read_text())
    data["num_key_value_heads"] = 1
    (tmp_path / "config.json").write_text(json.dumps(data))
    models = ["--sharer", str(tmp_path), "--fuser", str(E2E / "fuser_s1_last_aligned")]
    assert main(["info", *models]) == 1
    assert "num_heads 5 in sharer layer 0, this one has 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--fuser", "/nowhere"], "no fuser directory at /nowhere"),
        (["info", "--receiver", "/nowhere"], "config.json is missing"),
        (["demo", "--json", "/nowhere/x.json"], "--json: there is no directory /nowhere"),
        (["demo", "--entity", "Nobody", "--ask", "metal"], "unknown entity 'Nobody'; known are"),
        (["demo", "--entity", "Corbin", "--ask", "taste"], "unknown attribute 'taste'; known are"),
        (["demo", "--entity", "Corbin"], "--ask ATTRIBUTE is missing"),
        (["demo", "--ask", "metal"], "--entity NAME is missing"),
        (["demo", "--rivals"], "--rivals goes with --entity and --ask"),
        (["demo", "--entity", "a", "--ask", "b", "--json", "c"], "--json goes with the whole demo"),
    ],
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_version_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"c2c_ext {c2c_ext.__version__}\n"


def test_a_command_is_needed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "a command is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "two"}, "is not a model configuration|must be in 1..1024, got two"),
        ({"head_dim": 0}, "KVShape.head_dim must be an integer of at least 1, got 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads must be at least 1, got -2"),
    ],
)
def test_a_bad_model_configuration_is_one_clear_line(
    capsys: pytest.CaptureFixture, tmp_path: Path, change: dict, message: str
) -> None:
    data = json.loads((E2E / "receiver" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(data | change))
    assert main(["info", "--receiver", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert captured.err.count("\n") == 1


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "c2c_ext.cli", "info"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize("rivals", [False, True])
def test_demo_answers_a_question_of_ones_own(capsys: pytest.CaptureFixture, rivals: bool) -> None:
    extra = ["--rivals"] if rivals else []
    assert main(["demo", "--entity", "Corbin", "--ask", "metal", *extra]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    truth = lines["truth"]
    assert lines["C2C"] == f"{truth} +"
    assert lines["T2T"] == f"{truth} +"
    assert lines["receiver"] != f"{truth} +"


def test_demo_measures_and_writes_its_results(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "FORM_SIZES", (3, 12))
    monkeypatch.setattr(command, "TIMING_ROUNDS", 2)
    assert main(["demo", "--json", str(tmp_path / "demo.json")]) == 0
    out = capsys.readouterr().out
    assert "What this does not show" in out and ": they are.\n" in out
    results = json.loads((tmp_path / "demo.json").read_text())
    for row in results["held_out"]:
        assert row["questions"] == 960
    assert ev.judge(results["held_out"]).good
    assert {row["mode"] for row in results["latency_ms"]} == {
        "receiver",
        "T2T",
        "T2T at once",
        "C2C",
    }

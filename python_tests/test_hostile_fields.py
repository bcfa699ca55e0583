"""Hostile values in every field of every JSON file: an error or the same fuser, in no memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_fuser
from hostile import E2E, LOADERS, good_directories, load, refused

from c2c_ext import FuserConfig
from c2c_ext.cli import main
from c2c_ext.info import read_model
from c2c_ext.messages import shown
from c2c_ext.model_kv import ModelKV

DEEP = "[" * 400 + "]" * 400
# As JSON text: the module that would write them refuses some.
VALUES = [
    *("null", "true", "0", "-1", "1.5", "1e400", "-1e-400", "1000000000", "9" * 4000, "9" * 5000),
    *('""', '"x"', '"../../etc/passwd"', '"\\u0000\\n\\u001b[2J"', '"\\ud800"', f'"{"x" * 10**6}"'),
    *("[]", "{}", "[[]]", DEEP, "[" + "0," * 10**5 + "0]", '{"": {"": []}}', "NaN", "-Infinity"),
]
MARK = "@@@"


def with_every_field(data: object) -> Iterator[tuple[str, str]]:
    """(place, JSON text with `MARK` there) of every value and key, and of one more key."""

    def walk(value: object, place: str) -> Iterator[str]:
        yield place
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value or [])
            if isinstance(value, list)
            else ()
        )
        for key, item in items:
            yield from walk(item, f"{place}/{key}")

    def text(value: object, place: str, at: str) -> str:
        if place == at:
            return MARK
        if isinstance(value, dict):
            items = (f"{json.dumps(k)}:{text(v, f'{place}/{k}', at)}" for k, v in value.items())
            return "{" + ",".join(items) + "}"
        if isinstance(value, list):
            return "[" + ",".join(text(v, f"{place}/{i}", at) for i, v in enumerate(value)) + "]"
        return json.dumps(value)

    for place in walk(data, ""):
        yield place, text(data, "", place)


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    return good_directories(tmp_path)


@pytest.mark.filterwarnings("ignore:.*ignored")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("ours", "fuser_config.json"),
        ("published", "projector_config.json"),
        ("published", "projector_1.json"),
    ],
)
def test_every_field_of_a_fuser_with_every_hostile_value(directories, kind, name):
    path = directories[kind] / name
    expected = {n: p.shape for n, p in LOADERS[kind](directories[kind]).state_dict().items()}
    outcomes = {True: 0, False: 0}
    for _, text in with_every_field(json.loads(path.read_text())):
        for value in VALUES:
            path.write_text(text.replace(MARK, value))
            result = load(directories[kind], kind)
            outcomes[isinstance(result, str)] += 1
            if not isinstance(result, str):
                assert {n: p.shape for n, p in result.state_dict().items()} == expected
    assert outcomes[True] > 100
    assert outcomes[True] > outcomes[False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "can't decode"),
        (b'{"a": "\xff"}', "can't decode"),
        (b'{"format_version": 1' + b"}" * 5, "Extra data"),
        (b'{"a": ' * 200_000, "nested too deeply|Expecting|recursion"),
        (b'{"x": 1, "\\n\\u001b[2J": 1, "\\n\\u001b[2J": 2}', "duplicate keys: "),
        (b"{" + b'"k":0,' * 10**5 + b'"k":0}', "duplicate keys: k"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "4300 digits"),
        (b'{"a": 1e400}', "1e400 is too large for a number"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
    ],
)
@pytest.mark.parametrize("kind", LOADERS)
def test_json_that_is_none_is_refused(directories, kind, content, message):
    name = {"ours": "fuser_config.json", "published": "projector_config.json"}[kind]
    (directories[kind] / name).write_bytes(content)
    got = refused(directories[kind], kind)
    assert any(part in got for part in message.split("|")), got


def test_many_duplicate_keys_take_no_time(directories):
    """Counting each of n keys among the others would take hours here."""
    keys = ",".join(f'"{i}":0' for i in range(100_000))
    (directories["ours"] / "fuser_config.json").write_text("{" + keys + "," + keys + "}")
    assert "duplicate keys: 0, 1, 10, 100, ..." in refused(directories["ours"], "ours")


def test_names_are_never_paths(directories, tmp_path):
    """A model's name that is a path is kept as text, and only that."""
    path = directories["ours"] / "fuser_config.json"
    data = json.loads(path.read_text())
    for name in ("../../etc/passwd", "/etc/passwd", "..", "C:\\x"):
        data["receiver"]["name"] = data["sharer"]["model_type"] = name
        path.write_text(json.dumps(data))
        fuser = load(directories["ours"], "ours")
        assert fuser.config.receiver.name == name
        fuser.save_pretrained(tmp_path / "again")
        assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(
            ["README.md", "fuser.safetensors", "fuser_config.json"]
        )
    place = directories["published"] / "projector_config.json"
    layers = json.loads(place.read_text())["0"]["1"]
    place.write_text(json.dumps({"/etc/passwd": {"../\0\n": layers}}))
    assert load(directories["published"], "published").config.receiver.name == ""


def test_shown_is_short_and_on_one_line():
    for value in (10**5000, -(10**5000), [[]] * 10**6, "\n" * 1000, b"\0" * 1000):
        assert len(shown(value)) <= 80
        assert shown(value).isprintable()


def test_huge_integers_are_named_in_python_too():
    config = make_fuser().config
    with pytest.raises(ValueError, match=r"hidden_size must be in .*, got <int of 16610 bits>"):
        FuserConfig(config.receiver, config.sharer, config.layer_map, hidden_size=10**5000)


# ---- model configurations ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["receiver", "sharer2"])
def test_every_field_of_a_model_with_every_hostile_value(tmp_path, model):
    data = json.loads((E2E / model / "config.json").read_text())
    outcomes = {True: 0, False: 0}
    for place, text in with_every_field(data):
        for value in VALUES:
            (tmp_path / "config.json").write_text(text.replace(MARK, value))
            try:
                outcomes[isinstance(read_model(tmp_path), ModelKV)] += 1
            except (ValueError, TypeError) as error:
                outcomes[False] += 1
                message = str(error)
                assert message.isprintable() and len(message) < 600, (place, value[:40])
    assert outcomes[False] > 100


def info(capsys: pytest.CaptureFixture, directory: Path) -> str:
    """What `c2c info` says about a bad model directory, in one line."""
    assert main(["info", "--receiver", str(directory)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[" * 10**6, "is nested too deeply"),
        (b"[]", "model_type None is not one of transformers'"),
        (b'{"model_type": "../../x"}', "model_type '../../x' is not one of transformers'"),
        (b'{"model_type": []}', "model_type None is not one of|model_type [] is not one of"),
        (b'{"model_type": "qwen3", "model_type": "qwen3"}', "duplicate keys: model_type"),
        (b'{"model_type": "qwen3", "rope_theta": NaN}', "NaN is not JSON"),
        (b'{"model_type": "qwen3", "num_hidden_layers": 1000000000}', "must be at most 1024, got"),
        (b'{"model_type": "qwen3", "num_labels": 1000000000}', "num_labels must be at most 65536"),
        (
            b'{"model_type": "gemma3", "text_config": {"num_hidden_layers": 1e12}}',
            "num_hidden_layers must be at most 1024, got 1000000000000.0",
        ),
    ],
)
def test_a_hostile_model_configuration_is_one_clear_line(capsys, tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    error = info(capsys, tmp_path)
    assert any(part in error for part in message.split("|")), error


@pytest.mark.parametrize("model_type", ["qwen3", "stranger"])
def test_code_beside_a_model_configuration_never_runs(capsys, tmp_path, model_type):
    canary = tmp_path / "ran"
    code = f"open({str(canary)!r}, 'w')\nfrom transformers import Qwen3Config as Config"
    (tmp_path / "code.py").write_text(code)
    data = json.loads((E2E / "receiver" / "config.json").read_text())
    data |= {"model_type": model_type, "auto_map": {"AutoConfig": "code.Config"}}
    data["configuration_files"] = ["config.4.0.0.json"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "config.4.0.0.json").write_text("{")
    assert main(["info", "--receiver", str(tmp_path)]) == (0 if model_type == "qwen3" else 2)
    assert not canary.exists()


# ---- memory --------------------------------------------------------------------------------------

CHILD = Path(__file__).parent / "hostile_memory.py"


def test_absurd_sizes_take_no_memory(tmp_path):
    """In a process of its own, whose peak is that of nothing else; see hostile_memory.py."""
    command = [sys.executable, str(CHILD), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) >= 15
    for name, row in rows.items():
        assert row["error"] != "", name
        assert row["peak_mib"] <= 96, (name, row)
    assert math.isfinite(sum(row["peak_mib"] for row in rows.values()))

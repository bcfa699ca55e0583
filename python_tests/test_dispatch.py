"""Which CUDA path `auto` takes: filled from results alone, looked up by GPU, dtype and rows."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from conftest import flat, make_caches, make_config, make_fuser, same_bits

import c2c_ext
from c2c_ext import cuda_paths, info

ROOT = Path(__file__).resolve().parent.parent


def load_tool():
    spec = importlib.util.spec_from_file_location("fill", ROOT / "tools" / "fill_dispatch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load_tool()


def row(path: str, tokens: int, ms: float, **changes: object) -> dict:
    """A row as bench_fuse.py writes it on a GPU."""
    return {
        "shape": "real",
        "gates": "all",
        "dtype": "bfloat16",
        "batch": 1,
        "tokens": tokens,
        "provider": f"op {path}",
        "seconds": {"median": 1e-3 * ms, "p20": 1e-3 * ms, "p80": 1e-3 * ms},
        "verified": {"max_error": 0.1, "max_bound": 0.2, "rms_error": 0.01, "rms_bound": 0.01},
        "device": "a GPU",
        "capability": "9.0",
        "cuda_path": path,
        "cuda_path_ran": path,
        **changes,
    }


def results(directory: Path, rows: list[dict], name: str = "fuse_cuda.json", **changes) -> Path:
    """A results file of a GPU; ``changes`` are made to its environment."""
    environment = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789" * 4,
        "dirty": False,
        "package": "checkout",
    }
    data = {
        "format_version": 1,
        "benchmark": "fuse",
        "complete": True,
        "arguments": {"device": "cuda", "quick": False},
        "environment": {**environment, **changes},
        "rows": rows,
    }
    (directory / name).write_text(json.dumps(data))
    return directory / name


MEASURED = [
    # The fused path wins both shapes up to 16 rows, in the mean of the two up to 64.
    *(row("plain", n, 1.0) for n in (1, 16, 64)),
    *(row("fused", n, 0.5) for n in (1, 16, 64)),
    row("plain", 64, 2.0, shape="large"),
    row("fused", 64, 2.2, shape="large"),
    # A batch counts as its rows; the winner lacks one of the cells, so it is not verified in all.
    row("plain", 64, 1.0, batch=8),
    row("fused", 64, 0.5, batch=8),
    row("plain", 512, 1.0),
    # Hopper wins, fused is in between; a number of rows that is no bucket's end says nothing.
    row("plain", 2048, 4.0),
    row("fused", 2048, 3.0),
    row("hopper", 2048, 2.0),
    row("plain", 3000, 4.0),
    row("hopper", 3000, 2.0),
    # Not measured against plain: nothing is known.
    row("fused", 170, 0.1),
    # Other GPUs and dtypes have rows of their own; a graph's time is not the call's.
    row("plain", 16, 1.0, capability="8.0"),
    row("fused", 16, 1.1, capability="8.0"),
    row("plain", 16, 1.0, dtype="float16"),
    row("fused", 16, 0.9, dtype="float16"),
    {"provider": "op hopper graph", "cuda_graph": "hopper", "seconds": {"median": 1e-9}},
]
TABLE = [
    (80, "bfloat16", 1, 16, "plain"),
    (90, "bfloat16", 0, 64, "fused"),
    (90, "bfloat16", 170, 512, "plain"),
    (90, "bfloat16", 512, 2048, "hopper"),
    (90, "float16", 1, 16, "fused"),
]


def test_the_fastest_verified_path_of_every_measured_bucket_is_taken(tool, tmp_path) -> None:
    source, rows = tool.measurements(results(tmp_path, MEASURED))
    assert source == "fuse_cuda.json (a GPU, 2026-01-02, 0123456)"
    assert tool.merged(tool.table_of(rows)) == TABLE


def test_a_file_of_the_checkout_is_named_by_its_place_there(tool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    source, _ = tool.measurements(results(tmp_path / "build", MEASURED))
    assert source.startswith("build/fuse_cuda.json (a GPU, ")


def test_plain_keeps_what_another_only_equals(tool) -> None:
    assert tool.table_of([row("fused", 1, 1.0), row("plain", 1, 1.0)])[0][4] == "plain"


def test_the_written_table_answers_as_the_results_say(tool, tmp_path, capsys) -> None:
    """The tool's header through the compiler, and the look-up that the op makes."""
    header = tmp_path / "dispatch_table.h"
    given = [str(results(tmp_path, MEASURED)), "--output", str(header)]
    assert tool.main([*given, "--check"]) == 1 and not header.exists()
    assert tool.main(given) == 0
    assert tool.main([*given, "--check"]) == 0
    said = ["tools/fill_dispatch.py from", "  fuse_cuda.json (a GPU, 2026-01-02, 0123456)"]
    head = f"// Written by {said[0]}\n// {said[1]}\n//: do not edit.\n"
    assert header.read_text().startswith(head)
    asked = [
        (90, "bfloat16", 1, "fused"),
        (90, "bfloat16", 64, "fused"),
        (90, "bfloat16", 65, "plain"),
        (90, "bfloat16", 512, "plain"),
        (90, "bfloat16", 513, "hopper"),
        (90, "bfloat16", 2048, "hopper"),
        (90, "bfloat16", 2049, "plain"),
        (90, "float16", 16, "fused"),
        (90, "float16", 1, "plain"),
        (90, "float32", 16, "plain"),
        (90, "float64", 16, "plain"),
        (80, "bfloat16", 16, "plain"),
        (100, "bfloat16", 16, "plain"),
        (0, "bfloat16", 1, "plain"),
    ]
    questions = [str(value) for question in asked for value in question[:3]]
    assert answers(tmp_path, header, questions) == [path for *_, path in asked]


def answers(place: Path, header: Path, questions: list[str]) -> list[str]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    assert compiler, "the checkout is built with a C++ compiler, and none is on PATH or in CXX"
    program = place / "dispatch_checks"
    command = [*compiler.split(), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-o", str(program)]
    command += [f'-DTABLE="{header}"', "-I", str(ROOT / "csrc" / "cuda")]
    subprocess.run([*command, str(ROOT / "python_tests" / "dispatch_checks.cpp")], check=True)
    done = subprocess.run([program, *questions], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


BAD_NUMBERS = {"max_error": 0.3, "max_bound": 0.2, "rms_error": 0.0, "rms_bound": 1.0}


@pytest.mark.parametrize(
    ("environment", "document", "changes", "message"),
    [
        ({"dirty": True}, {}, {}, "was measured with changes to tracked files"),
        ({"dirty": None}, {}, {}, "was measured with changes to tracked files"),
        ({"commit": None}, {}, {}, "does not say its commit"),
        ({"package": "installed"}, {}, {}, "was not measured in a checkout"),
        ({}, {"complete": False}, {}, "is of a run that did not come to its end"),
        ({}, {"benchmark": "kernels"}, {}, "must be of bench_fuse.py --device cuda"),
        ({}, {"arguments": {"device": "cpu"}}, {}, "must be of bench_fuse.py --device cuda"),
        ({}, {"arguments": {"device": "cuda", "quick": True}}, {}, "is of a quick run"),
        ({}, {"format_version": 2}, {}, "is no results file of format version 1"),
        ({}, {"rows": [{"provider": "reference"}]}, {}, "has no row with a cuda_path"),
        ({}, {}, {"verified": {}}, "is not verified (max error nan, bound nan)"),
        ({}, {}, {"verified": BAD_NUMBERS}, "is not verified (max error 0.3, bound 0.2)"),
        ({}, {}, {"cuda_path_ran": None}, "the kernels that ran are those of an unknown path"),
        ({}, {}, {"cuda_path_ran": "plain"}, "the kernels that ran are those of plain"),
        ({}, {}, {"cuda_path": "best"}, "the path must be one of plain, fused, hopper"),
        ({}, {}, {"dtype": "int8"}, "dtype must be one of float32"),
        ({}, {}, {"capability": "sm_90"}, "capability must be like 9.0, got 'sm_90'"),
        ({}, {}, {"seconds": {"median": 0.0}}, "seconds must be above 0"),
        ({}, {}, {"seconds": {"median": "fast"}}, "seconds must be above 0"),
        ({}, {}, {"seconds": {"median": 10**400}}, "seconds must be above 0"),
        ({}, {}, {"seconds": 0.5}, "seconds must be above 0"),
        ({}, {}, {"verified": [0.1]}, "is not verified (max error nan, bound nan)"),
        ({}, {}, {"verified": {**BAD_NUMBERS, "max_error": -1.0}}, "is not verified (max error -1"),
        ({}, {}, {"device": "GPU\n#error"}, "device must be a line of text, got 'GPU\\n#error'"),
        ({}, {}, {"device": "GPU \\"}, "device must be a line of text"),
        ({}, {}, {"shape": ["real"]}, "shape must be a line of text, got ['real']"),
        ({}, {}, {"capability": 9.0}, "capability must be a line of text, got 9.0"),
        ({}, {}, {"tokens": "1"}, "tokens must be an integer above 0, got '1'"),
        ({}, {}, {"tokens": 1.0}, "tokens must be an integer above 0, got 1.0"),
        ({}, {}, {"batch": True}, "batch must be an integer above 0, got True"),
        ({"date": None}, {}, {}, "does not say its date"),
        ({"date": "today\n#error"}, {}, {}, "does not say its date"),
        ({}, {"environment": []}, {}, "was not measured in a checkout"),
        ({}, {"arguments": None}, {}, "must be of bench_fuse.py --device cuda"),
        ({}, {"rows": None}, {}, "has no list of rows"),
        ({}, {"rows": ["cuda_path"]}, {}, "has no list of rows"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(
    tool, tmp_path, capsys, environment, document, changes, message
) -> None:
    path = results(tmp_path, [row("plain", 1, 1.0), row("fused", 1, 0.5) | changes], **environment)
    path.write_text(json.dumps({**json.loads(path.read_text()), **document}))
    header = tmp_path / "table.h"
    assert tool.main([str(path), "--output", str(header)]) == 2
    said = capsys.readouterr().err
    assert message in said and "fuse_cuda.json" in said and said.count("\n") == 1
    assert not header.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 1}', "[" * 100_000])
def test_what_is_no_results_file_is_refused(tool, tmp_path, capsys, text) -> None:
    (tmp_path / "x.json").write_text(text)
    assert tool.main([str(tmp_path / "x.json"), "--output", str(tmp_path / "t.h")]) == 2
    assert "fill_dispatch.py: x.json" in capsys.readouterr().err


def test_a_row_that_lacks_a_field_is_refused(tool, tmp_path, capsys) -> None:
    incomplete = row("fused", 1, 1.0)
    del incomplete["gates"]
    assert tool.main([str(results(tmp_path, [incomplete])), "--check"]) == 2
    assert "a row of path fused lacks gates" in capsys.readouterr().err


def test_one_cell_of_two_files_is_refused(tool, tmp_path, capsys) -> None:
    files = [results(tmp_path, [row("plain", 1, 1.0)], f"fuse_cuda_{i}.json") for i in (1, 2)]
    assert tool.main([*map(str, files), "--check"]) == 2
    assert "measured twice: 9.0 bfloat16 real all 1 1 plain" in capsys.readouterr().err


def test_paths_are_compared_only_within_one_run(tool, tmp_path, capsys) -> None:
    files = [results(tmp_path, [row(p, 1, 1.0)], f"fuse_cuda_{p}.json") for p in ("plain", "fused")]
    assert tool.main([*map(str, files), "--check"]) == 2
    said = "measured in two runs: 9.0 bfloat16 real all 1 1 (fuse_cuda_plain.json, fuse_cuda_fused"
    assert said in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_line(tool, tmp_path, capsys) -> None:
    given = str(results(tmp_path, MEASURED))
    assert tool.main([given, "--output", str(tmp_path / "none" / "table.h")]) == 2
    assert "table.h cannot be written" in capsys.readouterr().err


def test_the_checked_in_table_is_what_the_results_say(tool, capsys) -> None:
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_the_build_has_the_checked_in_table(tool) -> None:
    rows = []
    for path in sorted(tool.RESULTS.glob("fuse_cuda*.json")):
        rows += tool.measurements(path)[1]
    assert c2c_ext.build_info()["cuda_dispatch"] == tool.merged(tool.table_of(rows))


# What the op does: under emulation there is one row, for bfloat16 and 5 to 16 rows on a GPU of
# compute capability 0.1 (csrc/cuda/runtime.cpp).


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens", "path"),
    [
        ("1", torch.bfloat16, 5, "fused"),
        ("1", torch.bfloat16, 16, "fused"),
        ("1", torch.bfloat16, 4, "plain"),
        ("1", torch.bfloat16, 17, "plain"),
        ("1", torch.float16, 5, "plain"),
        ("90", torch.bfloat16, 5, "plain"),
        (None, torch.bfloat16, 5, "plain"),
    ],
)
def test_auto_takes_what_the_table_says(capability, dtype, tokens, path, monkeypatch) -> None:
    monkeypatch.delenv("C2C_EMULATE_CAPABILITY", raising=False)
    config = make_config(hidden_size=40, intermediate_size=40)
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, tokens, dtype=dtype)
    by_path = {}
    for name in ("plain", "fused"):
        with cuda_paths.asked_for(name):
            by_path[name] = flat(emulated.run_op(fuser, base, sharer))
    differ = not all(map(same_bits, *by_path.values()))
    assert differ  # they round at different places
    if capability is not None:
        monkeypatch.setenv("C2C_EMULATE_CAPABILITY", capability)
    with cuda_paths.asked_for("auto"):
        ours = flat(emulated.run_op(fuser, base, sharer))
    assert all(map(same_bits, ours, by_path[path]))


# What the user is told.


def test_a_path_is_asked_for_and_what_was_there_restored(monkeypatch) -> None:
    monkeypatch.setenv(cuda_paths.VARIABLE, "hopper")
    with pytest.raises(KeyError), cuda_paths.asked_for("fused"):
        assert os.environ[cuda_paths.VARIABLE] == "fused"
        raise KeyError
    assert os.environ[cuda_paths.VARIABLE] == "hopper"
    monkeypatch.delenv(cuda_paths.VARIABLE)
    with cuda_paths.asked_for("fused"):
        pass
    assert cuda_paths.VARIABLE not in os.environ


@pytest.mark.parametrize(
    ("table", "asked", "line"),
    [
        (
            [],
            None,
            "plain, fused, hopper (C2C_EXT_CUDA_PATH chooses); auto, the default, takes plain "
            "everywhere: no path has been measured on a GPU",
        ),
        (
            [],
            "fused",
            "plain, fused, hopper (C2C_EXT_CUDA_PATH chooses); it says fused; auto would take "
            "plain everywhere: no path has been measured on a GPU",
        ),
        (
            [],
            "best",
            "plain, fused, hopper (C2C_EXT_CUDA_PATH chooses); it says 'best', which the op "
            "refuses; auto would take plain everywhere: no path has been measured on a GPU",
        ),
        (
            TABLE[:2],
            "auto",
            "plain, fused, hopper (C2C_EXT_CUDA_PATH chooses); auto, the default, takes plain on "
            "8.0, bfloat16, 2..16 rows; fused on 9.0, bfloat16, 1..64 rows; else plain: nothing "
            "else has been measured",
        ),
    ],
)
def test_paths_are_described(table, asked, line) -> None:
    assert cuda_paths.describe(table, asked) == line


@pytest.mark.parametrize(("table", "measured"), [([], False), (TABLE, True)])
def test_info_says_which_paths_there_are(table, measured, monkeypatch) -> None:
    build = {**c2c_ext.build_info(), "cuda_architectures": ["80-real"], "cuda_dispatch": table}
    monkeypatch.setattr(info, "build_info", lambda: build)
    monkeypatch.setattr(info, "kernels_missing", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "GPU")
    monkeypatch.delenv(cuda_paths.VARIABLE, raising=False)
    lines = info.describe()
    assert ("never measured" in lines["cuda:0"]) != measured
    assert ("no path has been measured" in lines["CUDA paths"]) != measured
    monkeypatch.setattr(info, "kernels_missing", lambda device: "because")
    assert "CUDA paths" not in info.describe()

"""tools/support_table.py: docs/support.md is what the tests' recorded results say."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import tiny_architectures
from test_architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield __import__("support_table")
    sys.modules.pop("support_table", None)


@pytest.fixture
def results(tool) -> dict:
    return json.loads(tool.RESULTS.read_text("utf-8"))


def functions_of(module: str) -> set[str]:
    tree = ast.parse((ROOT / "python_tests" / f"{module}.py").read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_document_holds_what_the_results_say(tool, capsys) -> None:
    assert tool.main(["--check"]) == 0, capsys.readouterr().out


def test_every_case_names_a_test_that_exists(tool, results) -> None:
    assert set(results["cases"]) == set(tool.TESTS)
    for module, functions in results["cases"].items():
        tests = {name for name in functions_of(module) if name.startswith("test_")}
        assert set(functions) == tests, module
    named = {*tool.COLUMNS, *tool.SPECIAL, tool.WORKS, tool.REFUSED}
    known = functions_of("test_architectures") | functions_of("test_every_architecture")
    assert named <= known


def test_every_architecture_has_its_cases(tool, results) -> None:
    assert set(results["cases"]["test_architectures"]["test_as_receiver"]) == set(ARCHITECTURES)
    every = results["cases"]["test_every_architecture"]
    assert set(every[tool.WORKS]) <= tiny_architectures.WORKS
    assert set(every[tool.REFUSED]) <= tiny_architectures.REFUSED.keys()
    versions = [run["transformers"] for run in results["runs"]]
    assert versions[-1] == pinned() and len(versions) == len(set(versions)) >= 2
    newest = {
        kind for kind in every[tool.WORKS] if versions[-1] in every[tool.WORKS][kind]["passed"]
    }
    assert len(newest) >= 90


def pinned() -> str:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("transformers=="))


def test_no_case_of_the_results_failed(results) -> None:
    failed = [
        f"{module}::{function}[{case}]"
        for module, functions in results["cases"].items()
        for function, cases in functions.items()
        for case, entry in cases.items()
        if "failed" in entry
    ]
    assert not failed


REPORT = """<testsuites><testsuite>
<testcase classname="python_tests.test_cache_kinds" name="test_one[a-b]"/>
<testcase classname="python_tests.test_cache_kinds" name="test_one[c]">
  <failure message="x"/></testcase>
<testcase classname="python_tests.test_cache_kinds" name="test_two">
  <properties><property name="reason" value="why"/></properties></testcase>
</testsuite></testsuites>"""


def test_reports_of_several_versions_are_joined(tool) -> None:
    cases: dict = {}
    tool.add_report(cases, REPORT, "1")
    tool.add_report(cases, REPORT.replace("<failure", "<other").replace("two", "three"), "2")
    found = cases["test_cache_kinds"]
    assert found["test_one"]["a-b"] == {"passed": ["1", "2"]}
    assert found["test_one"]["c"] == {"failed": ["1"], "passed": ["2"]}
    assert found["test_two"][""] == {"passed": ["1"], "reason": "why"}
    assert tool.said([found["test_one"]["a-b"]], ["1", "2"]) == "yes"
    assert tool.said([found["test_two"][""]], ["1", "2"]) == "1"
    assert tool.said(found["test_one"].values(), ["1", "2"]) == "**fails on 1**"
    assert tool.said([], ["1"]) == ""

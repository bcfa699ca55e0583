"""Writes docs/support.md from benchmarks/results/support.json, which the tests' own results fill.

usage: python tools/support_table.py [--check]
       python tools/support_table.py --record PYTHON...

--record runs the tests of architectures, caches and placement under each PYTHON, one with its own
transformers, and writes the results file first. With --check nothing is written; the exit status is
1 if the document differs from what the results say.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from c2c_ext.machine import commit_of
from c2c_ext.measure import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "support.json"
DOCUMENT = ROOT / "docs" / "support.md"
TESTS = ("test_architectures", "test_every_architecture", "test_cache_kinds", "test_placement")
VERSIONS = (
    "import json, transformers, torch, platform; print(json.dumps({'transformers': "
    "transformers.__version__, 'torch': torch.__version__, 'python': platform.python_version()}))"
)
# Columns of the table of common architectures: what each test says.
COLUMNS = {
    "test_as_receiver": "receiver",
    "test_as_sharer": "sharer",
    "test_as_receiver_of_padded_rows": "receiver, padded rows",
    "test_as_sharer_of_padded_rows": "sharer, padded rows",
    "test_as_receiver_beyond_the_window": "prompt beyond the window",
    "test_with_all_gates_closed_it_is_the_plain_split_run_bit_for_bit": "closed gates, same bits",
    "test_in_bfloat16": "bfloat16",
    "test_its_saved_form_is_that_of_the_model_alone": "saved form unchanged",
}
WORKS = "test_a_model_receives_from_another_of_its_type_as_the_plain_loop_does"
REFUSED = "test_a_model_without_plain_keys_and_values_is_refused"
# What else the models of one type show, and how it is said.
SPECIAL = {
    "test_an_encoder_that_is_configured_as_a_decoder_works": "with `is_decoder=True`, both roles",
    "test_the_decoder_of_an_encoder_decoder_shares_by_its_own_numbers": "its decoder, as sharer",
}

# {module: {function: {case: {"passed": [version], "failed": [version], "reason": text}}}}
Cases = dict[str, dict[str, dict[str, dict[str, Any]]]]


def record(pythons: Sequence[str]) -> None:
    """Runs the tests under each interpreter; what ran stands in the results file after each."""
    commit, dirty = commit_of(ROOT)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    cases: Cases = {}
    runs: list[dict[str, str]] = []
    data = {"commit": commit, "dirty": dirty, "date": date, "runs": runs, "cases": cases}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for python in pythons:
        with tempfile.TemporaryDirectory() as directory:
            report = Path(directory) / "report.xml"
            asked = subprocess.run([python, "-c", VERSIONS], capture_output=True, check=True)
            versions = json.loads(asked.stdout.splitlines()[-1])
            files = [f"python_tests/{name}.py" for name in TESTS]
            command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *files]
            subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr)
            add_report(cases, report.read_text("utf-8"), versions["transformers"])
        runs.append(versions)
        write_text(RESULTS, json.dumps(data, indent=1) + "\n")


def add_report(cases: Cases, report: str, version: str) -> None:
    """Adds a JUnit report of pytest to ``cases``."""
    for case in ElementTree.fromstring(report).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        function, _, name = case.get("name", "").partition("[")
        entry = cases.setdefault(module, {}).setdefault(function, {})
        entry = entry.setdefault(name.removesuffix("]"), {})
        bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        entry.setdefault("failed" if bad else "passed", []).append(version)
        for told in case.iter("property"):
            entry[told.get("name")] = told.get("value")


def said(entries: Iterable[dict[str, Any]], versions: Sequence[str]) -> str:
    """One cell: of all cases that it stands for."""
    passed, failed = set(versions), set()
    entries = list(entries)
    for entry in entries:
        passed &= set(entry.get("passed", []))
        failed |= set(entry.get("failed", []))
    if not entries:
        return ""
    if failed:
        return "**fails on " + ", ".join(v for v in versions if v in failed) + "**"
    return "yes" if passed == set(versions) else ", ".join(v for v in versions if v in passed)


def document(data: dict[str, Any]) -> str:
    """The text of docs/support.md."""
    versions = [run["transformers"] for run in data["runs"]]
    common, every = data["cases"]["test_architectures"], data["cases"]["test_every_architecture"]
    lines = [
        "# What is supported",
        "",
        "Written by `make support` from the results of the tests "
        "([support.json](../benchmarks/results/support.json)): tiny random models of each kind, "
        "whose caches and logits are compared with a plain loop (plain PyTorch fusing, "
        "transformers' own forward). Run on "
        f"{data['date'][:10]} at {(data['commit'] or 'no commit')[:7]}"
        + (" and changes" if data["dirty"] else "")
        + f" beside transformers {', '.join(versions)}, on a CPU. *yes*: on all of them; versions: "
        "on those, the others do not have it.",
        "",
        "## Common architectures",
        "",
    ]
    rows = []
    for name in common["test_as_receiver"]:
        cells = [
            said((e for case, e in common[f].items() if f"-{case}".endswith(f"-{name}")), versions)
            for f in COLUMNS
        ]
        rows.append([name, *cells])
    lines += table(["architecture", *COLUMNS.values()], rows)
    lines += [
        "",
        "An empty cell: no layer of it slides. Every receiver is attached to a Llama and every "
        "sharer to a Qwen3, of other depths and head sizes.",
        "",
        "## Every causal language model of transformers",
        "",
        "By model type, a receiver and a sharer of the same type, two rows of which one is padded:",
        "",
    ]
    works = {kind: said([entry], versions) for kind, entry in every[WORKS].items()}
    listed = [
        f"`{kind}`" + ("" if cell == "yes" else f" ({cell})")
        for kind, cell in sorted(works.items())
    ]
    lines += [", ".join(listed) + ".", ""]
    lines += [
        "`ctrl`, `doge`, `git`, `moss_transcribe_diarize` and `trocr` count the tokens of a padded "
        "row from its padding on, attached or not: give them rows of equal length.",
        "",
        "Refused by `attach`, with the layer and the reason:",
        "",
    ]
    refused = [
        [f"`{kind}`", re.sub(r"^model type '.*?':? ", "", entry["reason"]), said([entry], versions)]
        for kind, entry in sorted(every[REFUSED].items())
    ]
    lines += table(["model type", "reason", "holds"], refused)
    lines += ["", "Of them, where a part or a setting makes a decoder:", ""]
    special = [
        [f"`{kind}`", text, said([entry], versions)]
        for function, text in SPECIAL.items()
        for kind, entry in every[function].items()
    ]
    lines += table(["model type", "how", "holds"], special)
    for title, module in (("Caches", "test_cache_kinds"), ("Placement", "test_placement")):
        lines += ["", f"## {title}", ""]
        rows = [
            [words(function), case.replace("-", ", "), said([entry], versions)]
            for function, cases in data["cases"][module].items()
            for case, entry in cases.items()
        ]
        lines += table(["what", "case", "holds"], rows)
    lines += [
        "",
        "Not run: offloaded caches and `device_map` over several GPUs, for want of such machines. "
        "Layers on several devices keep their keys and values there; for fusing they are copied to "
        "the first layer's device and back ([placement.py](../c2c_ext/placement.py)).",
    ]
    return "\n".join(lines) + "\n"


def words(function: str) -> str:
    """A test's name as a sentence."""
    return function.removeprefix("test_").replace("_", " ")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it differs")
    parser.add_argument("--record", nargs="+", metavar="PYTHON", help="run the tests first")
    options = parser.parse_args(argv)
    if options.record:
        record(options.record)
    text = document(json.loads(RESULTS.read_text("utf-8")))
    if options.check:
        if not DOCUMENT.is_file() or DOCUMENT.read_text("utf-8") != text:
            print(f"{DOCUMENT.relative_to(ROOT)} is not what {RESULTS.name} says")
            return 1
        return 0
    write_text(DOCUMENT, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the test suite under several interpreters and records what ran, with what result.

usage: python tools/record_versions.py OUTPUT.json PYTHON... [--wheel WHEEL] [--tests FILE...]

Writes OUTPUT.json and, for reading, the same as a table to OUTPUT.md.

Each PYTHON is one with its own torch, transformers and pytest. With --wheel, that one wheel is
tested on all of them: unpacked by pip beside them, nothing in them is changed. Without, each tests
the checkout's in-place build where that build is for its Python version, else the c2c_ext installed
in it. --tests names files of python_tests; without it all run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = """
import json, platform, torch, transformers, c2c_ext
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "transformers": transformers.__version__,
                  "built_with_torch": c2c_ext.build_info()["built_with_torch"],
                  "instruction_set": c2c_ext.build_info()["cpu_instruction_set"],
                  "path": c2c_ext.__path__[0]}))
"""


def package_for(python: str, wheel: Path | None, directory: str) -> tuple[str, str | None]:
    """What is tested, in a word, and the directory to put on PYTHONPATH for it."""
    if wheel is not None:
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--no-deps", "--target", directory, str(wheel)], check=True)
        return "wheel", directory
    tag = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = subprocess.run([python, "-c", tag], capture_output=True, text=True, check=True).stdout
    if (ROOT / "c2c_ext" / f"_C{suffix.strip()}").exists():
        return "in place", str(ROOT)
    return "installed", None


def run(python: str, wheel: Path | None, tests: list[str]) -> dict:
    """One row: versions, pytest's closing line, exit status."""
    with tempfile.TemporaryDirectory() as directory:
        package, path = package_for(python, wheel, directory)
        environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
        if path is not None:
            environment["PYTHONPATH"] = path
        # Not from the root: there, an installed package would be hidden by the checkout.
        where = {
            "cwd": ROOT / "python_tests",
            "env": environment,
            "capture_output": True,
            "text": True,
        }
        asked = subprocess.run([python, "-c", QUESTION], check=True, **where)
        versions = json.loads(asked.stdout)
        found = versions.pop("path")
        if path is not None and not Path(found).is_relative_to(path):
            raise SystemExit(f"{python}: expected the c2c_ext in {path}, found {found}")
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(pytest, **where)
    closing = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    return {
        **versions,
        "package": package,
        "tests": " ".join(tests) or "all",
        "result": closing[-1].strip("= ") if closing else done.stdout[-200:],
        "status": done.returncode,
    }


def table(data: dict) -> str:
    """The runs as a Markdown table, for a reader of the JSON file."""
    columns = ("torch", "transformers", "python", "built_with_torch", "package", "tests", "result")
    rows = [columns, ["---"] * len(columns)]
    rows += [[str(row[c]) for c in columns] for row in data["runs"]]
    what = data.get("wheel", {}).get("name", "no single wheel")
    lines = [f"Commit {data['commit']}, {data['date']}, {what}.", ""]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE")
    options = parser.parse_args()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "none"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    data: dict = {"date": date, "commit": commit}
    if options.wheel is not None:
        digest = hashlib.sha256(options.wheel.read_bytes()).hexdigest()
        data["wheel"] = {"name": options.wheel.name, "sha256": digest}
    data["runs"] = []
    for python in options.pythons:
        row = run(python, options.wheel, options.tests)
        print(row, flush=True)
        data["runs"].append(row)
        options.output.write_text(json.dumps(data, indent=2) + "\n")
        options.output.with_suffix(".md").write_text(table(data))


if __name__ == "__main__":
    main()

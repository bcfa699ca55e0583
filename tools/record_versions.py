"""Runs the test suite under several interpreters and records what ran, with what result.

usage: python tools/record_versions.py OUTPUT.json PYTHON...

Each PYTHON is one with its own torch and transformers. It tests the checkout's in-place build where
that build is for its Python version, else the c2c_ext installed in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = """
import json, platform, torch, transformers, c2c_ext
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "transformers": transformers.__version__,
                  "built_with_torch": c2c_ext.build_info()["built_with_torch"],
                  "instruction_set": c2c_ext.build_info()["cpu_instruction_set"]}))
"""


def run(python: str) -> dict:
    """One row: versions, pytest's closing line, exit status."""
    tag = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    suffix = subprocess.run([python, "-c", tag], capture_output=True, text=True, check=True).stdout
    in_place = (ROOT / "c2c_ext" / f"_C{suffix.strip()}").exists()
    environment = dict(os.environ)
    if in_place:
        environment["PYTHONPATH"] = str(ROOT)
    # Not from the root: there, an installed package would be hidden by the checkout.
    where = {"cwd": ROOT / "python_tests", "env": environment, "capture_output": True, "text": True}
    versions = json.loads(subprocess.run([python, "-c", QUESTION], check=True, **where).stdout)
    done = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider"], **where)
    closing = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed)", line)]
    return {
        **versions,
        "package": "in place" if in_place else "installed",
        "result": closing[-1].strip("= ") if closing else done.stdout[-200:],
        "status": done.returncode,
    }


def main() -> None:
    output, *pythons = sys.argv[1:]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "none"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = []
    for python in pythons:
        rows.append(run(python))
        print(rows[-1], flush=True)
        data = {"date": date, "commit": commit, "runs": rows}
        Path(output).write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()

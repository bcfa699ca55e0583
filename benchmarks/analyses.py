"""Records the analyses that docs/analysis.md shows, and writes their tables into it.

The document says what there is: blocks that begin with `$ c2c analyze ...`, each followed by a
drawing `analyze_NAME.svg`. Every command runs; files, drawings and tables are replaced when all
have run, so that each is of the tree as it was before:

    python benchmarks/analyses.py             # minutes; only --tables: writes the tables anew
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from c2c_ext.analysis.tables import shown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "analysis.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(
    r"```text\n\$ c2c analyze (?P<arguments>[^\n]+)\n.*?```\n\n"
    r"!\[[^\]]*\]\(\.\./benchmarks/results/(?P<name>analyze_\w+)\.svg\)",
    re.DOTALL,
)


def recorded() -> dict[str, list[str]]:
    """By file what `c2c analyze` is called with."""
    return {b["name"]: b["arguments"].split() for b in BLOCK.finditer(DOCUMENT.read_text())}


def record(place: Path) -> None:
    """Runs every command, one process each; files go to ``place``."""
    for name, arguments in recorded().items():
        print(f"c2c analyze {' '.join(arguments)}", file=sys.stderr, flush=True)
        files = ["--json", str(place / f"{name}.json"), "--svg", str(place / f"{name}.svg")]
        command = [sys.executable, "-m", "c2c_ext.cli", "analyze", *arguments, *files]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def with_tables(text: str) -> str:
    """The document with the tables that the results hold."""

    def block(found: re.Match[str]) -> str:
        data = json.loads((RESULTS / f"{found['name']}.json").read_text())
        head, drawing = f"$ c2c analyze {found['arguments']}", found[0].rsplit("```\n\n", 1)[1]
        return f"```text\n{head}\n{shown(data['arguments']['what'], data)}\n```\n\n{drawing}"

    return BLOCK.sub(block, text)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only write the tables anew")
    if not parser.parse_args().tables:
        with tempfile.TemporaryDirectory() as place:
            record(Path(place))
            for file in sorted(Path(place).iterdir()):
                shutil.copy(file, RESULTS / file.name)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()

"""The options of `c2c analyze`."""

from __future__ import annotations

import argparse
from typing import Any

from ..model_arguments import add_pair, add_placement

ANALYSES = {
    "rank": "effective rank of keys and values per layer",
    "weights": "gates and mean dynamic weights per layer and head",
    "layers": "answers when only some layers are fused",
    "positions": "answers when only a part of the positions is fused",
    "attention": "cosine of attention outputs, fused and plain, and what it predicts",
    "solved": "which questions each mode and control solves, and whether content crosses",
}


def add_analyze(commands: Any) -> None:
    """Adds the subcommand to an argparse subparsers object."""
    analyze = commands.add_parser(
        "analyze",
        help="what a fuser does to caches and answers (docs/analysis.md)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:10} {what}" for name, what in ANALYSES.items()),
    )
    analyze.add_argument("what", choices=tuple(ANALYSES), help="see below")
    add_pair(analyze)
    analyze.add_argument(
        "--questions", metavar="FILE", help="conversations as for c2c train; with your own models"
    )
    analyze.add_argument(
        "--limit",
        metavar="N",
        type=int,
        help="questions at most (of each kind), drawn, always the same ones",
    )
    analyze.add_argument(
        "--form-size", metavar="K", type=int, help="attributes in the shipped pair's forms (6)"
    )
    analyze.add_argument(
        "--filled",
        action="store_true",
        help="attention: the shipped receiver's forms are filled in, at random",
    )
    analyze.add_argument(
        "--t2t-tokens", metavar="N", type=int, help="solved: that the sharer may write (128)"
    )
    analyze.add_argument(
        "--t2t-prompt", metavar="TEXT", help="solved: what it is asked for, with {question} in it"
    )
    add_placement(analyze)
    analyze.add_argument("--json", metavar="FILE", help="also write rows and environment there")
    analyze.add_argument("--svg", metavar="FILE", help="also draw them there")

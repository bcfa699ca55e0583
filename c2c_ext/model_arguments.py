"""Options that the commands share which load a pair of models."""

from __future__ import annotations

import argparse

PLACE = "a directory or a Hub name (shipped pair)"


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Adds ``--receiver``, ``--sharer`` and ``--fuser``."""
    for side in ("receiver", "sharer", "fuser"):
        parser.add_argument(f"--{side}", metavar="DIR", help=f"the {side}: {PLACE}")


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Adds ``--dtype`` and ``--device``, of both models."""
    parser.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="of both models (auto: as stored)",
    )
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="cpu, cuda, cuda:1 ...")

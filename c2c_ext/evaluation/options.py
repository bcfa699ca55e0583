"""The options of `c2c eval`."""

from __future__ import annotations

from typing import Any

from ..model_arguments import add_pair, add_placement


def add_eval(commands: Any) -> None:
    """Adds ``eval`` to the subcommands of `c2c`."""
    parser = commands.add_parser(
        "eval",
        help="benchmarks under every mode and control: does content cross? (docs/evaluation.md)",
    )
    add_pair(parser)
    parser.add_argument(
        "--identical-fuser", metavar="DIR", help="between the receiver and itself (control)"
    )
    parser.add_argument(
        "--tasks", metavar="TASK", nargs="+", required=True, help="of lm-evaluation-harness"
    )
    parser.add_argument("--include-path", metavar="DIR", help="task files of your own")
    parser.add_argument(
        "--modes",
        metavar="MODE",
        nargs="+",
        help="receiver sharer ensemble routing t2t c2c mismatched zero noise identical (all)",
    )
    parser.add_argument("--limit", metavar="N", type=int, help="questions of each task (all)")
    parser.add_argument("--num-fewshot", metavar="N", type=int, help="examples (the task's own)")
    parser.add_argument("--batch-size", metavar="B", type=int, default=8, help="contexts (8)")
    parser.add_argument(
        "--chat-template", action="store_true", help="ask as the receiver's chat template does"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before all others")
    parser.add_argument(
        "--metric", metavar="NAME", help="right or wrong by this (acc, exact_match)"
    )
    parser.add_argument(
        "--t2t-tokens", metavar="N", type=int, default=128, help="that the sharer may write (128)"
    )
    parser.add_argument(
        "--t2t-prompt", metavar="TEXT", help="what it is asked for, with {question}, {options}"
    )
    parser.add_argument(
        "--greedy", action="store_true", help="do not draw answers, also where a task asks for it"
    )
    parser.add_argument(
        "--rolling-block",
        metavar="N",
        type=int,
        default=64,
        help="tokens of a perplexity that are scored at a time, on the fused text before them (64)",
    )
    add_placement(parser)
    parser.add_argument(
        "--synchronize",
        action="store_true",
        help="on a GPU: wait around every part of the latency, which tells them apart",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all results to this file")

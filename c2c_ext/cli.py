"""The `c2c` command line. Each subcommand lives in a module of its own, imported when called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .analysis.arguments import add_analyze
from .evaluation.options import add_eval
from .model_arguments import add_pair, add_placement


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `c2c`; returns the exit status (2 for wrong arguments or bad input)."""
    parser = argparse.ArgumentParser(
        prog="c2c", description="Cache-to-Cache: LLMs that talk through their KV-caches."
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command")

    demo = commands.add_parser(
        "demo", help="two shipped models answer together, through their caches"
    )
    demo.add_argument("--entity", metavar="NAME", help="ask about this entity")
    demo.add_argument("--ask", metavar="ATTRIBUTE", help="ask for this attribute of it")
    demo.add_argument(
        "--rivals", action="store_true", help="ask for the value's rival, which the receiver knows"
    )
    demo.add_argument("--json", metavar="FILE", help="also write table and latencies to this file")

    info = commands.add_parser(
        "info", help="build, versions, devices; whether two models and a fuser fit, and the cost"
    )
    for side in ("receiver", "sharer"):
        info.add_argument(
            f"--{side}", metavar="DIR", help=f"the {side}'s model directory, or its config.json"
        )
    info.add_argument(
        "--fuser",
        metavar="DIR",
        help="a fuser directory, ours or a published one, or its configuration file",
    )
    info.add_argument("--batch", metavar="B", type=int, default=1, help="prompts (default: 1)")
    info.add_argument(
        "--tokens", metavar="N", type=int, default=512, help="tokens per prompt (default: 512)"
    )
    info.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        default="bf16",
        help="of both models and their caches (default: bf16)",
    )
    info.add_argument(
        "--probe", action="store_true", help="measure this machine (ten seconds), estimate times"
    )
    info.add_argument("--json", metavar="FILE", help="also write the exact numbers to this file")

    align = commands.add_parser(
        "align", help="how two tokenizers cut a text, and which token goes with which"
    )
    align.add_argument("text", metavar="TEXT", help="what both read")
    for side in ("receiver", "sharer"):
        align.add_argument(
            f"--{side}", metavar="DIR", required=True, help=f"the {side}: a directory or a Hub name"
        )
    align.add_argument(
        "--strategy",
        choices=("span", "first", "longest"),
        default="span",
        help="by character spans (default), or re-encoding as published",
    )
    align.add_argument(
        "--chat", action="store_true", help="TEXT is a user's message, in both chat templates"
    )
    align.add_argument("--json", metavar="FILE", help="also write tokens and map to this file")

    convert = commands.add_parser(
        "convert", help="a fuser from the published research code's format into ours, or back"
    )
    convert.add_argument("source", metavar="SOURCE", help="a fuser directory in either format")
    convert.add_argument("destination", metavar="DESTINATION", help="a new directory")
    convert.add_argument(
        "--to", choices=("c2c_ext", "published"), help="needed only where SOURCE holds both"
    )
    convert.add_argument("--receiver", metavar="DIR", help="record this model and compare shapes")
    convert.add_argument("--sharer", metavar="DIR", help="record this model and compare shapes")
    convert.add_argument("--overwrite", action="store_true", help="replace a fuser that is there")

    train = commands.add_parser(
        "train", help="train a fuser between two models on conversations (docs/training.md)"
    )
    for side in ("receiver", "sharer"):
        train.add_argument(
            f"--{side}", metavar="DIR", required=True, help=f"the {side}: a directory or a Hub name"
        )
    train.add_argument(
        "--data", metavar="FILE", required=True, help="conversations: JSON lines, or a Hub dataset"
    )
    train.add_argument("--eval-data", metavar="FILE", help="likewise, for the evaluation loss")
    train.add_argument(
        "--output", metavar="DIR", required=True, help="of the fuser, checkpoints and log"
    )
    train.add_argument(
        "--config",
        metavar="RECIPE",
        default="published",
        help="a YAML file, or published (default), write-up, tiny",
    )
    train.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change fields of the recipe",
    )
    train.add_argument(
        "--bad-data", choices=("refuse", "skip"), help="what to do about bad lines (refuse)"
    )
    train.add_argument(
        "--prompt-caches",
        metavar="DIR",
        help="keep what both models prefill there; written if it is not there",
    )
    train.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="parameters, memory and time; loads nothing"
    )
    train.add_argument(
        "--sweep",
        metavar="KEY=[VALUE,...]|FILE",
        nargs="+",
        action="extend",
        help="train for every combination, or every variant of a YAML file, and compare",
    )

    bench = commands.add_parser(
        "bench", help="how fast fusing is on this machine, in under a minute (docs/benchmarks.md)"
    )
    bench.add_argument(
        "--tokens", metavar="N", type=int, nargs="+", help="per prompt (default: 1 16 64 170)"
    )
    bench.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        nargs="+",
        help="of the caches (default: fp32 bf16)",
    )
    bench.add_argument("--quick", action="store_true", help="a tiny shape, in seconds")
    bench.add_argument("--json", metavar="FILE", help="also write the exact numbers to this file")

    chat = commands.add_parser(
        "chat", help="talk to two models in the terminal, alone and together (docs/chat.md)"
    )
    chat.add_argument(
        "--mode",
        choices=("receiver", "sharer", "t2t", "c2c", "all"),
        default="c2c",
        help="who answers (c2c); all: side by side",
    )
    _add_chat_options(chat)
    web = commands.add_parser(
        "web", help="the same in a browser, with what was fused (docs/chat.md)"
    )
    web.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on (this machine only)"
    )
    web.add_argument("--port", metavar="N", type=int, default=7860, help="7860; 0: any free one")
    _add_chat_options(web)
    add_analyze(commands)
    add_eval(commands)

    options = parser.parse_args(arguments)
    if options.command is None and not options.version:
        parser.error("a command is needed: " + ", ".join(commands.choices))
    try:
        if options.version:
            from . import __version__

            print(f"c2c_ext {__version__}")
            status = 0
        elif options.command == "demo":
            from .demo.command import run_demo

            status = run_demo(
                options.entity, options.ask, rivals=options.rivals, json_path=options.json
            )
        elif options.command == "align":
            from .align_command import run_align

            status = run_align(
                options.text,
                options.receiver,
                options.sharer,
                strategy=options.strategy,
                chat=options.chat,
                json_path=options.json,
            )
        elif options.command == "convert":
            from .convert import run_convert

            status = run_convert(
                options.source,
                options.destination,
                to=options.to,
                receiver=options.receiver,
                sharer=options.sharer,
                overwrite=options.overwrite,
            )
        elif options.command == "train":
            from .training.command import run_train

            status = run_train(
                receiver=options.receiver,
                sharer=options.sharer,
                data=options.data,
                output=options.output,
                config=options.config,
                changes=options.set,
                eval_data=options.eval_data,
                bad_data=options.bad_data,
                prompt_caches=options.prompt_caches,
                resume=options.resume,
                dry=options.dry_run,
                sweep=options.sweep,
            )
        elif options.command == "bench":
            from .bench import run_bench

            status = run_bench(
                options.tokens, options.dtype, quick=options.quick, json_path=options.json
            )
        elif options.command == "analyze":
            from .analysis.command import run_analyze

            given = {k: v for k, v in vars(options).items() if k not in ("command", "version")}
            status = run_analyze(json_path=given.pop("json"), svg_path=given.pop("svg"), **given)
        elif options.command in ("chat", "web", "eval"):
            if options.command == "eval":
                from .evaluation.command import run_eval as run
            elif options.command == "chat":
                from .chat.command import run_chat as run
            else:
                from .chat.web import run_web as run
            given = {k: v for k, v in vars(options).items() if k not in ("command", "version")}
            status = run(**given)
        else:
            from .info import run_info

            status = run_info(
                options.receiver,
                options.sharer,
                options.fuser,
                batch=options.batch,
                tokens=options.tokens,
                dtype=options.dtype,
                measure=options.probe,
                json_path=options.json,
            )
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, e.g. head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError) as error:
        name = f"c2c {options.command}" if options.command else "c2c"
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.command == "train" and not options.sweep and not options.dry_run:
            there = any(Path(options.output).glob("checkpoint-*"))
            hint = "; --resume goes on from the last checkpoint in " + options.output
            print(f"c2c train: stopped{hint if there else ''}", file=sys.stderr)
        return 130


def _add_chat_options(chat: argparse.ArgumentParser) -> None:
    add_pair(chat)
    chat.add_argument("--max-new-tokens", metavar="N", type=int, help="of an answer (256)")
    chat.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0 (default): greedy"
    )
    chat.add_argument(
        "--t2t-tokens", metavar="N", type=int, help="that the sharer may write in mode t2t (128)"
    )
    chat.add_argument(
        "--t2t-prompt", metavar="TEXT", help="what it is asked for, with {question} in it"
    )
    chat.add_argument("--system", metavar="TEXT", default="", help="a system message")
    add_placement(chat)


if __name__ == "__main__":
    sys.exit(main())

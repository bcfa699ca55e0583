"""How long until the receiver answers: alone, after a message in text, and through its cache?

usage: python benchmarks/bench_generate.py [--pairs tiny mid real] [--dtypes fp32 bf16]
           [--prompts N ...] [--message K] [--new-tokens M] [--device cpu|cuda]
           [--overlaps none stream thread] [--threads T] [--quick] [--output FILE]

Three modes: `receiver` reads the prompt and answers; `T2T`: the sharer reads it, writes K tokens,
and the receiver reads prompt and message; `C2C`: an attached receiver, once per way in which its
two prefills may overlap. Models have the pair's shapes and random weights. Every mode must give the
tokens of a plain greedy loop, and the fused cache must be as good as plain PyTorch's, before
anything is timed. docs/benchmarks.md says how to read the results.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import shapes
import torch
from answers import BATCH, CPU, MODES, Answer, Pair, is_fused, modes_of
from gpu import Gpu
from torch import Tensor

from c2c_ext.machine import peak_memory
from c2c_ext.measure import Cell, Effort, Timing, Unverified, alternate
from c2c_ext.overlap import OVERLAPS
from c2c_ext.report import DTYPES

PROMPTS = (64, 170, 512)
# By device: what is measured where the command line does not say.
DEFAULTS = {
    "cpu": {"pairs": ["tiny", "mid"], "dtypes": ["fp32", "bf16"], "new_tokens": 16},
    "cuda": {"pairs": ["real"], "dtypes": ["bf16"], "new_tokens": 64},
}
# Of C2C on a GPU, at 170 prompt tokens and 64 new ones.
GOALS = {"receiver": 1.05, "T2T": 4.0}


def measure(
    cell: Cell,
    pair: Pair,
    ids: Tensor,
    message: int,
    new_tokens: int,
    effort: Effort,
    modes: Sequence[str] = MODES,
) -> tuple[list[Cell], list[Cell]]:
    """Rows of all modes that give the right tokens, timed in turns."""
    verified, left_out = {}, []
    for mode in modes:
        try:
            verified[mode] = pair.verify(mode, ids, message, new_tokens)
        except Unverified as error:
            left_out.append({**cell, "provider": mode, "reason": str(error)})
    answers: dict[str, list[Answer]] = {mode: [] for mode in verified}
    prefix: list[dict[str, float]] = []  # parts of C2C up to the first token, by separate calls

    def call(mode: str) -> Callable[[int], None]:
        def run(_: int) -> None:
            answers[mode].append(pair.answer(mode, ids, message, new_tokens))

        return run

    calls = {mode: call(mode) for mode in verified}
    if any(map(is_fused, verified)):
        calls["parts"] = lambda _: prefix.append(pair.fused_parts(ids))
    if calls:
        alternate(calls, effort, pair.now)
    medians = {m: _summary([a.total for a in answers[m]])["median"] for m in verified}
    rows = []
    for mode in verified:
        runs = answers[mode]
        parts: dict[str, list[float]] = {}
        for part in [a.parts for a in runs] + (prefix if mode == MODES[2] else []):
            for name, seconds in part.items():
                parts.setdefault(name, []).append(seconds)
        row = {
            **cell,
            "provider": mode,
            "seconds": _summary([a.total for a in runs]),
            "calls": len(runs),
            "first_token": _summary([a.first for a in runs]),
            "per_token": _summary([s for a in runs for s in a.steps] or [0.0]),
            "parts": {name: _summary(seconds) for name, seconds in parts.items()},
        }
        if mode == MODES[2]:
            # Whatever generate does around all of it.
            known = sum(p["median"] for n, p in row["parts"].items() if n != "decode")
            row["first_token_unaccounted"] = row["first_token"]["median"] - known
        row["ratios"] = {other: m / medians[mode] for other, m in medians.items() if other != mode}
        if pair.gpu is not None:
            extra = pair.gpu.extra_bytes(lambda m=mode: pair.answer(m, ids, message, new_tokens))
            row |= {**pair.gpu.facts, "memory_bytes": {"extra": extra}}
        rows.append(row | {"verified": verified[mode]})
    return rows, left_out


def against_goals(rows: Sequence[Cell]) -> list[str]:
    """A line per C2C mode: its total against the receiver alone and against T2T."""
    lines = []
    for row in rows:
        ratios = row["ratios"]
        if is_fused(row["provider"]) and set(GOALS) <= set(ratios):
            lines.append(
                f"{row['provider']}, {row['tokens']} tokens and {row['new_tokens']} new: "
                f"{1 / ratios['receiver']:.3f} times the receiver alone (goal on a GPU, at 170 and "
                f"64: {GOALS['receiver']}), {ratios['T2T']:.2f} times as fast as T2T "
                f"(goal: {GOALS['T2T']:g})"
            )
    return lines


def peak(name: str, dtype: str, mode: str, tokens: int, message: int, new_tokens: int) -> dict:
    """Bytes resident in this process before and at most during one answer, models included."""
    pair = Pair(name, DTYPES[dtype], (mode,))
    ids = pair.prompt(tokens)
    measured = peak_memory(lambda: pair.answer(mode, ids, message, new_tokens))
    return {} if measured is None else dict(zip(("resident_before", "peak"), measured, strict=True))


def peak_in_a_process(*arguments: Any) -> dict[str, int]:
    """`peak` in a fresh process, which holds nothing but what the mode needs."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
    command += ["--one-peak", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench_generate.py --one-peak failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(seconds: list[float]) -> Mapping[str, float]:
    return Timing(seconds, 0).summary()


def main(argv: list[str] | None = None, gpu: Gpu | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--pairs", nargs="+", choices=shapes.PAIRS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--prompts", nargs="+", type=harness.positive, default=list(PROMPTS))
    harness.with_device(parser)
    parser.add_argument(
        "--overlaps",
        nargs="+",
        choices=OVERLAPS,
        help="of the two prefills (default: none; on a GPU all of them)",
    )
    parser.add_argument("--message", type=harness.positive, default=64, help="tokens of T2T's text")
    parser.add_argument("--new-tokens", type=harness.positive)
    parser.add_argument("--no-memory", action="store_true", help="no processes to measure peaks in")
    parser.add_argument(
        "--one-peak", nargs=6, help="pair, dtype, mode, prompt, message, new tokens"
    )
    options = parser.parse_args(argv)
    if options.one_peak is not None:
        torch.set_num_threads(options.threads)  # the op's scratch depends on it
        name, dtype, mode, *numbers = options.one_peak
        print(json.dumps(peak(name, dtype, mode, *map(int, numbers))))
        return 0
    del options.one_peak
    if min(options.prompts) < 2:
        parser.error("--prompts must be at least 2: the last prompt token is never fused")
    for option, value in DEFAULTS[options.device].items():
        if getattr(options, option) is None:
            setattr(options, option, value)
    if options.overlaps is None:
        options.overlaps = ["none"] if options.device == "cpu" else list(OVERLAPS)
    if options.device == "cpu" and "stream" in options.overlaps:
        parser.error("--overlaps stream needs --device cuda")
    if options.device == "cuda":
        gpu = gpu or Gpu.first("bench_generate.py")
    if options.quick:
        options.pairs, options.prompts = ["tiny"], [8]
        options.message, options.new_tokens = 4, 3
    device = CPU if gpu is None else gpu.device
    results = harness.Results("generate", options, options.dtypes, device)
    sizes, modes = (options.message, options.new_tokens), modes_of(options.overlaps)
    for name in options.pairs:
        for dtype in options.dtypes:
            harness.say(f"models {name} {dtype}")
            pair = Pair(name, DTYPES[dtype], modes, gpu)
            for tokens in options.prompts:
                cell = {
                    "shape": name,
                    "dtype": str(DTYPES[dtype]).removeprefix("torch."),
                    "batch": BATCH,
                    "tokens": tokens,
                    "message": sizes[0],
                    "new_tokens": sizes[1],
                }
                ids = pair.prompt(tokens)
                rows, left_out = measure(cell, pair, ids, *sizes, results.effort, modes)
                if gpu is None and not options.no_memory:
                    for row in rows:
                        where = (name, dtype, row["provider"], tokens, *sizes)
                        row["memory_bytes"] = peak_in_a_process(*where)
                results.add(rows, left_out)
                for line in against_goals(rows):
                    print(line, flush=True)
            del pair
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())

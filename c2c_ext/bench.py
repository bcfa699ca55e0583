"""`c2c bench`: under a minute, how fast fusing is here, compiled and in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .files import checked_target
from .fusion_bench import SHAPES, FusionCase, gemm_dtypes, make_fuser, measure_fusion, set_gates
from .info import format_bytes, format_seconds
from .machine import environment
from .measure import BASELINE, Cell, Effort, document, write_json
from .probe import CeilingSampler, probe
from .report import DTYPES

TOKENS = (1, 16, 64, 170)
MAX_TOKENS = 4096  # caches and times of a short run stay small
PROVIDERS = (BASELINE, "fuse")  # torch.compile alone would take longer than the rest
COLUMNS = ("dtype", "tokens", "PyTorch", "c2c_ext", "p20 .. p80", "faster", "ceiling", "bound")


def run_bench(
    tokens: Sequence[int] | None,
    dtypes: Sequence[str] | None,
    *,
    quick: bool = False,
    json_path: str | None = None,
) -> int:
    """Verifies and times fusions of random caches, prints a table; returns the exit status.

    The shape is that of four layers of Qwen3-0.6B reading Qwen2.5-0.5B.

    Args:
        tokens: per prompt, one row each; by default `TOKENS`.
        dtypes: keys of `report.DTYPES`; by default fp32 and bf16.
        quick: the shipped pair's shape, and seconds in place of a minute.
        json_path: also write the rows and the environment to this file.

    Returns:
        1 if a result was wrong; its row is missing then.

    Raises:
        ValueError, OSError: an option breaks a rule.
    """
    tokens = list(dict.fromkeys(tokens or (TOKENS[:2] if quick else TOKENS)))
    for value in tokens:
        if not 1 <= value <= MAX_TOKENS:
            raise ValueError(f"--tokens must be in 1..{MAX_TOKENS}, got {value}")
    chosen = {name: DTYPES[name] for name in dtypes or ("fp32", "bf16")}
    target = None if json_path is None else checked_target("--json", json_path)
    name = "tiny" if quick else "short"
    effort = Effort(rounds=2, seconds=0.05, limit=2) if quick else Effort(3, 0.5, limit=5)
    where = environment()
    cpu = torch.device("cpu")
    rows: list[Cell] = []
    left_out: list[Cell] = []
    with _progress(1 + len(chosen) * len(tokens)) as step:
        step("ceilings of this machine")
        ceilings = probe(cpu, gemm_dtypes(chosen), seconds=0.3 if quick else 3.0)
        sampler = CeilingSampler(cpu, gemm_dtypes(chosen))
        for label, dtype in chosen.items():
            fuser = make_fuser(SHAPES[name], dtype)
            set_gates(fuser, "all")
            for n in tokens:
                step(f"{label}, {n} tokens")
                case = FusionCase(fuser, dtype, 1, n)
                cell = {"shape": name, "gates": "all"}
                new, wrong = measure_fusion(cell, case, sampler, effort, PROVIDERS)
                rows += new
                left_out += wrong
    layers, heads, dim = SHAPES[name].receiver
    sources, sharer_heads, sharer_dim = SHAPES[name].sharer
    print(
        f"One fusion, batch 1, all gates open: {layers} receiver layers of {heads} x {dim}, "
        f"{sources} sharer layers of {sharer_heads} x {sharer_dim}, fuser width "
        f"{SHAPES[name].hidden}"
    )
    rates = ", ".join(
        f"{str(dtype).removeprefix('torch.')} GEMM {rate / 1e9:,.0f} GFLOP/s"
        for dtype, rate in ceilings.gemm.items()
    )
    print(f"{where['cpu']}; ceilings: {format_bytes(ceilings.memory)}/s, {rates}")
    _print_table(table(rows))
    for cell in left_out:
        print(f"left out: {cell['provider']}, {cell['dtype']}, {cell['tokens']} tokens: ", end="")
        print(cell["reason"])
    print("verified against float64; medians, in turns; benchmarks/bench_fuse.py measures the rest")
    if target is not None:
        arguments = {"tokens": tokens, "dtypes": list(chosen), "quick": quick}
        data = document("fuse", arguments, where, ceilings, rows, left_out, complete=True)
        write_json(target, data)
    return 1 if left_out else 0


def table(rows: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One line of `COLUMNS` per dtype and number of tokens that c2c_ext has a row for."""
    plain = {(r["dtype"], r["tokens"]): r for r in rows if r["provider"] == BASELINE}
    lines = []
    for row in rows:
        if row["provider"] == BASELINE:
            continue
        taken = row["seconds"]
        lines.append(
            (
                _label(row["dtype"]),
                str(row["tokens"]),
                format_seconds(plain[row["dtype"], row["tokens"]]["seconds"]["median"]),
                format_seconds(taken["median"]),
                f"{format_seconds(taken['p20'])} .. {format_seconds(taken['p80'])}",
                f"{row['ratios'][BASELINE]:.1f} x",
                f"{100 * row['fraction_of_ceiling']:.0f}%",
                row["bound"],
            )
        )
    return lines


def _label(dtype: str) -> str:
    return next(label for label, known in DTYPES.items() if str(known).endswith("." + dtype))


def _print_table(lines: Sequence[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            drawn = Table(box=None, pad_edge=False)
            for column in COLUMNS:
                drawn.add_column(column, justify="right", no_wrap=True)
            for line in lines:
                drawn.add_row(*line)
            Console().print(drawn)
            return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines, strict=True)]
    for line in (COLUMNS, *lines):
        print("  ".join(c.rjust(width) for c, width in zip(line, widths, strict=True)))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to call with what begins now: a bar on a terminal with rich, else lines."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        bar = None
    else:
        # Drawn at steps alone: a thread that redraws would take time from what is timed.
        bar = Progress(console=Console(stderr=True), transient=True, auto_refresh=False)
    if bar is None or not sys.stderr.isatty():
        yield lambda what: print(f"bench: {what} ...", file=sys.stderr, flush=True)
        return
    with bar:
        task = bar.add_task("", total=total)
        begun = 0

        def step(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun, refresh=True)
            begun += 1

        yield step

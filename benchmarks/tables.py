"""Writes the tables of README.md and docs/ from benchmarks/results/, so that no figure is typed.

usage: python benchmarks/tables.py [--check]

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`. With --check
nothing is written; the exit status is 1 if a document differs from what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from c2c_ext.measure import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/kernels.md", "docs/benchmarks.md", "docs/training.md")
MARKED = re.compile(r"(<!-- table: ([^>]+?) -->\n).*?(<!-- end of table -->)", re.S)
TOKENS = (1, 16, 64, 170, 512)
# How often a fusion at depth 3 runs what bench_kernels.py times once; gather and combine are timed
# for one stream, all others for all streams.
TIMES = {
    "gather": "streams",
    "multiply_in": 1,
    "bias_stats": 1,
    "multiply_w1": 2,  # and w2, of the same size
    "scale_activate": 3,
    "residual_stats": 1,
    "multiply_branches": 1,
    "multiply_out": 1,
    "head": 1,
    "combine": "streams",
}
PROVIDERS = {
    "reference": "plain PyTorch",
    "compiled": "`torch.compile`, stream by stream",
    "fuse": "**`c2c_ext.fuse`**",
}

Row = dict[str, Any]


@lru_cache
def results(name: str) -> dict[str, Any]:
    """A results file."""
    data = json.loads((RESULTS / name).read_text("utf-8"))
    if not data.get("complete", True):
        raise ValueError(f"{name} is of a run that did not come to its end")
    return data


def find(rows: Iterable[Row], **wanted: object) -> Row | None:
    """The row with these values, if there is one."""
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows for {wanted}")
    return found[0] if found else None


def milliseconds(seconds: float) -> str:
    """Three significant digits from 0.1 ms up, whole from 100 ms up."""
    ms = 1e3 * seconds
    digits = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 0.1 else 4
    return f"{ms:,.{digits}f}".replace(",", " ")


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    body = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in body)


def fusions(names: Sequence[str], shape: str, batch: int) -> str:
    """Whole fusions: every provider's median, and the ratios."""
    every = [row for name in names for row in results(name)["rows"]]
    rows = [r for r in every if r["shape"] == shape and r["batch"] == batch]
    tokens = [n for n in (*TOKENS, 2048) if any(r["tokens"] == n for r in rows)]
    lines = []
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        at = {
            (n, gates, p): find(rows, dtype=dtype, tokens=n, gates=gates, provider=p)
            for n in tokens
            for gates in ("all", "half")
            for p in PROVIDERS
        }
        chosen = [(f"{dtype}: {text}", "all", p) for p, text in PROVIDERS.items()]
        chosen.append((f"{dtype}: {PROVIDERS['fuse']}, half the gates open", "half", "fuse"))
        for label, gates, provider in chosen:
            found = [at[n, gates, provider] for n in tokens]
            if not any(found):
                continue
            cells = [milliseconds(r["seconds"]["median"]) if r else "" for r in found]
            lines.append([label, *cells])
        ratios = []
        for n in tokens:
            row = at[n, "all", "fuse"]
            both = [row["ratios"].get(p) for p in ("reference", "compiled")] if row else []
            known = " / ".join(f"{r:.1f}" for r in both if r is not None)
            ratios.append(f"{known} x" if known else "")
        lines.append([f"{dtype}: plain, compiled : ours", *ratios])
    first, *others = tokens
    return (
        markdown(["ms (median)", f"N = {first}", *map(str, others)], lines) + "\n" + where(*names)
    )


def floors(names: Sequence[str], shape: str) -> str:
    """Whole fusions by the op alone: what the ceilings allow, and what was measured."""
    rows = [
        r
        for name in names
        for r in results(name)["rows"]
        if (r["shape"], r["batch"], r["gates"], r["provider"]) == (shape, 1, "all", "op")
    ]
    lines = [
        [
            row["dtype"],
            str(row["tokens"]),
            f"{row['bytes'] / 1e6:,.0f}".replace(",", " "),
            f"{row['flop'] / 1e9:,.1f}".replace(",", " "),
            f"{row['memory_ceiling'] / 1e9:.0f}",
            f"{row['gemm_ceiling'] / 1e9:.0f}",
            milliseconds(row["bytes"] / row["memory_ceiling"]),
            milliseconds(row["flop"] / row["gemm_ceiling"]),
            milliseconds(row["seconds"]["median"]),
            f"{row['fraction_of_ceiling']:.0%} of {row['bound']}",
        ]
        for row in rows
    ]
    header = "dtype|N|MB|GFLOP|GB/s|GFLOP/s|memory ms|compute ms|measured ms|reached"
    return markdown(header.split("|"), lines) + "\n" + where(*names)


def stages(name: str, shape: str, dtype: str, tokens: Sequence[int]) -> str:
    """Where the time goes: every stage as often as a fusion runs it."""
    data = results(name)
    lines, totals = [], dict.fromkeys(tokens, 0.0)
    streams = 2 * {"tiny": 3, "real": 28, "large": 36}[shape]
    taken: dict[tuple[str, int], tuple[float, Row]] = {}
    for kernel, times in TIMES.items():
        for n in tokens:
            row = find(
                data["rows"], kernel=kernel, shape=shape, dtype=dtype, tokens=n, provider="ours"
            )
            if row is None:
                raise ValueError(f"{name} has no {kernel} of {shape} {dtype} at {n} tokens")
            seconds = row["seconds"]["median"] * (streams if times == "streams" else times)
            taken[kernel, n] = seconds, row
            totals[n] += seconds
    for kernel, times in TIMES.items():
        cells = []
        for n in tokens:
            seconds, row = taken[kernel, n]
            cells.append(
                f"{milliseconds(seconds)} ({seconds / totals[n]:.0%}), "
                f"{row['fraction_of_ceiling']:.0%} of {row['bound']}"
            )
        lines.append([f"`{kernel}`", str(streams if times == "streams" else times), *cells])
    lines.append(["sum", "", *(milliseconds(totals[n]) for n in tokens)])
    header = ["stage", "times", *(f"N = {n}: ms (share), of the ceiling" for n in tokens)]
    return markdown(header, lines) + "\n" + where(name)


def answers(names: Sequence[str]) -> str:
    """Whole answers: alone, by text, by cache; milliseconds by part and the most memory."""
    parts = ("sharer prefill", "sharer writing", "transfer", "fusing", "receiver prefill")
    lines = []
    for row in (row for name in names for row in results(name)["rows"]):
        medians = {name: part["median"] for name, part in row["parts"].items()}
        lines.append(
            [
                f"{row['shape']}, {row['tokens']}",
                row["provider"],
                *(milliseconds(medians[p]) if p in medians else "" for p in parts),
                milliseconds(row["first_token"]["median"]),
                milliseconds(row["per_token"]["median"]),
                milliseconds(row["seconds"]["median"]),
                f"{row['memory_bytes']['peak'] / 1e6:,.0f}".replace(",", " "),
            ]
        )
    header = ["pair, prompt", "mode", *parts, "first token", "per token", "total", "peak MB"]
    return markdown(header, lines) + "\n" + where(*names)


def gpu_goals(names: Sequence[str], shape: str, dtype: str) -> str:
    """Whole fusions on a GPU, the fastest path at each number of tokens, against what was aimed at.

    Bandwidth and GEMM rate are those of the graph, where the host does not count.
    """
    rows = [
        row
        for name in names
        for row in results(name)["rows"]
        if (row["shape"], row["dtype"], row["batch"]) == (shape, dtype, 1)
    ]
    lines = []
    for tokens in sorted({r["tokens"] for r in rows}):
        here = [r for r in rows if r["tokens"] == tokens]
        # torch.compile is measured in runs of its own, which take long.
        alone = [r for r in here if "compiled" not in (r["provider"], *r["ratios"])]
        whole = [r for r in alone if r["gates"] == "all"]
        ours = min((r for r in whole if "cuda_path" in r), key=_median, default=None)
        if ours is None:
            continue
        path = ours["cuda_path"]
        graph = find(whole, provider=f"op {path} graph")
        half = find((r for r in alone if r["gates"] == "half"), provider=f"op {path}")
        beside = [r for r in here if "compiled" in r["ratios"] and r["gates"] == "all"]
        beside = find(beside, provider=f"op {path}")
        limit = 2 * ours["fused_bytes"] + (64 << 20)
        lines.append(
            [
                str(tokens),
                path,
                milliseconds(_median(ours)),
                milliseconds(_median(graph)) if graph else "",
                f"{graph['fraction_of_ceiling']:.0%} of {graph['bound']}" if graph else "",
                f"{ours['ratios']['reference']:.1f} x",
                f"{beside['ratios']['compiled']:.1f} x" if beside else "",
                f"{_median(ours) / _median(half):.2f} x" if half else "",
                f"{ours['extra_bytes'] / 1e6:,.0f} ({limit / 1e6:,.0f})".replace(",", " "),
            ]
        )
    header = (
        "N|path|called, ms|graph, ms|graph reaches|eager|`torch.compile`|half open|extra MB (goal)"
    )
    goals = (
        "Goals: up to N = 64 75% of memory and 20 times eager; N = 170 0.5 ms; N = 2048 55% of the "
        "GEMM rate, 4 times eager and 2 times `torch.compile`; half the gates open 1.8 times.\n\n"
    )
    return markdown(header.split("|"), lines) + "\n" + goals + where(*names)


def _median(row: Row) -> float:
    return row["seconds"]["median"]


def load_memory(name: str) -> str:
    """Loading a fuser, two ways."""
    data = results(name)
    labels = {"parameters": "with its parameters", "inference_dtype": "`inference_dtype`"}
    lines = []
    for way, row in data["bytes"].items():
        extra = [(row[k] - row["before"]) / 1e9 for k in ("peak", "after")]
        lines.append([labels[way], *(f"{v:.2f}" for v in extra), f"{row['seconds']:.1f}"])
    note = (
        f"{data['parameter_bytes'] / 1e9:.2f} GB of {data['file_dtype']} parameters, packed for "
        f"{data['dtype']} caches ({data['bytes']['parameters']['packed'] / 1e9:.2f} GB). "
        "The peak counts pages of the mapped file. "
    )
    header = ["loading (real shape)", "at most, GB", "kept, GB", "seconds"]
    return markdown(header, lines) + "\n" + note + where(name)


TRAINED = {
    "reference": "plain PyTorch",
    "compiled": "`torch.compile`",
    "op": "**training op**",
    "op_recompute": "**training op**, `recompute`",
}


def training(name: str) -> str:
    """A training step's fuser part: time, what is kept for the backward, and the peak."""
    rows = results(name)["rows"]
    lines = []
    for dtype, tokens in dict.fromkeys((row["dtype"], row["tokens"]) for row in rows):
        for provider, label in TRAINED.items():
            row = find(rows, dtype=dtype, tokens=tokens, provider=provider)
            plain = find(rows, dtype=dtype, tokens=tokens, provider="reference")
            if row is None or plain is None:
                continue
            memory = row["memory"]
            lines.append(
                [
                    f"{dtype}, {tokens} tokens: {label}",
                    milliseconds(_median(row)),
                    f"{_median(plain) / _median(row):.2f} x",
                    f"{memory['saved_bytes'] / 1e6:.1f}",
                    f"{memory['saved_bytes'] / plain['memory']['saved_bytes']:.2f}",
                    f"{memory['peak_bytes'] / 1e6:.0f}",
                ]
            )
    header = ["four layers of the real shape", "ms (median)", "faster", "kept, MB", "of plain"]
    return markdown([*header, "peak, MB"], lines) + "\n" + where(name)


ASKED = {
    "receiver": "receiver alone",
    "sharer": "sharer alone, shown everything",
    "routing": "routing by confidence",
    "T2T": "text-to-text: sharer writes the form, receiver reads it",
    "T2T at once": "the same, all values read off one prefill",
    "C2C": "**C2C**",
    "mismatched": "control: cache of another question",
    "zero": "control: cache of zeros",
    "swapped": "control: cache of another entity; answers *that* entity's fact",
}


def held_out(shipped: str, second: str) -> str:
    """The demo's right answers, `is / rivals` a cell: the shipped pair, and a second seed's."""
    sizes = sorted({row["size"] for row in results(shipped)["held_out"]})
    columns = [(shipped, size) for size in sizes] + [(second, sizes[-1])]
    lines = []
    for mode, label in ASKED.items():
        line = [label]
        for name, size in columns:
            right = {r["kind"]: r for r in results(name)["held_out"] if r["size"] == size}
            cell = f"{right['is'][mode]} / {right['rivals'][mode]}"
            line.append(f"**{cell}**" if mode == "C2C" and name == shipped else cell)
        lines.append(line)
    count = results(shipped)["held_out"][0]["questions"]
    header = [f"right of {count} (is / rivals)", *(f"K = {size}" for size in sizes)]
    header.append(f"second seed, K = {sizes[-1]}")
    return markdown(header, lines) + "\n" + where(shipped, second)


def latency(name: str) -> str:
    """The demo's median milliseconds from form to answer."""
    at = {(row["mode"], row["size"]): row["median"] for row in results(name)["latency_ms"]}
    modes, sizes = (list(dict.fromkeys(column)) for column in zip(*at, strict=True))
    lines = [[mode, *(f"{at[mode, size]:.1f}" for size in sizes)] for mode in modes]
    ratios = [at["T2T", size] / at["C2C", size] for size in sizes]
    lines.append(["T2T : C2C", *(f"{ratio:.1f} x" for ratio in ratios)])
    header = ["ms, batch 1 (median)", *(f"K = {size}" for size in sizes)]
    return markdown(header, lines) + "\n" + where(name)


def where(*names: str) -> str:
    """When and on what files were measured."""
    sentences = []
    for name in names:
        env = results(name)["environment"]
        gpus = {row["device"] for row in results(name).get("rows", []) if "device" in row}
        variables = " ".join(f"`{k}={v}`" for k, v in env.get("variables", {}).items())
        sentences.append(
            f"Measured on {env['date'][:10]} at {(env['commit'] or 'no commit')[:7]}"
            + (" and changes" if env.get("dirty") else "")
            + "".join(f", {gpu}" for gpu in sorted(gpus))
            + f", {env['cpu']}, torch {env['torch']}"
            + (f", with {variables}" if variables else "")
            + f": [{name}]({{results}}/{name})."
        )
    return "\n".join(sentences) + "\n"


FUSE = ("fuse_float32.json", "fuse_bfloat16.json")
ON_A_GPU = ("fuse_cuda_bf16.json", "compiled_cuda.json")  # of benchmarks/gpu_check.sh
TABLES: dict[str, Callable[[], str]] = {
    "held out": partial(held_out, "demo.json", "demo_seed1.json"),
    "demo latency": partial(latency, "demo.json"),
    "fusions real": partial(fusions, FUSE, "real", 1),
    "fusions real batch 8": partial(fusions, FUSE, "real", 8),
    "fusions real batch 32": partial(fusions, FUSE, "real", 32),
    "fusions large": partial(fusions, FUSE, "large", 1),
    "fusions tiny": partial(fusions, FUSE, "tiny", 1),
    "fusions real avx2": partial(fusions, ("fuse_avx2.json",), "real", 1),
    "floors real": partial(floors, FUSE, "real"),
    "answers": partial(answers, ("generate.json", "generate_real.json")),
    "load memory": partial(load_memory, "load_memory.json"),
    "training": partial(training, "train.json"),
    "stages real float32": partial(stages, "kernels.json", "real", "float32", (1, 16, 170)),
    "stages real bfloat16": partial(stages, "kernels.json", "real", "bfloat16", (1, 16, 170)),
}
if all((RESULTS / name).exists() for name in ON_A_GPU):  # once a GPU has measured them
    TABLES["goals on a GPU"] = partial(gpu_goals, ON_A_GPU, "real", "bfloat16")


def filled(document: str, text: str) -> str:
    """A document's text with its tables written anew."""
    path = "../" * document.count("/") + "benchmarks/results"

    def table(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise ValueError(f"{document}: no table {name!r}; known: {', '.join(TABLES)}")
        return match[1] + TABLES[name]().replace("{results}", path) + match[3]

    return MARKED.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one differs")
    options = parser.parse_args(argv)
    status = 0
    for document in DOCUMENTS:
        path = ROOT / document
        if not path.exists():
            continue
        old = path.read_text("utf-8")
        new = filled(document, old)
        if new != old:
            status = 1
            print(f"{document}: {'differs' if options.check else 'written'}")
            if not options.check:
                write_text(path, new)
    return status if options.check else 0


if __name__ == "__main__":
    sys.exit(main())

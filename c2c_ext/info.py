"""`c2c info`: what was built, whether receiver, sharer and fuser fit, and what fusing costs."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__, build_info, cuda_paths
from . import report as reports
from .estimate import Workload
from .facts import read_fuser, read_model
from .files import checked_target, write_atomically
from .ops import kernels_missing
from .probe import SECONDS, probe

MAX_BATCH = 1 << 16
MAX_TOKENS = 1 << 24
MAX_ROWS = 1 << 31


def describe() -> dict[str, str]:
    """Label -> value: version, build, packages, devices and which path runs on each."""
    build = build_info()
    lines = {
        "c2c_ext": f"{__version__} (built with torch {build['built_with_torch']}, "
        f"{build['compiler']}, stable ABI target {build['abi_target']})",
        "flags": build["flags"],
        "CUDA architectures": ", ".join(build["cuda_architectures"]) or "none (CPU build)",
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            lines[package] = version(package)
        except PackageNotFoundError:
            lines[package] = "not installed"
    lines["cpu"] = (
        f"{_cpu_name()}: compiled op, {build['cpu_instruction_set']} kernels, "
        f"{torch.get_num_threads()} threads"
    )
    missing, table = kernels_missing(torch.device("cuda")), build["cuda_dispatch"]
    if torch.cuda.is_available():
        path = "compiled op, CUDA kernels" + ("" if table else " (never measured on a GPU)")
        if missing is not None:
            path = f"plain PyTorch reference ({missing})"
        for i in range(torch.cuda.device_count()):
            lines[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}: {path}"
    else:
        lines["cuda"] = "no device"
        if missing is not None and build["cuda_architectures"]:
            lines["cuda"] += f"; no kernels: {missing}"
    if build["cuda_architectures"] and missing is None:
        lines["CUDA paths"] = cuda_paths.describe(table, os.environ.get(cuda_paths.VARIABLE))
    return lines


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def run_info(
    receiver: str | None,
    sharer: str | None,
    fuser: str | None,
    *,
    batch: int = 1,
    tokens: int = 512,
    dtype: str = "bf16",
    measure: bool = False,
    json_path: str | None = None,
) -> int:
    """Prints `describe`, whether the given parts fit, and what fusing with them costs.

    Args:
        receiver, sharer: model directories or config.json files.
        fuser: a fuser directory or configuration file; by default `FuserConfig.for_models`.
        batch, tokens: the prompts that estimates are made for.
        dtype: of models and caches, a key of `report.DTYPES`.
        measure: probe the machine for about ten seconds and estimate times.
        json_path: also write the exact numbers to this file.

    Returns:
        the exit status: 1 if the parts do not fit.

    Raises:
        ValueError, OSError: an option or a file breaks a rule; names it.
    """
    for option, value, limit in (("--batch", batch, MAX_BATCH), ("--tokens", tokens, MAX_TOKENS)):
        if not 1 <= value <= limit:
            raise ValueError(f"{option} must be in 1..{limit}, got {value}")
    if batch * tokens > MAX_ROWS:
        raise ValueError(f"--batch times --tokens must be at most {MAX_ROWS}, got {batch * tokens}")
    target = None if json_path is None else checked_target("--json", json_path)
    work = Workload(batch, tokens, reports.DTYPES[dtype])
    environment = describe()
    for label, value in environment.items():
        _print_row(label, value)

    places = {"receiver": receiver, "sharer": sharer}
    models = {side: read_model(place) for side, place in places.items() if place is not None}
    given = None if fuser is None else read_fuser(fuser)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda:0"))
    report = {"environment": environment, **reports.build(models, given, work, devices)}
    _print_parts(report)
    _print_verdict(report)
    _print_memory(report)

    report["ceilings"], report["seconds"] = [], {}
    if measure:
        facts = None if report["problems"] else given or reports.default_fuser(models)
        for device in devices:
            ceilings = probe(
                device,
                reports.gemm_dtypes(facts, work, device),
                seconds=SECONDS / len(devices),
                progress=lambda what: print(f"probe: {what} ...", file=sys.stderr, flush=True),
            )
            gemm = {str(d).removeprefix("torch."): rate for d, rate in ceilings.gemm.items()}
            row = {"device": ceilings.device, "memory_bytes_per_s": ceilings.memory}
            report["ceilings"].append(row | {"gemm_flop_per_s": gemm})
            seconds = {}
            if not report["problems"]:
                seconds = reports.times(models, facts, work, device, ceilings)
            report["seconds"][str(device)] = seconds
            _print_times(report["ceilings"][-1], seconds)
    elif report["fits"]:
        _print_row("time", "--probe measures this machine for ten seconds and estimates it")
    if target is not None:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_atomically({target: lambda path: Path(path).write_text(text, "utf-8")})
    return 1 if report["problems"] else 0


def _print_row(label: str, value: str) -> None:
    print(f"{label:20} {value}")


def _print_parts(report: Mapping[str, Any]) -> None:
    for side in reports.SIDES:
        model = report[side]
        if model is None:
            continue
        count = "unknown number of parameters"
        if model["parameters"] is not None:
            count = f"{model['parameters']:,} parameters"
        elif model["summary"] is not None:
            count += f" ({model['parameters_unknown_because']})"
        _print_row(side, f"{model['summary'] or model['model_type']}, {count}")
    fuser = report["fuser"]
    if fuser is None:
        return
    origin = ""
    if fuser["is_default"]:
        origin = "none given; the default would be "
    elif not fuser["has_weights"]:
        origin = "configuration without weights: "
    _print_row("fuser", f"{origin}{fuser['summary']}, {fuser['parameters']:,} parameters")
    each = " or ".join(f"{n:,}" for n in fuser["parameters_per_stream"])
    opened = "" if fuser["open_streams"] is None else f", {fuser['open_streams']} open"
    _print_row("streams", f"{fuser['streams']} of {each} parameters each{opened}")
    for device, reason in fuser["uncompiled_because"].items():
        path = f"reference.py (plain PyTorch) because {reason}" if reason else "compiled op"
        _print_row(f"fuser on {device}", path)


def _print_verdict(report: Mapping[str, Any]) -> None:
    for problem in report["problems"]:
        _print_row("does not fit", problem)
    if report["fits"]:
        given = [side for side in reports.SIDES if report[side] is not None]
        _print_row("fits", ", ".join(given))
    for note in report["notes"]:
        _print_row("note", note)


def _print_memory(report: Mapping[str, Any]) -> None:
    work = report["workload"]
    at = f"batch {work['batch']}, {work['tokens']:,} tokens, models and caches in {work['dtype']}"
    memory = report["memory_bytes"]
    tables = {f"memory on {d}": table for d, table in memory.get("inference", {}).items()}
    tables |= {"training memory": memory["training"]} if "training" in memory else {}
    tables |= {"memory": memory["model"]} if "model" in memory else {}
    for title, table in tables.items():
        known = sum(number for number in table.values() if number is not None)
        least = "at least " if None in table.values() else ""
        _print_row(title, f"{least}{format_bytes(known)} in all at {at}")
        for name, number in table.items():
            _print_row(f"  {name}", "unknown" if number is None else format_bytes(number))
    if tables:
        _print_row("not counted", "what the models' own forward (and backward) passes hold")


def _print_times(ceilings: Mapping[str, Any], seconds: Mapping[str, Any]) -> None:
    device = ceilings["device"]
    rates = [f"memory {_digits(ceilings['memory_bytes_per_s'] / 1e9)} GB/s"]
    for dtype, rate in ceilings["gemm_flop_per_s"].items():
        rates.append(f"{dtype} GEMM {_digits(rate / 1e9)} GFLOP/s")
    _print_row(f"ceilings of {device}", f"{', '.join(rates)} (measured now)")
    if not seconds:
        return
    _print_row(f"time on {device}", "at least, at these ceilings; no overhead is counted")
    for step, row in seconds.items():
        if row is None:
            text = "unknown: parameters unknown, or a mixture of experts"
        else:
            text = format_seconds(row["seconds"])
            text += f" ({row['bound']}-bound)" if "bound" in row else ""
        _print_row(f"  {step}", text)


def format_bytes(number: int) -> str:
    """``1.23 GiB`` and the like, three digits."""
    size, units = float(number), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{_digits(size)} {units[0]}"


def format_seconds(number: float) -> str:
    """``1.23 ms`` and the like, three digits."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if number * factor >= 1 or unit == "us":
            return f"{_digits(number * factor)} {unit}"
    raise AssertionError


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"

"""`c2c info`: what was built, what runs, and whether a receiver, a sharer and a fuser fit."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import __version__, build_info
from .config import FuserConfig, ModelKV
from .published import PROJECTOR_CONFIG_NAME, load_published
from .serialization import CONFIG_NAME, existing_directory, load_fuser


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
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            lines[f"cuda:{i}"] = (
                f"{torch.cuda.get_device_name(i)}: plain PyTorch reference "
                "(this build has no CUDA kernels)"
            )
    else:
        lines["cuda"] = "no device"
    return lines


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def read_fuser_config(directory: str | Path) -> FuserConfig:
    """The configuration of a fuser directory, ours or a published one; every tensor is checked."""
    path = existing_directory(directory)
    if (path / PROJECTOR_CONFIG_NAME).exists() and not (path / CONFIG_NAME).exists():
        return load_published(path).config
    return load_fuser(path).config


def read_model(directory: str | Path) -> ModelKV:
    """The KV layout of a model directory, from its config.json alone."""
    return ModelKV.from_config(read_model_config(directory))


def read_model_config(directory: str | Path) -> Any:
    """The transformers configuration of a model directory."""
    from transformers import AutoConfig

    path = Path(directory)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no model at {path}: config.json is missing")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers' own checks raise errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path / 'config.json'} is not a model configuration: {reason}"
        ) from error


def run_info(receiver: str | None, sharer: str | None, fuser: str | None) -> int:
    """Prints `describe`, then whether the given parts fit; 1 if they do not."""
    for label, value in describe().items():
        print(f"{label:20} {value}")
    models: dict[str, ModelKV] = {}
    for side, directory in (("receiver", receiver), ("sharer", sharer)):
        if directory is not None:
            models[side] = read_model(directory)
            print(f"{side:20} {models[side].summary()}")
    if fuser is None:
        return 0
    config = read_fuser_config(fuser)
    print(
        f"{'fuser':20} {config.sharer.summary()} -> {config.receiver.summary()}; hidden size "
        f"{config.hidden_size}, depth {config.depth}, {config.activation}, "
        f"{config.num_parameters():,} parameters"
    )
    if not models:
        return 0
    problems = config.mismatches(**models)
    for problem in problems:
        print(f"{'does not fit':20} {problem}")
    if not problems:
        print(f"{'fits':20} {', '.join(models)}")
    return 1 if problems else 0

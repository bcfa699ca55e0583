"""The numbers behind `c2c info` as one JSON-ready object: what fits, memory, and times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import estimate
from .config import FuserConfig
from .estimate import Ceilings, Work, Workload
from .facts import FuserFacts, ModelFacts, compare_vocabularies

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SIDES = ("receiver", "sharer")
Models = Mapping[str, ModelFacts]  # by side


def default_fuser(models: Models) -> FuserFacts | None:
    """What `FuserConfig.for_models` gives for a pair; None without a pair that it can be made for.

    Its parameters' dtype is PyTorch's default.
    """
    if any(side not in models or models[side].kv is None for side in SIDES):
        return None
    return FuserFacts(FuserConfig.for_models(*(models[side].config for side in SIDES)))


def build(
    models: Models, fuser: FuserFacts | None, work: Workload, devices: list[torch.device]
) -> dict[str, Any]:
    """Everything that needs no measuring.

    Args:
        models: the models that were given.
        fuser: the fuser that was given, if any.
        work: what memory is computed for.
        devices: where a fusion might run.
    """
    problems = [
        f"{side}: {reason.removeprefix('c2c_ext: ')}"
        for side, model in models.items()
        for reason in model.unsupported
    ]
    if fuser is not None:
        problems += fuser.config.mismatches(**{s: m.kv for s, m in models.items()})
    compared = bool(models) and (fuser is not None or len(models) == len(SIDES))
    facts = fuser or default_fuser(models)
    report: dict[str, Any] = dict.fromkeys(SIDES)
    report |= {side: _model(model) for side, model in models.items()}
    report["fuser"] = None if facts is None else _fuser(facts, fuser is None, devices)
    report["problems"], report["notes"] = problems, _notes(models, fuser, work)
    report["fits"] = not problems if compared else None
    report["workload"] = {
        "batch": work.batch,
        "tokens": work.tokens,
        "dtype": str(work.dtype).removeprefix("torch."),
    }
    report["memory_bytes"] = {} if problems else _memory(models, facts, work, devices)
    return report


def times(
    models: Models,
    fuser: FuserFacts | None,
    work: Workload,
    device: torch.device,
    ceilings: Ceilings,
) -> dict[str, dict[str, Any] | None]:
    """Step -> seconds, at least, and what bounds it; None: unknown.

    The first token needs all four: the sharer reads, the receiver reads, the caches are fused, and
    the receiver decodes from them.
    """
    steps: dict[str, Work | None] = {}
    for side in reversed(SIDES):
        if side in models:
            steps[f"{side} prefill"] = _model_work(models[side], estimate.prefill_work, work)
    if fuser is not None:
        streams = fuser.open_streams
        steps["fuse"] = estimate.fuse_work(fuser.config, work, device, streams)
    if "receiver" in models:
        steps["decode step"] = _model_work(models["receiver"], estimate.decode_work, work)
    rows: dict[str, dict[str, Any] | None] = {
        step: None
        if w is None
        else {"seconds": w.seconds(ceilings), "bound": w.bound(ceilings), "bytes": w.bytes}
        | {"flop": w.flop}
        for step, w in steps.items()
    }
    if len(rows) == 4:
        known = [row["seconds"] for row in rows.values() if row is not None]
        rows["first token"] = {"seconds": sum(known)} if len(known) == 4 else None
    return rows


def gemm_dtypes(
    fuser: FuserFacts | None, work: Workload, device: torch.device
) -> list[torch.dtype]:
    """The dtypes whose GEMM rate `times` needs."""
    if fuser is None:
        return [work.dtype]
    fused = estimate.fuse_work(fuser.config, work, device, fuser.open_streams)
    return list(dict.fromkeys([fused.dtype, work.dtype]))


def _model(model: ModelFacts) -> dict[str, Any]:
    return {
        "summary": None if model.kv is None else model.kv.summary(),
        "model_type": str(getattr(model.config, "model_type", "")),
        "kv": None if model.kv is None else model.kv.to_dict(),
        "parameters": None if model.sizes is None else model.sizes.total,
        "parameters_unknown_because": model.sizes_unknown or None,
        "vocabulary": model.vocabulary,
    }


def _fuser(fuser: FuserFacts, is_default: bool, devices: list[torch.device]) -> dict[str, Any]:
    config = fuser.config
    reasons = {str(d): estimate.uncompiled_reason(config, d) for d in devices}
    return {
        "summary": _summary(config),
        "settings": config.settings(),
        "is_default": is_default,
        "has_weights": fuser.dtype is not None,
        "parameters": config.num_parameters(),
        "parameters_per_stream": sorted(set(estimate.stream_parameters(config))),
        "streams": estimate.num_streams(config),
        "open_streams": None if fuser.open_streams is None else len(fuser.open_streams),
        "uncompiled_because": reasons,
    }


def _summary(config: FuserConfig) -> str:
    parts = [f"{config.projection} projection"]
    if config.projection != "linear":
        parts = [f"hidden size {config.hidden_size}", f"depth {config.depth}", config.activation]
    variant = config.variant()
    variant.pop("activation", None)
    parts += [f"{name}={value!r}" for name, value in variant.items()]
    return f"{config.sharer.summary()} -> {config.receiver.summary()}; {', '.join(parts)}"


def _notes(models: Models, fuser: FuserFacts | None, work: Workload) -> list[str]:
    notes = []
    if fuser is not None:
        for side, model in models.items():
            recorded = getattr(fuser.config, side).model_type
            if model.kv is not None and recorded not in ("", model.kv.model_type):
                notes.append(
                    f"the fuser was made for a {side} of type {recorded}, this one is "
                    f"{model.kv.model_type}"
                )
    for side, model in models.items():
        if model.quantized:
            notes.append(f"the {side} is quantized; its memory and times are those without that")
        if model.max_positions is not None and work.tokens > model.max_positions:
            notes.append(
                f"{work.tokens:,} tokens are more than the {side} was made for "
                f"({model.max_positions:,})"
            )
    if len(models) == len(SIDES):
        notes += compare_vocabularies(*(models[side] for side in SIDES))
    return notes


def _memory(
    models: Models, fuser: FuserFacts | None, work: Workload, devices: list[torch.device]
) -> dict[str, Any]:
    if fuser is None:
        return (
            {
                "model": {
                    f"{side} {what}": number
                    for side, model in models.items()
                    for what, number in (
                        ("weights", model.sizes and model.sizes.total * work.dtype.itemsize),
                        ("cache", model.kv and estimate.cache_bytes(model.kv, work)),
                    )
                }
            }
            if models
            else {}
        )
    sizes = {side: models[side].sizes if side in models else None for side in SIDES}
    inference = {
        str(device): estimate.inference_memory(
            fuser.config,
            work,
            device,
            **sizes,
            parameter_dtype=fuser.dtype or torch.get_default_dtype(),
            open_streams=fuser.open_streams,
        )
        for device in devices
    }
    training = estimate.training_memory(fuser.config, work, **sizes)
    return {"inference": inference, "training": training}


def _model_work(model: ModelFacts, work_of: Any, work: Workload) -> Work | None:
    """None where not every parameter takes part, or their number is unknown."""
    if model.sizes is None or model.kv is None or model.experts:
        return None
    return work_of(model.sizes, model.kv, model.query_heads, work)

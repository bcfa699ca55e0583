"""Loading a fuser as its packed form alone: stream by stream, never all parameters at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .fuser import Fuser, stream_weights
from .packed import check_packable, pack_streams
from .reference import StreamWeights
from .serialization import WEIGHTS_NAME, check_finite, load_config, load_fuser, open_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def loader(dtype: torch.dtype | None, device: torch.device | str) -> Callable[[Path], Fuser]:
    """What reads a fuser directory for `Fuser.from_pretrained` with these two options.

    Raises:
        ValueError, TypeError: an option breaks a rule.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"c2c_ext: inference_device must be a device, got {device!r:.80}"
        ) from error
    if dtype is None:
        if place != torch.device("cpu"):
            raise ValueError("c2c_ext: inference_device goes with inference_dtype")
        return load_fuser
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"c2c_ext: inference_dtype must be one of {names}, got {dtype!r:.80}")
    if place.type == "meta":
        raise ValueError("c2c_ext: inference_device must hold numbers, got meta")
    try:
        # Where tensors say they are: "cuda" is the current one.
        place = torch.empty(0, device=place).device
    except Exception as error:  # whatever a backend that is not there raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"c2c_ext: inference_device {place} cannot be used here: {reason}"
        ) from error
    return lambda directory: _load(directory, dtype, place)


def _load(directory: Path, dtype: torch.dtype, device: torch.device) -> Fuser:
    config = load_config(directory)
    check_packable(config)
    weights = directory / WEIGHTS_NAME
    with (
        open_weights(weights, config) as read,
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),  # whatever the caller's default is
    ):
        with torch.device("meta"):
            fuser = Fuser(config).requires_grad_(False)

        def stream(group: int, index: int) -> dict[str, Tensor]:
            # Cloned before they are checked: the file may change.
            tensors = {name: t.clone() for name, t in read(group, index)}
            named = ((f"groups.{group}.{name} (stream {index})", t) for name, t in tensors.items())
            check_finite(named, str(weights))
            return tensors

        def folded(group: int, index: int) -> StreamWeights:
            tensors = stream(group, index)
            return stream_weights(lambda name: tensors[name].double() if name in tensors else None)

        for number, group in enumerate(fuser.groups):
            gates: list[Tensor | None] = []
            for index in range(len(group.layers) * len(group.kinds)):
                gates.append(stream(number, index).get("gate_logit"))
            if hasattr(group, "gate_logit"):
                group.gate_logit = torch.nn.Parameter(torch.stack(gates), requires_grad=False)
        packed = pack_streams(fuser, folded, dtype, device)
    key = (dtype, device)
    fuser._packs[key] = (config, None, packed)
    fuser._only = key
    return fuser.eval()

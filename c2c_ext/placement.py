"""Models whose layers lie on several devices, or are fetched from the CPU's memory or a disk.

`device_map` of transformers leaves each layer's keys and values on the layer's own device; fusing
needs one device. Written for several GPUs and not run on them: tested are layers fetched from
elsewhere to one device, and the copying by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .cache import KVPairs


def input_device(model: nn.Module) -> torch.device:
    """Where a model's token ids belong.

    That of its first parameters at work: what is fetched when it runs lies on ``meta`` between.
    """
    first = next(model.parameters(), None)
    if first is not None and first.device.type != "meta":
        return first.device  # without a walk through all modules
    for module in model.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None and next(module.parameters(recurse=False), None) is not None:
            return _device(place)
    return next(
        (p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu")
    )


@contextmanager
def on_one_device(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[KVPairs]:
    """``pairs``, those of other devices copied to the first one's and, in the end, back.

    What is written to the copies goes back unless an exception ends the block. Without other
    devices they are the pairs themselves.
    """
    device = pairs[0][0].device
    near = [(key.to(device), value.to(device)) for key, value in pairs]
    yield near
    for held, copies in zip(pairs, near, strict=True):
        for there, here in zip(held, copies, strict=True):
            if here is not there:
                there.copy_(here)


def _device(place: int | str | torch.device) -> torch.device:
    # accelerate names GPUs by their number.
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)

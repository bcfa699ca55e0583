"""What autograd keeps of a fusion by the reference, asked of the reference itself.

It runs on the meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .config import FuserConfig
from .fuser import FuserGroup

if TYPE_CHECKING:
    from .estimate import Workload

TEMPERATURE = 0.5  # of the soft gates; what is saved does not depend on it


def saved_per_stream(config: FuserConfig, work: Workload, *, training: bool) -> list[int]:
    """Bytes that autograd keeps of one stream of every shape group.

    The reference itself, run for one stream on the meta device, says what it keeps.
    """
    result = []
    for layers in config.shape_groups():
        with torch.device("meta"):
            group = FuserGroup(config, layers)
        caches = [
            torch.empty(
                work.batch, s.num_heads, work.tokens, s.head_dim, dtype=work.dtype, device="meta"
            )
            for s in (group.sharer_shape, group.receiver_shape)
        ]
        saved = SavedTensors([*group.parameters(), *caches])
        with saved:
            gate = torch.ones((), dtype=work.dtype, device="meta")
            if training and config.gate:
                noise = torch.empty_like(caches[1][..., :1])
                gate = reference.soft_gate(group.gate_logit[0], noise, TEMPERATURE)
            reference.fuse_stream(
                group.stream(0, dtype=work.dtype),
                *caches,
                gate,
                config,
                dropout=config.dropout if training else 0.0,
            )
        result.append(saved.nbytes)
    return result


class SavedTensors:
    """Counts the bytes of every storage that autograd saves inside ``with``, each once.

    Args:
        known: tensors whose storages are not counted.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        # By storage; kept alive, so that no id is given out twice.
        self._known = {t.untyped_storage()._cdata: t for t in known}
        self._saved: dict[int, Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    @property
    def nbytes(self) -> int:
        """Bytes counted so far."""
        return sum(t.untyped_storage().nbytes() for t in self._saved.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._known:
            self._saved[storage] = tensor
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

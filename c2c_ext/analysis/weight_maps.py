"""Gates and mean dynamic weights per layer and head, over all fused tokens of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import KINDS
from ..fuser import Fuser
from ..weights import fusion_weights
from .readings import Reading


def weight_rows(readings: Sequence[Reading], fuser: Fuser) -> list[dict[str, Any]]:
    """`c2c_ext.weights.fusion_weights` summed up per stream and receiver head.

    Returns:
        rows with ``layer``, ``kind`` (``"key"``, ``"value"``), ``head``, ``open``, and ``mean`` and
        ``std`` of the weights over the fused ``tokens`` (a weight is in (0, 1); through a closed
        gate nothing is added, whatever the weights). Streams that the fuser has not are left out.

    Raises:
        ValueError: no reading, or none of their tokens is fused.
    """
    per_reading = [
        (fusion_weights(r.receiver, r.sharer, fuser, r.token_map), r.token_map >= 0)
        for r in readings
    ]
    if not any(bool(is_fused.any()) for _, is_fused in per_reading):
        raise ValueError("c2c_ext.analysis: no token of these prompts is fused")
    rows = []
    for layer in range(len(fuser.config.layer_map)):
        for kind in KINDS:
            parts = [(getattr(w[layer], kind), is_fused) for w, is_fused in per_reading]
            if parts[0][0] is None:
                continue
            # [heads, tokens of all prompts]
            weights = torch.cat(
                [w[:, :, is_fused].transpose(0, 1).flatten(1) for w, is_fused in parts], dim=1
            ).double()
            rows += [
                {
                    "layer": layer,
                    "kind": kind,
                    "head": head,
                    "open": bool(getattr(per_reading[0][0][layer], f"{kind}_open")),
                    "mean": float(of_head.mean()),
                    "std": float(of_head.std(correction=0)),
                    "tokens": len(of_head),
                }
                for head, of_head in enumerate(weights)
            ]
    return rows

"""Which cells are measured by default, and the models whose shapes they are. Nothing is downloaded.

The fusers' own shapes (tiny, short, real, large) are `c2c_ext.fusion_bench.SHAPES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, Qwen2Config, Qwen3Config

import c2c_ext
from c2c_ext.report import DTYPES

TOKENS = (1, 16, 64, 170, 512)
MANY_TOKENS = 2048  # once, in float32, all gates open
BATCHES = (1, 8, 32)
TOKENS_OF_A_BATCH = 64  # larger batches have at most so many tokens
ASSETS = Path(c2c_ext.__file__).parent / "demo" / "assets" / "seed0"

_QWEN = {"vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960}
QWEN3_06B = {
    **_QWEN,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN25_05B = {
    **_QWEN,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Cell:
    """One fusion to measure."""

    shape: str
    dtype: str  # a key of c2c_ext.report.DTYPES
    gates: str
    batch: int
    tokens: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def fusion_cells(
    shapes: Sequence[str],
    dtypes: Sequence[str],
    gates: Sequence[str],
    batches: Sequence[int] | None,
    tokens: Sequence[int] | None,
) -> list[Cell]:
    """Ordered so that every fuser is made once per shape and dtype.

    Where neither batches nor tokens are given, the grid is: `TOKENS` at batch 1, those up to
    `TOKENS_OF_A_BATCH` at the other `BATCHES`, and once `MANY_TOKENS`. Else it is their product,
    batch 1 and `TOKENS` standing for what is not given.
    """
    pairs = [(b, n) for b in batches or (1,) for n in tokens or TOKENS]
    if batches is None and tokens is None:
        pairs = [(b, n) for b in BATCHES for n in TOKENS if b == 1 or n <= TOKENS_OF_A_BATCH]
    cells = []
    for shape in shapes:
        for dtype in dtypes:
            for gate in gates:
                cells += [Cell(shape, dtype, gate, b, n) for b, n in pairs]
                if batches is None and tokens is None and (dtype, gate) == ("fp32", "all"):
                    cells.append(Cell(shape, dtype, gate, 1, MANY_TOKENS))
    return cells


def model_pair(name: str) -> tuple[PretrainedConfig, PretrainedConfig, dict[str, Any]]:
    """(receiver, sharer, keywords of FuserConfig.for_models) of a pair of models.

    ``"tiny"``: the shipped pair. ``"real"``: Qwen3-0.6B reads Qwen2.5-0.5B. ``"mid"``: four
    layers of each, with an eighth of the vocabulary.
    """
    if name == "tiny":
        receiver, sharer = (AutoConfig.from_pretrained(ASSETS / s) for s in ("receiver", "sharer"))
        return receiver, sharer, {"hidden_size": 64}
    changes = {} if name == "real" else {"num_hidden_layers": 4, "vocab_size": 151936 // 8}
    return Qwen3Config(**QWEN3_06B | changes), Qwen2Config(**QWEN25_05B | changes), {}


PAIRS = ("tiny", "mid", "real")

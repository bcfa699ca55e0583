"""The variants of docs/differences.md that the tests go through: keywords of `make_config`."""

from __future__ import annotations

import torch

from c2c_ext import Fuser, fuse

# Fields of make_config -> what the compiled op runs, one change at a time and all together.
COMPILED = {
    "sharer only": {"reads": "sharer"},
    "interpolation": {"integration": "interpolation"},
    "replacement": {"integration": "replacement"},
    "keys only": {"kinds": ("key",)},
    "values only": {"kinds": ("value",)},
    "no weighting": {"weighting": False},
    "no gate": {"gate": False},
    "bare": {
        "reads": "sharer",
        "integration": "replacement",
        "kinds": ("value",),
        "weighting": False,
        "gate": False,
    },
    "second write-up": {"activation": "relu", "dropout": 0.1, "integration": "interpolation"},
}
LINEAR = {"projection": "linear", "weighting": False}
UNCOMPILED = {
    "linear": {**LINEAR, "reads": "sharer"},
    "linear, both": LINEAR,
    "transformer": {"projection": "transformer", "attention_heads": 4},
    "transformer block": {"projection": "transformer", "attention_heads": 2, "depth": 2},
    "self-attention": {"projection": "transformer", "attention_heads": 1, "reads": "sharer"},
}
EVERY = {**COMPILED, **UNCOMPILED}


def fused_by_fuse(fuser: Fuser, base, sharer, **keywords):
    with torch.no_grad():
        return fuse(base, sharer, fuser, **keywords)

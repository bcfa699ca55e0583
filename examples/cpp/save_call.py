"""Writes what fuse.cpp reads: the arguments of one call of c2c::fuse_, by name.

usage: python save_call.py FUSER_DIR call.pt

The caches are random here; of a real program only the packed weights come from Python.
"""

import sys

import torch

import c2c_ext
from c2c_ext import ops


def random_cache(layers: tuple, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (key, value) pair ``[1, heads, tokens, dim]`` per layer."""
    sizes = [(1, layer.num_heads, tokens, layer.head_dim) for layer in layers]
    return [(torch.randn(size), torch.randn(size)) for size in sizes]


def main() -> None:
    directory, output = sys.argv[1:]
    fuser = c2c_ext.Fuser.from_pretrained(directory)
    base = random_cache(fuser.config.receiver.layers, tokens=7)
    sharer = random_cache(fuser.config.sharer.layers, tokens=7)
    out = [(torch.empty_like(key), torch.empty_like(value)) for key, value in base]
    packed = fuser.packed(torch.float32, torch.device("cpu"))
    (group,) = packed.groups  # a fuser whose layers differ in KV shape has several: one call each
    values = ops.group_arguments(group, out, base, sharer, None, packed, False)
    names = [argument.name for argument in torch.ops.c2c.fuse_.default._schema.arguments]
    torch.save(dict(zip(names, values, strict=True)), output)


if __name__ == "__main__":
    main()

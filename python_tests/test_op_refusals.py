"""torch.ops.c2c.fuse_: every refusal by its message, and that nothing is written then."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import torch
from conftest import (
    arguments_of,
    assert_fused,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    same_bits,
    set_gates,
)
from torch import Tensor


def put(name: str, value: object, index: int | None = None) -> Callable[[dict], None]:
    """A mutation: argument ``name`` (or its item) becomes ``value(old)`` or ``value``."""

    def mutate(arguments: dict) -> None:
        old = arguments[name] if index is None else arguments[name][index]
        new = value(old) if callable(value) else value
        if index is None:
            arguments[name] = new
        else:
            arguments[name] = [new if i == index else x for i, x in enumerate(arguments[name])]

    return mutate


def both(*mutations: Callable[[dict], None]) -> Callable[[dict], None]:
    def mutate(arguments: dict) -> None:
        for mutation in mutations:
            mutation(arguments)

    return mutate


def drop_last(items: list) -> list:
    return items[:-1]


def one_more(dim: int) -> Callable[[Tensor], Tensor]:
    """A tensor one larger along ``dim``."""
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim=dim)


def transposed_weight(t: Tensor) -> Tensor:
    dims = (2, 3) if t.dim() == 5 else (0, 1)
    return t.transpose(*dims).contiguous().transpose(*dims)


def make_huge(arguments: dict) -> None:
    for name in ("out_keys", "out_values", "base_keys", "base_values"):
        arguments[name] = [t[:, :, :1].expand(-1, -1, 2**31, -1) for t in arguments[name]]


def alias(to: str, source: str, view: Callable[[Tensor], Tensor] = lambda t: t):
    """out[0] of ``to`` becomes a view of item 0 of ``source``."""

    def mutate(arguments: dict) -> None:
        put(to, view(arguments[source][0]), 0)(arguments)

    return mutate


def shift_base_by_a_token(arguments: dict) -> None:
    t = arguments["base_keys"][0]
    longer = torch.cat([t, t[:, :, :1]], dim=2)
    arguments["base_keys"] = [longer[:, :, :-1], *arguments["base_keys"][1:]]
    arguments["out_keys"] = [longer[:, :, 1:], *arguments["out_keys"][1:]]


def sharer_in_output(arguments: dict) -> None:
    """sharer_values[2] and out_keys[1] share the last element of one buffer."""
    out, sharer = arguments["out_keys"][1], arguments["sharer_values"][2]
    buffer = torch.zeros(out.numel() + sharer.numel() - 1)
    put("out_keys", buffer[: out.numel()].view(out.shape), 1)(arguments)
    put("sharer_values", buffer[out.numel() - 1 :].view(sharer.shape), 2)(arguments)


def sharer_inside_stride(arguments: dict) -> None:
    """Different strides over the same bytes are refused without solving for the addresses."""
    out, sharer = arguments["out_keys"][1], arguments["sharer_values"][2]
    buffer = torch.zeros(2 * out.numel())
    put("out_keys", buffer[::2].view(out.shape), 1)(arguments)
    put("sharer_values", buffer[1 : 1 + sharer.numel()].view(sharer.shape), 2)(arguments)


# 2 receiver layers of 2 heads x 8, 3 sharer layers of 1 x 4, batch 2, 5 tokens, 6 of the sharer;
# hidden 16, inner 24, depth 4, folded. Mutation -> the message after "c2c_ext.fuse: ".
REFUSED = [
    (
        put("base_values", drop_last),
        "receiver_values must have 2 entries (as receiver_keys), got 1",
    ),
    (put("out_keys", drop_last), "out_keys must have 2 entries (as receiver_keys), got 1"),
    (put("out_values", drop_last), "out_values must have 2 entries (as receiver_keys), got 1"),
    (put("sharer_values", drop_last), "sharer_values must have 3 entries (as sharer_keys), got 2"),
    (put("sources", drop_last), "sources must have 4 entries (one per stream, as layers), got 3"),
    (put("num_keys", 5), "num_keys must be in 0..4, got 5"),
    (put("num_keys", -1), "num_keys must be in 0..4, got -1"),
    (put("sharer_heads", 0), "sharer_heads must be in 1..16777216, got 0"),
    (put("sharer_dim", 2**62), f"sharer_dim must be in 1..16777216, got {2**62}"),
    (put("receiver_heads", -1), "receiver_heads must be in 1..16777216, got -1"),
    (put("receiver_dim", 0), "receiver_dim must be in 1..16777216, got 0"),
    (
        put("integration", "sum"),
        "integration must be residual, interpolation or replacement, got sum",
    ),
    (put("layers", 2, 1), "layers[1] must be in 0..1 (receiver layers), got 2"),
    (put("layers", -1, 3), "layers[3] must be in 0..1 (receiver layers), got -1"),
    (put("sources", 3, 0), "sources[0] must be in 0..2 (sharer layers), got 3"),
    (put("sources", -1, 2), "sources[2] must be in 0..2 (sharer layers), got -1"),
    (put("in_weight", lambda t: t[0]), "in_weight must have 5 dimensions, got 4"),
    (put("w1", lambda t: t[0]), "w1 must have 5 dimensions, got 4"),
    (put("inner", 0), "inner must be in 1..16777216, got 0"),
    (
        put("inner", 40),
        "w1 dim 1 (packed weight) must equal 3 (the shape group's other weights), got 2",
    ),
    (
        put("reads_receiver", False),
        "in_weight dim 2 (packed weight) must equal 4 (the shape group's other weights), got 20",
    ),
    (put("out_bias", lambda t: t[0]), "out_bias must have 2 dimensions, got 1"),
    (put("head_bias", lambda t: t[0]), "head_bias must have 2 dimensions, got 1"),
    (
        put("out_bias", lambda t: t[:, :15]),
        "out_bias dim 1 (packed weight) must equal 16 (the shape group's other weights), got 15",
    ),
    (
        put("head_bias", lambda t: t[:, :0]),  # as if there were no dynamic weighting
        "branch_w1 dim 1 (packed weight) must equal 2 (the shape group's other weights), got 3",
    ),
    (
        put("sharer_heads", 3),
        "sharer_keys[0] dim 1 (heads) must equal 3 (the fuser's sharer heads)",
    ),
    (
        put("receiver_dim", 9),
        "receiver_keys[0] dim 3 (head dim) must equal 9 (the fuser's receiver head dim), got 8",
    ),
    (
        put("in_weight", lambda t: t[:, :, :16]),
        "in_weight dim 2 (packed weight) must equal 20 (the shape group's other weights), got 16",
    ),
    (put("base_keys", lambda t: t[0], 0), "receiver_keys[0] must have 4 dimensions, got 3"),
    (
        both(
            put("num_keys", 0),
            put("layers", [0, 1]),
            put("sources", [0, 2]),
            put("base_values", lambda t: t[0], 0),
        ),
        "receiver_values[0] must have 4 dimensions, got 3",
    ),
    (put("base_keys", lambda t: t[0], 1), "receiver_keys[1] must have 4 dimensions, got 3"),
    (put("out_values", lambda t: t[0], 1), "out_values[1] must have 4 dimensions, got 3"),
    (put("sharer_keys", lambda t: t[0], 2), "sharer_keys[2] must have 4 dimensions, got 3"),
    (
        put("base_keys", lambda t: t.int(), 0),
        "receiver_keys[0] must be float64, float32, bfloat16 or float16",
    ),
    (
        put("base_values", lambda t: t.double(), 1),
        "receiver_values[1] must have the dtype of receiver_keys[0] (float32), got float64",
    ),
    (
        put("out_keys", lambda t: t.half(), 0),
        "out_keys[0] must have the dtype of receiver_keys[0] (float32), got float16",
    ),
    (
        put("sharer_values", lambda t: t.bfloat16(), 0),
        "sharer_values[0] must have the dtype of receiver_keys[0] (float32), got bfloat16",
    ),
    (
        put("sharer_values", lambda t: t.long(), 0),
        "sharer_values[0] must have the dtype of receiver_keys[0] (float32), got int64",
    ),
    (
        put("sharer_values", lambda t: t.int(), 0),
        "sharer_values[0] must have the dtype of receiver_keys[0] (float32), got another dtype",
    ),
    *(
        (
            put(name, one_more(dim), 1),
            f"{called}[1] dim {dim} ({meaning}) must equal {number} ({rule}), got {number + 1}",
        )
        for name, called in (
            ("base_keys", "receiver_keys"),
            ("base_values", "receiver_values"),
            ("out_keys", "out_keys"),
            ("out_values", "out_values"),
        )
        for dim, meaning, number, rule in (
            (0, "batch", 2, "receiver_keys[0]"),
            (1, "heads", 2, "the fuser's receiver heads"),
            (2, "tokens", 5, "receiver_keys[0]"),
            (3, "head dim", 8, "the fuser's receiver head dim"),
        )
    ),
    *(
        (
            put(name, one_more(dim), 2),
            f"{name}[2] dim {dim} ({meaning}) must equal {number} ({rule}), got {number + 1}",
        )
        for name in ("sharer_keys", "sharer_values")
        for dim, meaning, number, rule in (
            (0, "batch", 2, "receiver_keys[0]"),
            (1, "heads", 1, "the fuser's sharer heads"),
            (2, "tokens", 6, "the other sharer tensors"),
            (3, "head dim", 4, "the fuser's sharer head dim"),
        )
    ),
    (make_huge, "batch and token counts must be below 2^31"),
    (
        put("token_map", torch.zeros(5, dtype=torch.float32)),
        "token_map must be int64, got float32",
    ),
    (
        put("token_map", torch.zeros(5, dtype=torch.int32)),
        "token_map must be int64, got another dtype",
    ),
    (
        put("token_map", torch.zeros(1, 2, 5, dtype=torch.int64)),
        "token_map must be [N] or [B, N], got 3 dimensions",
    ),
    (
        put("token_map", torch.tensor(0)),
        "token_map must be [N] or [B, N], got 0 dimensions",
    ),
    (
        put("token_map", torch.zeros(6, dtype=torch.int64)),
        "token_map dim 0 (tokens) must equal 5 (the receiver's tokens), got 6",
    ),
    (
        put("token_map", torch.zeros(2, 4, dtype=torch.int64)),
        "token_map dim 1 (tokens) must equal 5 (the receiver's tokens), got 4",
    ),
    (
        put("token_map", torch.zeros(3, 5, dtype=torch.int64)),
        "token_map dim 0 (batch) must equal 2 (the caches' batch), got 3",
    ),
    (
        both(
            *(
                put(name, lambda ts: [t[:, :, :4] for t in ts])
                for name in ("sharer_keys", "sharer_values")
            )
        ),
        "sharer_keys dim 2 (tokens) must be at least 5 (the receiver's tokens) without a "
        "token_map, got 4",
    ),
    (
        put("out_keys", lambda t: t[:1].expand(2, -1, -1, -1), 0),
        "out_keys[0] must not overlap itself (expanded or interleaved view)",
    ),
    (
        put("out_values", lambda t: t.as_strided(t.shape, (80, 40, 4, 1)), 1),
        "out_values[1] must not overlap itself (expanded or interleaved view)",
    ),
    (
        alias("out_values", "out_keys"),
        "must not overlap out_",
    ),
    (
        alias("out_values", "base_keys"),
        "out_values[0] must not overlap receiver_keys[0]: it is written while the other is read "
        "or written",
    ),
    (
        shift_base_by_a_token,
        "out_keys[0] must not overlap receiver_keys[0]: it is written while the other is read or "
        "written",
    ),
    (
        sharer_in_output,
        "out_keys[1] must not overlap sharer_values[2]: it is written while the other is read or "
        "written",
    ),
    (sharer_inside_stride, "out_keys[1] must not overlap sharer_values[2]"),
    (
        both(put("layers", 0, 1), put("sources", 0, 1)),
        "layers[1] must not name a stream twice, got 0 again",
    ),
    *(
        (
            put(name, one_more(dim)),
            f"{name} dim {dim} (packed weight) must equal {number} (the shape group's other "
            f"weights), got {number + 1}",
        )
        for name, sizes in (
            ("in_weight", {0: 4, 1: 1, 2: 20, 3: 16, 4: 1}),
            ("in_bias", {0: 4}),
            ("w1", {0: 4, 1: 2, 2: 16}),
            ("w2", {0: 4, 1: 1, 2: 24}),
            ("branch_w1", {0: 4, 1: 3, 2: 16}),
            ("out_weight", {0: 4, 1: 1, 2: 40}),
            ("out_bias", {0: 4}),
            ("head_weight", {0: 4, 1: 2, 2: 32}),
            ("head_bias", {0: 4}),
        )
        for dim, number in sizes.items()
    ),
    *(
        (
            put(name, one_more(dim), 0),
            f"{name}[0] dim {dim} (packed weight) must equal {number} (the shape group's other "
            f"weights), got {number + 1}",
        )
        for name, sizes in (
            ("deep_w2", {0: 4, 1: 1, 2: 24}),
            ("deep_w1", {0: 4, 1: 2, 2: 16}),
        )
        for dim, number in sizes.items()
    ),
    (
        both(put("deep_w2", lambda ts: ts * 3)),
        "deep_w2 must have as many entries as deep_w1 (1) or one more, got 3",
    ),
    (
        put("deep_w2", []),
        "deep_w2 must have as many entries as deep_w1 (1) or one more, got 0",
    ),
    *(
        (
            put(name, lambda t: t.double()),
            f"{name} must be float32 for float32 caches on cpu, got float64",
        )
        for name in (
            *("in_weight", "in_bias", "w1", "w2", "branch_w1"),
            *("out_weight", "out_bias", "head_weight", "head_bias"),
        )
    ),
    (
        put("deep_w1", lambda t: t.half(), 0),
        "deep_w1[0] must be float32 for float32 caches on cpu, got float16",
    ),
    *(
        (put(name, transposed_weight), f"{name} must be contiguous")
        for name in ("in_weight", "in_bias", "w1", "w2", "branch_w1", "out_weight", "head_weight")
    ),
    (put("deep_w2", transposed_weight, 0), "deep_w2[0] must be contiguous"),
    (put("activation", "tanh"), "activation must be gelu, relu or silu, got tanh"),
]


@pytest.mark.parametrize(("mutate", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusal(mutate, message):
    fuser = make_fuser(make_config(depth=4))
    base, sharer = make_caches(fuser.config, 2, 5, 6)
    out = [tuple(torch.full_like(t, 7.0) for t in pair) for pair in base]
    arguments = arguments_of(fuser, out, base, sharer)
    before = [t.clone() for t in flat(base) + flat(sharer)]
    mutate(arguments)
    with pytest.raises(RuntimeError, match=re.escape("c2c_ext.fuse: ") + ".*" + re.escape(message)):
        torch.ops.c2c.fuse_(*arguments.values())
    assert all((t == 7.0).all() for t in flat(out))
    assert all(map(same_bits, flat(base) + flat(sharer), before))


@pytest.mark.parametrize(
    ("name", "index"), [("in_weight", None), ("head_bias", None), ("deep_w2", 0), ("deep_w1", 0)]
)
def test_output_that_overlaps_a_weight_is_refused(name, index):
    fuser = make_fuser(make_config(depth=4))
    base, sharer = make_caches(fuser.config, 2, 5, 6)
    arguments = arguments_of(fuser, clone(base), base, sharer)
    weight = arguments[name] if index is None else arguments[name][index]
    out = arguments["out_values"][1]
    buffer = torch.zeros(weight.numel() + out.numel() - 1)  # they share one element
    shared = buffer[: weight.numel()].view(weight.shape).copy_(weight)
    put(name, shared, index)(arguments)
    put("out_values", buffer[weight.numel() - 1 :].view(out.shape), 1)(arguments)
    before = buffer.clone()
    called = name if index is None else f"{name}[{index}]"
    message = re.escape(f"out_values[1] must not overlap {called}: it is written while")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.c2c.fuse_(*arguments.values())
    assert same_bits(buffer, before)


def test_unmutated_arguments_are_accepted():
    fuser = make_fuser(make_config(depth=4))
    base, sharer = make_caches(fuser.config, 2, 5, 6)
    out = [tuple(torch.full_like(t, 7.0) for t in pair) for pair in base]
    torch.ops.c2c.fuse_(*arguments_of(fuser, out, base, sharer).values())
    assert_fused(fuser, base, sharer, out)


@pytest.mark.parametrize("name", ["base_keys", "sharer_values", "token_map", "w1"])
def test_meta_tensor_among_real_ones_is_refused(name):
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    arguments = arguments_of(fuser, clone(base), base, sharer, torch.arange(5))
    put(name, lambda t: t.to("meta"), 1 if isinstance(arguments[name], list) else None)(arguments)
    with pytest.raises(RuntimeError, match="must be on one device, got cpu, meta"):
        torch.ops.c2c.fuse_(*arguments.values())


@pytest.mark.parametrize("seed", range(4))
def test_overlap_check_against_addresses(seed):
    """Random views of one buffer: refused if they share an element, else accepted if alike."""
    rng = random.Random(seed)
    fuser = make_fuser(make_config([(2, 2)], [(2, 2)], [0]))
    set_gates(fuser, {(0, "value"): -1.0})
    buffer = torch.zeros(400)
    values = torch.zeros(2, 2, 2, 2)
    seen = {"shared": 0, "alike": 0, "self": 0}

    def view(strides: list[int]) -> Tensor:
        return buffer.as_strided((2, 2, 2, 2), strides, rng.randrange(60))

    def addresses(t: Tensor) -> list[int]:
        places = torch.arange(400).as_strided(t.shape, t.stride(), t.storage_offset())
        return places.flatten().tolist()

    for _ in range(500):
        strides = [rng.choice([1, 2, 3, 4, 5, 8, 16, 17, 24, 32, 40]) for _ in range(4)]
        others = strides if rng.random() < 0.7 else rng.sample(strides, 4)
        out, sharer = view(strides), view(others)
        mine, theirs = addresses(out), addresses(sharer)
        base = [(torch.zeros(2, 2, 2, 2), values)]
        arguments = arguments_of(fuser, [(out, values)], base, [(sharer, torch.ones_like(values))])
        try:
            torch.ops.c2c.fuse_(*arguments.values())
            refused = None
        except RuntimeError as error:
            refused = str(error)
        if len(set(mine)) < len(mine):
            assert refused is not None
            seen["self"] += 1
        elif set(mine) & set(theirs):
            assert refused is not None
            seen["shared"] += 1
        elif others == strides and refused is not None:
            assert "must not overlap itself" in refused  # may refuse interleaved views
        else:
            seen["alike"] += others == strides
    assert min(seen.values()) > 10

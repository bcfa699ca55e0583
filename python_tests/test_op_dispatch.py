"""torch.ops.c2c.fuse_: what it dispatches, its chunks, autograd modes, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import (
    SHAPES,
    KVPairs,
    arguments_of,
    assert_fused,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    run_op,
    same_bits,
    set_gates,
)
from torch.profiler import ProfilerActivity, profile

import c2c_ext
from c2c_ext import ops

CPU = torch.device("cpu")


def aten_calls(function: Callable[[], object]) -> list[str]:
    """Names of all aten ops dispatched inside c2c::fuse_."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        function()
    calls = []
    for event in recorded.events():
        parent = event.cpu_parent
        while parent is not None and parent.name != "c2c::fuse_":
            parent = parent.cpu_parent
        if parent is not None and event.name.startswith("aten::"):
            calls.append(event.name)
    return calls


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("layers", "tokens"), [(12, 100), (1, 1001)], ids=["streams", "rows"])
def test_chunks_equal_reference(layers, tokens, one_thread):
    # Cheap products with many scratch elements a row, so that a thread's scratch is few tokens.
    config = make_config(
        [(1, 8)] * layers, [(1, 8)], [0] * layers, hidden_size=8, intermediate_size=4096
    )
    fuser = make_fuser(config)
    with torch.no_grad():
        for parameter in (fuser.groups[0].shared_w2, fuser.groups[0].proj_w2):
            parameter.mul_(8.0)
    if layers > 1:
        set_gates(fuser, {(1, "value"): -1.0})
    base, sharer = make_caches(config, 1, tokens)
    out = clone(base)
    run_op(fuser, clone(base), sharer)  # builds the packed form
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_op(fuser, base, sharer, out=out)
    scratch = max(e.cpu_memory_usage for e in recorded.events() if e.name == "aten::empty")
    streams = len(fuser.open_streams())
    assert scratch <= 8 << 20 < streams * tokens * 4 * 2 * 4096  # more than one chunk
    assert_fused(fuser, base, sharer, out, differs=False)
    changed = [max_abs(o - b) > 0.1 for o, b in zip(flat(out), flat(base), strict=True)]
    assert changed == [layers == 1 or i != 3 for i in range(2 * layers)]


@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("shape", ["even", "wide_output", "groups", "real_heads"])
def test_op_dispatches_one_allocation_and_nothing_else(shape, tokens):
    real_heads = {
        "receiver": [(8, 128)] * 2,
        "sharer": [(2, 64)] * 3,
        "hidden_size": 1024,
        "intermediate_size": 1024,
    }
    config = make_config(**(real_heads if shape == "real_heads" else SHAPES[shape]))
    fuser = make_fuser(config)
    base, sharer = make_caches(config, 1, tokens)
    fuser.packed(torch.float32, CPU)
    with torch.no_grad():
        calls = aten_calls(lambda: c2c_ext.fuse(base, sharer, fuser, inplace=True))
    assert calls == ["aten::empty"] * len(config.shape_groups())


def test_fuse_copies_only_what_it_returns():
    fuser = make_fuser()
    base, sharer = make_caches(fuser.config)
    fuser.packed(torch.float32, CPU)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        c2c_ext.fuse(base, sharer, fuser)
    names = [e.name for e in recorded.events() if e.cpu_parent is None]
    assert names.count("c2c::fuse_") == 1
    assert names.count("aten::clone") == len(flat(base))
    assert set(names) == {"c2c::fuse_", "aten::clone"}


@pytest.mark.parametrize("kept", [[], [(0, "key")], [(1, "value"), (0, "value"), (1, "key")]])
def test_closed_streams_cost_nothing(kept):
    fuser = make_fuser()
    set_gates(fuser, dict.fromkeys(kept, 1e-30), default=0.0)
    base, sharer = make_caches(fuser.config)
    packed = fuser.packed(torch.float32, CPU)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        ops.fuse_(base, base, sharer, packed)
    assert ("c2c::fuse_" in {e.name for e in recorded.events()}) == bool(kept)
    calls = aten_calls(lambda: ops.fuse_(base, base, sharer, packed))
    assert calls == (["aten::empty"] if kept else [])
    assert sum(len(group.layers) for group in packed.groups) == len(kept)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_agree(mode, device):
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, device=device)
    expected = run_op(fuser, base, sharer)
    packed = fuser.packed(torch.float32, device)
    with mode():
        base, sharer = make_caches(fuser.config, device=device)
        out = clone(base)
        ops.fuse_(out, base, sharer, packed)
    assert all(t.is_inference() == (mode is torch.inference_mode) for t in flat(out))
    assert all(not t.requires_grad for t in flat(out))
    assert all(map(same_bits, flat(out), flat(expected)))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_opcheck(mapped, accumulate, dtype, device):
    fuser = make_fuser(make_config(depth=4), device=device)
    base, sharer = make_caches(fuser.config, 2, 3, 5, dtype, device)
    token_map = torch.tensor([4, -1, 0], device=device) if mapped else None
    arguments = arguments_of(fuser, clone(base), base, sharer, token_map)
    arguments["accumulate"] = accumulate
    torch.library.opcheck(torch.ops.c2c.fuse_.default, tuple(arguments.values()))


# "inductor" only where it has no kernel of its own to compile.
@pytest.mark.parametrize(
    ("backend", "in_place"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)]
)
def test_compiled_op_equals_eager(backend, in_place, device):
    torch._dynamo.reset()
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, device=device)
    packed = fuser.packed(torch.float32, device)

    def function(out: KVPairs, base: KVPairs, sharer: KVPairs) -> None:
        ops.fuse_(out, base, sharer, packed)

    expected = run_op(fuser, base, sharer)
    before = clone(base)
    out = base if in_place else clone(base)
    with torch.no_grad():
        torch.compile(function, fullgraph=True, backend=backend)(out, base, sharer)
    assert all(map(same_bits, flat(out), flat(expected)))
    if not in_place:
        assert all(map(same_bits, flat(base), flat(before)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_fuse_equals_eager(inplace, mode, device):
    torch._dynamo.reset()
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, 2, 6, 4, device=device)
    token_map = torch.tensor([3, 2, -1, 0], device=device)

    def function(base: KVPairs, sharer: KVPairs) -> KVPairs:
        return c2c_ext.fuse(
            base, sharer, fuser, start=1, end=5, token_map=token_map, inplace=inplace
        )

    with mode():
        expected = c2c_ext.fuse(base, sharer, fuser, start=1, end=5, token_map=token_map)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        ours = compiled(base, sharer)
    assert all(map(same_bits, flat(ours), flat(expected)))
    moved = [not torch.equal(x, b) for x, b in zip(flat(ours), flat(base), strict=True)]
    assert moved == [not inplace] * 4


def test_compiled_fuse_takes_the_form_of_the_last_eager_use(device):
    torch._dynamo.reset()
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, device=device)
    compiled = torch.compile(
        lambda b, s: c2c_ext.fuse(b, s, fuser), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        before = c2c_ext.fuse(base, sharer, fuser)
        fuser.groups[0].out_bias.add_(1.0)
        assert all(map(same_bits, flat(compiled(base, sharer)), flat(before)))
        after = c2c_ext.fuse(base, sharer, fuser)
        assert all(map(same_bits, flat(compiled(base, sharer)), flat(after)))
    assert not any(map(torch.equal, flat(after), flat(before)))


def test_compiling_without_packed_form_is_refused(device):
    torch._dynamo.reset()
    fuser = make_fuser(device=device)
    base, sharer = make_caches(fuser.config, device=device)
    function = torch.compile(
        lambda b, s: c2c_ext.fuse(b, s, fuser), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad(), pytest.raises(Exception, match=r"call\s+fuser.packed\(torch.float32"):
        function(base, sharer)

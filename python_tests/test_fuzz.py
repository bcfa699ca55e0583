"""Random arguments of `c2c_ext.fuse` and the op: the reference's result or a clear error.

The examples are the same in every run. ``C2C_FUZZ_EXAMPLES=20000`` draws that many new ones.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from conftest import (
    OP_ARGUMENTS,
    KVPairs,
    arguments_of,
    assert_as_good_as_plain,
    cast,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    plain_draws,
    relative_error,
    run_reference,
    same_bits,
)
from fuzz_cases import Case, changed_argument, described, right_cases, wild_cases
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import c2c_ext

FEW = 512  # numbers, for the maximum of their errors to mean something
PHASES = (Phase.generate, Phase.shrink)
EXAMPLES = int(os.environ.get("C2C_FUZZ_EXAMPLES", "0"))


def fuzzed(examples: int) -> settings:
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


class Bits:
    """What every storage of some tensors holds, to tell later what has been written."""

    def __init__(self, tensors: list[Tensor]) -> None:
        wholes = [
            whole(t) for t in tensors if t.layout == torch.strided and t.is_cpu and has_memory(t)
        ]
        self.known = {t.data_ptr(): (t, t.clone()) for t in wholes}

    def allow(self, t: Tensor) -> None:
        """Leaves the elements of a view out of the comparison, taking them as they now are."""
        if t.numel() and has_memory(t) and t.untyped_storage().data_ptr() in self.known:
            now, before = self.known[t.untyped_storage().data_ptr()]
            now, before = now.view(t.dtype), before.view(t.dtype)
            # By number: a view may overlap itself, where all gates are closed.
            places = torch.arange(now.numel())
            places = places.as_strided(t.shape, t.stride(), t.storage_offset()).flatten()
            before[places] = now[places]

    def assert_unchanged(self) -> None:
        for now, before in self.known.values():
            assert torch.equal(now, before), "a tensor has been written to"


def has_memory(t: Tensor) -> bool:
    try:
        storage = t.untyped_storage()
        return t.is_cpu and storage.nbytes() > 0 and storage.data_ptr() != 0
    except RuntimeError:  # sparse tensors, torch's efficient zeros
        return False


def whole(t: Tensor) -> Tensor:
    """The bytes of a tensor's whole storage, in place."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def held(cache: Any) -> KVPairs:
    return [(x.keys, x.values) for x in cache.layers] if hasattr(cache, "layers") else list(cache)


def call(case: Case, caches: tuple[Any, Any]) -> Any:
    if case.grad_mode == "inference":
        with torch.inference_mode():
            return c2c_ext.fuse(*caches, case.fuser, **case.keywords)
    with torch.set_grad_enabled(case.grad_mode == "grad"):
        return c2c_ext.fuse(*caches, case.fuser, **case.keywords)


def check_result(case: Case, receiver: Any, before: KVPairs, fused: Any) -> None:
    """Shape, dtype, kind; nothing else has changed; the rest is what the reference says."""
    assert type(fused) is type(receiver)
    assert (fused is receiver) == bool(case.keywords.get("inplace"))
    ours = [
        (key.detach().resolve_neg(), value.detach().resolve_neg()) for key, value in held(fused)
    ]
    for new, old in zip(flat(ours), flat(before), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    start = case.keywords.get("start", 0)
    end = case.keywords.get("end")
    end = before[0][0].shape[2] if end is None else end
    token_map = case.keywords.get("token_map")
    window = [(key[:, :, start:end], value[:, :, start:end]) for key, value in before]
    inside = [(key[:, :, start:end], value[:, :, start:end]) for key, value in ours]
    sharer = [
        (key.detach().resolve_neg(), value.detach().resolve_neg()) for key, value in case.sharer
    ]
    if token_map is None:
        sharer = [(key[:, :, start:end], value[:, :, start:end]) for key, value in sharer]
    is_open = case.fuser.open_streams()
    kept = torch.zeros(window[0][0].shape[0], end - start, dtype=torch.bool)
    if token_map is not None:
        kept |= token_map < 0
    for layer, (new_pair, old_pair) in enumerate(zip(ours, before, strict=True)):
        for kind, new, old in zip(("key", "value"), new_pair, old_pair, strict=True):
            same = torch.ones(new.shape[0], new.shape[2], dtype=torch.bool)
            same[:, start:end] = kept if (layer, kind) in is_open else True
            assert same_bits(new.transpose(1, 2)[same], old.transpose(1, 2)[same])
    if not all(torch.isfinite(t).all() for t in flat(window) + flat(sharer)):
        return
    # Over all streams at once: a tensor of a few numbers has too few draws for the tolerance.
    wide = cast(window, torch.float64), cast(sharer, torch.float64)
    truth = together(flat(run_reference(case.fuser, *wide, token_map)))
    got = together(flat(inside))
    if got.dtype == torch.float64:
        assert relative_error(got, truth) <= 1e-13
    elif got.numel() < FEW:
        # Still too few: the same call in float64 must be exact, and this one near it.
        twin = c2c_ext.fuse(*wide, case.fuser, token_map=token_map)
        assert relative_error(together(flat(plain(twin))), truth) <= 1e-13
        stock = together(flat(run_reference(case.fuser, window, sharer, token_map)))
        few_roundings = 16 * torch.finfo(got.dtype).eps
        assert relative_error(got, truth) <= 2 * relative_error(stock, truth) + few_roundings
    else:
        draws = plain_draws(case.fuser, window, sharer, token_map)
        stock = [together(list(draw)) for draw in zip(*draws, strict=True)]
        assert_as_good_as_plain(got, stock, truth)


def plain(pairs: KVPairs) -> KVPairs:
    """Without gradients and pending negations."""
    return [(key.detach().resolve_neg(), value.detach().resolve_neg()) for key, value in pairs]


def together(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def check(case: Case, may_fail: bool) -> str:
    """What became of the call: "fused" or "refused"."""
    receiver, sharer = case.caches()
    bits = Bits(case.tensors())
    try:
        before = [tuple(t.detach().resolve_neg().clone() for t in pair) for pair in case.receiver]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        before = None  # such arguments must be refused
    try:
        fused = call(case, (receiver, sharer))
    except (ValueError, TypeError, RuntimeError) as error:
        assert may_fail, f"refused: {error}"
        assert str(error).startswith("c2c_ext"), f"{type(error).__name__}: {error}"
        bits.assert_unchanged()
        return "refused"
    assert before is not None, "was accepted"
    check_result(case, receiver, before, fused)
    if case.keywords.get("inplace"):
        start, end = case.keywords.get("start", 0), case.keywords.get("end")
        for t in flat(case.receiver):
            bits.allow(t[:, :, start:end])
    else:
        theirs = [t for t in flat(held(fused)) if t.numel() and not t.requires_grad]
        assert not set(bits.known) & {t.untyped_storage().data_ptr() for t in theirs}
    bits.assert_unchanged()
    return "fused"


@fuzzed(150)
@given(right_cases())
def test_right_arguments_give_the_reference(case: Case) -> None:
    event(check(case, may_fail=False))


@pytest.mark.filterwarnings("ignore")
@fuzzed(500)
@given(wild_cases())
def test_wild_arguments_give_the_reference_or_an_error(case: Case) -> None:
    event(check(case, may_fail=True))


@pytest.mark.filterwarnings("ignore")
@fuzzed(500)
@given(st.data())
def test_wild_arguments_of_the_op_change_no_input(data: st.DataObject) -> None:
    """Nothing is promised about the result, but that the process lives and inputs stay."""
    fuser = make_fuser(make_config(depth=data.draw(st.integers(3, 5))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    base, sharer = make_caches(fuser.config, 2, 5, 6, dtype=dtype)
    token_map = data.draw(st.sampled_from([None, torch.tensor([5, -1, 0, 2, 2])]))
    arguments = arguments_of(fuser, clone(base), base, sharer, token_map)
    tensors = [t for a in arguments.values() for t in (a if isinstance(a, list) else [a])]
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(OP_ARGUMENTS))
        arguments[name] = changed_argument(data.draw, arguments[name], tensors)
        note(f"{name} = {described(arguments[name])}")
    bits = Bits(tensors)
    try:
        torch.ops.c2c.fuse_(*arguments.values())
        for name in ("out_keys", "out_values"):
            for t in arguments[name]:
                bits.allow(t.detach())
    except Exception as error:
        note(f"{type(error).__name__}: {error}")
    bits.assert_unchanged()

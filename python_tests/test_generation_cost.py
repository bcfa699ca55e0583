"""What fusing costs besides prefills: nothing in a decoding step, no cache longer than needed."""

from __future__ import annotations

import weakref
from collections import Counter

import pytest
import tiny_models
import torch
from generation_checks import generate, left_padded
from torch.utils._python_dispatch import TorchDispatchMode

from c2c_ext import prompt_fusion
from c2c_ext.generation import attached
from c2c_ext.padding import shift_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Ops(TorchDispatchMode):
    """How often each op runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def ops_of_steps(receiver, ids, mask, steps: int) -> Counter[str]:
    """What ``steps`` decoding steps run beyond the first two."""
    generate(receiver, ids, attention_mask=mask, max_new_tokens=1)  # packs the fuser
    runs = []
    for tokens in (2, 2 + steps):
        with Ops() as ops:
            generate(receiver, ids, attention_mask=mask, max_new_tokens=tokens)
        runs.append(ops.seen)
    runs[1].subtract(runs[0])
    return +runs[1]


def test_a_decoding_step_runs_what_the_receiver_alone_runs():
    receiver, sharer, fuser = tiny_models.trio()
    ids, mask = left_padded((7, 4))
    alone = ops_of_steps(receiver, ids, mask, 3)
    with attached(receiver, sharer, fuser):
        assert ops_of_steps(receiver, ids, mask, 3) == alone
    assert alone  # the mode has seen them


def test_rows_that_need_no_moving_are_asked_about_once():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with Ops() as ops:
        assert shift_of(mask) is None
    assert ops.seen["aten._local_scalar_dense.default"] == 1
    assert not any("nonzero" in name for name in ops.seen)  # it waits for the device too


@pytest.mark.parametrize("beams", [1, 3])
def test_no_cache_is_held_twice_while_that_of_generate_is_filled(monkeypatch, beams):
    receiver, sharer, fuser = tiny_models.trio()
    ids, mask = left_padded((7, 4))
    read, alive, layers = [], [], []

    def note(module, args, kwargs, output) -> None:
        read.append(weakref.ref(kwargs["past_key_values"]))

    def watched(pairs):
        for pair in pairs:
            alive.append(sum(key() is not None for key in layers))
            layers.append(weakref.ref(pair[0]))
            yield pair
            del pair

    fill = prompt_fusion.append

    def append(cache, pairs, held) -> None:
        assert [ref() for ref in read] == [None]
        fill(cache, watched(pairs), held)

    monkeypatch.setattr(prompt_fusion, "append", append)
    with attached(receiver, sharer, fuser):
        hook = sharer.base_model.register_forward_hook(note, with_kwargs=True)
        try:
            generate(
                receiver,
                ids,
                attention_mask=mask,
                max_new_tokens=2,
                num_beams=beams,
                return_dict_in_generate=False,
            )
        finally:
            hook.remove()
    assert len(layers) == receiver.config.num_hidden_layers
    assert max(alive) <= 1  # the one that the loop is about to replace

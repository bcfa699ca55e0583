"""Models whose layers are fetched from elsewhere or lie on several devices."""

from __future__ import annotations

import accelerate
import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    STEPS,
    VISIBLE,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    logits_of,
    prompt,
)

from c2c_ext.generation import attached
from c2c_ext.placement import input_device, on_one_device

pytestmark = pytest.mark.usefixtures("one_thread")


def fetched(model, place: str, directory):
    """``model`` with its weights in the CPU's memory or on disk until a layer runs."""
    if place == "disk":
        return accelerate.disk_offload(model, directory, execution_device=torch.device("cpu"))
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("role", ["receiver", "sharer"])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_a_model_whose_layers_are_fetched_gives_the_same(architecture, role, place, tmp_path):
    receiver, sharer, fuser = tiny_models.trio(architecture)
    ids, mask = left_padded((11, 6))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    assert_visible(expected, receiver, ids, mask)
    moved = fetched(receiver if role == "receiver" else sharer, place, tmp_path)
    assert next(moved.parameters()).is_meta
    assert input_device(moved) == torch.device("cpu")
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask)
    assert_same_run(output, ids, expected, kv=False)


def test_one_fetched_layer_among_others_gives_the_same():
    receiver, sharer, fuser = tiny_models.trio()
    ids = prompt()
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, STEPS)
    fetched(receiver.model.layers[1], "cpu", None)
    assert input_device(receiver) == torch.device("cpu")
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids)
    assert_same_run(output, ids, expected)


def test_a_model_that_lies_on_one_device_is_read_there():
    model = tiny_models.receiver_model()
    assert input_device(model) == model.device


class Placed:
    """Numbers that pretend to lie on a device."""

    def __init__(self, values: torch.Tensor, device: str) -> None:
        self.values, self.device, self.copies = values, device, 0

    def to(self, device: str) -> Placed:
        if device == self.device:
            return self
        self.copies += 1
        return Placed(self.values.clone(), device)

    def copy_(self, other: Placed) -> None:
        self.values.copy_(other.values)


def pairs_on(*devices: str) -> list[tuple[Placed, Placed]]:
    return [
        (Placed(torch.full((2,), float(i)), device), Placed(torch.full((2,), -float(i)), device))
        for i, device in enumerate(devices)
    ]


def test_pairs_of_several_devices_are_brought_to_the_first_and_back():
    pairs = pairs_on("first", "second", "first", "third")
    with on_one_device(pairs) as near:
        assert {t.device for pair in near for t in pair} == {"first"}
        assert near[0][0] is pairs[0][0] and near[2][1] is pairs[2][1]
        for pair in near:
            for t in pair:
                t.values += 10
    for i, (key, value) in enumerate(pairs):
        assert key.values.tolist() == [10.0 + i] * 2 and value.values.tolist() == [10.0 - i] * 2
    assert [key.copies for key, _ in pairs] == [0, 1, 0, 1]


def test_pairs_of_other_devices_stay_as_they_are_after_an_exception():
    pairs = pairs_on("first", "second")
    with pytest.raises(ZeroDivisionError), on_one_device(pairs) as near:
        near[1][0].values += 10
        raise ZeroDivisionError
    assert pairs[1][0].values.tolist() == [1.0, 1.0]


def test_a_prompt_is_fused_alike_where_every_layer_is_copied(monkeypatch):
    """As if every layer but the first lay elsewhere: the copies are fused and written back."""
    receiver, sharer, fuser = tiny_models.trio()
    ids = prompt()
    with attached(receiver, sharer, fuser):
        expected = generate(receiver, ids)
        copies = []
        usual = torch.Tensor.to

        def copied(t: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            moved = usual(t, *args, **kwargs)
            if args == (torch.device("cpu"),) and t.dim() == 4:
                copies.append(t)
                return moved.clone()
            return moved

        monkeypatch.setattr(torch.Tensor, "to", copied)
        output = generate(receiver, ids)
        monkeypatch.undo()
    assert len(copies) == 2 * 3
    assert torch.equal(logits_of(output), logits_of(expected))
    assert (logits_of(generate(receiver, ids)) - logits_of(expected)).abs().max() > VISIBLE

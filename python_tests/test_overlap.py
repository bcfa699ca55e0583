"""Both prefills at once: the same numbers and modes as in turn, and nothing left behind."""

from __future__ import annotations

import contextvars
import copy
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from conftest import flat, same_bits
from generation_checks import generate, left_padded, new_tokens, prompt

import c2c_ext
from c2c_ext import overlap as ov

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = SimpleNamespace(device=torch.device("cpu"))
GPU = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(autouse=True)
def no_thread_left():
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@contextmanager
def watched(model, hook):
    """``hook()`` is called before every forward of the model."""
    handle = model.base_model.register_forward_pre_hook(lambda *_: hook())
    try:
        yield
    finally:
        handle.remove()


def meeting(receiver, sharer):
    """Both forwards wait for one another: passes only if they are under way at the same time."""
    barrier, met = threading.Barrier(2, timeout=60), []

    def once():
        if len(met) < 2:
            met.append(threading.current_thread())
            barrier.wait()

    return watched(receiver, once), watched(sharer, once), met


# Through generate.


@pytest.mark.parametrize("how", ov.OVERLAPS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_overlap_gives_the_same_bits(trio, how, masked) -> None:
    receiver, sharer, fuser = trio
    ids, mask = left_padded() if masked else (prompt(), None)
    with c2c_ext.attached(receiver, sharer, fuser):
        expected = generate(receiver, ids, attention_mask=mask)
    with c2c_ext.attached(receiver, sharer, fuser, overlap=how):
        output = generate(receiver, ids, attention_mask=mask)
    assert torch.equal(new_tokens(output, ids), new_tokens(expected, ids))
    assert all(map(same_bits, output.logits, expected.logits))
    layers = zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True)
    assert all(same_bits(a.keys, b.keys) and same_bits(a.values, b.values) for a, b in layers)


def test_in_a_thread_both_are_under_way_at_once(trio) -> None:
    receiver, sharer, fuser = trio
    first, second, met = meeting(receiver, sharer)
    with c2c_ext.attached(receiver, sharer, fuser, overlap="thread"), first, second:
        generate(receiver, prompt())
    assert len(set(met)) == 2 and threading.current_thread() in met


@pytest.mark.parametrize("how", ["none", "stream"])
def test_without_a_gpu_only_a_thread_overlaps(trio, how) -> None:
    receiver, sharer, fuser = trio
    threads = []
    note = lambda: threads.append(threading.current_thread())  # noqa: E731
    with (
        c2c_ext.attached(receiver, sharer, fuser, overlap=how),
        watched(receiver, note),
        watched(sharer, note),
    ):
        generate(receiver, prompt())
    assert set(threads) == {threading.current_thread()}


def fails(*_: object) -> None:
    raise KeyError("stopped")


@pytest.mark.parametrize("role", [0, 1], ids=["receiver", "sharer"])
@pytest.mark.parametrize("how", ["none", "thread"])
def test_an_error_of_either_model_is_raised_and_nothing_changed(trio, role, how) -> None:
    receiver, sharer, fuser = trio
    ids = prompt()
    with c2c_ext.attached(receiver, sharer, fuser, overlap=how):
        expected = generate(receiver, ids)
        with watched(trio[role], fails), pytest.raises(KeyError, match="stopped") as raised:
            generate(receiver, ids)
        assert any(entry.name == "fails" for entry in raised.traceback)
        again = generate(receiver, ids)
    assert all(map(same_bits, again.logits, expected.logits))


@pytest.mark.parametrize("make", [lambda m: m, copy.copy], ids=["itself", "shares its parameters"])
def test_one_model_never_runs_twice_at_once(make) -> None:
    receiver = tiny_models.receiver_model()
    sharer = make(receiver)
    fuser = tiny_models.fuser_between(receiver, sharer)
    threads = []
    note = lambda: threads.append(threading.current_thread())  # noqa: E731
    with c2c_ext.attached(receiver, sharer, fuser, overlap="thread"), watched(receiver, note):
        generate(receiver, prompt())
    assert set(threads) == {threading.current_thread()}


def test_copies_keep_it(trio) -> None:
    receiver, sharer, fuser = trio
    with c2c_ext.attached(receiver, sharer, fuser, overlap="thread"):
        copied = copy.deepcopy(receiver)
    first, second, met = meeting(copied, copied._c2c_attachment.sharing.sharers[0])
    with first, second:
        generate(copied, prompt())
    assert len(met) == 2


def test_an_unknown_overlap_is_refused(trio) -> None:
    receiver, sharer, fuser = trio
    with pytest.raises(ValueError, match="overlap must be one of none, stream, thread, got 'gpu'"):
        c2c_ext.attach(receiver, sharer, fuser, overlap="gpu")
    assert not hasattr(receiver, "_c2c_attachment")


# The thread.


def both(receiver_prefill, sharer_prefill, how: str = "thread"):
    return ov.run_both(how, CPU, [CPU], receiver_prefill, sharer_prefill)


def modes() -> dict[str, object]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")},
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "made on": torch.empty(1).device,
        "threads": torch.get_num_threads(),
    }


@contextmanager
def default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "none": lambda: torch.enable_grad(),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
    "dtype": default_dtype,
    "device": lambda: torch.device("meta"),
    "default device": default_device,
}


@pytest.mark.parametrize("name", MODES)
def test_the_thread_runs_in_the_same_modes(name) -> None:
    outside = modes()
    with MODES[name]():
        own, theirs = both(modes, modes)
        assert own == theirs == modes()
        assert (own != outside) == (name != "none")
    assert modes() == outside


def test_gradients_inside_inference_mode_too() -> None:
    with torch.inference_mode(), torch.enable_grad():
        own, theirs = both(modes, modes)
    assert own == theirs and theirs["grad"] and theirs["inference"]


def test_context_variables_are_carried_over() -> None:
    variable = contextvars.ContextVar("variable", default="default")
    token = variable.set("set")
    try:
        assert both(lambda: 0, variable.get) == (0, "set")
    finally:
        variable.reset(token)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_receivers_error_waits_for_the_sharer(kind) -> None:
    begun, ended = threading.Event(), []

    def receiver():
        assert begun.wait(60)
        raise kind("receiver")

    def sharer():
        begun.set()
        ended.append(True)
        raise ValueError("sharer")

    with pytest.raises(kind, match="receiver"):
        both(receiver, sharer)
    assert ended == [True]


def test_an_interrupt_while_waiting_is_raised_when_the_thread_has_ended(monkeypatch) -> None:
    release, interrupted = threading.Event(), []
    original = threading.Thread.join

    def join(self, *arguments):
        if not interrupted:
            interrupted.append(True)
            release.set()
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        both(lambda: 0, lambda: release.wait(60))


def test_a_model_spread_over_devices_is_not_overlapped() -> None:
    spread = SimpleNamespace(device=torch.device("cpu"), hf_device_map={"a": 0, "b": "cpu"})
    threads = ov.run_both(
        "thread", CPU, [spread], threading.current_thread, threading.current_thread
    )
    assert set(threads) == {threading.current_thread()}


# What is told to CUDA, by stand-ins that write down the order.


class Stream:
    def __init__(self, name: str, log: list) -> None:
        self.name, self.log, self.device = name, log, GPU.device

    def wait_stream(self, other) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    log: list[str] = []
    side, current = Stream("side", log), Stream("current", log)
    monkeypatch.setattr(ov, "side_stream", lambda device: side)
    running = threading.local()
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device=None: getattr(running, "stream", current)
    )

    @contextmanager
    def stream(chosen):
        running.stream = chosen
        try:
            yield
        finally:
            del running.stream

    monkeypatch.setattr(torch.cuda, "stream", stream)
    return log


class Made:
    """A tensor that notes which stream it is recorded on."""

    device = GPU.device

    def __init__(self, log: list) -> None:
        self.log = log

    def record_stream(self, stream) -> None:
        self.log.append(f"recorded on {stream.name}")


def prefill(name: str, log: list):
    def run():
        log.append(f"{name} on {torch.cuda.current_stream().name}")
        return [(Made(log), Made(log))]

    return run


def test_the_side_stream_begins_and_ends_in_order(log) -> None:
    ov.run_both("stream", GPU, [GPU], prefill("receiver", log), prefill("sharer", log))
    assert log == [
        "side waits for current",
        "sharer on side",
        "receiver on current",
        "current waits for side",
        *["recorded on current"] * 2,
    ]


def test_the_thread_launches_on_the_side_stream(log) -> None:
    ov.run_both("thread", GPU, [GPU], prefill("receiver", log), prefill("sharer", log))
    assert sorted(log[1:3]) == ["receiver on current", "sharer on side"]
    assert log[:1] + log[3:] == [
        "side waits for current",
        "current waits for side",
        *["recorded on current"] * 2,
    ]


@pytest.mark.parametrize("how", ["stream", "thread"])
@pytest.mark.parametrize("failing", [0, 1])
def test_after_an_error_the_current_stream_waits_too(log, how, failing) -> None:
    prefills = [prefill("receiver", log), prefill("sharer", log)]
    prefills[failing] = fails
    with pytest.raises(KeyError, match="stopped"):
        ov.run_both(how, GPU, [GPU], *prefills)
    assert log[0] == "side waits for current" and log[-1] == "current waits for side"
    assert torch.cuda.current_stream().name == "current"


@pytest.mark.parametrize("how", ["none", "stream", "thread"])
@pytest.mark.parametrize("models", [(CPU, GPU), (GPU, GPU)], ids=["receiver on CPU", "both"])
def test_streams_are_for_two_models_on_gpus(log, how, models) -> None:
    ov.run_both(how, models[0], [models[1]], prefill("receiver", log), prefill("sharer", log))
    overlapped = how != "none" and models[0] is GPU
    in_turn = ["receiver on current", "sharer on current"]
    assert (log == in_turn) != overlapped


def test_tensors_of_another_gpu_are_not_recorded(log) -> None:
    made = Made(log)
    made.device = torch.device("cuda", 1)
    ov.run_both("stream", GPU, [GPU], lambda: [], lambda: [(made, made)])
    assert not [line for line in log if "recorded" in line]


def test_prefills_in_two_threads_equal_those_in_turn(trio) -> None:
    receiver, sharer, _ = trio
    ids = prompt(4, 64)

    def run(model):
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        return [(layer.keys, layer.values) for layer in cache.layers]

    expected = both(lambda: run(receiver), lambda: run(sharer), "none")
    found = both(lambda: run(receiver), lambda: run(sharer))
    for a, b in zip(expected, found, strict=True):
        assert all(map(same_bits, flat(a), flat(b)))

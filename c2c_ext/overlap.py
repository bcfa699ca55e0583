"""Prefills at once: the sharers' beside the receiver's, on a CUDA stream or in a thread.

Results are those of one after the other. No GPU has measured what it gains, so it is not a default.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from .cache import KVPairs

OVERLAPS = ("none", "stream", "thread")
Prefill = Callable[[], KVPairs]


def usable(overlap: str, receiver: PreTrainedModel, sharers: Sequence[PreTrainedModel]) -> str:
    """``overlap``, or ``"none"`` where a sharer shares parameters with the receiver.

    No model runs twice at once; the sharers themselves run one after the other.

    Raises:
        ValueError: ``overlap`` is none of `OVERLAPS`.
    """
    if overlap not in OVERLAPS:
        raise ValueError(
            f"c2c_ext.attach: overlap must be one of {', '.join(OVERLAPS)}, got {overlap!r}"
        )
    if overlap == "none":
        return overlap
    own = {id(parameter) for parameter in receiver.parameters()}
    shared = any(id(p) in own for sharer in sharers for p in sharer.parameters())
    return "none" if shared else overlap


def run_both(
    overlap: str,
    receiver: PreTrainedModel,
    sharers: Sequence[PreTrainedModel],
    receiver_prefill: Prefill,
    sharer_prefill: Prefill,
) -> tuple[KVPairs, KVPairs]:
    """What both prefills give, ready for the current streams.

    One after the other where they cannot overlap: ``"stream"`` needs all models on GPUs,
    ``"thread"`` sharers on one device; several sharers are on the same one.

    Args:
        overlap: of `usable`.
        receiver_prefill: its inputs are on the receiver's device already.
        sharer_prefill: of all sharers, one after the other; likewise.

    Raises:
        What a prefill raises, once the other has ended; the receiver's where both do.
    """
    places = set() if overlap == "none" else {_device_of(sharer) for sharer in sharers}
    place = places.pop() if len(places) == 1 else None
    on_gpus = place is not None and place.type == receiver.device.type == "cuda"
    if overlap == "stream" and on_gpus:
        with _beside(side_stream(place)) as (side, hand_over):
            with torch.cuda.stream(side):  # launched first: the GPU begins while the host goes on
                shared = sharer_prefill()
            base = receiver_prefill()
        hand_over(shared)
        return base, shared
    if overlap == "thread" and on_gpus:
        with _beside(side_stream(place)) as (side, hand_over):
            base, shared = _in_a_thread(receiver_prefill, sharer_prefill, side)
        hand_over(shared)
        return base, shared
    if overlap == "thread" and place is not None and place.type == "cpu":
        return _in_a_thread(receiver_prefill, sharer_prefill, None)
    return receiver_prefill(), sharer_prefill()


def _device_of(model: PreTrainedModel) -> torch.device | None:
    """Where the model is; None where accelerate has spread it over several devices."""
    placed = getattr(model, "hf_device_map", None)
    return model.device if placed is None or len(set(placed.values())) == 1 else None


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a GPU that sharers run on: libraries keep workspaces for every stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _beside(
    side: torch.cuda.Stream,
) -> Iterator[tuple[torch.cuda.Stream, Callable[[KVPairs], None]]]:
    """``side`` begins after what the current stream of its GPU has, which waits for it at the end.

    Also gives what hands tensors made on ``side`` over to the current stream: their memory is not
    used again before that is done with them.
    """
    current = torch.cuda.current_stream(side.device)
    side.wait_stream(current)
    try:
        yield side, lambda pairs: _record(pairs, current)
    finally:  # after an error too: what the side stream reads may be freed then
        current.wait_stream(side)


def _record(pairs: KVPairs, stream: torch.cuda.Stream) -> None:
    for tensor in (tensor for pair in pairs for tensor in pair):
        if tensor.device == stream.device:
            tensor.record_stream(stream)


def _in_a_thread(
    receiver_prefill: Prefill, sharer_prefill: Prefill, side: torch.cuda.Stream | None
) -> tuple[KVPairs, KVPairs]:
    """The sharer's in a thread of its own, which has ended when this does, whatever happens."""
    enter_modes, context = _modes(), contextvars.copy_context()
    results: list[KVPairs] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with ExitStack() as modes:
                enter_modes(modes)
                if side is not None:
                    modes.enter_context(torch.cuda.stream(side))
                results.append(sharer_prefill())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=context.run, args=(run,), name="c2c_ext sharer prefill")
    thread.start()
    try:
        base = receiver_prefill()
    finally:
        _join(thread)
    if errors:
        raise errors[0]
    return base, results[0]


def _modes() -> Callable[[ExitStack], None]:
    """What makes another thread run in this one's modes: those of PyTorch belong to a thread.

    Gradients, inference mode, autocast and the default device. The default dtype is the whole
    process's; other modes that were entered by ``with`` are not carried over.
    """
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    device = torch.get_default_device()
    autocasts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]

    def enter(modes: ExitStack) -> None:
        if inference:
            modes.enter_context(torch.inference_mode())
        modes.enter_context(torch.set_grad_enabled(grad))
        if device != torch.get_default_device():
            modes.enter_context(device)
        for kind, dtype, cached in autocasts:
            modes.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))

    return enter


def _join(thread: threading.Thread) -> None:
    """Waits even if interrupted; the interrupt is raised afterwards."""
    interrupt = None
    while thread.is_alive():
        try:
            thread.join()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt

"""One `generate` in a thread of its own: text as it comes, its times, and a way to stop it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

WAIT_SECONDS = 0.1  # between two looks whether to stop, while another answer is being generated


class Generation:
    """Iterating generates and yields text; `stop`, or not iterating to the end, ends it.

    Stopping takes effect after the forward pass that is running; when the iteration has ended, no
    thread is left.

    Args:
        run: calls generate with the keywords that it is given (streamer, stopping_criteria).
        tokenizer: of the model that answers.
        lock: held while generating.

    Attributes:
        tokens: generated so far.
        first_token_seconds: from the moment that the lock was had; None before the first token.
        seconds: from then to the end.
        waited_seconds: for the lock.
        stopped: whether it was stopped.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        lock: threading.Lock,
    ) -> None:
        self._run, self._lock = run, lock
        self._streamer = _CountingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._began = self._ended = 0.0
        self.waited_seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        # A daemon: a forward pass that takes long must not keep the process from ending.
        thread = threading.Thread(target=self._work, name="c2c generate", daemon=True)
        thread.start()
        try:
            yield from (piece for piece in self._streamer if piece)
        finally:
            if not self._streamer.ended:
                self.stop()
            thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Ends the generation after the token that is being computed; from any thread."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    @property
    def tokens(self) -> int:
        """Generated so far."""
        return self._streamer.tokens

    @property
    def first_token_seconds(self) -> float | None:
        """Until the first token."""
        first = self._streamer.first
        return None if first is None else first - self._began

    @property
    def seconds(self) -> float:
        """Until the end."""
        return self._ended - self._began

    def _work(self) -> None:
        asked = time.perf_counter()
        try:
            while not self._lock.acquire(timeout=WAIT_SECONDS):
                if self.stopped:
                    return
            try:
                self._began = time.perf_counter()
                self.waited_seconds = self._began - asked
                self._run(
                    streamer=self._streamer,
                    stopping_criteria=StoppingCriteriaList([_Stop(self._stop)]),
                )
            finally:
                self._lock.release()
        except BaseException as error:  # raised again in the thread that iterates
            self._error = error
        finally:
            self._ended = time.perf_counter()
            self._streamer.end()


class _CountingStreamer(TextIteratorStreamer):
    """Also counts the tokens and remembers when the first one came."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Ctrl-C while queue.Queue waits may come between its locks: RuntimeError instead.
        self.text_queue = queue.SimpleQueue()
        self.tokens, self.first, self.ended = 0, None, False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            if self.first is None:
                self.first = time.perf_counter()
        super().put(value)

    def end(self) -> None:
        self.ended = True
        super().end()


class _Stop(StoppingCriteria):
    """Every row is done once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)

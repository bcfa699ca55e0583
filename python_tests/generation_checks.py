"""Prompts, the call of generate and the comparisons that the tests of generation share."""

from __future__ import annotations

import plain_loop
import tiny_models
import torch
from torch import Tensor

STEPS = 6
# float32 logits of order 1; the fusions compared here differ by more than VISIBLE.
CLOSE = {"rtol": 3e-5, "atol": 3e-5}
VISIBLE = 0.1


def prompt(rows: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, tiny_models.VOCABULARY, (rows, length), generator=generator)


def left_padded(lengths: tuple[int, ...] = (11, 4, 1)) -> tuple[Tensor, Tensor]:
    ids = prompt(len(lengths), max(lengths))
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return ids * mask, mask


def generate(receiver, ids: Tensor | None, **kwargs):
    settings = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    return receiver.generate(ids, **{**settings, **kwargs})


def new_tokens(output, ids: Tensor) -> Tensor:
    return output.sequences[:, ids.shape[1] :]


def logits_of(output) -> Tensor:
    return torch.stack(output.logits, 1)


def assert_same_run(output, ids: Tensor, expected: plain_loop.Decoded, *, kv: bool = True) -> None:
    """Tokens equal, logits close, and (full caches only) every cached key and value close."""
    torch.testing.assert_close(logits_of(output), expected.logits, **CLOSE)
    assert torch.equal(new_tokens(output, ids), expected.tokens)
    if kv:
        torch.testing.assert_close(plain_loop.kv_of(output.past_key_values), expected.kv, **CLOSE)


def assert_visible(expected: plain_loop.Decoded, receiver, ids: Tensor, mask=None) -> None:
    """The guard: the same loop over the unfused cache gives other logits from the first step on."""
    before = None if mask is None else mask[:, :-1]
    clean = plain_loop.prefill(receiver, ids[:, :-1], before)
    unfused = plain_loop.decode(
        receiver, clean, ids, 1, mask=mask, choose=plain_loop.forced(expected.tokens)
    )
    assert (unfused.logits[:, 0] - expected.logits[:, 0]).abs().max() > VISIBLE

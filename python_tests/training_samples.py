"""Samples and models that the tests of training share."""

from __future__ import annotations

import torch
from plain_training import Row
from tiny_models import fuser_between, receiver_model, sharer_model


def random_ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(seed))


def ragged_rows() -> list[Row]:
    """Long and short prompts and responses, one prompt of a single token."""
    return [Row(random_ids(n, n), p) for n, p in ((13, 8), (9, 3), (15, 12), (6, 1))]


def mapped_rows() -> list[Row]:
    """The sharer reads other tokens, more or fewer than the receiver."""
    rows = []
    for i, (n, p, s) in enumerate(((12, 7, 9), (8, 5, 3), (5, 1, 2))):
        generator = torch.Generator().manual_seed(i)
        token_map = torch.randint(-1, s, (p - 1,), generator=generator)
        rows.append(Row(random_ids(n, n), p, sharer_ids=random_ids(s, s), token_map=token_map))
    return rows


def chosen_rows() -> list[Row]:
    rows = ragged_rows()
    for row in rows[:3]:
        row.columns = torch.rand(row.prompt - 1, generator=torch.Generator().manual_seed(1)) < 0.5
    return rows


def gap_rows() -> list[Row]:
    """Two responses with a question between them that is not learnt."""
    rows = ragged_rows()
    for row in rows:
        row.learnt = torch.arange(len(row.ids)) != len(row.ids) - 2
    return rows


ROWS = {
    "one": lambda: [Row(random_ids(9, 0), 5)],
    "equal": lambda: [Row(random_ids(9, i), 5) for i in range(3)],
    "ragged": ragged_rows,
    "single_tokens": lambda: [Row(random_ids(n, n), 1) for n in (4, 7)],
    "chosen": chosen_rows,
    "mapped": mapped_rows,
    "gaps": gap_rows,
}


def models(kind: str = "qwen3", dtype: torch.dtype = torch.float64, **changes: object):
    receiver, sharer = receiver_model(kind), sharer_model()
    fuser = fuser_between(receiver, sharer, **changes)
    fuser_dtype = dtype if dtype == torch.float64 else torch.float32
    return receiver.to(dtype), sharer.to(dtype), fuser.to(fuser_dtype)

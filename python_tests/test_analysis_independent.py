"""Every analysis against a computation that shares none of its code: numpy, gates, generate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import set_gates
from tiny_models import VOCABULARY, trio
from torch import Tensor

from c2c_ext import attached, fuse, reference
from c2c_ext.analysis import attention_outputs as ao
from c2c_ext.analysis import curves, readings
from c2c_ext.analysis.effective_rank import effective_rank, rank_rows
from c2c_ext.analysis.weight_maps import weight_rows

TOKENS, BATCH = 6, 3
FUSED = range(1, 5)  # of the 6 tokens before the last


@pytest.fixture(scope="module")
def case() -> tuple:
    """(receiver, sharer, fuser, prompts [B, N + 1], answers [B], their reading)."""
    receiver, sharer, fuser = trio()
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS + 1), generator=generator)
    answers = torch.randint(VOCABULARY, (BATCH,), generator=generator)
    token_map = torch.full((TOKENS,), -1)
    token_map[list(FUSED)] = torch.tensor(list(FUSED))
    reading = readings.read(receiver, sharer, ids, ids[:, :-1], token_map, answers=answers)
    return receiver, sharer, fuser, ids, answers, reading


def cache_of(model: torch.nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of a plain forward over all of ``ids``."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]


def generated_logits(case: tuple, positions: range) -> Tensor:
    """What an attached receiver's generate says first ``[B, V]`` when these positions are fused."""
    receiver, sharer, fuser, ids, _, _ = case
    if not len(positions):
        return receiver(input_ids=ids).logits[:, -1].detach()
    with attached(receiver, sharer, fuser) as whole:
        said = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            positions=positions,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return said.logits[0]


def assert_row(row: dict, logits: Tensor, full: Tensor, answers: Tensor) -> None:
    """A curve's row is what these logits say; ``full`` are those on the whole fusion."""
    said, whole = logits.argmax(dim=1), full.argmax(dim=1)
    assert row["questions"] == len(answers)
    assert row["right"] == int((said == answers).sum())
    assert row["as_fused"] == int((said == whole).sum())
    p, q = (t.double().softmax(dim=1).numpy() for t in (full, logits))
    assert row["kl"] == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), abs=2e-5)


@pytest.mark.parametrize("shape", [(3, 9), (40, 5), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_effective_rank_is_the_entropy_of_the_grams_eigenvalues(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)
    exact = matrix.double().numpy()
    gram = exact @ exact.T if shape[0] <= shape[1] else exact.T @ exact
    lengths = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    part = lengths / lengths.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-sum(p * math.log(p) for p in part)))


def test_ranks_are_those_of_the_models_own_caches(case: tuple) -> None:
    receiver, sharer, fuser, ids, _, reading = case
    rows = {(r["cache"], r["layer"]): r for r in rank_rows([reading], fuser)}
    for name, model in (("sharer", sharer), ("receiver", receiver)):
        for layer, pair in enumerate(cache_of(model, ids[:, :-1])):
            for kind, tensor in zip(("key", "value"), pair, strict=True):
                vectors = [
                    torch.cat([tensor[b, head, n] for head in range(tensor.shape[1])])
                    for b in range(BATCH)
                    for n in FUSED
                ]
                lengths = np.linalg.svd(torch.stack(vectors).double().numpy(), compute_uv=False)
                part = lengths / lengths.sum()
                expected = math.exp(-(part * np.log(part)).sum())
                assert rows[name, layer][kind] == pytest.approx(expected, rel=1e-4)
                assert rows[name, layer]["rows"] == BATCH * len(FUSED)


def test_mean_weights_are_those_of_the_formula(case: tuple) -> None:
    """Section 2 of the design, one token and head at a time, from the fuser's own parameters."""
    receiver, sharer, fuser, ids, _, reading = case
    rows = {(r["layer"], r["kind"], r["head"]): r for r in weight_rows([reading], fuser)}
    ours, theirs = (cache_of(model, ids[:, :-1]) for model in (receiver, sharer))
    layer, place, kind = 2, 1, "value"
    streams, index = reference.streams_of(fuser)[layer, kind]
    w = streams(index, torch.float64)

    def block(z: Tensor, b: reference.BlockWeights) -> Tensor:
        normed = z / (z.square().mean() + 1e-6).sqrt() * b.norm
        inner = b.w1 @ normed
        return z + b.w2 @ (inner / 2 * (1 + torch.erf(inner / 2**0.5)))

    weights = []
    source = theirs[fuser.config.layer_map[layer]][place]
    for b in range(BATCH):
        for n in FUSED:
            c = torch.cat([source[b, :, n].flatten(), ours[layer][place][b, :, n].flatten()])
            z = block(w.in_weight @ c.double() + w.in_bias, w.shared)
            weights.append(torch.sigmoid(w.head_weight @ block(z, w.weight) + w.head_bias))
    for head, expected in enumerate(torch.stack(weights).detach().T):
        row = rows[layer, kind, head]
        assert row["tokens"] == BATCH * len(FUSED)
        assert row["mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert row["std"] == pytest.approx(float(expected.std(correction=0)), abs=1e-5)


@torch.no_grad()
def test_a_part_of_the_layers_is_the_fuser_with_the_other_gates_closed(case: tuple) -> None:
    receiver, sharer, _, ids, answers, reading = case
    fuser = trio()[2]  # gates are changed
    full = generated_logits(case, FUSED)
    layers = range(3)
    expected = {
        **{("first", n): set(layers[:n]) for n in range(4)},
        **{("last", n): set(layers[3 - n :]) for n in range(4)},
        **{("only", n): {n} for n in layers},
        **{("without", n): set(layers) - {n} for n in layers},
    }
    rows = {(r["which"], r["layers"]): r for r in curves.layer_rows(receiver, fuser, [reading])}
    assert rows.keys() == expected.keys()
    for key, chosen in expected.items():
        opened = {(n, kind): 1.0 for n in chosen for kind in ("key", "value")}
        set_gates(fuser, opened, default=-1.0)
        with attached(receiver, sharer, fuser) as whole:
            said = whole.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                positions=FUSED,
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        assert_row(rows[key], said.logits[0], full, answers)


def test_a_part_of_the_positions_is_what_generate_fuses_of_them(case: tuple) -> None:
    receiver, _, fuser, _, answers, reading = case
    full = generated_logits(case, FUSED)
    rows = {
        (r["which"], r["positions"], r["part"]): r
        for r in curves.position_rows(receiver, fuser, [reading])
    }
    assert len(rows) == 2 * 5 + 2 * 4
    for n in range(5):
        for which, places in (("first", FUSED[:n]), ("last", FUSED[4 - n :])):
            assert_row(rows[which, n, n / 4], generated_logits(case, places), full, answers)
    for n in range(4):
        only = generated_logits(case, FUSED[n : n + 1])
        assert_row(rows["only", 1, (n + 1) / 4], only, full, answers)


@torch.no_grad()
def test_all_but_one_position_is_fused_as_a_map_says(case: tuple) -> None:
    receiver, sharer, fuser, ids, answers, reading = case
    full = generated_logits(case, FUSED)
    rows = [r for r in curves.position_rows(receiver, fuser, [reading]) if r["which"] == "without"]
    for left_out, row in zip(FUSED, rows, strict=True):
        places = torch.tensor([n if n in FUSED and n != left_out else -1 for n in range(TOKENS)])
        cache = fuse(
            cache_of(receiver, ids[:, :-1]),
            cache_of(sharer, ids[:, :-1]),
            fuser,
            token_map=places,
        )
        logits = readings.next_logits(receiver, cache, reading)
        assert row["positions"] == 3
        assert_row(row, logits, full, answers)


@torch.no_grad()
def test_cosines_are_of_a_plain_forward_and_of_generates(case: tuple) -> None:
    receiver, _, fuser, ids, _, reading = case
    seen: dict[int, Tensor] = {}
    layers = receiver.model.layers
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _, __, output, i=i: seen.__setitem__(i, output[0][:, -1].double())
        )
        for i, layer in enumerate(layers)
    ]
    try:
        receiver(input_ids=ids)
        plain = dict(seen)
        generated_logits(case, FUSED)
        changed = dict(seen)
    finally:
        for hook in hooks:
            hook.remove()
    found = ao.attention_cosines(
        ao.attention_outputs(receiver, readings.fused(reading, fuser), reading.last)[0],
        ao.attention_outputs(receiver, reading.receiver, reading.last)[0],
    )
    for i in range(len(layers)):
        expected = F.cosine_similarity(changed[i], plain[i], dim=1)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-4)
        assert float(expected.max()) < 0.999

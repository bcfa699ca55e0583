"""The formulas of the uncompiled variants, stated once more in float64 and token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import flat, make_caches, make_config, make_fuser, max_abs, relative_error, same_bits
from torch import Tensor
from variants import LINEAR, UNCOMPILED, fused_by_fuse

from c2c_ext import Fuser, FuserConfig


def tokens_of(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D]."""
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def heads_of(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape[0], like.shape[2], like.shape[1], like.shape[3]).transpose(1, 2)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@pytest.mark.parametrize("integration", ["residual", "interpolation", "replacement"])
@pytest.mark.parametrize("reads", ["both", "sharer"])
def test_linear_projection_is_one_map(integration, reads):
    config = make_config(**LINEAR, reads=reads, integration=integration)
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, dtype=torch.float64)
    fused = fused_by_fuse(fuser, base, sharer)
    for layer, source in enumerate(config.layer_map):
        for kind in (0, 1):
            t, s = base[layer][kind], sharer[source][kind]
            weight = dict(fuser.named_parameters())["groups.0.out_weight"][2 * layer + kind]
            read = torch.cat([tokens_of(s), tokens_of(t)], -1) if reads == "both" else tokens_of(s)
            p = heads_of(torch.einsum("oi,bni->bno", weight, read), t)
            expected = {"residual": t + p, "interpolation": p, "replacement": p}[integration]
            assert relative_error(fused[layer][kind], expected) <= 1e-13


def test_second_write_ups_formula_is_w_times_the_sharers_cache():
    """``W x sharer cache`` added to the receiver's, and nothing else, by for_models' defaults."""
    shapes = {"model_type": "toy", "num_key_value_heads": 2, "num_attention_heads": 2}

    class ModelConfig:
        def __init__(self, layers: int, head_dim: int) -> None:
            self.__dict__.update(shapes, num_hidden_layers=layers, head_dim=head_dim)

    config = FuserConfig.for_models(
        ModelConfig(4, 8), ModelConfig(2, 4), projection="linear", layer_map="depth"
    )
    assert (config.reads, config.weighting, config.layer_map) == ("sharer", False, (0, 0, 1, 1))
    fuser = Fuser(config).double()
    assert sorted(n for n, _ in fuser.named_parameters()) == [
        "groups.0.gate_logit",
        "groups.0.out_weight",
    ]
    base, sharer = make_caches(config, dtype=torch.float64)
    fused = fused_by_fuse(fuser, base, sharer)
    expected = base[3][1] + heads_of(
        tokens_of(sharer[1][1]) @ fuser.groups[0].out_weight[7].T, base[3][1]
    )
    assert relative_error(fused[3][1], expected) <= 1e-13


@pytest.mark.parametrize("name", ["transformer", "transformer block", "self-attention"])
def test_transformer_attends_to_the_sharers_tokens_so_far(name):
    config = make_config(**UNCOMPILED[name])
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, 2, 5, 7, dtype=torch.float64)
    token_map = torch.tensor([[6, -1, 0, 2, 1], [0, 1, 2, 3, 4]])
    fused = fused_by_fuse(fuser, base, sharer, token_map=token_map)
    p = {n.removeprefix("groups.0."): x for n, x in fuser.named_parameters()}
    layer, kind, stream = 1, 0, 2  # keys of receiver layer 1
    w = {n: x[stream] for n, x in p.items()}
    heads, size = config.attention_heads, config.hidden_size // config.attention_heads

    def block(z: Tensor, norm: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return z + F.gelu(rms_norm(z, norm) @ w1.T) @ w2.T

    for b, n in itertools.product(range(2), range(5)):
        t = base[layer][kind][b, :, n]
        if token_map[b, n] < 0:
            assert same_bits(fused[layer][kind][b, :, n], t)
            continue
        seen = [int(m) for m in token_map[b, : n + 1] if m >= 0]
        source = sharer[config.layer_map[layer]][kind][b][:, seen]  # [Hs, seen, Ds]
        y = source.transpose(0, 1).flatten(1) @ w["source_weight"].T + w["source_bias"]
        x = y[-1] if config.reads == "sharer" else t.flatten() @ w["in_weight"].T + w["in_bias"]
        query = w["query_weight"] @ rms_norm(x, w["query_norm"])
        keys = rms_norm(y, w["source_norm"]) @ w["key_weight"].T
        values = rms_norm(y, w["source_norm"]) @ w["value_weight"].T
        attended = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.softmax(keys[:, part] @ query[part] / size**0.5, 0)
            attended.append(scores @ values[:, part])
        z = x + w["merge_weight"] @ torch.cat(attended)
        z = block(z, w["shared_norm"], w["shared_w1"], w["shared_w2"])
        projected = z
        for i in range(config.depth - 2):
            projected = block(projected, w["proj_norm"][i], w["proj_w1"][i], w["proj_w2"][i])
        projected = w["out_weight"] @ projected + w["out_bias"]
        a = block(z, w["weight_norm"], w["weight_w1"], w["weight_w2"])
        weighting = torch.sigmoid(w["head_weight"] @ a + w["head_bias"])
        expected = t + weighting[:, None] * projected.view_as(t)
        assert relative_error(fused[layer][kind][b, :, n], expected) <= 1e-12
        assert max_abs(expected - t) > 0.01


def test_transformer_tokens_do_not_depend_on_later_ones():
    fuser = make_fuser(make_config(**UNCOMPILED["transformer"]))
    base, sharer = make_caches(fuser.config, 1, 6, dtype=torch.float64)
    whole = fused_by_fuse(fuser, base, sharer)
    other = [(key.clone(), value.clone()) for key, value in sharer]
    for key, value in other:
        key[:, :, 4:] += 1.0
        value[:, :, 4:] += 1.0
    changed = fused_by_fuse(fuser, base, other)
    for x, y in zip(flat(whole), flat(changed), strict=True):
        assert relative_error(x[:, :, :4], y[:, :, :4]) <= 1e-13
        assert max_abs(x[:, :, 4:] - y[:, :, 4:]) > 1e-3

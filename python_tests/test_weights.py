"""The dynamic weights of a fusion, against the formula on golden data and against the fusion."""

from __future__ import annotations

import golden_data
import pytest
import torch
from conftest import make_caches, make_config, make_fuser, relative_error, set_gates
from torch import Tensor
from variants import EVERY

from c2c_ext.weights import fusion_weights


def by_formula(w: dict[str, Tensor], kind: str, source: Tensor, target: Tensor) -> tuple:
    """(r, P) of golden/FORMAT.md section 1, token by token, float64: [B, Ht, N], [B, Ht, N, Dt]."""

    def at(name: str) -> Tensor:
        return w[f"{kind}_{name}"].double()

    def block(z: Tensor, name: str) -> Tensor:
        scale = (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        u = (z / scale * at(f"{name}.norm.weight")) @ at(f"{name}.w1.weight").T
        gelu = u / 2 * (1 + torch.erf(u / 2**0.5))
        return z + gelu @ at(f"{name}.w2.weight").T

    batch, heads, tokens, dim = target.shape
    c = torch.cat([x.double().transpose(1, 2).flatten(2) for x in (source, target)], dim=-1)
    z1 = block(c @ at("in.weight").T + at("in.bias"), "mlp1.blocks.0")
    a = block(z1, "scalar_mlp2.blocks.0")
    r = torch.sigmoid(a @ at("scalar_head.weight").T + at("scalar_head.bias")).transpose(1, 2)
    p, i = z1, 0
    while f"{kind}_proj_mlp2.blocks.{i}.w1.weight" in w:
        p, i = block(p, f"proj_mlp2.blocks.{i}"), i + 1
    p = p @ at("proj_out.weight").T + at("proj_out.bias")
    return r, p.view(batch, tokens, heads, dim).transpose(1, 2)


@pytest.mark.parametrize(("name", "case"), golden_data.cases(golden_data.EVAL_FILES))
def test_weights_are_those_of_the_golden_data(name: str, case: int) -> None:
    file = golden_data.load(name)
    tensors, fuser = file.case(case), golden_data.build_fuser(file, case, torch.float64)
    caches = [
        [tuple(tensors[f"{side}_{kind}"].double() for kind in ("key", "value"))]
        for side in ("target", "source")
    ]
    (layer,) = fusion_weights(*caches, fuser)
    for i, kind in enumerate(("key", "value")):
        target, source = (cache[0][i] for cache in caches)
        weights, projected = by_formula(file.weights(), kind, source, target)
        gate = bool(tensors[f"{kind}_gate_logit"] > 0)
        out = target + gate * weights[..., None] * projected
        assert relative_error(out, tensors[f"out_{kind}_f64"]) <= 1e-12  # the formula is right
        assert relative_error(getattr(layer, kind), weights) <= 1e-12
        assert getattr(layer, f"{kind}_open") is gate
        assert torch.equal(layer.applied(kind), getattr(layer, kind) * gate)


def test_a_token_map_leaves_nan_where_nothing_is_fused() -> None:
    fuser = make_fuser().double()
    receiver, sharer = make_caches(fuser.config, 2, 5, 7, torch.float64)
    token_map = torch.tensor([[0, -1, 6, 2, -1], [3, 3, -1, 0, 1]])
    layers = fusion_weights(receiver, sharer, fuser, token_map)
    index = token_map.clamp(0)[:, None, :, None]
    gathered = [
        tuple(t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in pair)
        for pair in sharer
    ]
    for layer, whole in zip(layers, fusion_weights(receiver, gathered, fuser), strict=True):
        for kind in ("key", "value"):
            ours = getattr(layer, kind)
            mapped = (token_map >= 0)[:, None].expand_as(ours)
            assert torch.equal(ours.isnan(), ~mapped)
            assert torch.equal(ours[mapped], getattr(whole, kind)[mapped])


@pytest.mark.parametrize("name", EVERY)
def test_every_variant_has_weights_of_its_shape(name: str) -> None:
    fuser = make_fuser(make_config(**EVERY[name]))
    receiver, sharer = make_caches(fuser.config, 2, 5)
    layers = fusion_weights(receiver, sharer, fuser)
    assert len(layers) == len(receiver)
    for layer, (key, _) in zip(layers, receiver, strict=True):
        for kind in ("key", "value"):
            weights = getattr(layer, kind)
            if kind not in fuser.config.kinds:
                assert weights is None and not getattr(layer, f"{kind}_open")
                continue
            assert weights.shape == key.shape[:3] and not weights.requires_grad
            assert bool(((weights > 0) & (weights <= 1)).all())


def test_closed_gates_are_marked() -> None:
    fuser = make_fuser()
    set_gates(fuser, {(0, "key"): 0.0, (1, "value"): -1.0})
    layers = fusion_weights(*make_caches(fuser.config), fuser)
    assert [(x.key_open, x.value_open) for x in layers] == [(False, True), (True, False)]
    assert not layers[0].applied("key").any() and layers[0].key.all()
    assert torch.equal(layers[1].applied("key"), layers[1].key)


def test_what_does_not_fit_is_refused() -> None:
    fuser = make_fuser()
    receiver, sharer = make_caches(fuser.config, 2, 5)
    with pytest.raises(TypeError, match=r"fuser must be a c2c_ext.Fuser, got int"):
        fusion_weights(receiver, sharer, 3)
    with pytest.raises(ValueError, match="receiver_cache must have 2 layers, got 1"):
        fusion_weights(receiver[:1], sharer, fuser)
    with pytest.raises(ValueError, match=r"sharer_cache layer 0 key must be \[2, 1, 5, 4\], got"):
        fusion_weights(receiver, [receiver[0]] * 3, fuser)
    with pytest.raises(ValueError, match="at least 5 tokens without a token_map, got 4"):
        short = [(k[:, :, :4], v[:, :, :4]) for k, v in sharer]
        fusion_weights(receiver, short, fuser)
    with pytest.raises(ValueError, match=r"token_map must be \[5\] or \[2, 5\], got \[4\]"):
        fusion_weights(receiver, sharer, fuser, torch.zeros(4, dtype=torch.int64))

"""The variants of docs/differences.md: formulas stated again, compiled op, files, generate."""

from __future__ import annotations

import itertools
import json

import plain_loop
import pytest
import tiny_models
import torch
from conftest import (
    assert_fused,
    cast,
    clone,
    flat,
    make_caches,
    make_config,
    make_fuser,
    max_abs,
    relative_error,
    run_op,
    run_reference,
    same_bits,
)
from generation_checks import (
    CLOSE,
    STEPS,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    logits_of,
)
from torch import Tensor
from variants import COMPILED, EVERY, UNCOMPILED, fused_by_fuse

from c2c_ext import Fuser, FuserConfig, attached, fuse, reference
from c2c_ext.config import KINDS, VARIANT_FIELDS

GROUPS = {
    "receiver": [(2, 8), (1, 20), (2, 8)],
    "sharer": [(1, 4), (3, 6)],
    "layer_map": [1, 0, 0],
}
ALL_COMPILED = [
    {"reads": r, "integration": i, "weighting": w, "kinds": k}
    for r, i, w, k in itertools.product(
        ("both", "sharer"),
        ("residual", "interpolation", "replacement"),
        (True, False),
        (KINDS, ("key",), ("value",)),
    )
]


def fused_kinds_differ(fuser: Fuser, base, fused) -> None:
    """Fused kinds differ from the receiver's own cache; the others are its bits."""
    for pair, own in zip(fused, base, strict=True):
        for kind, x, t in zip(KINDS, pair, own, strict=True):
            if kind in fuser.config.kinds:
                assert max_abs(x - t) > 0.1
            else:
                assert same_bits(x, t)


@pytest.mark.parametrize("changes", [*COMPILED.values()], ids=[*COMPILED])
@pytest.mark.parametrize("shape", [{}, GROUPS, {"depth": 5, "hidden_size": 12}], ids=str)
def test_compiled_variants_match_the_reference(changes, shape, dtype):
    fuser = make_fuser(make_config(**shape, **changes))
    assert fuser.config.uncompiled_reason() is None
    base, sharer = make_caches(fuser.config, dtype=dtype)
    fused = run_op(fuser, base, sharer)
    fused_kinds_differ(fuser, base, fused)
    assert_fused(fuser, base, sharer, fused, differs=False)


@pytest.mark.parametrize("changes", ALL_COMPILED, ids=lambda c: " ".join(map(str, c.values())))
def test_every_combination_runs_in_the_op(changes):
    fuser = make_fuser(make_config(**changes))
    base, sharer = make_caches(fuser.config, sharer_tokens=9, dtype=torch.float64)
    token_map = torch.tensor([[0, 8, -1, 3, 3], [-1, 1, 2, 7, -1]])
    fused = run_op(fuser, base, sharer, token_map)
    truth = run_reference(fuser, base, sharer, token_map)
    for x, t in zip(flat(fused), flat(truth), strict=True):
        assert relative_error(x, t) <= 1e-13
    assert max(max_abs(x - t) for x, t in zip(flat(fused), flat(base), strict=True)) > 0.1
    assert same_bits(fused[0][1][0, :, 2], base[0][1][0, :, 2])


@pytest.mark.parametrize("changes", [*COMPILED.values()], ids=[*COMPILED])
def test_accumulate_adds_what_the_variant_changes(changes):
    fuser = make_fuser(make_config(**changes))
    base, sharer = make_caches(fuser.config, dtype=torch.float64)
    start = [(torch.randn_like(key), torch.randn_like(value)) for key, value in base]
    total = run_op(fuser, base, sharer, out=clone(start), accumulate=True)
    fused = run_reference(fuser, base, sharer)
    for x, s, f, t in zip(flat(total), flat(start), flat(fused), flat(base), strict=True):
        assert relative_error(x, s + (f - t)) <= 1e-13


# ---- what every variant has to do --------------------------------------------------------------


@pytest.fixture(params=EVERY.values(), ids=EVERY.keys())
def variant(request: pytest.FixtureRequest) -> dict:
    return request.param


def test_fuse_follows_the_reference(variant, dtype):
    """Through `fuse`, over a range, in place and not."""
    fuser = make_fuser(make_config(**variant))
    base, sharer = make_caches(fuser.config, dtype=dtype)
    part = [(key[:, :, 1:4], value[:, :, 1:4]) for key, value in base]
    part_sharer = [(key[:, :, 1:4], value[:, :, 1:4]) for key, value in sharer]
    fused = fused_by_fuse(fuser, base, sharer, start=1, end=4)
    middle = [(key[:, :, 1:4], value[:, :, 1:4]) for key, value in fused]
    fused_kinds_differ(fuser, part, middle)
    if fuser.config.uncompiled_reason() is None:
        assert_fused(fuser, part, part_sharer, middle, differs=False)
    else:  # the reference itself ran
        plain = run_reference(fuser, part, part_sharer)
        assert all(same_bits(x, t) for x, t in zip(flat(middle), flat(plain), strict=True))
    for x, t in zip(flat(fused), flat(base), strict=True):
        assert same_bits(x[:, :, :1], t[:, :, :1]) and same_bits(x[:, :, 4:], t[:, :, 4:])
    target = clone(base)
    fused_by_fuse(fuser, target, sharer, start=1, end=4, inplace=True)
    assert all(same_bits(a, b) for a, b in zip(flat(target), flat(fused), strict=True))


def test_empty_span_changes_nothing(variant):
    fuser = make_fuser(make_config(**variant))
    base, sharer = make_caches(fuser.config)
    fused = fused_by_fuse(fuser, base, sharer, start=2, end=2)
    assert all(same_bits(a, b) for a, b in zip(flat(fused), flat(base), strict=True))


def test_gradients_reach_every_parameter_and_both_caches(variant):
    config = make_config(receiver=[(1, 4)], sharer=[(1, 2)], layer_map=[0], **variant)
    fuser = make_fuser(config).double()
    base, sharer = make_caches(config, 1, 3, dtype=torch.float64)
    caches = [t.requires_grad_() for t in (*flat(base), *flat(sharer))]
    trained = [p for n, p in fuser.named_parameters() if not n.endswith("gate_logit")]

    def run(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(fuse(base, sharer, fuser)))

    assert torch.autograd.gradcheck(run, (*caches, *trained), fast_mode=True)
    grads = torch.autograd.grad(
        sum(x.square().sum() for x in run()), trained, allow_unused=True, materialize_grads=True
    )
    assert all(g.numel() == 0 or max_abs(g) > 0 for g in grads)


def test_closed_gates_keep_every_bit(variant):
    fuser = make_fuser(make_config(**variant))
    base, sharer = make_caches(fuser.config)
    if not fuser.config.gate:
        assert not any(name.endswith("gate_logit") for name, _ in fuser.named_parameters())
        assert len(fuser.open_streams()) == 2 * len(fuser.config.kinds)
        with pytest.raises(ValueError, match="gates must not be given"):
            reference.fuse(base, sharer, fuser, gates=[])
        return
    with torch.no_grad():
        fuser.groups[0].gate_logit.fill_(0.0)
    assert fuser.open_streams() == []
    fused = fused_by_fuse(fuser, base, sharer)
    assert all(same_bits(a, b) for a, b in zip(flat(fused), flat(base), strict=True))


def test_one_open_gate_fuses_one_stream(variant):
    fuser = make_fuser(make_config(**variant))
    if not fuser.config.gate:
        return
    kind = fuser.config.kinds[-1]
    streams = [(layer, k) for layer in range(2) for k in fuser.config.kinds]
    with torch.no_grad():
        for i, stream in enumerate(streams):
            fuser.groups[0].gate_logit[i] = 1.0 if stream == (1, kind) else -1.0
    assert fuser.open_streams() == [(1, kind)]
    base, sharer = make_caches(fuser.config)
    fused = fused_by_fuse(fuser, base, sharer)
    for layer, k in itertools.product(range(2), KINDS):
        x, t = (pairs[layer][KINDS.index(k)] for pairs in (fused, base))
        assert same_bits(x, t) != ((layer, k) == (1, kind))


def test_files_keep_the_variant(variant, tmp_path):
    fuser = make_fuser(make_config(**variant))
    fuser.save_pretrained(tmp_path)
    again = Fuser.from_pretrained(tmp_path)
    assert again.config == fuser.config
    assert again.config.num_parameters() == sum(p.numel() for p in again.parameters())
    base, sharer = make_caches(fuser.config)
    fused, expected = (fused_by_fuse(f, base, sharer) for f in (again, fuser))
    assert all(same_bits(a, b) for a, b in zip(flat(fused), flat(expected), strict=True))
    # The weights are bound to the variant: the same shapes read another way are refused.
    data = json.loads((tmp_path / "fuser_config.json").read_text())
    data["integration"] = "residual" if data["integration"] != "residual" else "interpolation"
    (tmp_path / "fuser_config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="come from different saves"):
        Fuser.from_pretrained(tmp_path)


def test_a_config_without_the_fields_is_the_published_architecture():
    config = make_config()
    data = json.loads(config.to_json())
    for name in VARIANT_FIELDS:
        del data[name]
    assert FuserConfig.from_dict(data) == config
    assert config.variant() == {}


def test_uncompiled_variants_say_so_and_have_no_packed_form():
    for changes in UNCOMPILED.values():
        fuser = make_fuser(make_config(**changes))
        assert "has no compiled kernels" in fuser.config.uncompiled_reason()
        with pytest.raises(ValueError, match="has no packed form: projection="):
            fuser.packed(torch.float32, torch.device("cpu"))


def test_packed_form_leaves_out_what_a_variant_lacks():
    cpu = torch.device("cpu")
    sizes = {
        name: make_fuser(make_config(**changes)).packed(torch.float32, cpu).nbytes
        for name, changes in {"": {}, **COMPILED}.items()
    }
    assert sizes["keys only"] == sizes["values only"] == sizes[""] // 2
    assert sizes[""] == sizes["no gate"] == sizes["interpolation"] == sizes["replacement"]
    assert sizes["no weighting"] < sizes[""] and sizes["sharer only"] < sizes[""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": "cnn"}, "projection must be one of mlp, linear, transformer, got 'cnn'"),
        ({"reads": "receiver"}, "reads must be one of both, sharer, got 'receiver'"),
        ({"integration": 1}, "integration must be one of residual, interpolation, replacement"),
        ({"kinds": ()}, r"kinds must be a sequence of kinds, got \(\)"),
        ({"kinds": "key"}, "kinds must be a sequence of kinds, got 'key'"),
        ({"kinds": ("value", "key")}, "kinds must be .*, got"),
        ({"kinds": ("key", "key")}, "kinds must be .*, got"),
        ({"kinds": ({},)}, "kinds must be .*, got"),
        ({"weighting": 1}, "weighting must be true or false, got 1"),
        ({"gate": None}, "gate must be true or false, got None"),
        ({"projection": "linear"}, "weighting must be False with projection 'linear'"),
        ({"projection": "transformer"}, None),
        ({"projection": "transformer", "attention_heads": 3}, "must divide hidden_size 16, got 3"),
        ({"attention_heads": 0}, "attention_heads must be in 1"),
        ({"projection": "transformer", "depth": 1}, "depth must be in 2"),
        ({"depth": 2}, "depth must be in 3"),
    ],
)
def test_config_refuses_what_is_no_variant(changes, message):
    if message is None:
        make_config(**changes)
        return
    with pytest.raises(ValueError, match=f"FuserConfig.*{message}"):
        make_config(**changes)


def test_packed_streams_are_keys_first():
    for kinds, keys in ((KINDS, 2), (("key",), 2), (("value",), 0)):
        fuser = make_fuser(make_config(kinds=kinds))
        (group,) = fuser.packed(torch.float32, torch.device("cpu")).groups
        assert group.num_keys == keys and len(group.layers) == 2 * len(kinds)


def test_half_precision_caches_of_variants(variant):
    """A fuser in float32 fuses bfloat16 caches, whichever path runs."""
    fuser = make_fuser(make_config(**variant))
    base, sharer = make_caches(fuser.config, dtype=torch.bfloat16)
    fused = fused_by_fuse(fuser, base, sharer)
    assert all(x.dtype == torch.bfloat16 for x in flat(fused))
    truth = run_reference(fuser, cast(base, torch.float64), cast(sharer, torch.float64))
    assert all(relative_error(x, t) < 0.05 for x, t in zip(flat(fused), flat(truth), strict=True))


def test_gates_given_to_the_reference_scale_every_variant(variant):
    """A soft gate of 1 is the open hard gate, of 0 the closed one."""
    fuser = make_fuser(make_config(**variant))
    if not fuser.config.gate:
        return
    base, sharer = make_caches(fuser.config, dtype=torch.float64)
    with torch.no_grad():
        full = reference.fuse(base, sharer, fuser)
        for value, expected in ((1.0, full), (0.0, base)):
            gates = [(torch.tensor(value).double(),) * 2] * len(base)
            soft = reference.fuse(base, sharer, fuser, gates=gates)
            for x, t in zip(flat(soft), flat(expected), strict=True):
                assert relative_error(x, t) <= 1e-14


# ---- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["second write-up", "linear", "transformer", "bare"])
def test_generate_with_left_padding_matches_plain_loop_and_each_prompt_alone(name):
    receiver, sharer = tiny_models.receiver_model(), tiny_models.sharer_model()
    changes = {**EVERY[name], "hidden_size": 24}
    fuser = tiny_models.fuser_between(receiver, sharer, **changes)
    lengths = (11, 4)
    ids, mask = left_padded(lengths)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask)
    assert_same_run(output, ids, expected)
    assert_visible(expected, receiver, ids, mask)
    for row, length in enumerate(lengths):
        one = ids[row : row + 1, -length:]
        alone = plain_loop.decode(
            receiver, plain_loop.fused_prompt(receiver, sharer, fuser, one), one, STEPS
        )
        torch.testing.assert_close(logits_of(output)[row], alone.logits[0], **CLOSE)


@pytest.mark.parametrize("changes", [{}, *UNCOMPILED.values()], ids=["mlp", *UNCOMPILED])
def test_in_place_refuses_overlaps_whichever_path_runs(changes):
    fuser = make_fuser(make_config(**changes))
    for gates in ("open", "closed"):
        base, sharer = make_caches(fuser.config)
        for broken in (
            [base[0], base[0]],
            [base[0], (base[0][1], base[1][1])],
            [base[0], (base[1][0][:1].expand(2, -1, -1, -1), base[1][1])],
            [base[0], (base[1][0], base[1][0])],
        ):
            before = [(key.clone(), value.clone()) for key, value in broken]
            with pytest.raises(RuntimeError, match=r"c2c_ext\.fuse: out_.* must not overlap"):
                fused_by_fuse(fuser, broken, sharer, inplace=True)
            assert all(same_bits(a, b) for a, b in zip(flat(broken), flat(before), strict=True))
        with torch.no_grad():
            fuser.groups[0].gate_logit.fill_(-1.0)
        assert gates == "closed" or fuser.open_streams() == []


def test_inference_tensors_are_written_in_place(variant):
    fuser = make_fuser(make_config(**variant))
    with torch.inference_mode():
        base, sharer = make_caches(fuser.config)
    expected = fused_by_fuse(fuser, base, sharer)
    fused_by_fuse(fuser, base, sharer, inplace=True)
    assert all(same_bits(a, b) for a, b in zip(flat(base), flat(expected), strict=True))


def test_variants_compile_into_one_graph(variant):
    torch._dynamo.reset()
    fuser = make_fuser(make_config(**variant))
    base, sharer = make_caches(fuser.config)
    expected = fused_by_fuse(fuser, base, sharer)
    with torch.no_grad():
        compiled = torch.compile(
            lambda b, s: fuse(b, s, fuser), fullgraph=True, backend="aot_eager"
        )(base, sharer)
    for x, t in zip(flat(compiled), flat(expected), strict=True):
        assert relative_error(x, t) <= 1e-6


def test_forward_mode_derivatives_of_variants(variant):
    fuser = make_fuser(make_config(**variant)).double()
    base, sharer = make_caches(fuser.config, dtype=torch.float64)
    direction = torch.randn_like(sharer[2][1])

    def last_values(x: torch.Tensor) -> torch.Tensor:
        caches = [*sharer[:2], (x, x)]
        return torch.cat([t.flatten() for t in flat(fuse(base, caches, fuser))])

    _, derivative = torch.func.jvp(last_values, (sharer[2][1],), (direction,))
    step = 1e-6
    with torch.no_grad():
        ends = [last_values(sharer[2][1] + s * step * direction) for s in (1, -1)]
    assert relative_error(derivative, (ends[0] - ends[1]) / (2 * step)) <= 1e-6

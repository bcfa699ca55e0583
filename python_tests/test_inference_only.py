"""from_pretrained(inference_dtype=...): the packed form without parameters."""

import copy
import dataclasses
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    SHAPES,
    cast,
    flat,
    make_caches,
    make_config,
    make_fuser,
    same_bits,
    set_gates,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from variants import COMPILED, UNCOMPILED

import c2c_ext
from c2c_ext import Fuser, packed
from c2c_ext.serialization import WEIGHTS_NAME

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fuser = make_fuser(make_config(**SHAPES["groups"]))
    set_gates(fuser, {(1, "key"): -1.0, (2, "value"): 0.0})
    fuser.save_pretrained(tmp_path / "fuser")
    return tmp_path / "fuser"


def assert_same_packed(ours: packed.PackedFuser, theirs: packed.PackedFuser) -> None:
    assert (ours.activation, ours.integration) == (theirs.activation, theirs.integration)
    assert len(ours.groups) == len(theirs.groups) > 0
    for a, b in zip(ours.groups, theirs.groups, strict=True):
        tensors = zip(a.tensors(), b.tensors(), strict=True)
        assert all(same_bits(x, y) for x, y in tensors)
        assert (a.layers, a.sources, a.num_keys) == (b.layers, b.sources, b.num_keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fuses_the_same_bits_as_a_fuser_with_parameters(saved: Path, dtype: torch.dtype) -> None:
    whole = Fuser.from_pretrained(saved)
    only = Fuser.from_pretrained(saved, inference_dtype=dtype)
    assert only.inference_only and not whole.inference_only and not only.training
    assert_same_packed(only.packed(dtype, CPU), whole.packed(dtype, CPU))
    assert only.open_streams() == whole.open_streams()
    base, sharer = (cast(pairs, dtype) for pairs in make_caches(whole.config))
    expected = flat(c2c_ext.fuse(base, sharer, whole.requires_grad_(False)))
    for ours, theirs in zip(flat(c2c_ext.fuse(base, sharer, only)), expected, strict=True):
        assert same_bits(ours, theirs)
    assert not all(same_bits(a, b) for a, b in zip(expected, flat(base), strict=True))


@pytest.mark.parametrize("variant", COMPILED)
def test_every_compiled_variant_packs_alike(tmp_path: Path, variant: str) -> None:
    make_fuser(make_config(**COMPILED[variant])).bfloat16().save_pretrained(tmp_path)
    whole = Fuser.from_pretrained(tmp_path)
    only = Fuser.from_pretrained(tmp_path, inference_dtype=torch.bfloat16)
    assert_same_packed(only.packed(torch.bfloat16, CPU), whole.packed(torch.bfloat16, CPU))


def test_no_parameter_but_the_gates_is_in_memory(saved: Path) -> None:
    only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    held = {n.rpartition(".")[2] for n, p in only.named_parameters() if not p.is_meta}
    assert held == {"gate_logit"}
    assert not any(p.requires_grad for p in only.parameters())


def test_weights_are_read_one_stream_at_a_time(saved: Path, monkeypatch) -> None:
    """Only one stream's float64 copies are alive when it is folded."""
    import weakref

    fold, alive, most = packed.fold_stream, [], []

    def folding(weights):
        alive.append(weakref.ref(weights.in_weight))
        most.append(sum(w() is not None for w in alive))
        return fold(weights)

    monkeypatch.setattr(packed, "fold_stream", folding)
    Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    assert len(most) == 4 and max(most) == 1


def test_tiny_gates_of_a_wide_file_stay_open(tmp_path: Path) -> None:
    fuser = make_fuser().double()
    set_gates(fuser, {}, default=1e-60)
    fuser.save_pretrained(tmp_path)
    only = Fuser.from_pretrained(tmp_path, inference_dtype=torch.float32)
    assert only.open_streams() == fuser.open_streams() != []


def test_the_default_device_of_the_caller_does_not_matter(saved: Path) -> None:
    with torch.device("meta"):
        only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    whole = Fuser.from_pretrained(saved)
    assert_same_packed(only.packed(torch.float32, CPU), whole.packed(torch.float32, CPU))


def test_generates_as_the_fuser_with_parameters(saved: Path) -> None:
    config = Fuser.from_pretrained(saved).config
    base, sharer = make_caches(config, tokens=3, sharer_tokens=6)
    only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    token_map = torch.tensor([5, -1, 0])
    ours = c2c_ext.fuse(base, sharer, only, token_map=token_map)
    whole = Fuser.from_pretrained(saved).requires_grad_(False)
    theirs = c2c_ext.fuse(base, sharer, whole, token_map=token_map)
    assert all(same_bits(a, b) for a, b in zip(flat(ours), flat(theirs), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_fuse_too(saved: Path, copied) -> None:
    only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    twin = copied(only)
    assert twin.inference_only
    assert_same_packed(twin.packed(torch.float32, CPU), only.packed(torch.float32, CPU))


# What it cannot do is said.


def test_other_caches_are_refused(saved: Path) -> None:
    only = Fuser.from_pretrained(saved, inference_dtype=torch.bfloat16)
    base, sharer = make_caches(only.config)
    message = "fuser was loaded for torch.bfloat16 caches on cpu only .*, got torch.float32 on cpu"
    with pytest.raises(ValueError, match=message):
        c2c_ext.fuse(base, sharer, only)


@pytest.mark.parametrize("which", ["base", "sharer", "transform"])
def test_gradients_are_refused_with_the_reason(saved: Path, which: str) -> None:
    only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    base, sharer = make_caches(only.config)
    message = (
        r"loaded for inference only \(inference_dtype\) and holds no parameters, but gradients are "
        r"enabled and a cache requires them.*under torch.no_grad\(\); or load the fuser without inf"
    )
    if which == "transform":
        with pytest.raises(ValueError, match=message), torch.autograd.forward_ad.dual_level():
            c2c_ext.fuse(base, sharer, only)
        return
    flat(base if which == "base" else sharer)[0].requires_grad_()
    with pytest.raises(ValueError, match=message):
        c2c_ext.fuse(base, sharer, only)
    with torch.no_grad():
        c2c_ext.fuse(base, sharer, only)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.to(torch.float32),
        lambda f: f.half(),
        lambda f: f.repack(),
        lambda f: f.load_state_dict(f.state_dict()),
        lambda f: setattr(f, "config", dataclasses.replace(f.config, activation="silu")),
    ],
)
def test_what_needs_parameters_is_refused(saved: Path, change) -> None:
    only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"fuser cannot be .* loaded for inference only"):
        change(only)
    only.packed(torch.float32, CPU)  # still there


@pytest.mark.parametrize("write", ["save_pretrained", "save_published"])
def test_saving_is_refused_and_writes_nothing(saved: Path, tmp_path: Path, write: str) -> None:
    only = Fuser.from_pretrained(saved, inference_dtype=torch.float32)
    message = r"holds no numbers to save: its groups\.0.* inference only"
    with pytest.raises(ValueError, match=message):
        getattr(only, write)(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("variant", UNCOMPILED)
def test_a_variant_without_packed_form_is_refused(tmp_path: Path, variant: str) -> None:
    make_fuser(make_config(**UNCOMPILED[variant])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no packed form"):
        Fuser.from_pretrained(tmp_path, inference_dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference_dtype": torch.int8}, "inference_dtype must be one of .*, got torch.int8"),
        ({"inference_dtype": "bf16"}, "inference_dtype must be one of .*, got 'bf16'"),
        ({"inference_device": "cuda"}, "inference_device goes with inference_dtype"),
        (
            {"inference_dtype": torch.float32, "inference_device": "here"},
            "inference_device must be a device, got 'here'",
        ),
        ({"inference_dtype": torch.float32, "inference_device": "meta"}, "must hold numbers"),
        (
            {"inference_dtype": torch.float32, "inference_device": "xpu"},
            "inference_device xpu cannot be used here",
        ),
    ],
)
def test_bad_options_are_named(saved: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fuser.from_pretrained(saved, **options)


@pytest.mark.parametrize(("group", "stream"), [(0, 1), (1, 0), (2, 1)])  # open, closed, closed
def test_nan_is_named_in_open_and_closed_streams(saved: Path, group: int, stream: int) -> None:
    path = saved / WEIGHTS_NAME
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = f"groups.{group}.shared_w1"
    tensors[name][stream].view(-1)[-1] = float("nan")
    save_file(tensors, path, metadata)
    message = re.escape(f"{name} (stream {stream}) holds NaN")
    with pytest.raises(ValueError, match=message):
        Fuser.from_pretrained(saved, inference_dtype=torch.float32)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    path = saved / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Fuser.from_pretrained(saved, inference_dtype=torch.float32)

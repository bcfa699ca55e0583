"""Fuser.from_published: the public research code's on-disk format, good and bad."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from c2c_ext import Fuser

E2E = Path(__file__).parent / "golden" / "e2e"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    shutil.copytree(E2E / "fuser_s1_k_nearest", tmp_path / "fuser")
    return tmp_path / "fuser"


def test_published_weights_arrive_unchanged(published: Path) -> None:
    fuser = Fuser.from_published(published)
    assert fuser.config.layer_map == (0, 0, 1, 1, 2)
    assert (fuser.config.hidden_size, fuser.config.intermediate_size, fuser.config.depth) == (
        24,
        16,
        3,
    )
    for layer in range(5):
        state = torch.load(published / f"projector_{layer}.pt", weights_only=True)
        for kind in ("key", "value"):
            w = fuser.stream(layer, kind)
            assert torch.equal(w.in_weight, state[f"{kind}_in.weight"])
            assert torch.equal(w.proj[0].w2, state[f"{kind}_proj_mlp2.blocks.0.w2.weight"])
            assert torch.equal(w.weight.norm, state[f"{kind}_scalar_mlp2.blocks.0.norm.weight"])
            assert torch.equal(w.gate_logit, state[f"{kind}_gate_logit"])


def test_bfloat16_checkpoints_stay_bfloat16() -> None:
    fuser = Fuser.from_published(E2E / "fuser_s2_last_aligned")
    assert {p.dtype for p in fuser.parameters()} == {torch.bfloat16}
    assert fuser.config.depth == 4


def test_model_configs_are_recorded_and_checked(published: Path) -> None:
    receiver = AutoConfig.from_pretrained(E2E / "receiver")
    sharer = AutoConfig.from_pretrained(E2E / "sharer1")
    fuser = Fuser.from_published(published, receiver_config=receiver, sharer_config=sharer)
    assert (fuser.config.receiver.model_type, fuser.config.sharer.model_type) == ("qwen3", "qwen2")
    other = AutoConfig.from_pretrained(E2E / "sharer2")
    with pytest.raises(
        ValueError, match=r"sharer_config layer 0 must have 5 KV heads x 8 .*, got 3 x 6"
    ):
        Fuser.from_published(published, sharer_config=other)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused(published: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"key_in.weight": Bomb(marker)}, published / "projector_0.pt")
    with pytest.raises(ValueError, match="is not a state dict of plain tensors"):
        Fuser.from_published(published)
    (published / "projector_0.pt").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ValueError, match="is not a state dict of plain tensors"):
        Fuser.from_published(published)
    assert not marker.exists()


def change_state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "projector_1.pt"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return apply


def change_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        change(data)
        (directory / name).write_text(json.dumps(data))

    return apply


def set_argument(name: str, value: object) -> Callable[[Path], None]:
    return change_json("projector_1.json", lambda d: d["init_args"].__setitem__(name, value))


def truncate(directory: Path) -> None:
    path = directory / "projector_1.pt"
    path.write_bytes(path.read_bytes()[:1000])


def rezip(compression: int, pickled: bytes | None = None) -> Callable[[Path], None]:
    """Packs projector_1.pt anew, with another pickle if given."""

    def apply(directory: Path) -> None:
        path = directory / "projector_1.pt"
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in parts.items():
                if pickled is not None and name.endswith("data.pkl"):
                    data = pickled
                archive.writestr(name, data)

    return apply


def replace_pickle(pickled: bytes) -> Callable[[Path], None]:
    return rezip(zipfile.ZIP_STORED, pickled)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_state(lambda s: s.pop("key_in.bias")), r"1 missing tensors: key_in\.bias"),
        (change_state(lambda s: s.update(more=torch.ones(1))), "1 surplus tensors: more"),
        (
            change_state(lambda s: s.update({"key_in.bias": torch.ones(3)})),
            r"key_in\.bias must have shape \[24\], got \[3\]",
        ),
        (
            change_state(lambda s: s["key_in.bias"].fill_(float("nan"))),
            r"key_in\.bias holds NaN",
        ),
        (
            change_state(lambda s: s.update({"key_in.bias": "text"})),
            r"key_in\.bias must be a tensor of dtype F64, F32, BF16, F16, got str",
        ),
        (
            change_state(lambda s: s.update({"key_in.bias": torch.ones(24, dtype=torch.int32)})),
            r"key_in\.bias must be a tensor of dtype F64, F32, BF16, F16, got torch\.int32",
        ),
        (
            change_state(lambda s: s.update({"key_in.bias": torch.zeros(1).expand(24)})),
            r"key_in\.bias must be a dense, contiguous tensor",
        ),
        (
            change_state(lambda s: s.update({"key_in.bias": torch.ones(24).to_sparse()})),
            r"not a state dict of plain tensors: it names 'torch",
        ),
        (
            change_state(
                lambda s: s.update({"key_in.bias": torch.nested.nested_tensor([torch.ones(24)])})
            ),
            r"not a state dict of plain tensors: it names 'torch",
        ),
        (truncate, "is not a state dict of plain tensors"),
        (rezip(zipfile.ZIP_DEFLATED), "must be an uncompressed archive"),
        (replace_pickle(b"."), r"the weights_only loader refused it \(\w+\)"),
        (replace_pickle(b"\x80\x02K\x01Q."), r"the weights_only loader refused it \(\w+\)"),
        (replace_pickle(b"\x80\x02J\x01."), r"its pickle is damaged \(\w+\)"),
        (set_argument("hidden_dim", 25), "must agree on hidden_dim: .* has 24, .* has 25"),
        (set_argument("hidden_dim", True), "init_args.hidden_dim must be an integer"),
        (set_argument("source_dim", 10**9), "init_args.source_dim must be an integer in 1.."),
        (set_argument("source_num_heads", 4), "disagree on the KV shape of sharer layer 0"),
        (
            change_json("projector_1.json", lambda d: d.update({"class": "os.system"})),
            "class must be 'C2CProjector', got 'os.system'",
        ),
        (
            change_json("projector_config.json", lambda d: d["0"]["1"].pop("2")),
            "receiver layers must be 0..3, 2 is missing",
        ),
        (
            change_json("projector_config.json", lambda d: d["0"].update({"2": {}})),
            "must name exactly one sharer model, got 2",
        ),
        (
            change_json(
                "projector_config.json", lambda d: d["0"]["1"].update({"0": [["../x", 0]]})
            ),
            "a pair must be two integers",
        ),
        (lambda d: (d / "projector_1.pt").unlink(), r"projector_1\.pt is missing"),
        (lambda d: (d / "projector_config.json").unlink(), r"projector_config\.json is missing"),
    ],
)
def test_bad_directories_are_refused(
    published: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(published)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Fuser.from_published(published)


def test_unknown_arguments_warn(published: Path) -> None:
    for index in range(5):
        change_json(f"projector_{index}.json", lambda d: d["init_args"].__setitem__("novel", 1))(
            published
        )
    with pytest.warns(UserWarning, match="arguments ignored: novel"):
        Fuser.from_published(published)

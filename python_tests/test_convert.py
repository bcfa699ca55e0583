"""c2c convert and save_published: both directions bit for bit, refusals, nothing half-written."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPES, make_caches, make_config, make_fuser, same_bits
from test_end_to_end import CASES, Case

from c2c_ext import Fuser, FuserConfig, fuse, published_writer
from c2c_ext.cli import main
from c2c_ext.config import VARIANT_FIELDS
from c2c_ext.convert import convert
from c2c_ext.model_card import CARD_NAME

E2E = Path(__file__).parent / "golden" / "e2e"
GOLDEN = sorted(path.name for path in E2E.glob("fuser_*"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same_fuser(a: Fuser, b: Fuser) -> None:
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(same_bits(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", GOLDEN)
def test_published_to_ours_and_back_keeps_every_bit(tmp_path: Path, name: str) -> None:
    source = E2E / name
    fuser, written = convert(source, tmp_path / "ours")
    assert written == "c2c_ext"
    assert_same_fuser(Fuser.from_pretrained(tmp_path / "ours"), fuser)
    assert convert(tmp_path / "ours", tmp_path / "back")[1] == "published"
    before, after = content(source), content(tmp_path / "back")
    assert set(before) == set(after)
    for file in before:
        if file.endswith(".json"):
            assert after[file] == before[file]
            continue
        old = torch.load(source / file, weights_only=True)
        new = torch.load(tmp_path / "back" / file, weights_only=True)
        assert set(old) == set(new)
        assert all(same_bits(old[key], new[key]) for key in old)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name not in ("relu", "silu")])
def test_ours_to_published_and_back_keeps_every_bit(
    tmp_path: Path, shape: str, dtype: torch.dtype
) -> None:
    fuser = make_fuser(make_config(**SHAPES[shape])).to(dtype)
    fuser.save_published(tmp_path / "published")
    back = Fuser.from_published(tmp_path / "published")
    assert_same_fuser(back, fuser)
    for name in ("layer_map", "hidden_size", "intermediate_size", "depth", "dropout"):
        assert getattr(back.config, name) == getattr(fuser.config, name)
    assert back.config.receiver.layers == fuser.config.receiver.layers
    used = max(fuser.config.layer_map) + 1
    assert len(back.config.sharer.layers) == used  # the format knows no layers behind


def test_converted_fusers_fuse_alike(tmp_path: Path) -> None:
    fuser = make_fuser().eval()
    fuser.save_published(tmp_path)
    back = Fuser.from_published(tmp_path)
    receiver, sharer = make_caches(fuser.config)
    with torch.no_grad():
        expected, got = (fuse(receiver, sharer, which) for which in (fuser, back))
    for pair, other in zip(expected, got, strict=True):
        assert all(same_bits(a, b) for a, b in zip(pair, other, strict=True))


@pytest.mark.parametrize(
    "name", [name for name, (_, case) in CASES.items() if len(case["sharers"]) == 1]
)
@torch.no_grad()
def test_a_fuser_that_went_both_ways_gives_the_golden_caches(tmp_path: Path, name: str) -> None:
    case = Case(name, torch.float32)
    source = E2E / case.meta["sharers"][0]["fuser"]
    models = {"receiver": E2E / "receiver", "sharer": E2E / case.meta["sharers"][0]["model"]}
    convert(source, tmp_path / "ours", **models)
    convert(tmp_path / "ours", tmp_path / "published")
    back = Fuser.from_published(
        tmp_path / "published",
        receiver_config=case.receiver.config,
        sharer_config=case.sharers[0].config,
    )
    prompt = case.ids[:, :-1]
    models = (case.receiver, *case.sharers)
    caches = [model(prompt, use_cache=True).past_key_values for model in models]
    start = 0 if case.fuses else prompt.shape[1]
    case.check_cache(fuse(*caches, back, start=start), "fused", prompt.shape[1])


def test_models_are_recorded_and_compared(tmp_path: Path) -> None:
    source = E2E / "fuser_s1_k_nearest"
    models = {"receiver": E2E / "receiver", "sharer": E2E / "sharer1"}
    convert(source, tmp_path / "ours", **models)
    config = Fuser.from_pretrained(tmp_path / "ours").config
    assert (config.receiver.model_type, config.sharer.model_type) == ("qwen3", "qwen2")
    with pytest.raises(ValueError, match="sharer_config layer 0 must have 5 KV heads x 8"):
        convert(source, tmp_path / "other", receiver=E2E / "receiver", sharer=E2E / "sharer2")
    with pytest.raises(ValueError, match=r"receiver .* cannot be recorded"):
        convert(tmp_path / "ours", tmp_path / "other", receiver=E2E / "receiver")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_fuser().save_published(tmp_path / name)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_projector_holds_its_own_numbers_only(tmp_path: Path) -> None:
    make_fuser().save_published(tmp_path)
    state = torch.load(tmp_path / "projector_0.pt", weights_only=True)
    assert type(state) is dict
    stored = sum(tensor.untyped_storage().nbytes() for tensor in state.values())
    assert stored == sum(tensor.nbytes for tensor in state.values())
    with zipfile.ZipFile(tmp_path / "projector_0.pt") as archive:
        assert sum(e.file_size for e in archive.infolist() if "/data/" in e.filename) == stored


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_the_format_cannot_express_is_refused(tmp_path: Path, activation: str) -> None:
    fuser = make_fuser(make_config(activation=activation))
    with pytest.raises(ValueError, match=f"activation 'gelu', this one has '{activation}'"):
        fuser.save_published(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("projection", "transformer"),
        ("reads", "sharer"),
        ("integration", "replacement"),
        ("kinds", ("key",)),
        ("weighting", False),
        ("gate", False),
    ],
)
def test_variants_are_refused_by_field(field: str, value: object) -> None:
    published_writer.check_publishable(make_config())
    with pytest.raises(ValueError, match=rf"fusers with {field} .*, this one has"):
        published_writer.check_publishable(make_config(**{field: value, "hidden_size": 24}))


def test_every_field_that_changes_the_function_is_looked_at() -> None:
    # Carried by the format, or without effect on what the fuser computes.
    carried = {"receiver", "sharer", "layer_map", "hidden_size", "intermediate_size", "depth"}
    idle = {"dropout", "gate_init", "format_version"}
    known = carried | idle | set(VARIANT_FIELDS)
    assert set(FuserConfig.__dataclass_fields__) <= known


def test_damaged_parameters_are_refused(tmp_path: Path) -> None:
    fuser = make_fuser()
    with torch.no_grad():
        fuser.groups[0].gate_logit[1] = float("inf")
    with pytest.raises(ValueError, match=r"groups\.0\.gate_logit holds NaN or infinite"):
        fuser.save_published(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_with_files_is_refused_unless_it_is_a_fuser(tmp_path: Path) -> None:
    place = tmp_path / "fuser"
    make_fuser(make_config(**SHAPES["groups"])).save_published(place)
    old = content(place)
    fuser = make_fuser(make_config(receiver=[(2, 8)], layer_map=[0]))
    with pytest.raises(FileExistsError, match="is not empty; with overwrite a fuser there is"):
        fuser.save_published(place)
    assert content(place) == old
    fuser.save_published(place, overwrite=True)  # one projector instead of three: none is left
    assert set(content(place)) == {"projector_0.pt", "projector_0.json", "projector_config.json"}
    assert_same_fuser(Fuser.from_published(place), fuser)

    for name in ("thesis.txt", CARD_NAME):
        (place / name).write_text("mine")
        old = content(place)
        with pytest.raises(FileExistsError, match=f"holds what is not a fuser's: {name}"):
            fuser.save_published(place, overwrite=True)
        assert content(place) == old
        (place / name).unlink()
    (place / "fuser.safetensors").mkdir()
    with pytest.raises(FileExistsError, match=r"not a fuser's: fuser\.safetensors"):
        fuser.save_published(place, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["fuser"]


def test_ours_is_replaced_with_its_card(tmp_path: Path) -> None:
    make_fuser().save_pretrained(tmp_path / "fuser")
    convert(E2E / "fuser_s1_k_nearest", tmp_path / "fuser", overwrite=True)
    assert len(Fuser.from_pretrained(tmp_path / "fuser").config.layer_map) == 5
    fuser = make_fuser()
    fuser.save_published(tmp_path / "fuser", overwrite=True)
    assert CARD_NAME not in content(tmp_path / "fuser")
    assert_same_fuser(Fuser.from_published(tmp_path / "fuser"), fuser)


def test_links_and_empty_directories_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fuser = make_fuser()
    fuser.save_published(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_fuser(Fuser.from_published(tmp_path / "real"), fuser)
    fuser.save_published(tmp_path / "deep" / "er")
    assert_same_fuser(Fuser.from_published(tmp_path / "deep" / "er"), fuser)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a directory, it is a file"):
        fuser.save_published(tmp_path / "file")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["save", "rename"])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, overwrite: bool
) -> None:
    place = tmp_path / "fuser"
    if overwrite:
        make_fuser(seed=1).save_published(place)
    before = content(place) if overwrite else None
    save, rename = torch.save, os.rename

    def no_space(state: object, path: Path) -> None:
        if path.name == "projector_1.pt":
            raise OSError("disk full")
        save(state, path)

    def no_move(source: Path, target: Path) -> None:
        if source.name.endswith(".new"):
            raise OSError("disk full")
        rename(source, target)

    if failing == "save":
        monkeypatch.setattr(torch, "save", no_space)
    else:
        monkeypatch.setattr(os, "rename", no_move)
    with pytest.raises(OSError, match="disk full"):
        make_fuser().save_published(place, overwrite=overwrite)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["fuser"] if overwrite else [])
    if overwrite:
        assert content(place) == before


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def test_command_converts_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, ours, back = E2E / "fuser_s2_last_aligned", tmp_path / "ours", tmp_path / "back"
    models = ["--receiver", E2E / "receiver", "--sharer", E2E / "sharer2"]
    assert run(source, ours, *models) == 0
    out = capsys.readouterr().out
    assert f"{source} -> {ours} (c2c_ext format)" in out and "bfloat16" in out
    assert run(ours, back, "--to", "published") == 0
    assert "not in that format: the models' names" in capsys.readouterr().out
    assert run(ours, back, "--overwrite") == 0
    assert_same_fuser(Fuser.from_published(back), Fuser.from_pretrained(ours))


def test_bad_commands_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, ours, both = E2E / "fuser_s1_k_nearest", tmp_path / "ours", tmp_path / "both"
    assert run(source, ours) == 0
    shutil.copytree(source, both)
    for path in ours.iterdir():
        shutil.copy(path, both)
    relu = make_fuser(replace(make_config(), activation="relu"))
    relu.save_pretrained(tmp_path / "relu")
    (tmp_path / "empty").mkdir()
    new = tmp_path / "new"
    capsys.readouterr()
    for arguments, message in [
        ((tmp_path / "no", new), "no fuser directory at"),
        ((tmp_path / "empty", new), "holds neither fuser_config.json nor projector_config.json"),
        ((source, ours), "is not empty; with overwrite"),
        ((ours, f"{ours}/../ours"), "destination must be another directory than source"),
        ((ours, ours, "--overwrite"), "destination must be another directory than source"),
        ((ours, tmp_path, "--overwrite"), "holds what is not a fuser's: both, empty, ours, relu"),
        ((ours, new, "--to", "c2c_ext"), "is in the c2c_ext format already"),
        ((source, new, "--to", "published"), "is in the published format already"),
        ((both, new), "holds both formats: say which to write with to"),
        ((tmp_path / "relu", new), "only fusers with activation 'gelu', this one has 'relu'"),
        ((source, new, "--sharer", E2E / "sharer2"), "sharer_config layer 0 must have 5 KV heads"),
        ((source, new, "--sharer", "/nowhere"), "no model at /nowhere"),
        ((ours, new, "--sharer", E2E / "sharer1"), "the published format has no place"),
    ]:
        assert run(*arguments) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1 and captured.out == ""
        assert not new.exists()
    for to in ("published", "c2c_ext"):
        assert run(both, tmp_path / f"to_{to}", "--to", to) == 0


def test_a_training_schedule_of_ones_own_is_not_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(E2E / "fuser_s1_k_nearest", source)
    for path in source.glob("projector_?.json"):
        data = json.loads(path.read_text())
        data["init_args"] |= {"anneal_steps": 7, "dropout": 0.25}
        path.write_text(json.dumps(data))
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    arguments = json.loads((tmp_path / "back" / "projector_0.json").read_text())["init_args"]
    assert (arguments["anneal_steps"], arguments["dropout"]) == (1929, 0.25)

"""Prompt caches on disk: the same loss as without them, little memory, nothing half-written."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import struct
import subprocess
import sys

import pytest
import torch
from conftest import same_bits
from plain_training import Row, batch_of
from safetensors.torch import load_file, save_file
from tiny_models import receiver_model, sharer_model
from torch.utils.data import DataLoader
from training_samples import chosen_rows, mapped_rows, models, ragged_rows, random_ids

from c2c_ext.training import (
    C2CTrainingModel,
    CachedCollator,
    GateSampler,
    PromptCaches,
    lay_out,
    prompts_of,
    write_prompt_caches,
)
from c2c_ext.training import prompt_cache_writer as writer_module

pytestmark = pytest.mark.usefixtures("one_thread")


def written(place, trio_, batch, sample_ids, **settings) -> dict[str, PromptCaches]:
    """Caches of a batch's rows, by role."""
    batch = {**batch, "sample_ids": sample_ids}
    return {
        role: write_prompt_caches(place / role, model, prompts_of([batch], role), **settings)
        for role, model in zip(("receiver", "sharer"), trio_[:2], strict=True)
    }


def prefixes(caches, batch, sample_ids) -> dict:
    layout = lay_out(batch["input_ids"], **{k: v for k, v in batch.items() if k != "input_ids"})
    return {
        "receiver_prefix": caches["receiver"].read(sample_ids, layout.receiver_rows()),
        "sharer_prefix": caches["sharer"].read(sample_ids, layout.sharer_rows()),
    }


def loss_and_gradients(model, batch, **arguments) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**batch, **arguments)
    output.loss.backward()
    return {"loss": output.loss, **{n: p.grad for n, p in model.fuser.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [ragged_rows, mapped_rows], ids=["ragged", "mapped"])
def test_losses_keep_every_bit(tmp_path, rows, dtype):
    """Where the caches were computed in the batch that they are used in."""
    trio_ = models(dtype=dtype)
    model = C2CTrainingModel(*trio_, sampler=GateSampler(per="token"), dropout=0.1)
    ids = [7, 2**60, -5, 0][: len(rows())]
    batch = batch_of(rows(), "left")
    expected = loss_and_gradients(model, batch, sample_ids=ids)
    caches = written(tmp_path, trio_, batch, ids, batch_size=4)
    calls = []
    for frozen in trio_[:2]:
        frozen.model.register_forward_hook(lambda *_: calls.append(1))
    for side in ("left", "right"):
        batch = batch_of(rows(), side)
        ours = loss_and_gradients(model, batch, sample_ids=ids, **prefixes(caches, batch, ids))
        for name, t in expected.items():
            assert same_bits(ours[name], t), name
    assert len(calls) == 2  # the receiver's answers; nobody prefilled


def test_rows_written_alone_keep_every_bit_of_a_lone_row(tmp_path):
    trio_ = models(dtype=torch.float32)
    model = C2CTrainingModel(*trio_, sampler=None, dropout=0.0)
    rows = ragged_rows()
    caches = written(tmp_path, trio_, batch_of(rows, "left"), range(4))
    for i in (2, 0, 3, 1):
        batch = batch_of([rows[i]], "right")
        expected = loss_and_gradients(model, batch)["loss"]
        assert same_bits(
            loss_and_gradients(model, batch, **prefixes(caches, batch, [i]))["loss"], expected
        )
    together = batch_of(rows, "left")
    expected = loss_and_gradients(model, together)["loss"].item()
    ours = loss_and_gradients(model, together, **prefixes(caches, together, range(4)))[
        "loss"
    ].item()
    assert ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_sliding_receivers_store_every_token(tmp_path, kind):
    trio_ = models(kind, torch.float32)
    model = C2CTrainingModel(*trio_, sampler=None, dropout=0.0)
    batch = batch_of(ragged_rows(), "left")
    caches = written(tmp_path, trio_, batch, range(4), batch_size=4, prefill_chunk=3)
    expected = loss_and_gradients(model, batch)["loss"].item()
    ours = loss_and_gradients(model, batch, **prefixes(caches, batch, range(4)))["loss"].item()
    assert ours == pytest.approx(expected, rel=1e-6)


def test_a_collator_brings_the_caches(tmp_path):
    """Through a data loader and its worker, in another order than they were written in."""
    trio_ = models(dtype=torch.float32)
    model = C2CTrainingModel(*trio_, sampler=None, dropout=0.0)
    rows = chosen_rows()

    def collate(indices: list[int]) -> dict:
        return {**batch_of([rows[i] for i in indices], "left"), "sample_ids": torch.tensor(indices)}

    plain = DataLoader(range(4), batch_size=1, collate_fn=collate)
    directories = {role: tmp_path / role for role in ("receiver", "sharer")}
    for (role, place), frozen in zip(directories.items(), trio_[:2], strict=True):
        write_prompt_caches(place, frozen, prompts_of(plain, role))
    caches = {role: PromptCaches(place) for role, place in directories.items()}
    losses = [model(**batch).loss for batch in plain]
    for role in ("both", "receiver", "sharer"):
        chosen = caches if role == "both" else {role: caches[role]}
        cached = DataLoader(
            [2, 0, 3, 1],
            batch_size=1,
            collate_fn=CachedCollator(collate, **chosen),
            num_workers=int(role == "both"),
        )
        for i, batch in zip([2, 0, 3, 1], cached, strict=True):
            assert [name for name in batch if name.endswith("prefix")] == [
                f"{name}_prefix" for name in chosen
            ]
            assert same_bits(model(**batch).loss, losses[i])


def test_caches_need_names_of_samples(caches):
    batch = batch_of(ragged_rows(), "left")
    with pytest.raises(ValueError, match="batches must have sample_ids to have prompt caches"):
        CachedCollator(lambda samples: batch, receiver=caches)([])
    with pytest.raises(ValueError, match="role must be receiver or sharer, got 'teacher'"):
        list(prompts_of([batch], "teacher"))


def many(count: int) -> list[tuple[int, torch.Tensor]]:
    return [(100 + i, random_ids(3 + i % 5, i)) for i in range(count)]


@pytest.fixture(scope="module")
def receiver():
    return receiver_model()


@pytest.fixture
def caches(tmp_path, receiver) -> PromptCaches:
    """Seven rows in more than one shard."""
    return write_prompt_caches(tmp_path / "caches", receiver, many(7), shard_bytes=8000)


def test_rows_are_found_and_bounded_by_shards(tmp_path, receiver, monkeypatch):
    sizes = []
    save = writer_module.save_file
    monkeypatch.setattr(
        writer_module,
        "save_file",
        lambda tensors, path: (
            sizes.append(sum(t.nbytes for t in tensors.values())),
            save(tensors, path),
        ),
    )
    consumed = []

    def prompts():
        for sample_id, ids in many(12):
            consumed.append(len(sizes))
            yield sample_id, ids

    caches = write_prompt_caches(
        tmp_path / "c", receiver, prompts(), shard_bytes=8000, batch_size=2
    )
    row = 3 * 2 * 2 * 12 * 4  # bytes of a token: layers, kinds, heads, head dim, float32
    assert len(sizes) > 4 and all(size < 8000 + 2 * 7 * row for size in sizes[:-1])
    assert consumed == sorted(consumed) and consumed[-1] > 1  # prompts are read as they are needed
    assert len(caches) == 12 and 105 in caches and 99 not in caches and 112 not in caches
    for sample_id, ids in reversed(many(12)):
        (row,) = caches.read([sample_id], [ids])
        assert len(row) == 3
        assert all(t.shape == (2, len(ids), 12) for pair in row for t in pair)
    assert len(list((tmp_path / "c").iterdir())) == len(sizes) + 1
    again = pickle.loads(pickle.dumps(caches))
    a, b = (c.read(torch.tensor([103]), [many(4)[3][1]])[0] for c in (caches, again))
    assert all(
        same_bits(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(tmp_path, dtype):
    model = receiver_model().to(dtype)
    (sample,) = many(1)
    caches = write_prompt_caches(tmp_path / "c", model, [sample])
    (row,) = caches.read([100], [sample[1]])
    assert all(t.dtype == dtype and t.any() for pair in row for t in pair)


def test_equal_inputs_give_equal_files(tmp_path, receiver):
    for name in "ab":
        write_prompt_caches(tmp_path / name, receiver, many(3))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["caches-00000.safetensors", "index.json", "rows.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_empty_prompts_and_no_prompts(tmp_path, receiver):
    caches = write_prompt_caches(tmp_path / "a", receiver, [(1, []), (2, [5, 6])], batch_size=1)
    empty, _ = caches.read([1, 2], [torch.zeros(0).long(), torch.tensor([5, 6])])
    assert all(t.shape == (2, 0, 12) for pair in empty for t in pair)
    assert len(write_prompt_caches(tmp_path / "b", receiver, [])) == 0


def test_other_tokens_and_samples_are_refused(caches):
    (_, first), (_, second) = many(2)
    with pytest.raises(
        ValueError, match="caches of sample 100 are of other tokens than it has now"
    ):
        caches.read([100], [second])
    with pytest.raises(LookupError, match="holds no prompt caches of sample 7"):
        caches.read([7], [first])
    with pytest.raises(ValueError):
        caches.read([100, 101], [first])


def test_other_models_are_refused(caches, receiver):
    assert len(PromptCaches(caches.directory, receiver)) == 7
    nudged = copy.deepcopy(receiver)
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight.view(-1)[0] += 1e-3
    for other in (nudged, copy.deepcopy(receiver).bfloat16(), sharer_model()):
        with pytest.raises(ValueError, match="holds prompt caches of another model than this"):
            PromptCaches(caches.directory, other)
    renamed = copy.deepcopy(receiver)
    renamed.config._name_or_path = "elsewhere"
    assert len(PromptCaches(caches.directory, renamed)) == 7


def edited_index(caches, **fields) -> None:
    path = caches.directory / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


INDEX = {
    "format": ({"format": "else"}, "format must be 'c2c_ext.prompt_caches', got 'else'"),
    "version": (
        {"format_version": 2},
        "format_version must be 1, got 2: written by another version",
    ),
    "bool": ({"format_version": True}, "format_version must be a int, got True"),
    "dtype": ({"dtype": "I64"}, "dtype must be one of F64, F32, BF16, F16, got 'I64'"),
    "layers": ({"layers": []}, "layers must have 1..1024 entries, got 0"),
    "many_layers": ({"layers": [[1, 1]] * 1025}, "layers must have 1..1024 entries, got 1025"),
    "layer": ({"layers": [[2]]}, "layers[0] must be [num_heads, head_dim], got [2]"),
    "heads": ({"layers": [[0, 4]]}, "num_heads must be an integer of at least 1, got 0"),
    "hash": ({"model": "zz"}, "model must be a SHA-256 in hexadecimal digits, got 'zz'"),
    "shards": ({"shards": {}}, "shards must be a list, got {}"),
    "path": (
        {"shards": [{"file": "../../etc/passwd", "bytes": 1}]},
        "shards[0].file must be caches-00000.safetensors, got '../../etc/passwd'",
    ),
    "bytes": (
        {"shards": [{"file": "caches-00000.safetensors", "bytes": -1}]},
        "shards[0].bytes must be at least 0, got -1",
    ),
    "rows": ({"rows": 2**40}, "rows must be in 0..268435456, got 1099511627776"),
    "fewer_shards": (
        {"shards": [{"file": "caches-00000.safetensors", "bytes": 1}]},
        "rows.safetensors: shards must be in 0..0, got 1",
    ),
    "fewer_rows": ({"rows": 6}, "rows.safetensors: sample_ids must be torch.int64 of shape [6]"),
}


@pytest.mark.parametrize("name", INDEX)
def test_damaged_indexes_are_refused(caches, name):
    fields, message = INDEX[name]
    edited_index(caches, **fields)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        PromptCaches(caches.directory)
    assert str(caches.directory) in str(raised.value)


def test_missing_and_unreadable_indexes_are_refused(caches, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        PromptCaches(tmp_path / "nowhere")
    (caches.directory / "index.json").write_text("[1]")
    with pytest.raises(ValueError, match="format must be a str, got None"):
        PromptCaches(caches.directory)
    (caches.directory / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        PromptCaches(caches.directory)


def test_rows_of_another_write_are_refused(caches):
    path = caches.directory / "rows.safetensors"
    rows = load_file(path)
    rows["tokens"][0] += 1
    save_file(rows, path)
    with pytest.raises(ValueError, match=r"rows\.safetensors is not the file that index\.json"):
        PromptCaches(caches.directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"rows\.safetensors is missing"):
        PromptCaches(caches.directory)


def test_a_sample_twice_in_the_rows_is_refused(caches):
    import hashlib

    path = caches.directory / "rows.safetensors"
    rows = load_file(path)
    rows["sample_ids"][0] = rows["sample_ids"][3]
    save_file(rows, path)
    edited_index(caches, rows_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"rows\.safetensors: a sample id occurs twice"):
        PromptCaches(caches.directory)


def read_first(caches):
    return PromptCaches(caches.directory).read([100], [many(1)[0][1]])


def test_damaged_shards_are_refused(caches):
    path = caches.directory / "caches-00000.safetensors"
    whole = path.read_bytes()

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as raised:
            read_first(caches)
        assert str(path) in str(raised.value) and str(raised.value).isprintable()

    assert read_first(caches)
    for data in (whole[:-1], b""):
        refused(data, f"must be of {len(whole)} bytes, got {len(data)}")
    refused(whole + b"\0", f"must be at most {len(whole)} bytes, got {len(whole) + 1}")
    refused(b"\0" * len(whole), "is not a shard of prompt caches")
    refused(struct.pack("<Q", 1 << 62) + whole[8:], "is not a shard of prompt caches")
    header = whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]]
    swapped = header.replace(b'"0.0"', b'"9.0"')
    refused(whole.replace(header, swapped), "is not a shard of prompt caches: .*0.0")
    retyped = header.replace(b'"F32"', b'"I32"')
    refused(whole.replace(header, retyped), r"0.0 must be F32 of shape \[6, 2, 3, 12\], got I32")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"caches-00000\.safetensors is missing"):
        read_first(caches)
    path.mkdir()
    with pytest.raises(FileNotFoundError, match="is missing or not a regular file"):
        read_first(caches)


def test_an_interrupted_write_leaves_nothing(tmp_path, receiver):
    def broken():
        yield from many(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_prompt_caches(tmp_path / "c", receiver, broken(), shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_cannot_finish_leaves_nothing(tmp_path, receiver, monkeypatch):
    def fail(source: str, target: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(writer_module.os, "rename", fail)
    (tmp_path / "c").mkdir()
    with pytest.raises(OSError, match="no space left"):
        write_prompt_caches(tmp_path / "c", receiver, many(3))
    assert list(tmp_path.rglob("*")) == [tmp_path / "c"]


def test_what_was_read_no_longer_depends_on_the_file(caches):
    first, second = read_first(caches), read_first(caches)
    path = caches.directory / "caches-00000.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    for a, b in zip(first[0], second[0], strict=True):
        assert a[0].any() and same_bits(a[0], b[0]) and same_bits(a[1], b[1])


def test_bad_arguments_are_refused(tmp_path, receiver, caches):
    with pytest.raises(FileExistsError, match="must not exist, or be an empty directory"):
        write_prompt_caches(caches.directory, receiver, many(1))
    for settings in ({"batch_size": 0}, {"shard_bytes": 1.5}):
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            write_prompt_caches(tmp_path / "c", receiver, many(1), **settings)
    cases = (
        ([(1, [3]), (1, [4])], "one row per sample, got 1 twice"),
        ([(1, [97])], "ids that the model reads must be in its vocabulary, 0 to 96, got 97"),
        ([(1, [0.5])], "the ids of sample 1 must be up to .* integers, got torch.float32"),
        ([(1, [[3]])], r"integers, got torch.int64 of shape \[1, 1\]"),
    )
    for prompts, message in cases:
        with pytest.raises(ValueError, match=message):
            write_prompt_caches(tmp_path / "c", receiver, prompts)
    model = receiver_model().train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        write_prompt_caches(tmp_path / "c", model, many(1))
    assert [p.name for p in tmp_path.iterdir()] == ["caches"]


def test_prefixes_that_do_not_fit_are_refused():
    model = C2CTrainingModel(*models(), sampler=None)
    batch = batch_of([Row(random_ids(6, 0), 4)], "left")
    good = [tuple(torch.zeros(2, 3, 12) for _ in range(2)) for _ in range(3)]
    short = [tuple(torch.zeros(2, 2, 12) for _ in range(2)) for _ in range(3)]
    for rows, message in (
        ([], "receiver_prefix must have 1 rows, got 0"),
        ([good[:2]], r"receiver_prefix\[0\] must have 3 layers, got 2"),
        (
            [short],
            r"receiver_prefix\[0\] layer 0 key must have shape \[2, 3, 12\] .* got \[2, 2, 12\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, receiver_prefix=rows)


READ_ONE = """
import re, sys, torch
from c2c_ext.training.prompt_caches import PromptCaches
from safetensors.torch import load_file
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
caches = PromptCaches(sys.argv[1])
ids = [torch.arange(5)]
caches.read([1], ids)
before = peak()
for sample in (3, 2, 1):
    caches.read([sample], ids)
after = peak()
whole = load_file(sys.argv[1] + "/caches-00000.safetensors")["0.9"].sum()
print(after - before, peak() - after)
assert not any(name.startswith("transformers") for name in sys.modules)
"""


def test_reading_maps_a_shard_and_takes_a_row(tmp_path):
    """A shard of more than a hundred megabytes, of which a row is a few kilobytes."""
    model = receiver_model()
    directory = tmp_path / "c"
    rows = [(i, torch.arange(5)) for i in range(4)]
    write_prompt_caches(directory, model, rows)
    shard = directory / "caches-00000.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "0.9": torch.ones(32 << 20)}, shard)
    size = os.stat(shard).st_size
    assert size > 128 << 20
    index = json.loads((directory / "index.json").read_text())
    index["shards"][0]["bytes"] = size
    (directory / "index.json").write_text(json.dumps(index))
    done = subprocess.run(
        [sys.executable, "-c", READ_ONE, str(directory)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows_took, all_of_it_took = map(int, done.stdout.split())  # KiB
    assert rows_took < 16 << 10 < 100 << 10 < all_of_it_took

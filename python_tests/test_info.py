"""c2c info as the practical guide: what fits and why not, what it costs, from configurations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_config, make_fuser, set_gates

from c2c_ext import Fuser, FuserConfig, estimate, info
from c2c_ext.cli import main
from c2c_ext.estimate import Ceilings, Workload
from c2c_ext.model_kv import ModelKV

E2E = Path(__file__).parent / "golden" / "e2e"
PUBLISHED = E2E / "fuser_s1_k_nearest"
PAIR = ["--receiver", str(E2E / "receiver"), "--sharer", str(E2E / "sharer1")]


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, list[tuple[str, str]]]:
    """(exit status, (label, value) of every line)."""
    status = main(["info", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return status, [(line[:20].strip(), line[21:]) for line in lines]


def values(rows: list[tuple[str, str]], label: str) -> list[str]:
    return [value for name, value in rows if name == label]


def report(tmp_path: Path, *arguments: object, status: int = 0) -> dict[str, Any]:
    """What --json writes; strict JSON."""
    file = tmp_path / "report.json"
    assert main(["info", *map(str, arguments), "--json", str(file)]) == status

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def config_directory(path: Path, config: transformers.PretrainedConfig, **changes: object) -> Path:
    """A model directory that holds a configuration only."""
    config.save_pretrained(path)
    if changes:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return path


def test_a_pair_without_a_fuser_gets_the_default_one(capsys, tmp_path):
    status, rows = run(capsys, *PAIR)
    assert status == 0 and values(rows, "fits") == ["receiver, sharer"]
    configs = [transformers.AutoConfig.from_pretrained(E2E / n) for n in ("receiver", "sharer1")]
    default = FuserConfig.for_models(*configs)
    (text,) = values(rows, "fuser")
    assert text.startswith("none given; the default would be qwen2 sharer1")
    assert f"{default.num_parameters():,} parameters" in text
    numbers = report(tmp_path, *PAIR)
    assert numbers["fits"] is True and numbers["problems"] == []
    assert numbers["fuser"]["parameters"] == default.num_parameters()
    assert numbers["fuser"]["is_default"] and not numbers["fuser"]["has_weights"]
    work = Workload(1, 512, torch.bfloat16)
    inference, training = (numbers["memory_bytes"][key] for key in ("inference", "training"))
    assert (
        inference["cpu"]["packed fuser"]
        == Fuser(default).packed(torch.bfloat16, torch.device("cpu")).nbytes
    )
    assert inference["cpu"]["receiver cache"] == 2 * 512 * 5 * 48 * 2
    assert training["fuser activations"] == estimate.activation_bytes(default, work)


def test_memory_follows_batch_tokens_and_dtype(tmp_path):
    options = ["--batch", 3, "--tokens", 7, "--dtype", "fp32"]
    numbers = report(tmp_path, *PAIR, "--fuser", PUBLISHED, *options)
    assert numbers["workload"] == {"batch": 3, "tokens": 7, "dtype": "float32"}
    table = numbers["memory_bytes"]["inference"]["cpu"]
    model = transformers.AutoModelForCausalLM.from_pretrained(E2E / "receiver")
    assert table["receiver weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert table["receiver cache"] == 2 * 3 * 7 * 5 * 48 * 4
    fuser = Fuser.from_published(PUBLISHED)
    assert table["packed fuser"] == fuser.packed(torch.float32, torch.device("cpu")).nbytes
    assert numbers["fuser"]["open_streams"] == len(fuser.open_streams()) < 10


def test_totals_are_printed_with_units(capsys):
    _, rows = run(capsys, *PAIR, "--fuser", PUBLISHED)
    (total,) = values(rows, "memory on cpu")
    assert total.endswith("MiB in all at batch 1, 512 tokens, models and caches in bfloat16")
    assert values(rows, "receiver cache")[0] == "480 KiB"
    assert [info.format_bytes(n) for n in (0, 999, 1000, 1 << 20, 3 << 29)] == [
        "0 B",
        "999 B",
        "0.977 KiB",
        "1 MiB",
        "1.5 GiB",
    ]
    assert [info.format_seconds(s) for s in (2.5, 0.0123456, 4e-5, 1e-8, 12345.0)] == [
        "2.5 s",
        "12.3 ms",
        "40 us",
        "0.01 us",
        "12,345 s",
    ]


@pytest.mark.parametrize("place", ["directory", "file"])
def test_a_fuser_of_our_own_needs_no_weights(capsys, tmp_path, place):
    config = make_config()
    make_fuser(config).save_pretrained(tmp_path)
    (tmp_path / "fuser.safetensors").unlink()
    where = tmp_path if place == "directory" else tmp_path / "fuser_config.json"
    status, rows = run(capsys, "--fuser", where)
    assert status == 0
    (text,) = values(rows, "fuser")
    assert text.startswith("configuration without weights: ")
    assert f"{config.num_parameters():,} parameters" in text
    assert values(rows, "streams") == ["4 of 2,739 parameters each"]
    assert set(values(rows, "receiver weights")) == {"unknown"}
    assert values(rows, "memory on cpu")[0].startswith("at least ")


@pytest.mark.parametrize("place", ["directory", "file"])
def test_a_published_fuser_needs_no_weights(capsys, tmp_path, place):
    for file in PUBLISHED.glob("*.json"):
        shutil.copy(file, tmp_path)
    where = tmp_path if place == "directory" else tmp_path / "projector_config.json"
    status, rows = run(capsys, *PAIR, "--fuser", where)
    assert status == 0
    parameters = Fuser.from_published(PUBLISHED).config.num_parameters()
    assert f"{parameters:,} parameters" in values(rows, "fuser")[0]
    assert values(rows, "fits") == ["receiver, sharer"]


def test_weights_that_are_there_are_checked(capsys, tmp_path):
    make_fuser().save_pretrained(tmp_path)
    (tmp_path / "fuser.safetensors").write_bytes(b"nothing")
    assert main(["info", "--fuser", str(tmp_path)]) == 2
    assert "is not a whole safetensors file" in capsys.readouterr().err
    shutil.copytree(PUBLISHED, tmp_path / "published")
    (tmp_path / "published" / "projector_3.pt").unlink()
    assert main(["info", "--fuser", str(tmp_path / "published")]) == 2
    assert "projector_3.pt is missing" in capsys.readouterr().err


def test_open_gates_are_counted_where_there_are_weights(capsys, tmp_path):
    fuser = make_fuser()
    set_gates(fuser, {(0, "key"): -1.0})
    fuser.half().save_pretrained(tmp_path)
    _, rows = run(capsys, "--fuser", tmp_path)
    assert values(rows, "streams") == ["4 of 2,739 parameters each, 3 open"]
    assert values(rows, "fuser parameters")[0] == info.format_bytes(4 * 2739 * 2)


def test_every_reason_is_given(capsys, tmp_path):
    """Both models are of the wrong shape, and one of them in two numbers."""
    data = json.loads((E2E / "receiver" / "config.json").read_text())
    data |= {"num_key_value_heads": 1, "head_dim": 10}
    (tmp_path / "config.json").write_text(json.dumps(data))
    arguments = ["--receiver", tmp_path, "--sharer", E2E / "sharer2", "--fuser", PUBLISHED]
    status, rows = run(capsys, *arguments)
    assert status == 1
    problems = values(rows, "does not fit")
    assert "the fuser was made for num_heads 2 in receiver layer 0, this one has 1" in problems
    assert "the fuser was made for head_dim 24 in receiver layer 4, this one has 10" in problems
    assert "the fuser was made for a sharer of 3 layers, this one has 7" in problems
    assert len(problems) == 2 * 5 + 1
    assert values(rows, "fits") == [] == values(rows, "memory on cpu")
    numbers = report(tmp_path, *arguments, status=1)
    assert numbers["fits"] is False and numbers["memory_bytes"] == {}
    assert numbers["problems"] == problems


UNSUPPORTED = {
    "DeepseekV3Config": "uses multi-head latent attention (kv_lora_rank=512)",
    "T5Config": "is an encoder-decoder model",
    "MambaConfig": "model type 'mamba': layer 0",
    "RwkvConfig": "model type 'rwkv': layer 0",
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_architectures_are_named_and_do_not_fit(capsys, tmp_path, kind):
    if not hasattr(transformers, kind):
        kind = "MambaConfig"
    directory = config_directory(tmp_path, getattr(transformers, kind)())
    status, rows = run(capsys, "--receiver", directory, "--sharer", directory, "--fuser", PUBLISHED)
    assert status == 1
    problems = values(rows, "does not fit")
    assert [problem.partition(":")[0] for problem in problems] == ["receiver", "sharer"]
    assert all(UNSUPPORTED[kind] in problem for problem in problems)


def test_all_reasons_of_one_model_are_given():
    config = transformers.Qwen3Config(num_hidden_layers=2)
    config.is_encoder_decoder, config.kv_lora_rank = True, 8
    config.layer_types = ["linear_attention", "conv"]
    with pytest.raises(ValueError) as caught:
        ModelKV.from_config(config)
    assert len(caught.value.reasons) == 4
    assert all(reason in str(caught.value) for reason in caught.value.reasons)


def test_a_receiver_alone(capsys, tmp_path):
    status, rows = run(capsys, "--receiver", E2E / "receiver" / "config.json")
    assert status == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(E2E / "receiver")
    count = sum(p.numel() for p in model.parameters())
    (text,) = values(rows, "receiver")
    assert text == f"qwen3 receiver (5 layers, 2 x 24), {count:,} parameters"
    assert values(rows, "receiver weights") == [info.format_bytes(2 * count)]
    assert values(rows, "fits") == values(rows, "fuser") == []
    numbers = report(tmp_path, "--receiver", E2E / "receiver")
    assert numbers["fits"] is None and numbers["sharer"] is None


def tokenizer(vocabulary: dict[str, int] | list, added: dict[str, int]) -> str:
    listed = [{"id": number, "content": token} for token, number in added.items()]
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": listed})


TOKENIZERS = {
    "same": (({"a": 0, "b": 1}, {"<s>": 2}), []),
    "more": (({"a": 0, "b": 1, "c": 3}, {"<s>": 2}), []),  # the sharer may know more
    "list": (([["a", -1.0], ["b", -2.0]], {"<s>": 2}), []),
    "swapped": (({"a": 1, "b": 0}, {"<s>": 2}), ["2 of the receiver's 3 tokens"]),
    "fewer": (({"a": 0}, {"<s>": 2}), ["1 of the receiver's 3 tokens"]),
    "broken": ((5, {}), ["tokenizer.json is not a tokenizer of a known kind"]),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizers_are_compared_id_by_id(capsys, tmp_path, case):
    for side, content in (("receiver", TOKENIZERS["same"][0]), ("sharer", TOKENIZERS[case][0])):
        (tmp_path / side).mkdir()
        shutil.copy(E2E / "receiver" / "config.json", tmp_path / side)
        (tmp_path / side / "tokenizer.json").write_text(tokenizer(*content))
    sides = ["--receiver", tmp_path / "receiver", "--sharer", tmp_path / "sharer"]
    status, rows = run(capsys, *sides)
    assert status == 0
    notes, expected = values(rows, "note"), TOKENIZERS[case][1]
    assert len(notes) == len(expected)
    assert all(part in note for part, note in zip(expected, notes, strict=True))
    assert all("both models must read the same token ids" in note for note in notes)


def test_what_fits_but_deserves_attention_is_noted(capsys, tmp_path):
    receiver = transformers.AutoConfig.from_pretrained(E2E / "receiver")
    sharer = transformers.AutoConfig.from_pretrained(E2E / "sharer1")
    fuser = Fuser(FuserConfig.for_models(receiver, sharer, hidden_size=8))
    fuser.save_pretrained(tmp_path / "fuser")
    shape = {"num_hidden_layers": 5, "num_key_value_heads": 2, "head_dim": 24}
    other = transformers.LlamaConfig(**shape, num_attention_heads=2, vocab_size=97, hidden_size=48)
    config_directory(tmp_path / "r", other, quantization_config={"quant_method": "gptq"})
    arguments = ["--receiver", tmp_path / "r", *PAIR[2:], "--fuser", tmp_path / "fuser"]
    status, rows = run(capsys, *arguments, "--tokens", 1_000_000)
    assert status == 0
    notes = "\n".join(values(rows, "note"))
    for part in (
        "the fuser was made for a receiver of type qwen3, this one is llama",
        "the receiver is quantized; its memory and times are those without that",
        "1,000,000 tokens are more than the receiver was made for (2,048)",
        "the sharer's vocabulary (96) is smaller than the receiver's (97)",
        "tokenizers not compared (receiver and sharer: no tokenizer.json)",
    ):
        assert part in notes


def test_the_path_of_the_fuser_is_told(capsys, monkeypatch):
    _, rows = run(capsys, "--fuser", PUBLISHED)
    assert values(rows, "fuser on cpu") == ["compiled op"]
    reason = "projection='linear'"
    monkeypatch.setattr(FuserConfig, "uncompiled_reason", lambda self: reason, raising=False)
    _, rows = run(capsys, "--fuser", PUBLISHED)
    expected = f"reference.py (plain PyTorch) because {reason}"
    assert values(rows, "fuser on cpu") == [expected]
    assert set(values(rows, "packed fuser")) == {"0 B"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch", 0, "--batch must be in 1..65536, got 0"),
        ("--batch", -3, "--batch must be in 1..65536, got -3"),
        ("--tokens", 10**12, "--tokens must be in 1..16777216, got 1000000000000"),
        ("--json", "/nowhere/x.json", "--json: there is no directory /nowhere"),
        ("--json", "/", "--json: / exists and is not a regular file"),
        ("--json", os.devnull, f"--json: {os.devnull} exists and is not a regular file"),
        ("--sharer", "/nowhere", "no model at /nowhere: config.json is missing"),
    ],
)
def test_a_bad_option_is_named_before_anything_is_printed(capsys, option, value, message):
    assert main(["info", option, str(value)]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"c2c info: {message}\n"
    if option != "--sharer":
        assert captured.out == ""


def test_batch_and_tokens_are_bounded_together(capsys):
    assert main(["info", "--batch", "65536", "--tokens", "16777216"]) == 2
    assert "--batch times --tokens must be at most 2147483648" in capsys.readouterr().err
    status, rows = run(capsys, *PAIR, "--batch", 128, "--tokens", 16_777_216)
    assert status == 0 and "TiB" in values(rows, "memory on cpu")[0]


@pytest.mark.parametrize("option", ["--batch", "--tokens", "--dtype"])
def test_an_option_of_the_wrong_kind_is_named(capsys, option):
    with pytest.raises(SystemExit) as caught:
        main(["info", option, "many"])
    assert caught.value.code == 2
    assert f"argument {option}: invalid" in capsys.readouterr().err


def hostile(change: dict[str, object] | str) -> str:
    if isinstance(change, str):
        return change
    return json.dumps({"model_type": "qwen3", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": 10**12},
            "num_hidden_layers must be at most 1024, got 1000000000000",
        ),
        ({"a": [{"num_experts": 10**9}]}, "num_experts must be at most 4096, got 1000000000"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "must be equal to|entries"),
        ({"model_type": "\x1b[31mred"}, "is not a model configuration"),
        (
            {"model_type": "red", "auto_map": {"AutoConfig": "evil.Evil"}},
            "is not a model configuration",
        ),
        ("[1, 2]", "is not a model configuration: model_type None is not one of"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"model_type": "qwen3", "num_hidden_layers": 1e999}', "is not valid JSON"),
        (" " * ((4 << 20) + 1), "must be at most 4194304 bytes, got 4194305"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_hostile_model_configuration_is_one_clear_line(capsys, tmp_path, change, message):
    (tmp_path / "config.json").write_text(hostile(change))
    assert main(["info", "--receiver", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|"))
    assert error.count("\n") == 1 and len(error) < 1000
    assert error[:-1].isprintable()


@pytest.mark.parametrize("place", [".", "config.json"])
def test_code_beside_a_configuration_is_neither_run_nor_asked_about(tmp_path, monkeypatch, place):
    (tmp_path / "config.json").write_text(
        hostile({"model_type": "red", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    assert main(["info", "--receiver", str(tmp_path / place)]) == 2
    assert not (tmp_path / "ran").exists() and not asked


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**21},
        {"vocab_size": 2**63 - 1},
        {"num_experts": 4000, "num_hidden_layers": 1000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_model_too_odd_to_count_has_unknown_parameters(capsys, tmp_path, change):
    (tmp_path / "config.json").write_text(hostile({"head_dim": 8, **change}))
    status, rows = run(capsys, "--receiver", tmp_path)
    assert status == 0
    assert "unknown number of parameters (" in values(rows, "receiver")[0]
    assert values(rows, "receiver weights") == ["unknown"]


def test_json_is_written_whole_or_not_at_all(capsys, tmp_path):
    target, link = tmp_path / "kept.json", tmp_path / "link.json"
    target.write_text("before")
    link.symlink_to(target)
    assert main(["info", "--receiver", "/nowhere", "--json", str(link)]) == 2
    assert target.read_text() == "before"
    assert main(["info", "--json", str(link)]) == 0
    assert json.loads(target.read_text())["environment"]["python"]
    assert link.is_symlink()
    assert {file.name for file in tmp_path.iterdir()} == {"kept.json", "link.json"}


CEILINGS = {torch.float32: 1e12, torch.bfloat16: 4e12, torch.float16: 4e12}


def fixed_probe(device: torch.device, dtypes: list[torch.dtype], **_: object) -> Ceilings:
    return Ceilings(str(device), 1e11, {dtype: CEILINGS[dtype] for dtype in dtypes})


def test_times_come_from_the_measured_ceilings(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(info, "probe", fixed_probe)
    numbers = report(tmp_path, *PAIR, "--fuser", PUBLISHED, "--dtype", "fp16", "--probe")
    assert numbers["ceilings"][0] == {
        "device": "cpu",
        "memory_bytes_per_s": 1e11,
        "gemm_flop_per_s": {"float32": 1e12, "float16": 4e12},
    }
    steps = numbers["seconds"]["cpu"]
    assert list(steps) == [
        "sharer prefill",
        "receiver prefill",
        "fuse",
        "decode step",
        "first token",
    ]
    first = steps.pop("first token")["seconds"]
    assert first == pytest.approx(sum(step["seconds"] for step in steps.values()))
    for name, step in steps.items():
        rate = 1e12 if name == "fuse" else 4e12  # the CPU widens float16 weights
        assert step["seconds"] == max(step["bytes"] / 1e11, step["flop"] / rate) > 0
    fuser = Fuser.from_published(PUBLISHED)
    elements = estimate.packed_matrix_elements(fuser.config, fuser.open_streams())
    assert steps["fuse"]["flop"] == 2 * elements * 512
    out = capsys.readouterr().out
    assert "memory 100 GB/s, float32 GEMM 1,000 GFLOP/s, float16 GEMM 4,000 GFLOP/s" in out
    assert "(measured now)" in out and "at least, at these ceilings; no overhead is counted" in out


def test_probe_alone_prints_ceilings(capsys, monkeypatch):
    monkeypatch.setattr(info, "probe", fixed_probe)
    status, rows = run(capsys, "--probe")
    assert status == 0
    assert values(rows, "ceilings of cpu") == [
        "memory 100 GB/s, bfloat16 GEMM 4,000 GFLOP/s (measured now)"
    ]
    assert values(rows, "time on cpu") == []


def test_a_mixture_of_experts_has_no_time(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(info, "probe", fixed_probe)
    config = transformers.MixtralConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=8, num_attention_heads=2
    )
    config.num_key_value_heads = 2
    directory = config_directory(tmp_path, config)
    _, rows = run(capsys, "--receiver", directory, *PAIR[2:], "--probe")
    assert values(rows, "decode step")[0].startswith("unknown: ")
    assert values(rows, "first token")[0].startswith("unknown: ")
    assert values(rows, "fuse")[0].endswith("-bound)")


def test_transformers_is_imported_only_to_read_models():
    code = (
        "import sys; from c2c_ext.cli import main; "
        f"assert main(['info', '--fuser', {str(PUBLISHED)!r}]) == 0; "
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "wav2vec2"}, "no causal language model"),
        ({"model_type": "bert"}, "is an encoder"),
        ({"model_type": "roberta"}, "is an encoder"),
        ({"model_type": "xlnet"}, "fills no cache"),
    ],
)
def test_models_that_cannot_decode_do_not_fit(capsys, tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, rows = run(capsys, "--receiver", str(tmp_path))
    assert status == 1
    assert any(reason in row for row in values(rows, "does not fit"))


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_key_value_heads"])
def test_sizes_below_one_are_refused(capsys, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", name: 0}))
    assert main(["info", "--receiver", str(tmp_path)]) == 2
    assert f"{name} must be at least 1, got 0" in capsys.readouterr().err


def test_a_variant_is_named(capsys, tmp_path):
    for changes, words in (
        ({"projection": "linear", "weighting": False}, ["linear projection", "weighting=False"]),
        ({"kinds": ("key",), "gate": False}, ["kinds=('key',)", "gate=False", "hidden size 16"]),
        ({"integration": "interpolation"}, ["integration='interpolation'"]),
    ):
        file = tmp_path / "fuser_config.json"
        file.write_text(make_config(**changes).to_json())
        status, rows = run(capsys, "--fuser", str(file))
        assert status == 0
        (row,) = values(rows, "fuser")
        assert all(word in row for word in words)
        path = "reference.py (plain PyTorch)" if "projection" in changes else "compiled op"
        assert path in values(rows, "fuser on cpu")[0]


def test_many_shapes_are_refused_before_they_are_counted(capsys, tmp_path):
    data = json.loads(make_config().to_json())
    data["receiver"]["kv_layers"] = [[1, n + 1] for n in range(64)]
    data["layer_map"] = [0] * 64
    (tmp_path / "fuser_config.json").write_text(json.dumps(data))
    assert main(["info", "--fuser", str(tmp_path)]) == 2
    assert "at most 32 different pairs of KV shapes, got 64" in capsys.readouterr().err

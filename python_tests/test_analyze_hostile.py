"""c2c analyze under attack: bad files and models, and inputs of which there is too little."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chat_models import save_chat_models
from local_tokenizers import WORDS, word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import trio

from c2c_ext.analysis import curves, readings, retention
from c2c_ext.analysis.arguments import ANALYSES
from c2c_ext.analysis.effective_rank import cache_ranks, effective_rank, rank_rows
from c2c_ext.analysis.weight_maps import weight_rows
from c2c_ext.cli import main


def conversation(prompt: str, answer: str, **more: object) -> str:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **more}) + "\n"


GOOD = conversation("w1 w2", "w3") + conversation("w5", "w6")


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Options that name a tiny trio of this test's own, and a file of questions."""
    options = save_chat_models(tmp_path / "trio")
    (tmp_path / "q.jsonl").write_text(GOOD)
    return [*options, "--questions", str(tmp_path / "q.jsonl")]


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """What is said; nothing is printed as a result."""
    capsys.readouterr()
    assert main(["analyze", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("c2c analyze: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("n" * 250, "cannot be written: File name too long"),
        ("n" * 300, "cannot be written: File name too long"),
        ("circle", "cannot be written"),
        ("q.jsonl/a", "there is no directory"),
        (".", "exists and is not a regular file"),
        ("fifo", "exists and is not a regular file"),
    ],
)
@pytest.mark.parametrize("option", ["--json", "--svg"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_loaded(
    option: str,
    place: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded before the place was checked")

    monkeypatch.setattr("c2c_ext.analysis.command.load_models", load)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "q.jsonl").write_text(GOOD)
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.iterdir())
    error = refused(["rank", option, str(tmp_path / place)], capsys)
    assert message in error and error.startswith(f"c2c analyze: {option}: ")
    assert sorted(tmp_path.iterdir()) == before


def test_questions_are_not_overwritten(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "q.jsonl")
    for option, name in (("--json", "q.jsonl"), ("--svg", "link")):
        error = refused(["rank", *own, option, str(tmp_path / name)], capsys)
        assert f"{option} must be another file than --questions" in error
    assert (tmp_path / "q.jsonl").read_text() == GOOD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\n", "line 1: the line is not valid JSON"),
        (b"[" * 100000 + b"\n", "line 1: the line is nested too deeply"),
        (b'{"messages": NaN}\n', "line 1: the line is not valid JSON: NaN is not JSON"),
        (b'{"messages":[],"messages":[]}\n', "duplicate keys: messages"),
        (b"[1]\n", "line 1: must be an object with messages, got list"),
        (b"\0" * 99, "line 1: the line is not valid JSON"),
        (GOOD.encode() + conversation("w1", "").encode(), "line 3: messages[1].content, the resp"),
        (conversation("w1\ud800", "w2").encode(), "line 1: messages[0].content holds a lone surr"),
        (conversation("w1", "w2", positions=[0, 10**30]).encode(), "positions must end at most"),
        (conversation("w1", "w2", positions=[2, 1]).encode(), "positions must be [first, end]"),
        (conversation("w1", "w2", positions=[True, 2]).encode(), "positions must be [first, end]"),
        (conversation("w1", "w2", positions="all").encode(), "positions must be [first, end]"),
    ],
)
def test_hostile_lines_are_named(
    text: bytes, message: str, own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "q.jsonl").write_bytes(text)
    error = refused(["layers", *own, "--json", str(tmp_path / "a.json")], capsys)
    assert message in error and f"--questions: {tmp_path / 'q.jsonl'}" in error
    assert "bad_data" not in error  # no option of this command
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("place", ["/dev/zero", ".", "some/dataset", "missing.jsonl"])
def test_questions_must_be_a_file(
    place: str, own: list[str], capsys: pytest.CaptureFixture
) -> None:
    error = refused(["layers", *own[:-1], place], capsys)
    assert error == f"c2c analyze: --questions: there is no file {place}\n"


def change_tokenizers(tmp_path: Path, make: Callable[[], object]) -> None:
    for side in ("receiver", "sharer"):
        (tmp_path / "trio" / side / "chat_template.jinja").unlink(missing_ok=True)
        make().save_pretrained(tmp_path / "trio" / side)


@pytest.mark.parametrize(
    ("what", "prompt", "answer", "more", "message"),
    [
        ("layers", "x30 w1", "w2", [], "line 1: token 127 is not one of the receiver's 97"),
        ("layers", "w1", "x40", [], "line 1: token 137 is not one of the receiver's 97"),
        (
            "solved",
            "w1",
            "w2",
            ["--t2t-prompt", "x40 {question}"],
            "line 1, t2t: token 137 is not one of the sharer's 97",
        ),
    ],
)
def test_tokens_that_a_model_does_not_know_are_named(
    what: str,
    prompt: str,
    answer: str,
    more: list[str],
    message: str,
    own: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    change_tokenizers(tmp_path, lambda: word_tokenizer((*WORDS, *(f"x{i}" for i in range(50)))))
    (tmp_path / "q.jsonl").write_text(conversation(prompt, answer))
    assert message in refused([what, *own, *more], capsys)


def test_prompts_of_one_token_or_none_are_named(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change_tokenizers(tmp_path, lambda: word_tokenizer(chat_template=None))
    (tmp_path / "q.jsonl").write_text(conversation("w1", "w2"))
    error = refused(["layers", *own], capsys)
    assert "line 1: the prompt must have at least 2 tokens, the last one is not fused" in error
    (tmp_path / "q.jsonl").write_text(conversation("", "w2"))
    assert "line 1: the receiver's tokenizer makes no token of this" in refused(
        ["layers", *own], capsys
    )


def test_a_template_that_refuses_is_named(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change_tokenizers(tmp_path, lambda: word_tokenizer(chat_template="{{ raise_exception('no') }}"))
    error = refused(["layers", *own], capsys)
    assert "line 1: the receiver's chat template refuses the conversation: no" in error


def poison(place: Path, name: str) -> None:
    """NaN in every number of the one tensor of a model's file."""
    tensors = load_file(place)
    with safe_open(place, "pt") as file:
        meta = file.metadata()
    tensors[name].fill_(math.nan)
    save_file(tensors, place, metadata=meta)


@pytest.mark.parametrize(
    ("side", "name", "message"),
    [
        ("receiver", "model.layers.1.self_attn.k_proj.weight", "the receiver's cache holds NaN"),
        ("sharer", "model.layers.4.self_attn.v_proj.weight", "the sharer's cache holds NaN"),
        ("fuser", "groups.0.out_bias", "--fuser: "),
    ],
)
@pytest.mark.parametrize("what", ["rank", "solved"])
def test_models_that_compute_nan_are_named(
    what: str,
    side: str,
    name: str,
    message: str,
    own: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = "fuser.safetensors" if side == "fuser" else "model.safetensors"
    poison(tmp_path / "trio" / side / file, name)
    error = refused([what, *own, "--json", str(tmp_path / "a.json")], capsys)
    assert message in error and not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("what", ["layers", "attention", "solved"])
def test_logits_that_are_nan_are_named(
    what: str, own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    poison(tmp_path / "trio" / "receiver" / "model.safetensors", "lm_head.weight")
    assert "the receiver's logits hold NaN" in refused([what, *own], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solved", "--t2t-tokens", "0"], "--t2t-tokens must be at least 1, got 0"),
        (["rank", "--t2t-tokens", "3"], "--t2t-tokens goes with solved, not with rank"),
        (["rank", "--t2t-prompt", "{question}"], "--t2t-prompt goes with solved, not with rank"),
        (["solved", "--t2t-prompt", "x"], "--t2t-prompt must have the placeholder {question}"),
        (["solved", "--t2t-prompt", "{question}"], "--t2t-prompt goes with models of your own"),
        (["rank", "--filled"], "--filled goes with the shipped pair and attention"),
        (
            ["attention", "--receiver", "x", "--questions", "q", "--filled"],
            "--filled goes with the shipped pair and attention",
        ),
        (["rank", "--form-size", "0"], "--form-size must be within 1..12, got 0"),
        (["rank", "--form-size", "13"], "--form-size must be within 1..12, got 13"),
        (
            ["rank", "--receiver", "x", "--questions", "q", "--form-size", "3"],
            "--form-size goes with the shipped pair",
        ),
    ],
)
def test_options_that_do_not_go_together_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert message in refused(arguments, capsys)


@pytest.mark.parametrize("what", ANALYSES)
def test_one_question_of_one_token_is_analysed(
    what: str, own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Every figure is defined, or said not to be: no NaN in what is written."""
    change_tokenizers(tmp_path, lambda: word_tokenizer(chat_template=None))
    (tmp_path / "q.jsonl").write_text(conversation("w1 w2", "w3"))
    files = [str(tmp_path / "a.json"), str(tmp_path / "a.svg")]
    more = ["--t2t-tokens", "1"] if what == "solved" else []
    assert main(["analyze", what, *own, *more, "--json", files[0], "--svg", files[1]]) == 0
    assert "nan" not in capsys.readouterr().out
    data = json.loads(Path(files[0]).read_text())
    if what == "rank":
        assert all(row[kind] == pytest.approx(1) for row in data["rows"] for kind in KINDS)
    if what == "attention":
        assert all(row["kept_auc"] is None for row in data["conditions"])
        assert all(row["spearman_low"] is None for row in data["across"])


KINDS = ("key", "value")


def reading(token_map: list[int]) -> tuple:
    receiver, sharer, fuser = trio()
    ids = torch.arange(2, 16).view(2, 7)
    answers = torch.tensor([1, 2])
    places = torch.tensor(token_map)
    return (
        receiver,
        fuser,
        readings.read(receiver, sharer, ids, ids[:, :-1], places, answers=answers),
    )


def test_prompts_of_which_nothing_is_fused_are_refused_or_like_the_receiver_alone() -> None:
    receiver, fuser, nothing = reading([-1] * 6)
    for analysis in (lambda: rank_rows([nothing], fuser), lambda: weight_rows([nothing], fuser)):
        with pytest.raises(ValueError, match="no token of these prompts is fused"):
            analysis()
    for rows in (
        curves.layer_rows(receiver, fuser, [nothing]),
        curves.position_rows(receiver, fuser, [nothing]),
    ):
        assert all(row["kl"] == 0 and row["as_fused"] == 2 for row in rows)
    seen = retention.observe(receiver, fuser, [nothing])
    assert bool(seen.kept.all()) and bool((seen.cosines == 1).all())


def test_no_prompts_at_all_are_refused() -> None:
    receiver, fuser, _ = reading([0] * 6)
    for analysis in (curves.layer_rows, curves.position_rows, retention.observe):
        with pytest.raises(ValueError, match="at least one reading"):
            analysis(receiver, fuser, [])
    for analysis in (rank_rows, weight_rows):
        with pytest.raises(ValueError, match="no token of these prompts is fused"):
            analysis([], fuser)


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_ranks_of_huge_and_tiny_numbers_are_those_of_ones(size: float) -> None:
    matrix = torch.eye(3, dtype=torch.float64) * size
    assert effective_rank(matrix) == pytest.approx(3.0)


def test_zero_caches_have_rank_zero() -> None:
    (layer,) = cache_ranks([[(torch.zeros(2, 2, 3, 4), torch.ones(2, 2, 3, 4))]])
    assert (layer["key"], layer["rows"]) == (0.0, 6)
    assert layer["value"] == pytest.approx(1.0)

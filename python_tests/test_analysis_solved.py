"""Which questions each mode and control solves: against c2c eval, c2c chat and the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_models import chat_models, save_chat_models
from torch import Tensor

from c2c_ext.analysis import solved
from c2c_ext.analysis.curves import map_of_part
from c2c_ext.analysis.file_questions import file_questions
from c2c_ext.analysis.questions import sample, shipped_questions
from c2c_ext.analysis.readings import fused, is_right, next_logits
from c2c_ext.chat.models import ChatModels, load_models
from c2c_ext.chat.session import Session, Settings
from c2c_ext.cli import main
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.evaluation.modes import Item, generate
from c2c_ext.evaluation.readers import EvaluationPair
from c2c_ext.evaluation.statistics import mcnemar, wilson_interval

MODES = ("receiver", "sharer", "routing", "t2t", "c2c", "mismatched", "zero", "noise")
PROMPTS = ["w1 w2 w3", "w9 w8 w7 w6", "w20", "w30 w31 w32", "w40 w41", "w50 w1 w50 w1 w2", "w60"]


def written(place: Path, answers: list[str], prompts: list[str] = PROMPTS) -> str:
    """A file of these questions and answers."""
    talks = [
        {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    place.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return str(place)


def said_by(models: ChatModels, mode: str, prompts: list[str] = PROMPTS) -> list[str]:
    """What c2c eval's reader of token ids says to the same prompts, one word each."""
    pair = EvaluationPair(models.receiver, models.sharer, models.fuser)
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    items = [
        Item(tuple(models.prompts.encode("receiver", talk)[0].tolist()), group=k)
        for k, talk in enumerate(messages)
    ]
    tokens = models.tokenizers["receiver"]
    return [tokens.decode(list(said.ids)) for said in generate(mode, pair, items, 1)]


@pytest.fixture(scope="module")
def models() -> ChatModels:
    return chat_models()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "t2t"])
def test_a_mode_says_what_it_says_in_evaluation(
    mode: str, models: ChatModels, tmp_path: Path
) -> None:
    """Its own words are right answers in it alone and where others say them too."""
    said = {other: said_by(models, other) for other in MODES if other != "t2t"}
    words = [word.startswith("w") for word in said[mode]]
    assert sum(words) >= 4
    answers = [word if ok else "w0" for word, ok in zip(said[mode], words, strict=True)]
    right = solved.answers(models, file_questions(models, written(tmp_path / "q", answers)), 1)
    assert tuple(right) == MODES
    for other, said_there in said.items():
        expected = [a == b for a, b in zip(said_there, answers, strict=True)]
        assert right[other].tolist() == expected, other
    assert len({tuple(found) for found in said.values()}) > 5  # they differ


def test_t2t_says_what_it_says_in_a_chat(models: ChatModels, tmp_path: Path) -> None:
    said = {}
    for tokens in (1, 5):
        session = Session(models, Settings(max_new_tokens=1, t2t_tokens=tokens))
        replies = [session.ask(prompt, "t2t") for prompt in PROMPTS]
        for reply in replies:
            session.reset()
            list(reply)
        said[tokens] = [reply.answer.text or "w0" for reply in replies]
    assert said[1] != said[5]
    for tokens, answers in said.items():
        asked = file_questions(models, written(tmp_path / "q", answers))
        found = asked.ask_by_text(tokens).tolist()
        assert found == [answer != "w0" for answer in answers]
        assert asked.ask_by_text(6 - tokens).tolist() == [
            a == b and a != "w0" for a, b in zip(said[6 - tokens], answers, strict=True)
        ]


def test_shipped_answers_are_those_of_the_demo() -> None:
    """Question by question; the recorded file agrees with the demo's counts of all of them."""
    models = load_models()
    asked = shipped_questions(models, 40, 3)
    found = solved.answers(models, asked, asked.t2t_tokens)
    pair, kept = pair_of(models), sample(960, 40)
    for k, kind in enumerate(w.KINDS):
        every = ev.held_out_questions(pair.world, kind, 3)
        fields = (every.entities, every.attributes, every.asked, every.kinds)
        questions = ev.Questions(*(field[kept] for field in fields))
        alone = [ev.answer_alone(m, pair.world, questions) for m in (pair.receiver, pair.sharer)]
        surer = alone[0].softmax(1).amax(1) >= alone[1].softmax(1).amax(1)
        expected = {
            "receiver": alone[0],
            "sharer": alone[1],
            "routing": torch.where(surer[:, None], *alone),
            "t2t": ev.answer_t2t(pair, questions, ev.write_form),
            "c2c": ev.answer_c2c(pair, questions),
            "zero": ev.answer_zero(pair, questions),
        }
        for mode, logits in expected.items():
            right = logits.argmax(dim=1) == questions.answers(pair.world)
            assert torch.equal(found[mode][40 * k : 40 * k + 40], right), mode
    assert found["c2c"].sum() > 70
    assert all(found[mode].sum() < 30 for mode in ("receiver", "mismatched", "zero", "noise"))
    assert solved.verdict_of(found).transferred


@pytest.mark.parametrize("size", [3, 12])
def test_a_position_carries_its_own_attribute_and_no_other(size: int) -> None:
    models = load_models()
    asked, own, others = shipped_questions(models, 100, size), [], []
    for r in asked.readings:
        places = [name.split()[2 : 2 + size].index(name.split()[-1]) for name in r.names]
        for k in range(size):
            token_map = map_of_part(r, "only", (k + 1) / size, k / size)
            right = is_right(next_logits(models.receiver, fused(r, models.fuser, token_map), r), r)
            is_own = torch.tensor(places) == k
            own.append(right[is_own])
            others.append(right[~is_own])
    own, others = (torch.cat(part).float() for part in (own, others))
    assert len(own) == 200 and own.mean() > 0.97
    assert 0.08 < others.mean() < 0.18


def pair_of(models: ChatModels) -> ev.Pair:
    return ev.Pair(w.make_world(0), models.receiver, models.sharer, models.fuser)


def test_shipped_text_of_few_tokens_says_only_the_first_values() -> None:
    models = load_models()
    asked = shipped_questions(models, 60)
    whole, none_missing = asked.ask_by_text(6), asked.ask_by_text(12)
    assert torch.equal(whole, none_missing) and whole.float().mean() > 0.95
    first = torch.tensor(
        [name.split()[2] == name.split()[-1] for r in asked.readings for name in r.names]
    )
    told = asked.ask_by_text(1)
    assert 5 < int(first.sum()) < 40
    assert told[first].float().mean() > 0.95 and told[~first].float().mean() < 0.4


def test_the_shipped_pairs_mismatched_cache_is_of_another_form() -> None:
    shipped = load_models()
    asked = shipped_questions(shipped, 20)
    for own, other in zip(asked.readings, asked.mismatched, strict=True):
        assert torch.equal(own.token_map, other.token_map) and torch.equal(own.last, other.last)
        assert bool((own.sharer_ids != other.sharer_ids).any(dim=1).all())
        logits = next_logits(shipped.receiver, fused(other, shipped.fuser), other)
        assert int(is_right(logits, other).sum()) < 10


def test_rows_hold_intervals_and_paired_tests() -> None:
    right = {
        "receiver": torch.tensor([True, False, False, False]),
        "c2c": torch.tensor([False, True, True, False]),
    }
    receiver, c2c = solved.mode_rows(right)
    assert receiver == {
        "mode": "receiver",
        "right": 1,
        "questions": 4,
        **dict(zip(("low", "high"), wilson_interval(1, 4), strict=True)),
        "only_c2c": 2,
        "only_it": 1,
        "p": mcnemar(2, 1),
    }
    assert (c2c["only_c2c"], c2c["only_it"], c2c["p"]) == (None, None, None)
    assert solved.verdict_of(right) is None
    with pytest.raises(ValueError, match="at least one question"):
        solved.mode_rows({"c2c": torch.zeros(0, dtype=torch.bool)})


def everything(out: Tensor | str) -> list[str]:
    return [line for line in str(out).splitlines() if line]


def test_one_command_says_whether_content_crosses(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A fuser that was never trained carries nothing that answers: the verdict says so."""
    options = save_chat_models(tmp_path)
    questions = written(tmp_path / "q.jsonl", ["w5"] * len(PROMPTS))
    target = tmp_path / "a.json"
    arguments = [*options, "--questions", questions, "--json", str(target)]
    arguments += ["--t2t-tokens", "3", "--t2t-prompt", "w7 {question}"]
    assert main(["analyze", "solved", *arguments]) == 0
    lines = everything(capsys.readouterr().out)
    assert [line.split()[0] for line in lines[1:9]] == list(MODES)
    assert lines[9].startswith("no evidence that content was transferred: against receiver")
    data = json.loads(target.read_text())
    assert (data["verdict"]["transferred"], data["verdict"]["line"]) == (False, lines[9])
    assert (data["arguments"]["t2t_tokens"], data["arguments"]["t2t_prompt"]) == (
        3,
        "w7 {question}",
    )
    assert len(data["pairs"]) == 8 * 7 // 2 and all(0 <= row["p"] <= 1 for row in data["pairs"])
    assert sum(row["questions"] for row in data["patterns"]) == len(PROMPTS)


def test_a_single_question_has_no_mismatched_cache_and_no_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = save_chat_models(tmp_path)
    questions = written(tmp_path / "q.jsonl", ["w5", "w6"], ["w1 w2", "w1 w2"])
    arguments = [*options, "--questions", questions, "--t2t-tokens", "1"]
    assert main(["analyze", "solved", *arguments]) == 0
    out = capsys.readouterr().out
    assert "no verdict: a mismatched cache needs another question" in out
    assert "mismatched " not in out.replace("a mismatched cache", "")


def test_t2t_that_does_not_fit_names_the_line(models: ChatModels, tmp_path: Path) -> None:
    asked = file_questions(models, written(tmp_path / "q", ["w5"], ["w1 w2"]))
    with pytest.raises(ValueError, match=r"q line 1, t2t: too long: .* the sharer was made for"):
        asked.ask_by_text(1000)

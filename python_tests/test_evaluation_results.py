"""Counts, table, T2T wording and the options of `c2c eval`, without the harness."""

import sys

import pytest

from c2c_ext.cli import main
from c2c_ext.evaluation.results import (
    Answers,
    multiplicity,
    of_first_filter,
    pooled,
    right_or_wrong,
    summarise,
    table,
)
from c2c_ext.evaluation.text_to_text import Wording


def sample(doc: int, filter: str = "none", **metrics: float) -> dict:
    return {"doc_id": doc, "filter": filter, "metrics": list(metrics), **metrics}


def test_answers_are_in_the_order_of_questions_and_of_the_first_filter() -> None:
    samples = [
        sample(1, "strict", exact_match=0.0),
        sample(0, "strict", exact_match=1.0),
        sample(0, "loose", exact_match=1.0),
        sample(1, "loose", exact_match=1.0),
    ]
    assert of_first_filter(samples) == [samples[1], samples[0]]
    assert right_or_wrong({"c2c": samples}) == "exact_match"


def test_right_or_wrong_prefers_acc_and_takes_the_metric_asked_for() -> None:
    samples = {"c2c": [sample(k, acc_norm=1.0, acc=float(k), loss=0.5) for k in range(2)]}
    assert right_or_wrong(samples) == "acc"
    assert right_or_wrong(samples, "acc_norm") == "acc_norm"
    assert right_or_wrong(samples, "loss") is None
    assert right_or_wrong({"c2c": [sample(0, word_perplexity=2.5)]}) is None


def test_a_metric_is_right_or_wrong_in_all_modes_or_in_none() -> None:
    """F1 happens to be 0 or 1 where every answer of a mode is all right or all wrong."""
    samples = {
        "receiver": [sample(0, f1=0.0, em=0.0), sample(1, f1=1.0, em=1.0)],
        "c2c": [sample(0, f1=0.5, em=0.0), sample(1, f1=1.0, em=1.0)],
    }
    assert right_or_wrong(samples) == "em"
    assert right_or_wrong(samples, "f1") is None


def test_summary_and_table_show_counts_intervals_and_the_verdict() -> None:
    right = {
        "receiver": [False] * 10 + [True] * 2,
        "c2c": [True] * 10 + [False] * 2,
        "mismatched": [False] * 12,
    }
    summary = summarise(right)
    assert summary["modes"]["c2c"]["right"] == 10
    assert summary["modes"]["c2c"]["count"] == 12
    pairs = [(c["first"], c["second"]) for c in summary["comparisons"]]
    assert pairs == [("receiver", "c2c"), ("receiver", "mismatched"), ("c2c", "mismatched")]
    assert summary["verdict"]["transferred"]
    text = table("forms", "acc", summary)
    # 2 * (1 + 12 + 66) / 4096 against the receiver, 2 / 1024 against the control.
    assert "| receiver | 2 of 12 | 4.7% - 44.8% | 10 : 2 | 0.039 |" in text
    assert "| mismatched | 0 of 12 | 0.0% - 24.2% | 10 : 0 | 0.002 |" in text
    assert text.splitlines()[-1] == summary["verdict"]["line"]


def test_summary_without_a_control_gives_no_verdict() -> None:
    summary = summarise({"receiver": [False], "c2c": [True]})
    assert summary["verdict"] is None
    assert table("t", "acc", summary).endswith(
        "no verdict: it needs the modes c2c, receiver, mismatched"
    )


def test_pooled_tasks_count_a_repeated_question_once() -> None:
    def of(right, *documents):
        return Answers({"receiver": [False] * len(right), "c2c": right}, documents)

    found = pooled({"a": of([True, False], "x", "y"), "b": of([False, True, True], "x", "z", "z")})
    assert (found["tasks"], found["repeated"]) == (["a", "b"], 1)
    assert (found["modes"]["c2c"]["right"], found["modes"]["c2c"]["count"]) == (3, 4)


def test_pooling_shows_what_no_single_task_does() -> None:
    def of(task):
        right = {"c2c": [True] * 4, "receiver": [False] * 4, "mismatched": [False] * 4}
        return Answers(right, [f"{task}{k}" for k in range(4)])

    tasks = {name: of(name) for name in "ab"}
    assert not any(summarise(task.right)["verdict"]["transferred"] for task in tasks.values())
    found = pooled(tasks)
    assert found["verdict"]["transferred"] and found["verdict"]["p"] == 2 / 2**8


def test_several_verdicts_are_corrected_for_their_number() -> None:
    def of(p):
        return {"transferred": p < 0.05, "p": p, "line": ""}

    found = multiplicity({"a": of(0.001), "b": of(0.04), "c": of(0.6)})
    assert found["transferred"] == ["a", "b"]
    assert found["transferred_holm"] == ["a"]  # 0.04 is not below 0.05 / 2
    assert "up to 15%" in found["line"] and found["line"].endswith("(Holm) 1: a")


def test_wording_fills_placeholders_once() -> None:
    wording = Wording("Q: {question}{options}!", "{text} | {question}")
    assert wording.asked("why {options}?", [" a", "b"]) == "Q: why {options}?\n- a\n- b!"
    assert wording.asked("why", []) == "Q: why!"
    assert wording.read("see {question}", "why") == "see {question} | why"


def test_wording_refuses_what_says_nothing() -> None:
    with pytest.raises(ValueError, match="t2t prompt must have the placeholder"):
        Wording(prompt="write")
    with pytest.raises(ValueError, match="t2t reading must have the placeholder"):
        Wording(reading="{question}")
    with pytest.raises(ValueError, match="t2t tokens must be at least 1, got 0"):
        Wording(tokens=0)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--num-fewshot", "-1"], "--num-fewshot must be at least 0, got -1"),
        (["--include-path", "nowhere"], "--include-path: nowhere is no directory"),
        (["--modes", "c2c", "magic"], "--modes: there are receiver, sharer, ensemble"),
        (["--t2t-prompt", "x"], "--t2t-prompt: t2t prompt must have the placeholder {question}"),
        (["--t2t-prompt", ""], "--t2t-prompt: t2t prompt must have the placeholder {question}"),
        (["--json", "/nowhere/x.json"], "--json: there is no directory /nowhere"),
        (["--json", "/"], "--json: / exists and is not a regular file"),
        ([], "needs the extra eval: pip install 'c2c_ext[eval]'"),
    ],
)
def test_eval_refuses_with_one_line(options, message, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it raises ImportError
    assert main(["eval", "--tasks", "forms", *options]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"c2c eval: {message}") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_eval_refuses_a_place_that_it_cannot_write_to(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("os.access", lambda *asked: False)  # root may write everywhere
    assert main(["eval", "--tasks", "forms", "--json", str(tmp_path / "x")]) == 2
    assert f"--json: nothing can be written to {tmp_path}" in capsys.readouterr().err

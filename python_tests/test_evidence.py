"""benchmarks/evidence: outcomes and their files, answers under every mode, a fuser's training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import asking, learning, runs, timing
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.outcomes import Cell, read_runs, update_run
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import world as w
from c2c_ext.demo.command import ASSETS
from c2c_ext.training.recipes import load_recipe

SIZE = 3
CHOICES = torch.arange(w.NUM_VALUES)


@pytest.fixture(scope="module")
def pair() -> ev.Pair:
    return ev.load_pair(ASSETS, 0)


def make_task(pair: ev.Pair, kind: str = "rivals") -> asking.Task:
    questions = ev.held_out_questions(pair.world, kind, SIZE)
    form = pair.world.blank_form(questions.entities, questions.attributes)
    prompt = torch.cat([form, questions.question()], dim=1)
    token_map = torch.full((prompt.shape[1] - 1,), -1)
    fused = slice(w.FORM_START, w.FORM_START + SIZE)
    token_map[fused] = torch.arange(fused.start, fused.stop)
    candidates = w.value_ids(questions.asked[:, None], CHOICES)[:, None]
    truth = questions.answers(pair.world)[:, None]
    return asking.Task(prompt, form, token_map, candidates, truth, alone=prompt)


def first(task: asking.Task, count: int) -> asking.Task:
    fields = {
        name: value if name == "token_map" or value is None else value[:count]
        for name, value in vars(task).items()
    }
    return asking.Task(**fields)


def test_every_mode_answers_as_the_demo_does(pair: ev.Pair) -> None:
    models, task = asking.Models(pair.receiver, pair.sharer, pair.fuser), make_task(pair)
    questions = ev.held_out_questions(pair.world, "rivals", SIZE)
    expected = ev.evaluate(pair, "rivals", SIZE)
    others = questions.entities.roll(w.NUM_ATTRIBUTES)
    swapped = pair.world.blank_form(others, questions.attributes)
    cell = asking.ask_all(
        "rivals, K = 3",
        models,
        task,
        mismatched=swapped,
        swapped=(swapped, questions.answers(pair.world, others)[:, None]),
        texts={"t2t": asking.Text(task.prompt, 0.0)},
        seed=0,
    )
    for mode in ("receiver", "sharer", "routing", "zero"):
        assert cell.count(mode) == expected[mode], mode
    assert cell.count("c2c") == expected["C2C"]
    assert cell.count("t2t") == cell.count("receiver")  # the text said nothing
    assert cell.candidates == w.NUM_VALUES
    wrong = ~cell.right["c2c"] & ~cell.right["swapped"]
    assert cell.count("swapped") > 0.9 * cell.questions and wrong.sum() < 0.1 * cell.questions


def test_an_answer_of_two_tokens_must_be_right_in_both(pair: ev.Pair) -> None:
    models, task = asking.Models(pair.receiver, pair.sharer, pair.fuser), first(make_task(pair), 40)
    one = asking.ask_c2c(models, task)
    twice = asking.Task(
        task.prompt,
        task.shared,
        task.token_map,
        task.candidates.repeat(1, 2, 1),
        torch.cat([task.truth, one.chosen], dim=1),
    )
    both = asking.ask_c2c(models, twice)
    assert torch.equal(both.chosen[:, :1], one.chosen)
    assert torch.equal(both.right(twice.truth), (both.chosen == twice.truth).all(1))
    assert (both.confidence < one.confidence).all()


def test_routing_takes_the_surer_model() -> None:
    own = asking.Answers(torch.tensor([[0], [1]]), torch.tensor([-1.0, -3.0]))
    other = asking.Answers(torch.tensor([[2], [3]]), torch.tensor([-2.0, -2.0]))
    assert asking.routed(own, other).chosen.flatten().tolist() == [0, 3]


def test_noise_has_the_norm_of_every_head_and_one_draw_per_seed(pair: ev.Pair) -> None:
    cache = ev.prefill(pair.sharer, make_task(pair).shared[:2])
    noise = asking.noise_like(cache, 0)
    for (key, value), (n_key, n_value) in zip(cache, noise, strict=True):
        torch.testing.assert_close(n_key.norm(dim=-1), key.norm(dim=-1))
        torch.testing.assert_close(n_value.norm(dim=-1), value.norm(dim=-1))
    assert all(
        torch.equal(a, b) for a, b in zip(noise[0], asking.noise_like(cache, 0)[0], strict=True)
    )
    assert not torch.equal(noise[0][0], asking.noise_like(cache, 1)[0][0])
    assert all((t == 0).all() for pair_ in asking.zeros_like(cache) for t in pair_)


def test_a_fuser_learns_in_the_plain_loop_and_repeats_its_bits(pair: ev.Pair) -> None:
    task = make_task(pair)
    answers = task.candidates[:, 0].gather(1, task.truth)
    ids = torch.cat([task.prompt, answers], dim=1)[:64]
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    fused = torch.zeros_like(ids, dtype=torch.bool)
    fused[:, w.FORM_START : w.FORM_START + SIZE] = True
    batch = learning.Batch(ids, labels, fused)
    recipe = load_recipe("tiny").changed({"max_steps": 12, "hidden_size": 16})
    losses: list[float] = []

    def train(seed: int):
        losses.clear()
        return learning.train_fuser(
            pair.receiver,
            pair.sharer,
            recipe.changed({"seed": seed}),
            lambda step: batch,
            lambda step, loss: losses.append(loss),
        )

    fuser, log = train(0)
    assert losses[-1] < losses[0] and log["last_loss"] == round(losses[-1], 4)
    assert log["recipe"]["hidden_size"] == 16 and len(losses) == 12
    again, _ = train(0)
    other, _ = train(1)
    same = [torch.equal(a, b) for a, b in zip(fuser.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert any(
        not torch.equal(a, b) for a, b in zip(fuser.parameters(), other.parameters(), strict=True)
    )


def test_times_are_of_every_mode_and_its_parts(pair: ev.Pair) -> None:
    models, task = asking.Models(pair.receiver, pair.sharer, pair.fuser), first(make_task(pair), 1)
    rows = timing.measure(
        "is",
        {
            "receiver": lambda watch: asking.ask_receiver(models, task),
            "c2c": lambda watch: timing.c2c_by_parts(models, task, watch),
        },
        rounds=3,
    )
    assert [row["mode"] for row in rows] == ["receiver", "c2c"]
    assert "parts" not in rows[0] and tuple(rows[1]["parts"]) == timing.PARTS
    assert all(row["p20"] <= row["median"] <= row["p80"] for row in rows)


def cell(bits: list[bool]) -> Cell:
    right = {"c2c": torch.tensor(bits), "receiver": torch.zeros(len(bits), dtype=torch.bool)}
    return Cell("is", 8, right, {"c2c": 0.0})


def test_a_cell_comes_back_from_its_file(tmp_path: Path) -> None:
    bits = [True, False, True] * 7
    document = {"cells": [cell(bits).to_json()]}
    path = update_run(tmp_path, "form", 3, accuracy=document)
    update_run(tmp_path, "form", 3, latency={"rows": [{"mode": "c2c"}]})
    (run,) = read_runs(tmp_path)
    assert (run.world, run.seed, run.path) == ("form", 3, path)
    assert run.cells[0].right["c2c"].tolist() == bits and run.cells[0].count("c2c") == 14
    assert run.latency == [{"mode": "c2c"}] and run.cells[0].written == {"c2c": 0.0}
    assert read_runs(tmp_path, "other") == []


def test_counts_that_are_not_their_bits_are_refused() -> None:
    data = json.loads(json.dumps(cell([True, False]).to_json()))
    data["modes"]["c2c"]["right"] = 2
    with pytest.raises(ValueError, match="is, c2c: its bits do not give its count"):
        Cell.from_json(data)
    with pytest.raises(ValueError, match="every mode must have bits"):
        Cell("is", 8, {"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(3).bool()})


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["run", "nowhere"], "got nowhere"),
        (["run", "--jobs", "0"], "--jobs must be at least 1"),
        (["run", "--seeds", "-1"], "--seeds at least 0"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().err


def test_nothing_is_asked_that_was_not_trained(tmp_path: Path) -> None:
    for name in runs.names():
        with pytest.raises(FileNotFoundError, match="nothing was trained here"):
            runs.run(name, 0, tmp_path, tmp_path / "out", ["evaluate"])
    assert not (tmp_path / "out").exists()

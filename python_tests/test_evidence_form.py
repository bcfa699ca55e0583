"""The form world as evidence: what each mode reads, and that nothing held out is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.evidence import timing
from benchmarks.evidence.asking import Models
from benchmarks.evidence.worlds import form
from c2c_ext import Fuser
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import export
from c2c_ext.demo import train as demo_train
from c2c_ext.demo import world as w
from c2c_ext.training.recipes import RECIPES

SEED = 1
QUESTIONS = 24
MODES = {"receiver", "sharer", "routing", "ensemble", "t2t", "t2t_parallel", "t2t_asked"}
MODES |= {"c2c", "mismatched", "zero", "noise", "identical", "swapped"}


@pytest.fixture(scope="module")
def world() -> w.World:
    return w.make_world(SEED)


@pytest.fixture(scope="module")
def models() -> Models:
    """Untrained ones of the recipe's shapes."""
    recipe = demo_train.Recipe()
    torch.manual_seed(0)
    receiver, sharer = (
        demo_train.new_model(shape, recipe.init_std).eval().requires_grad_(False)
        for shape in (recipe.receiver_model, recipe.sharer_model)
    )
    fusers = [
        Fuser(RECIPES["tiny"].changed(changes).fuser_config(receiver.config, other.config))
        for changes, other in (({}, sharer), ({"layer_map": [2, 2, 2]}, receiver))
    ]
    return Models(receiver, sharer, *(fuser.eval().requires_grad_(False) for fuser in fusers))


def some(size: int, kind: str = "rivals") -> ev.Questions:
    """Every 40th of the held-out questions: of many entities, and of several attributes."""
    every = ev.held_out_questions(w.make_world(SEED), kind, size, SEED)
    places = torch.arange(0, len(every.asked), len(every.asked) // QUESTIONS + 1)
    return ev.Questions(*(t[places] for t in vars(every).values()))


def test_every_mode_answers_every_question(models: Models, world: w.World) -> None:
    questions = some(3)
    cell = form.all_modes("rivals, K = 3", models, world, questions, SEED)
    assert set(cell.right) == MODES
    assert cell.questions == len(questions.asked) and cell.candidates == w.NUM_VALUES
    assert dict(cell.written) == {"t2t": 3, "t2t_parallel": 3, "t2t_asked": 1}


def test_answers_are_those_of_the_demos_evaluation(models: Models, world: w.World) -> None:
    """Two ways to the same bits."""
    questions = some(6)
    cell = form.all_modes("rivals, K = 6", models, world, questions, SEED)
    pair = ev.Pair(world, models.receiver, models.sharer, models.fuser)
    truth, draw = questions.answers(world), 1000 * SEED + 6
    expected = {
        "receiver": ev.answer_alone(pair.receiver, world, questions),
        "t2t": ev.answer_t2t(pair, questions, ev.write_form),
        "t2t_parallel": ev.answer_t2t(pair, questions, ev.read_values),
        "c2c": ev.answer_c2c(pair, questions),
        "mismatched": ev.answer_mismatched(pair, questions, draw),
        "zero": ev.answer_zero(pair, questions),
        "identical": ev.answer_c2c(
            replace(pair, sharer=pair.receiver, fuser=models.identical), questions
        ),
    }
    for mode, logits in expected.items():
        assert torch.equal(cell.right[mode], logits.argmax(dim=1) == truth), mode
    swapped, others = ev.answer_swapped(pair, questions)
    assert torch.equal(cell.right["swapped"], swapped.argmax(dim=1) == others)
    for mode in ("receiver", "mismatched", "zero", "identical"):  # or no bit could be wrong
        assert not torch.allclose(expected["c2c"], expected[mode])


def test_task_fuses_each_attribute_with_itself(world: w.World) -> None:
    task = form.task_of(world, some(3))
    fused = (task.token_map >= 0).nonzero()[:, 0]
    words = w.decode(task.prompt[0]).split()
    assert words[:3] == ["<bos>", world.names[int(some(3).entities[0])], ":"]
    assert fused.tolist() == [3, 4, 5]
    assert all(words[i] in w.ATTRIBUTES for i in fused)
    assert torch.equal(task.shared[:, task.token_map[fused]], task.prompt[:, fused])
    right = task.candidates[:, 0].gather(1, task.truth)[:, 0]
    assert w.decode(right[:1]) in w.VALUES_OF[words[-1]]


def test_text_says_what_was_written_and_no_more(world: w.World) -> None:
    questions = some(12, "is")
    facts = world.facts[questions.entities[:, None], questions.attributes]
    for count in (0, 1, 7):
        text = form.read_text(world, form.first_facts(questions, count), facts[:, :count])
        expected = ["<bos>", world.names[int(questions.entities[0])], ":"]
        for a, v in zip(questions.attributes[0, :count], facts[0], strict=False):
            expected += [w.ATTRIBUTES[a], w.VALUES_OF[w.ATTRIBUTES[a]][v]]
        expected += ["question", ":", "is", w.ATTRIBUTES[questions.asked[0]]]
        assert w.decode(text[0]).split() == expected


def test_stopped_text_has_a_cell_for_every_number_of_facts(models: Models, world: w.World) -> None:
    cells = form.stopped_text("is, K = 12", models, world, some(12, "is"))
    assert [cell.written["t2t"] for cell in cells] == list(range(13))
    assert len({cell.name for cell in cells}) == 13
    full = form.all_modes("is, K = 12", models, world, some(12, "is"), SEED)
    assert torch.equal(cells[-1].right["t2t"], full.right["t2t"])


def test_who_sees_the_question_writes_the_asked_fact_alone(world: w.World) -> None:
    questions = some(6)
    asked = form.only_the_asked(questions)
    facts = world.facts[questions.entities, questions.asked][:, None]
    words = w.decode(form.read_text(world, asked, facts)[0]).split()
    assert len(words) == 3 + 2 + 4
    assert words[3] == words[-1] and words[4] in w.VALUES_OF[words[3]]


@pytest.mark.parametrize("seed", w.WORLD_DIGESTS)
def test_fusers_data_names_no_held_out_entity(seed: int) -> None:
    world = w.make_world(seed)
    trained = {world.names[i] for i in world.train}
    rows = export.conversations(world, 2000, seed + 2)
    named = {row["messages"][0]["content"].split()[0] for row in rows}
    assert named == trained


def test_times_are_of_every_mode_and_every_number_of_facts(
    models: Models, world: w.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form, "measure", partial(timing.measure, rounds=2))
    monkeypatch.setattr(timing, "WARM_UP", 0)
    question = ev.Questions(*(t[:1] for t in vars(some(12)).values()))
    rows = form.times("is, K = 12", models, world, question)
    modes = {row["mode"] for row in rows if row["cell"] == "is, K = 12"}
    assert modes == {"receiver", "t2t", "t2t_parallel", "t2t_asked", "c2c"}
    stopped = [row for row in rows if row["cell"] != "is, K = 12"]
    assert [row["cell"] for row in stopped] == [form.facts_name("is, K = 12", k) for k in range(13)]
    assert {row["mode"] for row in stopped} == {"t2t"}


def test_identical_fuser_is_trained_by_the_same_recipe_on_the_receivers_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def recorded(*arguments: object) -> float:
        commands.append([*map(str, arguments)])
        return 1.0

    monkeypatch.setattr(form, "_python", recorded)
    (tmp_path / "receiver").mkdir()
    (tmp_path / "receiver" / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    for name in form.FUSERS:
        with pytest.raises(FileNotFoundError):  # nothing was trained
            form.train_fuser(name, 7, tmp_path)
    pair, own = commands
    for command in commands:
        assert command[command.index("--config") + 1] == "tiny" and "seed=7" in command
    assert pair[pair.index("--sharer") + 1] == str(tmp_path / "sharer")
    assert own[own.index("--sharer") + 1] == str(tmp_path / "receiver")
    assert "layer_map=[2, 2, 2]" in own and len(own) == len(pair) + 1

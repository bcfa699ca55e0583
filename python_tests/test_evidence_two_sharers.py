"""The world with two sharers: who knows what, what is exact in it, and answers under every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import c2c_ext
from benchmarks.evidence.worlds import two_sharers as ts
from benchmarks.evidence.worlds import two_sharers_fusing as f
from benchmarks.evidence.worlds import two_sharers_training as tr
from benchmarks.evidence.worlds import two_sharers_world as t
from c2c_ext.demo import world as w
from c2c_ext.demo.evaluate import prefill, read_values
from c2c_ext.training.recipes import load_recipe
from c2c_ext.training.run import new_fuser

# Fixed before any model was trained on them.
DIGESTS = {
    0: "c12620c926578e5247a748e2d82475c4b81427491bf13030cf7ab89f540f5af7",
    1: "b7d4a06b992e1604f7959d69cab681ccfefec126f5300114fca3779b75882910",
    2: "951ecf53d7e8d6e729183e72d19d1434be53627d631037acb2ab21bbaca5b7f6",
    3: "ce9f3a9b83cc4b56cb62cf0e58cbb6d8b7ba21377e44dadcce1760ea595a0877",
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SMALL |= {"num_key_value_heads": 1, "intermediate_size": 16}


@pytest.fixture(scope="module")
def world() -> t.TwoSharerWorld:
    return t.make_world(0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models(world: t.TwoSharerWorld) -> ts.Models:
    """Untrained ones, whose fusers write something."""
    torch.manual_seed(0)
    receiver, *sharers = (tr.new_model(SMALL, 0.5).eval().requires_grad_(False) for _ in range(3))

    def fuser(sharer: torch.nn.Module) -> c2c_ext.Fuser:
        settings = {"layer_map": [1, 1], "hidden_size": 8, "zero_output": False}
        recipe = load_recipe("tiny").changed(settings)
        return new_fuser(recipe, receiver.config, sharer.config).eval().requires_grad_(False)

    return ts.Models(
        world,
        receiver,
        sharers,
        [fuser(sharer) for sharer in sharers],
        fuser(receiver),
    )


@pytest.mark.parametrize("seed", DIGESTS)
def test_worlds_are_those_that_were_drawn_first(seed: int) -> None:
    assert t.make_world(seed).digest() == DIGESTS[seed]


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_any_two_attributes_are_jointly_uniform(world: t.TwoSharerWorld, split: str) -> None:
    facts = world.facts[getattr(world, split)]
    for i in range(w.NUM_ATTRIBUTES):
        for j in range(i):
            pairs = torch.bincount(w.NUM_VALUES * facts[:, i] + facts[:, j], minlength=64)
            assert pairs.tolist() == [2] * 64


def test_names_are_of_one_kind_each(world: t.TwoSharerWorld) -> None:
    split = [set(part.tolist()) for part in (world.train, world.held_out, world.others)]
    assert [len(part) for part in split] == [128, 128, 144]
    assert len(set.union(*split)) == len(set(world.names)) == 400


def test_one_value_says_nothing_about_the_answer(world: t.TwoSharerWorld) -> None:
    questions = f.held_out_questions(world, t.WHICH_SUM, 6)
    answers = questions.answers(world) - t.FIRST_ANSWER
    facts = questions.facts(world)
    pairs = questions.asked.sort(dim=1).values
    for pair in pairs.unique(dim=0):
        of = (pairs == pair).all(dim=1)
        assert of.sum() == 128
        for attribute in pair:
            known = facts[questions.asked == attribute][:, None]
            assert len(known) == 128
            both = torch.bincount(w.NUM_VALUES * known[:, 0] + answers[of], minlength=64)
            assert both.tolist() == [2] * 64


def test_a_which_answer_is_the_sum_of_the_two_numbers(world: t.TwoSharerWorld) -> None:
    questions = f.held_out_questions(world, t.WHICH_SUM, 2)
    assert set(questions.entities.tolist()) == set(world.held_out.tolist())
    assert torch.equal(t.owner(questions.asked).sum(dim=1), torch.ones(768, dtype=torch.long))
    entity, (first, second) = questions.entities[7], questions.asked[7]
    numbers = [world.number_of[a, world.facts[entity, a]].item() for a in (first, second)]
    answer = questions.answers(world)[7]
    assert t.VOCABULARY[answer] == t.ANSWERS[sum(numbers) % 8]
    words = f"question : which {w.ATTRIBUTES[first]} {w.ATTRIBUTES[second]}"
    assert t.decode(questions.ids()[7]) == words


@pytest.mark.parametrize("sharer", [0, 1])
@pytest.mark.parametrize("alone", [True, False])
def test_a_sharer_never_meets_the_other_ones_values(
    world: t.TwoSharerWorld, sharer: int, alone: bool
) -> None:
    ids, values, others = tr.sharer_batch(world, sharer, 64, 0.0, alone, generator())
    seen = torch.cat([ids.flatten(), values.flatten(), others.flatten()])
    seen = seen[(seen >= w.FIRST_VALUE) & (seen < w.FIRST_VALUE + 8 * w.NUM_ATTRIBUTES)]
    assert set(t.owner((seen - w.FIRST_VALUE) // w.NUM_VALUES).tolist()) == {sharer}
    assert ((values >= 0).sum(dim=1) == t.OWNED).all()
    assert not ((values >= 0) & (others >= 0)).any()


def test_a_receiver_reads_no_entity_that_has_facts(world: t.TwoSharerWorld) -> None:
    ids, targets, places = tr.receiver_batch(world, 3, [t.WHICH_SUM, t.IS], 0.5, 32, generator())
    assert set(ids[:, 1].tolist()) <= set(world.name_ids[world.others].tolist())
    for row, target in zip(ids, targets, strict=True):
        words = t.decode(row).split()
        form = words[: words.index("question")]
        value = {form[i]: form[i + 1] for i in range(3, len(form) - 1)}
        number = {
            a: int(world.number_of[w.ATTRIBUTES.index(a), w.VALUES_OF[a].index(value[a])])
            for a in (words[place] for place in places)
        }
        first, second, fact = (words[place] for place in places)
        assert [t.VOCABULARY[x] for x in target] == [
            t.ANSWERS[number[first]],
            t.ANSWERS[(number[first] + number[second]) % 8],
            value[fact],
        ]


def test_forms_hold_what_is_asked_and_as_much_of_either_sharer() -> None:
    asked = torch.tensor([[0, 11], [7, 3]]).repeat(20, 1)
    forms = f.forms_with(asked, 6, generator())
    assert all(len(set(form)) == 6 for form in forms.tolist())
    assert (t.owner(forms).sum(dim=1) == 3).all()
    assert all(set(a) <= set(form) for a, form in zip(asked.tolist(), forms.tolist(), strict=True))


def test_token_maps_name_each_attributes_own_place(world: t.TwoSharerWorld) -> None:
    forms = torch.tensor([[0, 6, 1, 7]])
    assert f.token_map(forms).tolist() == [[-1, -1, -1, 3, 4, 5, 6]]
    assert f.token_map(forms, 0).tolist() == [[-1, -1, -1, 3, -1, 5, -1]]
    assert f.token_map(forms, 1).tolist() == [[-1, -1, -1, -1, 4, -1, 6]]
    given = t.owner(forms) == 1
    text = world.form(torch.tensor([0]), forms, torch.zeros_like(forms), given)
    mapped = f.token_map(forms, 0, given)
    assert mapped.tolist() == [[-1, -1, -1, 3, -1, -1, 5, -1, -1]]
    blank = world.blank_form(torch.tensor([0]), forms)
    own = mapped >= 0
    assert torch.equal(text[own], blank[:, mapped[own]][0])


@pytest.mark.parametrize("about", [0, None])
def test_no_fuser_is_trained_on_a_held_out_entity(
    world: t.TwoSharerWorld, models: ts.Models, about: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []

    def spy(model: torch.nn.Module, ids: Tensor):
        read.append(ids[:, 1])
        return prefill(model, ids)

    monkeypatch.setattr(f, "prefill", spy)
    recipe = f.FuserRecipe(training=f.Training(steps=3, lr=1e-3, batch=16), hidden_size=8)
    sharer = models.receiver if about is None else models.sharers[about]
    fuser = f.train_fuser(world, models.receiver, sharer, about, recipe, 0, lambda *a, **k: 0)
    names = set(torch.cat(read).tolist())
    assert names and names <= set(world.name_ids[world.train].tolist())
    assert not any(p.requires_grad for p in fuser.parameters())


def test_text_holds_what_each_sharer_says_of_its_own(models: ts.Models) -> None:
    questions = f.held_out_questions(models.world, t.WHICH_SUM, 6).first(5)
    asking = ts._Asking(models, questions)
    together = asking.written(one_by_one=False)
    for k, sharer in enumerate(models.sharers):
        said = read_values(sharer, models.world, questions.entities, questions.forms)
        own = t.owner(questions.forms) == k
        assert torch.equal(together[own], said[own])
    serial = asking.written(one_by_one=True)
    # Nothing has been written before a sharer's first own attribute, which each reads alone.
    for k, sharer in enumerate(models.sharers):
        first = (t.owner(questions.forms) == k).long().argmax(dim=1, keepdim=True)
        alone = questions.forms.gather(1, first)
        said = read_values(sharer, models.world, questions.entities, alone)
        assert torch.equal(serial.gather(1, first), said)


def test_every_mode_answers_every_cell(models: ts.Models) -> None:
    cells = ts.evaluate_models(models, sizes=(2, 6), limit=5)
    assert [cell.name for cell in cells][-2:] == ["which, K = 2", "which, K = 6"]
    assert all(cell.questions == 5 and cell.candidates == 8 for cell in cells)
    modes = {"receiver", "t2t", "c2c_a", "c2c_b", "c2c", "mismatched", "zero", "noise", "swapped_a"}
    assert modes <= set(cells[-1].right)
    assert cells[-1].written["t2t"] == 6


def test_disjoint_maps_make_the_order_of_sharers_meaningless(models: ts.Models) -> None:
    asking = ts._Asking(models, f.held_out_questions(models.world, t.WHICH_SUM, 6).first(9))
    caches = asking.caches(asking.entities, asking.entities)
    parallel = asking.fused(caches, asking.own)
    assert torch.equal(parallel, asking.fused(caches, asking.own, fusion="sequential"))
    everywhere = [asking.everywhere] * 2
    changed = asking.fused(caches, everywhere, fusion="sequential")
    assert not torch.allclose(parallel, changed)
    assert not torch.allclose(changed, asking.fused(caches, everywhere))


def test_generate_with_sections_answers_the_same(models: ts.Models) -> None:
    asking = ts._Asking(models, f.held_out_questions(models.world, t.WHICH_SUM, 6).first(4))
    caches = asking.caches(asking.entities, asking.entities)
    expected = asking.fused(caches, [asking.everywhere] * 2)
    prompt = torch.cat([asking.form, asking.ids], dim=1)
    with c2c_ext.attached(models.receiver, models.sharers, models.fusers, fusion="parallel"):
        out = models.receiver.generate(
            prompt,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            positions=range(w.FORM_START, asking.form.shape[1]),
            sections=[(asking.form.shape[1], [0, 1])],
        )
    torch.testing.assert_close(asking.of(out.logits[0][:, None]), expected, atol=1e-4, rtol=1e-4)


def test_what_is_trained_can_be_loaded(tmp_path: Path) -> None:
    few = f.Training(steps=1, lr=1e-3, batch=4)
    recipe = tr.Recipe(sharer_model=SMALL, receiver_model=SMALL, sharer=few, receiver=few)
    made = ts.train(1, tmp_path, recipe, f.FuserRecipe(hidden_size=8, training=few))
    assert set(made["stages"]) == {*ts.MODELS, *ts.FUSERS}
    assert made["world"] == t.make_world(1).digest()
    loaded = ts.load(1, tmp_path)
    rows = ts._timed_modes(loaded, f.held_out_questions(loaded.world, t.WHICH_SUM, 2).first(1))
    assert set(rows) == {"receiver", "t2t", "t2t_parallel", "c2c"}

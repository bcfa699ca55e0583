"""benchmarks/evidence: the world with two tokenizers, on models that have learnt nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from benchmarks.evidence.timing import Watch
from benchmarks.evidence.worlds import pieces_sharer as ps
from benchmarks.evidence.worlds import tokenizers as tk
from benchmarks.evidence.worlds import word_pieces
from c2c_ext import Fuser
from c2c_ext.demo import evaluate as ev
from c2c_ext.demo import train as demo
from c2c_ext.demo import world as w

SEED = 0
MODES = {
    *("receiver", "sharer", "routing", "ensemble", "t2t", "t2t_parallel", "t2t_asked", "c2c"),
    *("swapped", "mismatched", "zero", "noise", "identical", "wrong_map", "index_map"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` would leave, untrained."""
    place = tmp_path_factory.mktemp("untrained")
    torch.manual_seed(SEED)
    demo.new_model(demo.Recipe().receiver_model, 0.05).save_pretrained(place / "receiver")
    ps.new_sharer(ps.Recipe()).save_pretrained(place / "sharer")
    receiver, sharer = tk.load_models(place, "receiver", "sharer")
    for name, other in (("fuser", sharer), ("identical", receiver)):
        config = tk.fuser_recipe(SEED, other).fuser_config(receiver.config, other.config)
        Fuser(config).save_pretrained(place / name)
    return place


@pytest.fixture(scope="module")
def pair(directory: Path) -> tk.Pair:
    return tk.load(SEED, directory)


def some(questions: ev.Questions, count: int = 24) -> ev.Questions:
    return ev.Questions(*(t[:count] for t in vars(questions).values()))


def held_out(pair: tk.Pair, size: int, count: int = 24) -> ev.Questions:
    return some(ev.held_out_questions(pair.world, "rivals", size), count)


def test_vocabulary_is_as_recorded() -> None:
    words = "\n".join(word_pieces.VOCABULARY)
    digest = "63441e64040692718db4aa0d91b4172129f737267ce1769468619548c6d4a3be"
    assert hashlib.sha256(words.encode()).hexdigest() == digest


def test_tokenizer_cuts_every_word_into_its_pieces_and_back() -> None:
    tokenizer = word_pieces.tokenizer()
    for word, pieces in zip(w.VOCABULARY, word_pieces.PIECES, strict=True):
        ids = tokenizer(word)["input_ids"]
        assert tuple(tokenizer.convert_ids_to_tokens(ids)) == pieces
        assert tokenizer.decode(ids) == word
    counts = [len(pieces) for pieces in word_pieces.PIECES]
    first = w.FIRST_ATTRIBUTE
    assert set(counts[first : first + w.NUM_ATTRIBUTES]) == {2, 3}
    assert set(counts[-len(w.NAMES) :]) == {2}


def test_models_share_no_token_id() -> None:
    ours = {word: i for i, word in enumerate(word_pieces.VOCABULARY)}
    equal = [word for i, word in enumerate(w.VOCABULARY) if ours.get(word) == i]
    assert equal == []


@pytest.mark.parametrize("size", ev.FORM_SIZES)
def test_batches_are_as_tokenizer_and_aligner_have_them(pair: tk.Pair, size: int) -> None:
    questions = held_out(pair, size)
    form = pair.world.blank_form(questions.entities, questions.attributes)
    ids, places = word_pieces.pieces_of(form)
    shared, token_map = pair.reader(form)
    assert torch.equal(ids, shared)
    assert torch.equal(places, token_map)
    assert len({tuple(row) for row in token_map.tolist()}) > 1  # words stand elsewhere in each


def test_reader_maps_an_attribute_to_its_last_piece(pair: tk.Pair) -> None:
    questions = held_out(pair, 6)
    form = pair.world.blank_form(questions.entities, questions.attributes)
    shared, token_map = pair.reader(form)
    part = ev.form_positions(6)
    found = shared.gather(1, token_map[:, part]).tolist()
    for row, attributes in zip(found, questions.attributes.tolist(), strict=True):
        last = [word_pieces.PIECES[w.FIRST_ATTRIBUTE + a][-1] for a in attributes]
        assert [word_pieces.VOCABULARY[i] for i in row] == last


def test_reader_refuses_what_is_not_its_receivers(pair: tk.Pair) -> None:
    with pytest.raises(ValueError, match="receiver's tokenizer"):
        tk.Reader(type(pair.reader.aligner)(pair.reader.aligner.sharer, word_pieces.tokenizer()))(
            pair.world.blank_form(torch.tensor([0]), torch.tensor([[1, 2]]))
        )


def test_text_crosses_from_one_tokenizer_to_the_other(pair: tk.Pair) -> None:
    questions = held_out(pair, 12)
    facts = pair.world.facts[questions.entities[:, None], questions.attributes]
    filled = pair.world.filled_form(questions.entities, questions.attributes, facts)
    written, _ = word_pieces.pieces_of(filled)
    assert torch.equal(pair.reader.as_text(written), filled)


def test_sharers_batch_asks_for_facts_at_last_pieces(pair: tk.Pair) -> None:
    tokenizer = word_pieces.tokenizer()
    ids, values, others = ps.batch_of(pair.world, 8, 0.5, torch.Generator().manual_seed(1))
    assert not ((values >= 0) & (others >= 0)).any()
    asked = 0
    for row, targets in zip(ids, values, strict=True):
        words = tokenizer.decode(row[row != word_pieces.PAD]).split()
        entity = pair.world.entity(words[1])
        for place in (targets >= 0).nonzero()[:, 0].tolist():
            attribute = tokenizer.decode(row[: place + 1]).split()[-1]
            fact = pair.world.facts[entity, w.attribute(attribute)]
            assert word_pieces.VOCABULARY[targets[place]] == w.VALUES_OF[attribute][fact]
            assert row[place + 1] == targets[place]
            asked += 1
    assert 0 < asked < 8 * w.NUM_ATTRIBUTES  # some slots were left out
    # A blank slot's last piece is asked for nothing at all.
    last = {pieces[-1] for pieces in word_pieces.PIECES[w.FIRST_ATTRIBUTE :][: w.NUM_ATTRIBUTES]}
    at_slots = torch.tensor([[word_pieces.VOCABULARY[i] in last for i in row] for row in ids])
    assert (others[at_slots] < 0).all()


@pytest.mark.parametrize("aligned", [True, False])
def test_fuser_is_trained_on_train_entities_and_attributes_alone(
    pair: tk.Pair, aligned: bool
) -> None:
    draw = tk.draw_batches(pair.world, SEED, pair.reader if aligned else None, rows=32)
    sizes = set()
    for step in range(12):
        batch = draw(step)
        sizes.add(size := batch.input_ids.shape[1] - 8)
        names = [w.VOCABULARY[i] for i in batch.input_ids[:, 1]]
        assert all(pair.world.entity(name) < w.NUM_TRAIN for name in names)
        assert (batch.labels >= 0).sum(dim=1).tolist() == [1] * 32
        assert torch.equal(batch.labels[:, -1], batch.input_ids[:, -1])
        assert batch.fused_mask[:, ev.form_positions(size)].all()
        assert (batch.fused_mask.sum(dim=1) == size).all()
        assert (batch.sharer_ids is None) == (not aligned)
        if aligned:
            shared, places = pair.reader(batch.input_ids[:, : w.FORM_START + size])
            assert torch.equal(batch.sharer_ids, shared)
            assert torch.equal(batch.token_map[:, : w.FORM_START + size], places)
    assert sizes == set(ev.FORM_SIZES)


@torch.no_grad()
def test_writing_with_a_cache_is_reading_all_again(pair: tk.Pair) -> None:
    sharer, world = pair.models.sharer, pair.world
    entities, forms = world.held_out[:6], torch.rand(6, 12).argsort(dim=1)
    written = ps.write_form(sharer, world, entities, forms)
    filled = world.filled_form(entities, forms, written)
    logits = ps.word_logits(sharer, filled, slice(w.FORM_START, None, 2))
    values = word_pieces.value_ids(forms[..., None], torch.arange(w.NUM_VALUES))
    assert torch.equal(logits.gather(2, values).argmax(dim=2), written)
    at_once = ps.read_values(sharer, world, entities, forms)
    assert torch.equal(at_once[:, 0], written[:, 0])  # until there, both have read the same
    assert not torch.equal(at_once, written)


@torch.no_grad()
def test_answers_do_not_depend_on_the_batch(pair: tk.Pair) -> None:
    questions = held_out(pair, 3)

    def logits(of: ev.Questions) -> torch.Tensor:
        form = pair.world.blank_form(of.entities, of.attributes)
        shared, places = pair.reader(form)
        cache = ev.prefill(pair.models.sharer, shared)
        return tk.answer_c2c(pair, of, cache, places[:, ev.form_positions(3)])

    together, alone = logits(questions), tk.sharer_alone(pair, questions)
    for i in range(8):
        one = ev.Questions(*(t[i : i + 1] for t in vars(questions).values()))
        torch.testing.assert_close(logits(one)[0], together[i])
        torch.testing.assert_close(tk.sharer_alone(pair, one)[0], alone[i])


def test_other_entities_have_another_fact(pair: tk.Pair) -> None:
    questions = ev.held_out_questions(pair.world, "is", 3)
    others = tk.other_entities(pair.world, questions)
    assert (others >= w.NUM_TRAIN).all()
    assert (others < w.NUM_TRAIN + w.NUM_HELD_OUT).all()
    assert (questions.answers(pair.world) != questions.answers(pair.world, others)).all()


@torch.no_grad()
def test_wrong_maps_are_wrong_everywhere(pair: tk.Pair) -> None:
    questions = held_out(pair, 3)
    form = pair.world.blank_form(questions.entities, questions.attributes)
    _, token_map = pair.reader(form)
    places = token_map[:, ev.form_positions(3)]
    for wrong in tk.wrong_maps(places).values():
        assert (wrong != places).all()


@pytest.mark.parametrize("size", ev.FORM_SIZES)
def test_ask_answers_under_every_mode(pair: tk.Pair, size: int) -> None:
    cell = tk.ask("a cell", pair, held_out(pair, size), SEED)
    assert set(cell.right) == MODES
    assert (cell.questions, cell.candidates) == (24, 8)
    assert cell.written == {"t2t": size, "t2t_parallel": size, "t2t_asked": 1}
    again = tk.ask("a cell", pair, held_out(pair, size), SEED)
    assert cell.to_json() == again.to_json()


def test_latency_names_the_parts(pair: tk.Pair) -> None:
    parts = {}
    for mode, answer in tk.modes_of_one(pair, held_out(pair, 3)).items():
        watch = Watch()
        answer(watch)
        parts[mode] = set(watch.parts)
    text = {"sharer_writing", "text", "receiver"}
    fused = {"sharer_prefill", "receiver_prefill", "transfer", "fusing", "decode", "alignment"}
    by_text = dict.fromkeys(("t2t", "t2t_parallel", "t2t_asked"), text)
    assert parts == {"receiver": set(), "c2c": fused, **by_text}

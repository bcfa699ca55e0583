"""Scores and answers of every mode and control, against a plain loop over single rows."""

import copy
import math

import pytest
import torch
from tiny_models import VOCABULARY, close_all_gates, fuser_between, trio
from transformers import DynamicCache

from c2c_ext import fuse
from c2c_ext.evaluation import modes
from c2c_ext.evaluation.modes import Item, generate, mismatched_items, score
from c2c_ext.evaluation.readers import CONTROLS, EvaluationPair

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = ("receiver", "sharer", "ensemble", "c2c", *CONTROLS)


@pytest.fixture(scope="module")
def pair() -> EvaluationPair:
    receiver, sharer, fuser = trio()
    return EvaluationPair(receiver, sharer, fuser, fuser_between(receiver, receiver))


def random_items() -> list[Item]:
    """Questions of two options each, of many lengths; the last context is a single token."""
    generator = torch.Generator().manual_seed(7)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (count,), generator=generator).tolist())

    items = []
    for group, length in enumerate((5, 9, 3, 9, 6, 1)):
        context = ids(length)
        items += [Item(context, ids(1 + group % 3), group), Item(context, ids(2), group)]
    return items


ITEMS = random_items()


def plain_cache(model, ids):
    """Keys and values of one row, as the model itself makes them."""
    cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def plain_models(mode: str, pair: EvaluationPair, item: Item):
    """(model, its cache of all but the context's last token) of one row."""
    prefix = item.context[:-1]
    names = {"receiver": ["receiver"], "sharer": ["sharer"], "ensemble": ["receiver", "sharer"]}
    for name in names.get(mode, ["receiver"]):
        model = getattr(pair, name)
        own = plain_cache(model, prefix) if prefix else None
        if own is not None and mode not in names:
            source = pair.receiver if mode == "identical" else pair.sharer
            fuser = pair.identical_fuser if mode == "identical" else pair.fuser
            token_map = None
            if mode == "mismatched":
                other = mismatched_items(ITEMS)[ITEMS.index(item)].context[:-1]
                shared = plain_cache(source, other)
                far = [
                    round(k * (len(other) - 1) / max(len(prefix) - 1, 1) + 1e-9)
                    for k in range(len(prefix))
                ]
                token_map = torch.tensor(far)
            else:
                shared = plain_cache(source, prefix)
            if mode == "zero":
                shared = [(0 * key, 0 * value) for key, value in shared]
            own = fuse(own, shared, fuser, token_map=token_map)
        cache = DynamicCache()
        for layer, (key, value) in enumerate(own or []):
            cache.update(key, value, layer)
        yield model, cache


@torch.no_grad()
def plain_score(mode: str, pair: EvaluationPair, item: Item) -> tuple[float, bool]:
    tail = torch.tensor([[item.context[-1], *item.continuation[:-1]]])
    logits = [
        m(input_ids=tail, past_key_values=c).logits for m, c in plain_models(mode, pair, item)
    ]
    logs = (sum(logits) / len(logits)).log_softmax(-1)[0]
    total = sum(float(logs[k, token]) for k, token in enumerate(item.continuation))
    return total, logs.argmax(-1).tolist() == list(item.continuation)


@torch.no_grad()
def plain_answer(mode: str, pair: EvaluationPair, item: Item, count: int) -> list[int]:
    models, token, said = list(plain_models(mode, pair, item)), item.context[-1], []
    for _ in range(count):
        logits = [m(input_ids=torch.tensor([[token]]), past_key_values=c).logits for m, c in models]
        token = int(sum(logits)[0, -1].argmax())
        said.append(token)
    return said


DETERMINISTIC = [mode for mode in PLAIN if mode != "noise"]


@pytest.mark.parametrize("mode", DETERMINISTIC)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_equal_a_plain_loop(mode: str, batch_size: int, pair: EvaluationPair) -> None:
    for found, item in zip(score(mode, pair, ITEMS, batch_size), ITEMS, strict=True):
        expected, greedy = plain_score(mode, pair, item)
        assert found.log_likelihood == pytest.approx(expected, abs=2e-4)
        assert found.greedy == greedy
        assert 1 / VOCABULARY <= found.confidence <= 1


@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_answers_equal_a_plain_loop(mode: str, pair: EvaluationPair) -> None:
    found = generate(mode, pair, ITEMS, 4, batch_size=5)
    assert [list(f.ids) for f in found] == [plain_answer(mode, pair, item, 4) for item in ITEMS]
    assert all(0 < f.confidence <= 1 for f in found)


def test_modes_differ_from_each_other(pair: EvaluationPair) -> None:
    found = {mode: [s.log_likelihood for s in score(mode, pair, ITEMS)] for mode in PLAIN}
    fused = [k for k, item in enumerate(ITEMS) if len(item.context) > 1]
    for mode in PLAIN:
        for other in PLAIN[: PLAIN.index(mode)]:
            assert any(abs(found[mode][k] - found[other][k]) > 0.01 for k in fused), (mode, other)


@pytest.mark.parametrize("mode", ["c2c", *CONTROLS])
def test_closed_gates_and_single_tokens_score_as_the_receiver(mode, pair) -> None:
    own = score("receiver", pair, ITEMS)
    open_gates = score(mode, pair, ITEMS)
    assert [s.log_likelihood for s in open_gates[-2:]] == [s.log_likelihood for s in own[-2:]]
    closed = [copy.deepcopy(fuser) for fuser in (pair.fuser, pair.identical_fuser)]
    for fuser in closed:
        close_all_gates(fuser)
    assert score(mode, EvaluationPair(pair.receiver, pair.sharer, *closed), ITEMS) == own


def test_noise_has_the_norms_of_the_cache_and_is_the_same_in_any_batch(pair) -> None:
    from c2c_ext.evaluation.readers import _noise

    generator = torch.Generator().manual_seed(0)
    layers = [tuple(torch.randn(2, 3, 6, 8, generator=generator) for _ in "kv") for _ in range(2)]
    rows = [(5, 6, 7, 8), (1, 2, 3, 4, 5, 6)]
    noise = _noise(layers, rows, 0)
    for before, after in zip(layers, noise, strict=True):
        for t, n in zip(before, after, strict=True):
            torch.testing.assert_close(n[1].norm(dim=-1), t[1].norm(dim=-1))
            torch.testing.assert_close(n[0, :, 2:].norm(dim=-1), t[0, :, 2:].norm(dim=-1))
            assert not torch.allclose(n, t)
            assert abs(torch.cosine_similarity(n[1].flatten(), t[1].flatten(), dim=0)) < 0.5
    one = [score("noise", pair, ITEMS, size) for size in (1, 5)]
    assert [s.log_likelihood for s in one[0]] == pytest.approx(
        [s.log_likelihood for s in one[1]], abs=2e-4
    )
    other = EvaluationPair(pair.receiver, pair.sharer, pair.fuser, seed=1)
    assert score("noise", other, ITEMS) != score("noise", pair, ITEMS)


def test_mismatched_contexts_are_another_questions_of_like_length() -> None:
    others = [item.context for item in mismatched_items(ITEMS)]
    by_context = {item.context: item.group for item in ITEMS}
    for item, other in zip(ITEMS, others, strict=True):
        assert (by_context[other] == item.group) == (len(item.context) == 1)
        assert others[ITEMS.index(item)] == other
    nine = [k for k, item in enumerate(ITEMS) if len(item.context) == 9]
    assert all(len(others[k]) == 9 for k in nine)


def test_mismatched_contexts_never_are_another_option_of_the_same_question() -> None:
    items = [Item((1, 2, 3), (4,), 0), Item((1, 2, 5), (4,), 0), Item((9,) * 8, (4,), 1)]
    assert [item.context for item in mismatched_items(items)[:2]] == [(9,) * 8] * 2
    with pytest.raises(ValueError, match="needs questions with different contexts, got 2"):
        mismatched_items(items[:2])
    with pytest.raises(ValueError, match="got 1 different context in all"):
        score("mismatched", EvaluationPair(None, None, None), items[:1])


def test_routing_takes_a_whole_question_from_the_surer_model(pair: EvaluationPair) -> None:
    own, other, routed = (score(mode, pair, ITEMS) for mode in ("receiver", "sharer", "routing"))
    taken = set()
    for k in range(0, len(ITEMS), 2):

        def sure(scores, k=k):
            a, b = (math.exp(s.log_likelihood) for s in scores[k : k + 2])
            return max(a, b) / (a + b)

        source = own if sure(own) >= sure(other) else other
        assert routed[k : k + 2] == source[k : k + 2]
        taken.add(source is own)
    assert taken == {True, False}


def test_routing_of_a_single_continuation_does_not_look_at_it(pair: EvaluationPair) -> None:
    items = ITEMS[::2]
    own, other, routed = (score(mode, pair, items) for mode in ("receiver", "sharer", "routing"))
    expected = [a if a.confidence >= b.confidence else b for a, b in zip(own, other, strict=True)]
    assert routed == expected
    assert routed != own and routed != other


def test_routed_answers_are_the_surer_models(pair: EvaluationPair) -> None:
    own, other, routed = (
        generate(mode, pair, ITEMS, 3) for mode in ("receiver", "sharer", "routing")
    )
    expected = [a if a.confidence >= b.confidence else b for a, b in zip(own, other, strict=True)]
    assert routed == expected
    assert routed != own and routed != other


def test_generation_ends_where_it_is_told_to(pair: EvaluationPair) -> None:
    whole = generate("c2c", pair, ITEMS[:4], 6)
    limits = [1, 2, 3, 6]
    assert [f.ids for f in generate("c2c", pair, ITEMS[:4], limits)] == [
        f.ids[:limit] for f, limit in zip(whole, limits, strict=True)
    ]
    ends = [f.ids[1] for f in whole]
    stopped = generate("c2c", pair, ITEMS[:4], 6, stop=lambda side, k, ids: ids[-1] == ends[k])
    for found, full, end in zip(stopped, whole, ends, strict=True):
        assert found.ids == full.ids[: full.ids.index(end) + 1]


def test_identical_needs_a_fuser_of_its_own_where_shapes_differ(pair: EvaluationPair) -> None:
    without = EvaluationPair(pair.receiver, pair.sharer, pair.fuser)
    with pytest.raises(ValueError, match="identical: needs a fuser between the receiver and"):
        score("identical", without, ITEMS)


def test_bad_items_and_modes_are_refused(pair: EvaluationPair) -> None:
    with pytest.raises(ValueError, match="item 1: context must have at least one token"):
        score("c2c", pair, [ITEMS[0], Item((), (3,))])
    with pytest.raises(ValueError, match="item 0: continuation must have at least one token"):
        score("c2c", pair, [Item((3, 4))])
    with pytest.raises(ValueError, match="unknown mode 't2t'"):
        generate("t2t", pair, ITEMS, 2)
    assert set(PLAIN) < set(modes.MODES)

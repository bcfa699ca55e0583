"""The parts of a mode's time: which modes spend what, and what is said where nobody knows."""

import pytest
import torch
from tiny_models import fuser_between, trio

from c2c_ext.evaluation import latency as latency_module
from c2c_ext.evaluation.latency import PARTS, Stopwatch, latency, latency_table
from c2c_ext.evaluation.modes import Item, generate, score
from c2c_ext.evaluation.readers import EvaluationPair
from c2c_ext.evaluation.text_to_text import write

pytestmark = pytest.mark.usefixtures("one_thread")
ITEMS = [Item((3, 4, 5, 6), (7, 8), 0), Item((3, 4, 5, 6), (9,), 0), Item((8, 7, 6), (5,), 1)]
CPU = torch.device("cpu")
SPENT = {
    "receiver": {"receiver_prefill", "receiver_decode"},
    "sharer": {"sharer_prefill", "sharer_decode"},
    "ensemble": {"receiver_prefill", "receiver_decode", "sharer_prefill", "sharer_decode"},
    "routing": {"receiver_prefill", "receiver_decode", "sharer_prefill", "sharer_decode"},
    "c2c": set(PARTS) - {"sharer_decode"},
    "mismatched": set(PARTS) - {"sharer_decode"},
    "identical": set(PARTS) - {"sharer_decode"},
}


@pytest.fixture(scope="module")
def models() -> tuple:
    receiver, sharer, fuser = trio()
    return receiver, sharer, fuser, fuser_between(receiver, receiver)


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Every part's begin and end, in the order in which they are."""
    seen: list[str] = []
    part = Stopwatch.part

    def noted(self, name):
        seen.append(name)
        return part(self, name)

    monkeypatch.setattr(Stopwatch, "part", noted)
    return seen


@pytest.mark.parametrize("mode", SPENT)
def test_a_mode_spends_time_on_its_own_parts_alone(mode: str, models) -> None:
    pair = EvaluationPair(*models)
    score(mode, pair, ITEMS)
    assert {part for part, seconds in pair.clock.seconds.items() if seconds > 0} == SPENT[mode]
    pair = EvaluationPair(*models)
    generate(mode, pair, ITEMS, 3)
    assert {part for part, seconds in pair.clock.seconds.items() if seconds > 0} == SPENT[mode]


def test_what_the_sharer_writes_is_its_decoding(models) -> None:
    pair = EvaluationPair(*models)
    write(pair, [(3, 4, 5)], 4)
    spent = {part for part, seconds in pair.clock.seconds.items() if seconds > 0}
    assert spent == {"sharer_prefill", "sharer_decode"}


def test_equal_contexts_are_read_once_in_a_batch(models, counted, monkeypatch) -> None:
    from c2c_ext.evaluation import readers

    rows = []
    padded = readers.padded
    monkeypatch.setattr(
        readers, "padded", lambda texts, side: rows.append(list(texts)) or padded(texts, side)
    )
    score("c2c", EvaluationPair(*models), ITEMS)
    assert rows == [[(3, 4, 5), (8, 7)]] * 2  # the receiver's and the sharer's
    assert counted == [
        *("receiver_prefill", "sharer_prefill", "transfer", "fusing", "receiver_decode")
    ]


def test_bytes_of_a_transfer_are_those_of_the_sharers_real_tokens(models) -> None:
    pair = EvaluationPair(*models)
    score("c2c", pair, ITEMS)
    config = models[1].config
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert pair.clock.counts == {"transfer_bytes": per_token * (3 + 2)}


def test_latency_is_per_question_and_in_total() -> None:
    clock = Stopwatch()
    clock.seconds["fusing"], clock.seconds["receiver_decode"] = 0.5, 2.0
    clock.count("transfer_bytes", 12)
    found = latency(clock, CPU, questions=4, total=3.0)
    assert found["seconds"]["fusing"] == 0.5 and found["mean_seconds"]["fusing"] == 0.125
    assert (found["questions"], found["total_seconds"]) == (4, 3.0)
    assert (found["transfer_bytes"], found["synchronized"]) == (12, False)
    rows = {"c2c": {**found, "tokens_written": 10, "tokens_answered": 6}}
    text = latency_table(rows)
    assert "| c2c | 0 | 0 | 0 | 125 | 0 | 500 | 3 | 2.5 | 1.5 |" in text
    assert "--synchronize" not in text


def test_a_gpu_that_is_not_waited_for_has_no_parts() -> None:
    gpu = torch.device("cuda", 0)
    found = latency(Stopwatch(), gpu, questions=2, total=1.0)
    assert found["seconds"] is None and found["mean_seconds"] is None
    rows = {"c2c": {**found, "tokens_written": 0, "tokens_answered": 0}}
    text = latency_table(rows)
    assert "| c2c | - | - | - | - | - | - | 1 | 0 | 0 |" in text
    assert text.endswith("parts on a GPU are told apart with --synchronize alone")
    told = latency(Stopwatch(gpu), gpu, questions=2, total=1.0)
    assert told["seconds"] is not None and told["synchronized"]


def test_a_gpu_is_waited_for_around_a_part_when_asked_and_a_cpu_never(monkeypatch) -> None:
    waits = []
    monkeypatch.setattr(latency_module.torch.cuda, "synchronize", waits.append)
    with Stopwatch().part("fusing"):
        pass
    assert waits == []
    gpu = torch.device("cuda", 0)
    with Stopwatch(gpu).part("fusing"):
        assert waits == [gpu]
    assert waits == [gpu, gpu]

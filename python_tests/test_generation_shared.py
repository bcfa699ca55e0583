"""Receivers, sharers and fusers used by several at once: in turn, nested and in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import STEPS, VISIBLE, assert_same_run, assert_visible, generate, prompt
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from c2c_ext.generation import attach, attached, detach

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_fused(output, trio, ids: Tensor, settings: dict | None = None) -> None:
    """``output`` is that of the plain loop over ``trio``, and not the receiver's alone."""
    receiver, sharer, fuser = trio
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    choose = plain_loop.forced(output.sequences[:, ids.shape[1] :]) if settings else None
    expected = plain_loop.decode(receiver, kv, ids, STEPS, choose=choose)
    assert_same_run(output, ids, expected, kv=False)
    assert_visible(expected, receiver, ids)


def in_threads(jobs: list[Callable[[], object]]) -> list:
    """What the jobs return; they begin together. Raises what one of them raises."""
    outputs: list = [None] * len(jobs)
    failures: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(index: int) -> None:
        try:
            start.wait()
            outputs[index] = jobs[index]()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return outputs


@pytest.fixture
def two():
    """Two receivers of different models with one sharer: two trios."""
    sharer = tiny_models.sharer_model()
    receivers = tiny_models.receiver_model("qwen3"), tiny_models.receiver_model("gemma2")
    return [(r, sharer, tiny_models.fuser_between(r, sharer)) for r in receivers]


PROMPTS = [prompt(1, 9, seed=1), prompt(2, 12, seed=2)]


def test_two_receivers_share_one_sharer_in_turn(two):
    for trio in two:
        attach(*trio)
    for _ in range(2):
        for trio, ids in zip(two, PROMPTS, strict=True):
            assert_fused(generate(trio[0], ids), trio, ids)
    detach(two[0][0])
    assert_fused(generate(two[1][0], PROMPTS[1]), two[1], PROMPTS[1])


class Meanwhile(StoppingCriteria):
    """Does something else after every token."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work, self.results = work, []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self.results.append(self.work())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("inner", [0, 1], ids=["the same receiver", "the other receiver"])
def test_generate_may_be_called_between_the_tokens_of_another(two, inner):
    (outer, _, _), (other, _, _) = two[0], two[inner]
    for trio in two:
        attach(*trio)
    meanwhile = Meanwhile(lambda: generate(other, PROMPTS[1]))
    output = generate(outer, PROMPTS[0], stopping_criteria=StoppingCriteriaList([meanwhile]))
    assert_fused(output, two[0], PROMPTS[0])
    assert len(meanwhile.results) == STEPS
    for result in meanwhile.results:
        assert_fused(result, two[inner], PROMPTS[1])


def test_two_receivers_share_one_sharer_in_threads(two):
    for trio in two:
        attach(*trio)

    def job(index: int):
        return lambda: [generate(two[index][0], PROMPTS[index]) for _ in range(3)]

    for trio, ids, outputs in zip(two, PROMPTS, in_threads([job(0), job(1)]), strict=True):
        for output in outputs:
            assert_fused(output, trio, ids)


def test_threads_do_not_mix_their_prompts_on_one_receiver():
    trio = tiny_models.trio()
    prompts = [prompt(1 + seed % 2, 5 + 2 * seed, seed=seed) for seed in range(4)]
    settings = [{}, {"num_beams": 1}, {"do_sample": True, "top_k": 0}, {"positions": None}]
    with attached(*trio) as receiver:

        def job(index: int):
            return lambda: [generate(receiver, prompts[index], **settings[index]) for _ in range(3)]

        results = in_threads([job(index) for index in range(4)])
        assert receiver._c2c_attachment.calls == {}
    for ids, kind, outputs in zip(prompts, settings, results, strict=True):
        for output in outputs:
            assert_fused(output, trio, ids, kind)


def test_a_failure_in_one_thread_leaves_the_others_alone():
    trio = tiny_models.trio()
    ids = prompt()
    with attached(*trio) as receiver:

        def fails() -> None:
            for _ in range(3):
                with pytest.raises(ValueError, match="positions must be at least 0"):
                    generate(receiver, ids, positions=[99])

        _, outputs = in_threads([fails, lambda: [generate(receiver, ids) for _ in range(3)]])
    for output in outputs:
        assert_fused(output, trio, ids)


def test_an_attached_receiver_shares_its_own_unfused_cache(two):
    first = receiver, *_ = two[0]
    last = tiny_models.receiver_model("llama")
    second = (last, receiver, tiny_models.fuser_between(last, receiver))
    ids = prompt()
    attach(*first)
    with attached(*second):
        assert_fused(generate(last, ids), second, ids)  # the plain loop's sharer is never fused
        assert_fused(generate(receiver, ids), first, ids)
    # What it would have been if the sharer had shared its fused cache.
    fused = plain_loop.fused_prompt(*first, ids)
    base = plain_loop.prefill(last, ids[:, :-1])
    wrong = plain_loop.reference.fuse(base, fused, second[2])
    right = plain_loop.fused_prompt(*second, ids)
    assert (wrong[0][0] - right[0][0]).abs().max() > VISIBLE


def test_two_receivers_may_be_each_others_sharer():
    one, other = tiny_models.receiver_model("qwen3"), tiny_models.receiver_model("mistral")
    there = (one, other, tiny_models.fuser_between(one, other))
    back = (other, one, tiny_models.fuser_between(other, one))
    ids = prompt()
    with attached(*there), attached(*back):
        for trio in (there, back, there):
            assert_fused(generate(trio[0], ids), trio, ids)

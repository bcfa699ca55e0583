"""Compiled forwards under an attached receiver: by hand, before or after attach; by generate."""

from __future__ import annotations

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    STEPS,
    assert_same_run,
    assert_visible,
    generate,
    prompt,
)
from transformers import CompileConfig, StaticCache

from c2c_ext.generation import attach, attached, detach

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
LENGTH, FEW = 9, 3


@pytest.fixture
def trio():
    """Fresh, since compiling leaves its marks on a model; one layer, since it takes time."""
    torch._dynamo.reset()
    yield tiny_models.trio(num_hidden_layers=1)
    torch._dynamo.reset()


def counting_backend():
    """(backend of torch.compile that runs what it is given, the graphs that it was given)."""
    graphs = []

    def backend(graph, inputs):  # a function, which transformers' copy of its settings keeps
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def expected_run(trio, ids, steps=STEPS):
    receiver, sharer, fuser = trio
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    expected = plain_loop.decode(receiver, kv, ids, steps)
    assert_visible(expected, receiver, ids)
    return expected


@pytest.mark.parametrize(
    ("when", "settings"),
    [("before attach", {}), ("after attach", {"cache_implementation": "static"})],
)
def test_a_compiled_forward_answers_as_the_plain_loop(trio, when, settings):
    receiver, (backend, graphs) = trio[0], counting_backend()
    ids = prompt(2, LENGTH)
    expected = expected_run(trio, ids, FEW)

    def compile_forward():
        receiver.forward = torch.compile(receiver.forward, backend=backend)

    if when == "before attach":
        compile_forward()
    attach(*trio)
    if when == "after attach":
        compile_forward()
    compiled = receiver.forward
    output = generate(receiver, ids, max_new_tokens=FEW, **settings)
    assert_same_run(output, ids, expected, kv=not settings)
    assert graphs
    detach(receiver)
    assert receiver.forward is compiled


@pytest.mark.parametrize("part", ["receiver", "its base model", "the sharer's base model"])
def test_compiled_modules_answer_as_the_plain_loop(trio, part):
    receiver, sharer, _ = trio
    ids, (backend, graphs) = prompt(2, LENGTH), counting_backend()
    expected = expected_run(trio, ids, FEW)
    modules = {"receiver": receiver, "its base model": receiver.model}
    modules.get(part, sharer.model).compile(backend=backend)
    with attached(*trio):
        assert_same_run(generate(receiver, ids, max_new_tokens=FEW), ids, expected)
    assert graphs


def test_a_static_cache_needs_one_graph_for_prompts_of_any_length(trio):
    receiver, (backend, graphs) = trio[0], counting_backend()
    prompts = [prompt(2, length, seed=length) for length in (LENGTH, 5, 12)]
    expected = [expected_run(trio, ids) for ids in prompts]
    receiver.forward = torch.compile(receiver.forward, backend=backend, fullgraph=True)
    cache = StaticCache(config=receiver.config, max_cache_len=32)
    with attached(*trio):
        for ids, run in zip(prompts, expected, strict=True):
            cache.reset()
            output = generate(receiver, ids, past_key_values=cache)
            assert_same_run(output, ids, run, kv=False)
    # Fused prompts leave one token to every step; the first use may see other inputs than the next.
    assert 1 <= len(graphs) <= 3


def test_generate_compiles_the_decoding_of_a_static_cache(trio):
    receiver, (backend, graphs) = trio[0], counting_backend()
    ids = prompt(2, LENGTH)
    expected = expected_run(trio, ids)
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True  # else transformers compiles on accelerators only
    with attached(*trio):
        for _ in range(2):
            output = generate(receiver, ids, cache_implementation="static", compile_config=config)
            assert_same_run(output, ids, expected, kv=False)
    assert graphs


def test_inductor_compiles_a_static_cache_into_one_graph(trio):
    receiver, ids = trio[0], prompt(1, LENGTH)
    expected = expected_run(trio, ids)
    receiver.forward = torch.compile(receiver.forward, fullgraph=True, dynamic=False)
    counted = torch._dynamo.utils.counters["stats"]
    before = counted["unique_graphs"]
    cache = StaticCache(config=receiver.config, max_cache_len=16)
    with attached(*trio):
        output = generate(receiver, ids, past_key_values=cache)
    assert_same_run(output, ids, expected, kv=False)
    assert counted["unique_graphs"] > before


@pytest.mark.parametrize("role", [0, 1], ids=["receiver", "sharer"])
def test_a_wrapper_of_torch_compile_is_refused(trio, role):
    arguments = list(trio)
    arguments[role] = torch.compile(arguments[role])
    with pytest.raises(TypeError, match=r"must be a transformers model, got OptimizedModule"):
        attach(*arguments)

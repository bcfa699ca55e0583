"""Several sharers: in every call and row the chosen ones, in spans, and nobody else's bits."""

from __future__ import annotations

import copy
from contextlib import ExitStack, contextmanager

import plain_loop
import pytest
import tiny_models
import torch
from conftest import same_bits
from generation_checks import (
    CLOSE,
    STEPS,
    VISIBLE,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    logits_of,
    new_tokens,
    prompt,
)
from transformers import DynamicCache

from c2c_ext.generation import attach, attached, detach

pytestmark = pytest.mark.usefixtures("one_thread")
FUSIONS = ["parallel", "sequential"]
BOTH = [0, 1]


@pytest.fixture(scope="module")
def quintet():
    """(receiver, sharers, fusers)."""
    return tiny_models.quintet()


@contextmanager
def counted(models):
    """The shapes of the token ids of every forward, for every model."""
    seen = [[] for _ in models]
    with ExitStack() as hooks:
        for model, shapes in zip(models, seen, strict=True):
            hook = model.base_model.register_forward_pre_hook(
                lambda _, args, kwargs, shapes=shapes: shapes.append(
                    tuple(kwargs["input_ids"].shape)
                ),
                with_kwargs=True,
            )
            hooks.callback(hook.remove)
        yield seen


def expected_run(quintet, ids, spans, mask=None, fusion="parallel", steps=STEPS):
    receiver, sharers, fusers = quintet
    kv = plain_loop.fused_spans(receiver, sharers, fusers, ids, spans, mask=mask, fusion=fusion)
    return plain_loop.decode(receiver, kv, ids, steps, mask=mask)


def split_run(receiver, ids, mask=None, steps=STEPS):
    """The receiver alone, its prompt read up to the last token first."""
    before = None if mask is None else mask[:, :-1]
    kv = plain_loop.prefill(receiver, ids[:, :-1], before)
    return plain_loop.decode(receiver, kv, ids, steps, mask=mask)


def held(output):
    return [t for pair in plain_loop.kv_of(output.past_key_values) for t in pair]


def same_row(a, b, row: int) -> bool:
    """Logits, tokens and caches of a row, bit for bit."""
    return (
        same_bits(logits_of(a)[row], logits_of(b)[row])
        and torch.equal(a.sequences[row], b.sequences[row])
        and all(same_bits(x[row], y[row]) for x, y in zip(held(a), held(b), strict=True))
    )


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_two_sharers_match_the_plain_loop(kind, fusion):
    receiver, sharers, fusers = quintet = tiny_models.quintet(kind)
    ids = prompt()
    expected = expected_run(quintet, ids, [(10, [BOTH] * 2)], fusion=fusion)
    other = expected_run(
        quintet, ids, [(10, [BOTH] * 2)], fusion=FUSIONS[fusion == FUSIONS[0]], steps=1
    )
    with attached(receiver, sharers, fusers, fusion=fusion):
        output = generate(receiver, ids, past_key_values=DynamicCache())
    assert_same_run(output, ids, expected)
    assert_visible(expected, receiver, ids)
    assert (other.logits[:, 0] - expected.logits[:, 0]).abs().max() > VISIBLE


def test_the_default_is_parallel(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers, fusion="parallel"):
        expected = generate(receiver, ids)
    with attached(receiver, sharers, fusers):
        assert same_bits(logits_of(generate(receiver, ids)), logits_of(expected))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_beams_and_return_sequences_repeat_the_fused_rows(quintet, fusion):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded((9, 4))
    rows = [[1], BOTH]
    kv = plain_loop.fused_spans(
        receiver, sharers, fusers, ids, [(8, rows)], mask=mask, fusion=fusion
    )
    with attached(receiver, sharers, fusers, fusion=fusion), counted([receiver, *sharers]) as seen:
        torch.manual_seed(3)
        sampled = generate(
            receiver, ids, attention_mask=mask, sharers=rows, do_sample=True, top_k=0,
            num_return_sequences=3,
        )  # fmt: skip
        beams = generate(
            receiver, ids, attention_mask=mask, sharers=rows, num_beams=2, num_return_sequences=2,
            max_new_tokens=3,
        )  # fmt: skip
    assert [shape for shape in seen[0] if shape[1] > 1] == [(2, 8), (2, 8)]
    assert seen[1:] == [[(2, 8), (2, 8)]] * 2
    forced = plain_loop.forced(new_tokens(sampled, ids))
    repeated, long = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    expected = plain_loop.decode(
        receiver, plain_loop.repeat_rows(kv, 3), repeated, STEPS, mask=long, choose=forced
    )
    assert_same_run(sampled, repeated, expected)
    for row, length in enumerate((9, 4)):
        one = ids[row : row + 1, -length:]
        alone = plain_loop.fused_spans(
            receiver, sharers, fusers, one, [(length - 1, [rows[row]])], fusion=fusion
        )
        tokens, scores = plain_loop.beam_search(receiver, alone, one, 3, 2)
        assert torch.equal(new_tokens(beams, ids)[2 * row : 2 * row + 2], tokens)
        torch.testing.assert_close(beams.sequences_scores[2 * row : 2 * row + 2], scores, **CLOSE)


@pytest.mark.parametrize("how", ["thread", "stream"])
def test_overlapping_gives_the_same_bits(quintet, how):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded()
    with attached(receiver, sharers, fusers):
        expected = generate(receiver, ids, attention_mask=mask, sections=[(4, BOTH), (3, [1])])
    with attached(receiver, sharers, fusers, overlap=how):
        output = generate(receiver, ids, attention_mask=mask, sections=[(4, BOTH), (3, [1])])
    assert all(same_row(output, expected, row) for row in range(3))


def test_one_model_may_share_twice(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    second = tiny_models.fuser_between(receiver, sharers[0], layer_map=[1, 0, 4])
    trio = receiver, [sharers[0], sharers[0]], [fusers[0], second]
    expected = expected_run(trio, ids, [(10, [BOTH] * 2)])
    with attached(*trio):
        assert_same_run(generate(receiver, ids), ids, expected)


def test_sharers_of_other_dtypes_match_the_plain_loop(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    half = [copy.deepcopy(sharers[0]).to(torch.bfloat16), sharers[1]]
    with attached(receiver, half, fusers):
        output = generate(receiver, ids, max_new_tokens=1)
    with attached(receiver, sharers, fusers):
        whole = generate(receiver, ids, max_new_tokens=1)
    error = (output.logits[0] - whole.logits[0]).abs().max()
    assert 1e-5 < error < 1.0


def test_copies_keep_all_sharers(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers, fusion="sequential"):
        expected = generate(receiver, ids)
        twin = copy.deepcopy(receiver)
    assert not {id(s) for s in twin._c2c_attachment.sharing.sharers} & {id(s) for s in sharers}
    assert same_bits(logits_of(generate(twin, ids)), logits_of(expected))


# ---- which sharers -------------------------------------------------------------------------------


@pytest.mark.parametrize("none", [[], [[], []], torch.zeros(2, 2, dtype=torch.bool)], ids=str)
def test_no_sharer_is_the_plain_split_run_and_runs_no_sharer(quintet, none):
    receiver, sharers, fusers = quintet
    ids = prompt()
    expected = split_run(receiver, ids)
    with attached(receiver, sharers, fusers), counted(sharers) as seen:
        output = generate(receiver, ids, sharers=none)
    assert seen == [[], []]
    assert same_bits(logits_of(output), expected.logits)
    assert torch.equal(new_tokens(output, ids), expected.tokens)
    clean = [t for pair in expected.kv for t in pair]
    assert all(map(same_bits, held(output), clean))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("chosen", BOTH)
def test_one_of_two_is_as_if_attached_alone_and_the_other_does_not_run(quintet, chosen, fusion):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers[chosen], fusers[chosen]):
        expected = generate(receiver, ids)
    with attached(receiver, sharers, fusers, fusion=fusion), counted(sharers) as seen:
        output = generate(receiver, ids, sharers=[chosen])
    assert all(same_row(output, expected, row) for row in range(2))
    assert seen[chosen] == [(2, 10)] and seen[1 - chosen] == []


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_order_of_fusing_is_that_of_attaching(quintet, fusion):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers, fusion=fusion):
        expected = generate(receiver, ids)
        for order in ([1, 0], [0, 1], [1, 0, 1], torch.tensor([1, 0])):
            assert same_bits(logits_of(generate(receiver, ids, sharers=order)), logits_of(expected))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_row_has_its_own_sharers(quintet, fusion):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded((11, 4, 7, 11))
    rows = [BOTH, [1], [], [0]]
    expected = expected_run(quintet, ids, [(10, rows)], mask=mask, fusion=fusion)
    alone = split_run(receiver, ids, mask)
    bools = torch.tensor([[k in row for k in BOTH] for row in rows])
    with attached(receiver, sharers, fusers, fusion=fusion):
        output = generate(receiver, ids, attention_mask=mask, sharers=rows)
        assert all(
            same_row(output, generate(receiver, ids, attention_mask=mask, sharers=form), row)
            for form in (bools, bools.numpy())
            for row in range(4)
        )
    assert_same_run(output, ids, expected)
    # What selects none is the plain split run of the batch, bit for bit.
    assert same_bits(logits_of(output)[2], alone.logits[2])
    clean = [t for pair in alone.kv for t in pair]
    assert all(same_bits(x[2], y[2]) for x, y in zip(held(output), clean, strict=True))
    for row in (0, 1, 3):
        assert (alone.logits[row, 0] - logits_of(output)[row, 0]).abs().max() > VISIBLE


def test_a_rows_selection_reaches_no_other_row(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt(3)
    with attached(receiver, sharers, fusers):
        runs = [generate(receiver, ids, sharers=[row, [1], []]) for row in ([], [0], [1], BOTH)]
    for run in runs[1:]:
        assert same_row(run, runs[0], 1) and same_row(run, runs[0], 2)
        assert not same_row(run, runs[0], 0)


def test_a_rows_mask_reaches_no_other_row(quintet):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded((11, 11, 4))
    padded, fewer = mask.clone(), mask.bool()
    padded[0, :5] = 0
    fewer[:, -1] = False
    fewer[0, 3:] = False
    with attached(receiver, sharers, fusers):
        whole = generate(receiver, ids, attention_mask=mask)
        one_padded = generate(receiver, ids, attention_mask=padded)
        limited = generate(receiver, ids, attention_mask=mask, positions=fewer)
    for run in (one_padded, limited):
        assert same_row(run, whole, 1) and same_row(run, whole, 2)
        assert (logits_of(run)[0, 0] - logits_of(whole)[0, 0]).abs().max() > VISIBLE


# ---- sections ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_sections_match_the_plain_loop(quintet, fusion):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded((11, 6))
    sections = [(2, [0]), (3, []), (4, [[1], BOTH])]
    spans = [(2, [[0], [0]]), (3, [[], []]), (4, [[1], BOTH])]
    expected = expected_run(quintet, ids, spans, mask=mask, fusion=fusion)
    whole = expected_run(quintet, ids, [(9, [BOTH] * 2)], mask=mask, fusion=fusion, steps=1)
    with attached(receiver, sharers, fusers, fusion=fusion):
        output = generate(receiver, ids, attention_mask=mask, sections=sections)
        assert_same_run(output, ids, expected)
        chunked = generate(
            receiver, ids, attention_mask=mask, sections=sections, prefill_chunk_size=2
        )
        assert_same_run(chunked, ids, expected)
    assert (whole.logits[:, 0] - expected.logits[:, 0]).abs().max() > VISIBLE


def test_a_row_that_no_section_selects_is_the_plain_run_split_there(quintet):
    receiver, sharers, fusers = quintet
    ids, mask = left_padded((11, 6))
    nobody = [(4, [[], []]), (3, [[], []])]
    kv = plain_loop.fused_spans(receiver, [], [], ids, nobody, mask=mask)
    alone = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    sections = [(4, [BOTH, []]), (3, [[1], []])]
    with attached(receiver, sharers, fusers):
        output = generate(receiver, ids, attention_mask=mask, sections=sections)
    assert same_bits(logits_of(output)[1], alone.logits[1])
    clean = [t for pair in alone.kv for t in pair]
    assert all(same_bits(x[1], y[1]) for x, y in zip(held(output), clean, strict=True))
    assert (logits_of(output)[0, 0] - alone.logits[0, 0]).abs().max() > VISIBLE


def test_a_later_section_reads_the_earlier_ones_as_fused(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers):
        after = generate(receiver, ids, sections=[(5, [0])])
        columns = generate(receiver, ids, sharers=[0], positions=range(5))
    # The same columns are fused; what follows them was computed over fused or clean ones.
    for a, b in zip(held(after), held(columns), strict=True):
        torch.testing.assert_close(a[:, :, :5], b[:, :, :5], **CLOSE)
    last = zip(held(after)[2:], held(columns)[2:], strict=True)
    assert all((a[:, :, 5:10] - b[:, :, 5:10]).abs().max() > VISIBLE for a, b in last)


def test_sections_run_only_the_sharers_that_they_name(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers), counted([receiver, *sharers]) as seen:
        generate(receiver, ids, sections=[(4, [1]), (2, [])], max_new_tokens=1)
    assert seen == [[(2, 4), (2, 2), (2, 4), (2, 1)], [], [(2, 10)]]


def test_no_sections_fuse_nothing(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers), counted(sharers) as seen:
        output = generate(receiver, ids, sections=[])
    assert same_bits(logits_of(output), split_run(receiver, ids).logits)
    assert seen == [[], []]


def test_positions_restrict_sections(quintet):
    receiver, sharers, fusers = quintet
    ids = prompt()
    with attached(receiver, sharers, fusers):
        output = generate(receiver, ids, sections=[(6, BOTH), (4, None)], positions=range(4))
        expected = generate(receiver, ids, positions=range(4), sections=[(6, BOTH)])
        unrestricted = generate(receiver, ids, sections=[(6, BOTH)])
    assert all(same_row(output, expected, row) for row in range(2))
    assert not same_row(output, unrestricted, 0)


def test_a_prompt_of_one_token_takes_only_empty_sections(quintet):
    receiver, sharers, fusers = quintet
    with attached(receiver, sharers, fusers), counted(sharers) as seen:
        alone = generate(receiver, prompt(2, 1), sections=[])
        with pytest.raises(ValueError, match=r"must sum to at most 0 .* of the 1 prompt .* got 1"):
            generate(receiver, prompt(2, 1), sections=[(1, [0])])
    assert seen == [[], []]
    assert same_bits(logits_of(alone), logits_of(generate(receiver, prompt(2, 1))))


# ---- attach --------------------------------------------------------------------------------------


def test_attach_refuses_lists_that_do_not_fit(quintet):
    receiver, sharers, fusers = quintet
    cases = [
        (sharers, fusers[0], TypeError, "sharer is a list, so fuser must be a list .* got Fuser"),
        (sharers[0], fusers, TypeError, "fuser is a list, so sharer must be .* got LlamaForCausal"),
        (sharers, fusers[:1], ValueError, "as many entries as each other, .* got 2 and 1"),
        ([], [], ValueError, "at least one, got 0 and 0"),
        (
            [sharers[0], "s"],
            fusers,
            TypeError,
            r"sharer\[1\] must be a transformers model, got str",
        ),
        (sharers, [fusers[0], 1], TypeError, r"fuser\[1\] must be a c2c_ext.Fuser, got int"),
        (
            *(sharers[::-1], fusers, ValueError),
            r"fuser\[0\] and sharer\[0\]: the fuser was made for a sharer of 5 layers, .* has 2",
        ),
        (
            *([sharers[0]] * 2, fusers, ValueError),
            r"fuser\[1\] and sharer\[1\]: the fuser was made for a sharer of 2 layers, .* has 5",
        ),
    ]
    for models, networks, error, message in cases:
        with pytest.raises(error, match=message):
            attach(receiver, models, networks)
    with pytest.raises(ValueError, match="attach: fusion must be one of parallel, sequential, got"):
        attach(receiver, sharers, fusers, fusion="sum")
    assert not hasattr(receiver, "_c2c_attachment")
    attach(receiver, tuple(sharers), tuple(fusers))
    detach(receiver)


def test_a_sharer_that_keeps_no_cache_is_named_by_its_place(quintet):
    receiver, sharers, fusers = quintet
    broken = copy.deepcopy(sharers[1])
    broken.base_model.forward = lambda **kwargs: None
    with attached(receiver, [sharers[0], broken], fusers):
        generate(receiver, prompt(), sharers=[0])
        with pytest.raises(RuntimeError, match=r"the sharer\[1\] \(Qwen2ForCausalLM\) kept no"):
            generate(receiver, prompt())


def test_a_vocabulary_that_is_too_small_is_named_by_its_sharer(quintet):
    receiver, sharers, fusers = quintet
    small = tiny_models.sharer_model(vocab_size=50)
    ids = prompt().clamp(max=90)
    ids[0, 3] = 90
    with attached(receiver, [small, sharers[1]], fusers):
        generate(receiver, ids, sharers=[1])
        with pytest.raises(ValueError, match=r"sharer\[0\]'s vocabulary size 50, got 90"):
            generate(receiver, ids)

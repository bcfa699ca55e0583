"""sharer_inputs=: what of a sharer's own text reaches the receiver is what the map says."""

from __future__ import annotations

import plain_loop
import pytest
import tiny_models
import torch
from conftest import same_bits
from generation_checks import CLOSE, STEPS, VISIBLE, generate, left_padded, logits_of, prompt
from local_tokenizers import letter_tokenizer, word_tokenizer
from torch import Tensor

from c2c_ext import TokenAligner, reference
from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")
P, S = 11, 16  # tokens of the prompt and of the sharer's text


@pytest.fixture(scope="module")
def quintet():
    return tiny_models.quintet()


@pytest.fixture(scope="module")
def trio(quintet):
    receiver, sharers, fusers = quintet
    return receiver, sharers[0], fusers[0]


def some_map(rows: int | None = None) -> Tensor:
    """A map of the prompt's shape that goes back and forth and skips some; the last is nonsense."""
    one = torch.tensor([3, -1, 4, 9, 9, -1, 15, 0, 12, 5, 999])
    if rows is None:
        return one
    return torch.stack([torch.cat([one[:10].roll(r), one[10:]]) for r in range(rows)])


def expected_kv(trio, ids, shared, token_map, mask=None):
    """Written out: the receiver's prompt, fused through the map with a cache of the sharer's."""
    receiver, _, fuser = trio
    before = None if mask is None else mask[:, :-1]
    base = plain_loop.prefill(receiver, ids[:, :-1], before)
    rows = token_map[..., :-1].expand(len(ids), -1)
    if mask is not None:
        rows = rows.masked_fill(before == 0, -1)
    with torch.no_grad():
        return reference.fuse(base, shared, fuser, token_map=rows)


def check(trio, ids, output, kv, mask=None):
    receiver = trio[0]
    expected = plain_loop.decode(receiver, kv, ids, STEPS, mask=mask)
    torch.testing.assert_close(logits_of(output), expected.logits, **CLOSE)
    torch.testing.assert_close(plain_loop.kv_of(output.past_key_values), expected.kv, **CLOSE)
    clean = plain_loop.prefill(receiver, ids[:, :-1], None if mask is None else mask[:, :-1])
    unfused = plain_loop.decode(receiver, clean, ids, 1, mask=mask)
    assert (unfused.logits[:, 0] - expected.logits[:, 0]).abs().max() > VISIBLE


@pytest.mark.parametrize("rows", [None, 2])
def test_a_map_says_what_reaches_the_receiver(trio, rows):
    receiver, sharer, fuser = trio
    ids, text, token_map = prompt(), prompt(2, S, seed=5), some_map(rows)
    kv = expected_kv(trio, ids, plain_loop.prefill(sharer, text), token_map)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, sharer_inputs={"input_ids": text, "token_map": token_map})
    check(trio, ids, output, kv)


def test_a_span_is_a_map_one_to_one(trio):
    receiver, sharer, fuser = trio
    ids, text = prompt(), prompt(2, S, seed=5)
    token_map = torch.full((P,), -1)
    token_map[2:6] = torch.arange(12, 16)
    kv = expected_kv(trio, ids, plain_loop.prefill(sharer, text), token_map)
    with attached(receiver, sharer, fuser):
        by_span = generate(receiver, ids, sharer_inputs={"input_ids": text, "span": (2, 12, 4)})
        by_map = generate(receiver, ids, sharer_inputs={"input_ids": text, "token_map": token_map})
    check(trio, ids, by_span, kv)
    assert same_bits(logits_of(by_span), logits_of(by_map))


def test_the_receivers_own_text_and_columns_are_the_default(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 7))
    same = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
    token_map = torch.arange(P).masked_fill(mask == 0, -1)
    with attached(receiver, sharer, fuser):
        default = generate(receiver, ids, attention_mask=mask)
        given = generate(
            receiver, ids, attention_mask=mask, sharer_inputs={**same, "token_map": token_map}
        )
    assert same_bits(logits_of(default), logits_of(given))
    held = [plain_loop.kv_of(output.past_key_values) for output in (default, given)]
    assert all(
        same_bits(a, b) for pairs in zip(*held, strict=True) for a, b in zip(*pairs, strict=True)
    )


def test_what_the_map_does_not_name_does_not_reach_the_receiver(trio):
    """Later tokens of the sharer: earlier ones change what it makes of those that are named."""
    receiver, sharer, fuser = trio
    ids, text = prompt(), prompt(2, S, seed=5)
    token_map = some_map().clamp(max=9)  # columns 10 .. 15 are read, and named by nothing
    other = text.clone()
    other[:, 10:] = prompt(2, 6, seed=9)
    earlier = text.clone()
    earlier[:, 1] = (earlier[:, 1] + 1) % 90
    with attached(receiver, sharer, fuser):
        runs = [
            generate(receiver, ids, sharer_inputs={"input_ids": t, "token_map": token_map})
            for t in (text, other, earlier)
        ]
    assert same_bits(logits_of(runs[0]), logits_of(runs[1]))
    assert (logits_of(runs[0])[:, 0] - logits_of(runs[2])[:, 0]).abs().max() > VISIBLE


def test_a_map_of_nothing_is_the_plain_split_run(trio):
    receiver, sharer, fuser = trio
    ids = prompt()
    nothing = {"input_ids": prompt(2, S), "token_map": torch.full((P,), -1)}
    alone = plain_loop.decode(receiver, plain_loop.prefill(receiver, ids[:, :-1]), ids, STEPS)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, sharer_inputs=nothing)
        empty = generate(
            receiver, ids, sharer_inputs={"input_ids": prompt(2, S), "span": (10, 3, 0)}
        )
    assert same_bits(logits_of(output), alone.logits)
    assert same_bits(logits_of(empty), alone.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sharers_text_may_be_padded_on_either_side(trio, side):
    receiver, sharer, fuser = trio
    ids, text = prompt(), prompt(2, S, seed=5)
    lengths = (S, 9)
    mask = torch.zeros(2, S, dtype=torch.long)
    padded = torch.full((2, S), 10_000)  # a token that the sharer does not know
    maps = torch.full((2, P), -1)
    kv = []
    for row, length in enumerate(lengths):
        start = S - length if side == "left" else 0
        mask[row, start : start + length] = 1
        padded[row, start : start + length] = text[row, :length]
        maps[row, [0, 4, 5]] = start + torch.tensor([8, 0, 3])
        one = maps[row] - start * (maps[row] >= 0)
        shared = plain_loop.prefill(sharer, text[row : row + 1, :length])
        kv.append(expected_kv(trio, ids[row : row + 1], shared, one))
    kv = [
        tuple(torch.cat(ts) for ts in zip(*layer, strict=True)) for layer in zip(*kv, strict=True)
    ]
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver, ids,
            sharer_inputs={"input_ids": padded, "attention_mask": mask, "token_map": maps},
        )  # fmt: skip
    check(trio, ids, output, kv)


def test_a_sharers_own_position_ids_are_followed(trio):
    receiver, sharer, fuser = trio
    ids, text = prompt(), prompt(2, S, seed=5)
    position_ids = torch.arange(0, 2 * S, 2)[None]
    with torch.no_grad():
        cache = plain_loop.DynamicCache()
        sharer(text, position_ids=position_ids, past_key_values=cache)
    kv = expected_kv(trio, ids, plain_loop.kv_of(cache), some_map())
    own = {"input_ids": text, "token_map": some_map()}
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, sharer_inputs={**own, "position_ids": position_ids})
        usual = generate(receiver, ids, sharer_inputs=own)
    check(trio, ids, output, kv)
    assert (logits_of(output)[:, 0] - logits_of(usual)[:, 0]).abs().max() > VISIBLE


def test_positions_padding_and_sections_restrict_the_map(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 6))
    text, token_map = prompt(2, S, seed=5), some_map()
    shared = plain_loop.prefill(sharer, text)
    own = {"input_ids": text, "token_map": token_map}
    limited = token_map.clone()
    limited[:6] = -1
    kv = expected_kv(trio, ids, shared, limited, mask)
    with attached(receiver, sharer, fuser):
        output = generate(
            receiver, ids, attention_mask=mask, positions=range(6, 10), sharer_inputs=own
        )
        sections = [(6, []), (2, [0]), (2, [0])]
        spans = generate(receiver, ids, attention_mask=mask, sections=sections, sharer_inputs=own)
        whole = generate(receiver, ids, attention_mask=mask, sharer_inputs=own)
    check(trio, ids, output, kv, mask)
    for layer, (key, _) in enumerate(plain_loop.kv_of(spans.past_key_values)[:1]):
        torch.testing.assert_close(key[:, :, :8], kv[layer][0][:, :, :8], **CLOSE)
    assert (logits_of(whole)[0, 0] - logits_of(output)[0, 0]).abs().max() > VISIBLE


@pytest.mark.parametrize("fusion", ["parallel", "sequential"])
def test_sharers_read_texts_of_their_own_beside_one_that_reads_the_receivers(quintet, fusion):
    receiver, sharers, fusers = quintet
    ids, text = prompt(), prompt(2, S, seed=5)
    base = plain_loop.prefill(receiver, ids[:, :-1])
    first = plain_loop.prefill(sharers[0], ids[:, :-1])
    second = plain_loop.prefill(sharers[1], text)
    one_map = some_map()[:-1].expand(2, -1)
    with torch.no_grad():
        out = reference.fuse(base, first, fusers[0])
        read = base if fusion == "parallel" else out
        other = reference.fuse(read, second, fusers[1], token_map=one_map)
        kv = [
            tuple(a + (b - r) for a, b, r in zip(*triple, strict=True))
            for triple in zip(out, other, read, strict=True)
        ]
    own = [None, {"input_ids": text, "token_map": some_map()}]
    with attached(receiver, sharers, fusers, fusion=fusion):
        output = generate(receiver, ids, sharer_inputs=own)
        beams = generate(receiver, ids, sharer_inputs=own, num_beams=2, max_new_tokens=2)
    check((receiver, None, None), ids, output, kv)
    for row in range(2):
        one = [(key[row : row + 1], value[row : row + 1]) for key, value in kv]
        tokens, _ = plain_loop.beam_search(receiver, one, ids[row : row + 1], 2, 2)
        assert torch.equal(beams.sequences[row, P:], tokens[0])


def test_a_text_need_not_fit_the_receivers_vocabulary():
    receiver = tiny_models.receiver_model()
    sharer = tiny_models.sharer_model(vocab_size=400)
    fuser = tiny_models.fuser_between(receiver, sharer)
    ids, text = prompt(), prompt(2, S, seed=5) + 300
    kv = expected_kv((receiver, sharer, fuser), ids, plain_loop.prefill(sharer, text), some_map())
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, sharer_inputs={"input_ids": text, "token_map": some_map()})
    check((receiver, sharer, fuser), ids, output, kv)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_aligned_batch_generates_as_it_stands(trio, side):
    receiver, sharer, fuser = trio
    aligner = TokenAligner(word_tokenizer(), letter_tokenizer())
    texts = ["w1 w22 w3 w45 w5", "w7 w8", "w60"]
    aligned = aligner(texts, padding_side=side)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, **given(aligned), past_key_values=plain_loop.DynamicCache())
        width = aligned.receiver["input_ids"].shape[1]
        for row, text in enumerate(texts):
            one = generate(receiver, **given(aligner(text)))
            start = width - one.sequences.shape[1] + STEPS
            torch.testing.assert_close(logits_of(output)[row], logits_of(one)[0], **CLOSE)
            assert torch.equal(output.sequences[row, start:], one.sequences[0])
    unfused = generate(receiver, aligner(texts[0]).receiver["input_ids"])
    assert (logits_of(unfused)[0, 0] - logits_of(output)[0, 0]).abs().max() > VISIBLE


def given(aligned) -> dict:
    ids, rest = aligned.receiver["input_ids"], dict(aligned.receiver)
    del rest["input_ids"]
    return {"ids": ids, **rest, "sharer_inputs": aligned.sharer_inputs}


# ---- refusals ------------------------------------------------------------------------------------


def inputs(**changes: object) -> dict:
    whole = {"input_ids": prompt(2, S), "token_map": some_map(), **changes}
    return {key: value for key, value in whole.items() if value is not None}


MASK = torch.ones(2, S, dtype=torch.long)
GAP = MASK.clone()
GAP[1, 9] = 0
REFUSED = {
    "no mapping": (5, TypeError, "sharer_inputs must be a mapping .* or a list .*, got int"),
    "text": ("text", TypeError, "sharer_inputs must be a mapping .* or a list .*, got str"),
    "too many": ([None, None], ValueError, "every sharer attached, 1, got 2"),
    "no entry": ([5], TypeError, "sharer_inputs must be a mapping or None, got int"),
    "unknown key": (inputs(maps=1), ValueError, "no other keys than input_ids, .*, got maps"),
    "no ids": ({"span": (0, 0, 1)}, TypeError, "must have input_ids as a tensor .* got nothing"),
    "list of ids": (inputs(input_ids=[[1]]), TypeError, "must have input_ids as .* got list"),
    "float ids": (inputs(input_ids=torch.ones(2, S)), TypeError, "must be integers, got torch.fl"),
    "bool ids": (inputs(input_ids=MASK.bool()), TypeError, "must be integers, got torch.bool"),
    "one row": (inputs(input_ids=MASK[:1]), ValueError, r"= \[2, at least 1\], got \[1, 16\]"),
    "no token": (inputs(input_ids=MASK[:, :0]), ValueError, r"at least 1\], got \[2, 0\]"),
    "1-D ids": (inputs(input_ids=MASK[0]), ValueError, r"at least 1\], got \[16\]"),
    "unknown token": (inputs(input_ids=MASK * 97), ValueError, "vocabulary size 97, got 97"),
    "negative token": (inputs(input_ids=-MASK), ValueError, "at least 0 and below .*, got -1"),
    "mask shape": (inputs(attention_mask=MASK[:, 1:]), ValueError, r"\[2, 16\] as .* \[2, 15\]"),
    "mask kind": (inputs(attention_mask=[1]), TypeError, "attention_mask must be a tensor .* list"),
    "positions shape": (inputs(position_ids=MASK[0]), ValueError, r"\[1, 16\], got \[16\]"),
    "float positions": (inputs(position_ids=MASK / 2), TypeError, "must be integers, got torch.fl"),
    "no map": (inputs(token_map=None), ValueError, "one of token_map and span, got neither"),
    "map and span": (inputs(span=(0, 0, 1)), ValueError, "one of token_map and span, got both"),
    "list as map": (inputs(token_map=[0]), TypeError, "must have token_map as a tensor .* list"),
    "bool map": (inputs(token_map=some_map() > 0), TypeError, "token_map must be integers, got"),
    "short map": (inputs(token_map=some_map()[:-1]), ValueError, r"\[11\] or \[2, 11\] .* \[10\]"),
    "other rows": (inputs(token_map=some_map(3)), ValueError, r"\[2, 11\] .* got \[3, 11\]"),
    "beyond": (inputs(token_map=some_map() + 1), ValueError, "at least -1 and below 16, .* got 16"),
    "below": (inputs(token_map=some_map() - 1), ValueError, "at least -1 and below 16, .* got -2"),
    "padded": (
        inputs(attention_mask=GAP),
        ValueError,
        r"attention_mask does not mask, got column 9 of row 1 \(for prompt column 3\)",
    ),
    "padded span": (
        inputs(token_map=None, span=(0, 8, 2), attention_mask=GAP),
        ValueError,
        r"got column 9 of row 1 \(for prompt column 1\)",
    ),
    "span of two": (
        inputs(token_map=None, span=(0, 1)),
        TypeError,
        "three integers .*, got .0, 1.$",
    ),
    "span of floats": (inputs(token_map=None, span=(0, 1.0, 2)), TypeError, "three integers"),
    "span of bools": (inputs(token_map=None, span=(0, True, 2)), TypeError, "three integers"),
    "span number": (inputs(token_map=None, span=3), TypeError, "three integers .*, got 3"),
    "last token": (
        inputs(token_map=None, span=(8, 0, 3)),
        ValueError,
        r"receiver's columns 0 .. 9 \(the last of the 11 is never fused\), got start 8, length 3",
    ),
    "span beyond": (
        inputs(token_map=None, span=(0, 14, 3)),
        ValueError,
        r"sharer's columns 0 .. 15, got start 14, length 3",
    ),
    "negative span": (
        inputs(token_map=None, span=(0, -1, 3)),
        ValueError,
        "got start -1, length 3",
    ),
    "negative length": (inputs(token_map=None, span=(0, 1, -3)), ValueError, "start 0, length -3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_inputs_are_refused_before_anything_runs(trio, name):
    given, error, message = REFUSED[name]
    receiver, sharer, fuser = trio
    ran = []
    hook = sharer.base_model.register_forward_pre_hook(lambda *_: ran.append(1))
    with (
        attached(receiver, sharer, fuser),
        pytest.raises(error, match=message),
    ):
        generate(receiver, prompt(), sharer_inputs=given)
    hook.remove()
    assert ran == []


def test_one_mapping_for_several_sharers_is_refused(quintet):
    receiver, sharers, fusers = quintet
    with attached(receiver, sharers, fusers):
        with pytest.raises(
            TypeError, match=r"must be a list of 2 mappings or None, .* one mapping"
        ):
            generate(receiver, prompt(), sharer_inputs=inputs())
        with pytest.raises(ValueError, match=r"sharer_inputs\[1\]'s token_map must be at least"):
            generate(receiver, prompt(), sharer_inputs=[None, inputs(token_map=some_map() + 1)])

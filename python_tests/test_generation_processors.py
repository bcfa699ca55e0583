"""Every logits processor of transformers' generate, over fused logits: tokens and scores."""

from __future__ import annotations

import inspect
import re

import plain_loop
import pytest
import tiny_models
import torch
from generation_checks import (
    CLOSE,
    STEPS,
    assert_same_run,
    assert_visible,
    generate,
    left_padded,
    new_tokens,
    prompt,
)
from transformers.generation import (
    GenerationMixin,
    LogitsProcessor,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    logits_process,
)

from c2c_ext.generation import attached

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = prompt(2, 6).repeat(1, 2)  # something that must not be repeated again
LENGTH = ROWS.shape[1]
OFTEN, NEVER = 81, 5  # tokens: the greedy answer begins with it; it is in no answer here
WATERMARK = WatermarkingConfig(bias=3.0)
SYNTH_ID = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 14, 15], sampling_table_size=512)


def prefix(batch: int, ids: torch.Tensor) -> list[int]:
    return [int(ids[0]) + 1, int(ids[-1]), *range(20, 40, 2 + batch)]


class Halve(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores / 2


def one(name: str, *arguments: object, **keywords: object):
    """The processor of this name alone."""
    return lambda: [getattr(logits_process, name)(*arguments, **keywords)]


# What generate is asked for, and the processors that the plain loop applies for it.
GREEDY = {
    "repetition_penalty": (
        {"repetition_penalty": 1.9},
        one("RepetitionPenaltyLogitsProcessor", 1.9),
    ),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 1.9},
        one("EncoderRepetitionPenaltyLogitsProcessor", 1.9, ROWS),
    ),
    "no_repeat_ngram_size": (
        {"no_repeat_ngram_size": 2},
        one("NoRepeatNGramLogitsProcessor", 2),
    ),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 2},
        one("EncoderNoRepeatNGramLogitsProcessor", 2, ROWS),
    ),
    "bad_words_ids": (
        {"bad_words_ids": [[OFTEN], [7, 8]]},
        one("NoBadWordsLogitsProcessor", [[OFTEN], [7, 8]]),
    ),
    "sequence_bias": (
        {"sequence_bias": [[[40], 9.0], [[40, 41], 20.0]]},
        one("SequenceBiasLogitsProcessor", [[[40], 9.0], [[40, 41], 20.0]]),
    ),
    "min_length": (
        {"min_length": LENGTH + STEPS, "eos_token_id": OFTEN},
        one("MinLengthLogitsProcessor", LENGTH + STEPS, OFTEN),
    ),
    "min_new_tokens": (
        {"min_new_tokens": STEPS, "eos_token_id": OFTEN},
        # Both: transformers makes a minimal length of the minimal number of new tokens.
        lambda: [
            logits_process.MinLengthLogitsProcessor(LENGTH + STEPS, OFTEN),
            logits_process.MinNewTokensLengthLogitsProcessor(LENGTH, STEPS, OFTEN),
        ],
    ),
    "prefix_allowed_tokens_fn": (
        {"prefix_allowed_tokens_fn": prefix},
        one("PrefixConstrainedLogitsProcessor", prefix, 1),
    ),
    "forced_eos_token_id": (
        {"forced_eos_token_id": NEVER, "eos_token_id": NEVER},
        one("ForcedEOSTokenLogitsProcessor", LENGTH + STEPS, NEVER),
    ),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": NEVER},
        one("ExponentialDecayLengthPenalty", (2, 1.1), NEVER, LENGTH),
    ),
    "suppress_tokens": (
        {"suppress_tokens": [OFTEN, 7]},
        one("SuppressTokensLogitsProcessor", [OFTEN, 7]),
    ),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": [OFTEN, 7]},
        one("SuppressTokensAtBeginLogitsProcessor", [OFTEN, 7], LENGTH),
    ),
    "renormalize_logits": ({"renormalize_logits": True}, one("LogitNormalization")),
    "watermarking_config": (
        {"watermarking_config": WATERMARK},
        lambda: [WATERMARK.construct_processor(tiny_models.VOCABULARY, "cpu")],
    ),
    "logits_processor": ({"logits_processor": [Halve()]}, lambda: [Halve()]),
}
DRAWN = {
    "temperature": ({"temperature": 1.7}, one("TemperatureLogitsWarper", 1.7)),
    "top_k": ({"top_k": 4}, one("TopKLogitsWarper", 4)),
    "top_p": ({"top_p": 0.6}, one("TopPLogitsWarper", 0.6)),
    "min_p": ({"min_p": 0.2}, one("MinPLogitsWarper", 0.2)),
    "typical_p": ({"typical_p": 0.4}, one("TypicalLogitsWarper", 0.4)),
    "epsilon_cutoff": ({"epsilon_cutoff": 0.03}, one("EpsilonLogitsWarper", 0.03)),
    "eta_cutoff": ({"eta_cutoff": 0.05}, one("EtaLogitsWarper", 0.05)),
    "synth_id": (
        {"watermarking_config": SYNTH_ID},
        lambda: [SYNTH_ID.construct_processor(tiny_models.VOCABULARY, "cpu")],
    ),
    "several": (
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.3},
        lambda: [
            logits_process.RepetitionPenaltyLogitsProcessor(1.3),
            logits_process.TemperatureLogitsWarper(0.7),
            logits_process.TopKLogitsWarper(9),
            logits_process.TopPLogitsWarper(0.8),
        ],
    ),
}
if hasattr(logits_process, "TopHLogitsWarper"):
    DRAWN["top_h"] = ({"top_h": 0.4}, one("TopHLogitsWarper", 0.4))
# Without a trace here: the first is for prompts of one token, which nothing is fused into; the
# second repairs numbers that are not there.
IDLE = {
    "forced_bos_token_id": ({"forced_bos_token_id": NEVER}, list),
    "remove_invalid_values": ({"remove_invalid_values": True}, list),
}
CASES = {**GREEDY, **DRAWN, **IDLE}


@pytest.fixture(scope="module")
def trio():
    return tiny_models.trio()


@pytest.fixture(scope="module")
def fused(trio):
    return plain_loop.fused_prompt(*trio, ROWS)


def test_the_tokens_that_the_cases_name_are_chosen_or_not(trio, fused):
    tokens = plain_loop.decode(trio[0], fused, ROWS, STEPS).tokens
    assert OFTEN in tokens[:, 0] and NEVER not in tokens


@pytest.mark.parametrize("case", list(CASES))
def test_processor_sees_fused_logits_and_the_whole_prompt(trio, fused, case):
    receiver, sharer, fuser = trio
    settings, processors = CASES[case]
    draw = case in DRAWN
    torch.manual_seed(5)
    choose = plain_loop.Processed(ROWS, processors(), draw=draw)
    expected = plain_loop.decode(receiver, fused, ROWS, STEPS, choose=choose)
    settings = {"do_sample": True, "top_k": 0, **settings} if draw else settings
    with attached(receiver, sharer, fuser):
        torch.manual_seed(5)
        output = generate(receiver, ROWS, pad_token_id=0, **settings)
    assert_same_run(output, ROWS, expected)
    scores = torch.stack(choose.scores, 1)
    torch.testing.assert_close(torch.stack(output.scores, 1), scores, **CLOSE)
    assert torch.equal(scores, expected.logits) == (case in IDLE)
    assert_visible(expected, receiver, ROWS)


def test_no_processor_of_this_version_is_left_out():
    tested = {type(processor) for _, build in CASES.values() for processor in build()}
    tested.add(logits_process.ForcedBOSTokenLogitsProcessor)
    tested.add(logits_process.InfNanRemoveLogitsProcessor)
    elsewhere = {logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor}
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    refused = {getattr(logits_process, "HammingDiversityLogitsProcessor", None)}  # group beams
    names = set(re.findall(r"\b\w+(?=\()", source)) - {"LogitsProcessorList"}
    named = {getattr(logits_process, name, None) for name in names}
    made = {value for value in named if isinstance(value, type)}
    assert len(made) > 20
    assert made - tested - elsewhere - refused == set()


def test_penalties_skip_padding_as_transformers_does(trio):
    receiver, sharer, fuser = trio
    ids, mask = left_padded((11, 4))
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids, mask)
    with attached(receiver, sharer, fuser):
        output = generate(receiver, ids, attention_mask=mask, repetition_penalty=1.9)
    tokens = new_tokens(output, ids)
    expected = plain_loop.decode(
        receiver, kv, ids, STEPS, mask=mask, choose=plain_loop.forced(tokens)
    )
    assert_same_run(output, ids, expected)
    for row, length in enumerate((11, 4)):
        one_row = ids[row : row + 1, -length:]
        choose = plain_loop.Processed(
            one_row, [logits_process.RepetitionPenaltyLogitsProcessor(1.9)], draw=False
        )
        kv = plain_loop.fused_prompt(receiver, sharer, fuser, one_row)
        alone = plain_loop.decode(receiver, kv, one_row, STEPS, choose=choose)
        assert torch.equal(tokens[row], alone.tokens[0])
        padding = torch.ones(tiny_models.VOCABULARY, dtype=torch.bool)
        padding[0] = length == 11  # versions differ in whether the padding token is punished
        seen = torch.stack(output.scores, 1)[row][:, padding]
        torch.testing.assert_close(seen, torch.cat(choose.scores)[:, padding], **CLOSE)
    assert_visible(expected, receiver, ids, mask)


def test_drawn_beams_score_what_the_plain_loop_scores(trio):
    receiver, sharer, fuser = trio
    ids = prompt(1)
    kv = plain_loop.fused_prompt(receiver, sharer, fuser, ids)
    clean = plain_loop.prefill(receiver, ids[:, :-1])
    with attached(receiver, sharer, fuser):
        torch.manual_seed(2)
        output = generate(
            receiver, ids, do_sample=True, num_beams=3, num_return_sequences=3, top_k=0
        )
        torch.manual_seed(2)
        again = generate(
            receiver, ids, do_sample=True, num_beams=3, num_return_sequences=3, top_k=0
        )
    assert torch.equal(output.sequences, again.sequences)
    tokens = new_tokens(output, ids)

    def mean_log_probability(kv):
        rows = ids.expand(3, -1)
        seen = plain_loop.decode(
            receiver, plain_loop.repeat_rows(kv, 3), rows, STEPS, choose=plain_loop.forced(tokens)
        )
        chosen = seen.logits.log_softmax(-1).gather(2, tokens[:, :, None])
        return chosen.sum((1, 2)) / STEPS

    torch.testing.assert_close(output.sequences_scores, mean_log_probability(kv), **CLOSE)
    assert (mean_log_probability(clean) - output.sequences_scores).abs().max() > 0.1

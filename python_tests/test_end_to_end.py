"""Golden end-to-end cases: published fusers, real prefills, fuse and generate."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from c2c_ext import Fuser, attached, fuse

E2E = Path(__file__).parent / "golden" / "e2e"
CACHE_TOLERANCE, LOGIT_TOLERANCE = 2e-4, 2e-3  # golden/FORMAT.md, section 5
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def load_cases() -> dict[str, tuple[int, dict]]:
    with safe_open(E2E / "cases.safetensors", "pt") as file:
        cases = json.loads(file.metadata()["meta"])["cases"]
    return {case["name"]: (j, case) for j, case in enumerate(cases)}


CASES = load_cases()


@functools.cache
def load_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(E2E / name, attn_implementation="eager")
    return model.eval().to(dtype)


class Case:
    """One golden case: its tensors, models and fusers."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.number, self.meta = CASES[name]
        self.dtype, self.fusion = dtype, self.meta["fusion_mode"]
        self.receiver = load_model("receiver", dtype)
        entries = self.meta["sharers"]
        self.sharers = [load_model(entry["model"], dtype) for entry in entries]
        self.fusers = [
            Fuser.from_published(
                E2E / entry["fuser"],
                receiver_config=self.receiver.config,
                sharer_config=sharer.config,
            )
            for entry, sharer in zip(entries, self.sharers, strict=True)
        ]
        # The last section is the last prompt token; -1: nothing is fused.
        self.sections = [
            (section["length"], self.selected(section["mask"]))
            for section in self.meta["sections"][:-1]
        ]
        self.fuses = any(selected for _, selected in self.sections)
        self.ids = self.tensor("input_ids")

    def selected(self, mask: int) -> list[int]:
        return [k for k in range(len(self.sharers)) if mask > 0 and mask >> k & 1]

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(E2E / "cases.safetensors", "pt") as file:
            return file.get_tensor(f"case{self.number}.{name}")

    def check_cache(self, cache: DynamicCache, kind: str, tokens: int) -> None:
        for index, layer in enumerate(cache.layers):
            for which in ("key", "value"):
                got = getattr(layer, which + "s")[:, :, :tokens]
                expected = self.tensor(f"{kind}.{index}.{which}").to(self.dtype)
                torch.testing.assert_close(got, expected, atol=CACHE_TOLERANCE, rtol=0)


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return DTYPES[request.param]


def test_all_cases_are_here() -> None:
    assert len(CASES) == 16
    cases = [case for _, case in CASES.values()]
    assert sum(len(case["sharers"]) == 2 for case in cases) == 9
    assert sum(len(case["sections"]) > 2 for case in cases) == 2
    assert sum(any(section["mask"] > 0 for section in case["sections"]) for case in cases) == 15


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_fuse_gives_the_golden_caches(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    prompt = case.ids[:, :-1]
    shared = [DynamicCache() for _ in case.sharers]
    for k, (sharer, cache) in enumerate(zip(case.sharers, shared, strict=True)):
        sharer(prompt, past_key_values=cache)
        case.check_cache(cache, f"sharer{k + 1}", prompt.shape[1])
    receiver_cache, start = DynamicCache(), 0
    for length, selected in case.sections:
        end = start + length
        case.receiver(prompt[:, start:end], past_key_values=receiver_cache)
        if len(case.sections) == 1:
            case.check_cache(receiver_cache, "receiver_clean", end)
        if selected:
            caches, fusers = [shared[k] for k in selected], [case.fusers[k] for k in selected]
            before = receiver_cache
            receiver_cache = fuse(before, caches, fusers, fusion=case.fusion, start=start)
            if len(case.sections) == 1:  # a new cache: the clean one is as it was
                case.check_cache(before, "receiver_clean", end)
                fuse(before, caches, fusers, fusion=case.fusion, inplace=True)
                case.check_cache(before, "fused", end)
        start = end
    case.check_cache(receiver_cache, "fused", prompt.shape[1])


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_golden_tokens_and_logits(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    arguments = {
        "attention_mask": torch.ones_like(case.ids),
        "max_new_tokens": case.meta["new_tokens"],
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    length = case.ids.shape[1]
    if len(case.sections) > 1:
        how = {"sections": case.sections}
    else:
        how = {"sharers": case.sections[0][1]}
    with attached(case.receiver, case.sharers, case.fusers, fusion=case.fusion) as receiver:
        output = receiver.generate(case.ids, **how, **arguments)
    case.check_cache(output.past_key_values, "fused", length - 1)
    logits, expected = torch.stack(output.logits, dim=1), case.tensor("logits")
    torch.testing.assert_close(logits, expected.to(logits.dtype), atol=LOGIT_TOLERANCE, rtol=0)
    assert torch.equal(output.sequences[:, length:], case.tensor("tokens"))

    plain = case.receiver.generate(case.ids, **arguments)
    change = (torch.stack(plain.logits, dim=1)[:, 0] - expected[:, 0]).abs().max()
    if case.fuses:
        assert change > 100 * LOGIT_TOLERANCE
    else:
        assert change < LOGIT_TOLERANCE


def test_a_single_sharer_without_lists_gives_the_golden_caches() -> None:
    case = Case("single_last_aligned_p1", torch.float32)
    with attached(case.receiver, case.sharers[0], case.fusers[0]) as receiver:
        output = receiver.generate(
            case.ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
        )
    case.check_cache(output.past_key_values, "fused", case.ids.shape[1] - 1)

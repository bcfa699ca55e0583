"""Golden end-to-end cases with one sharer: published fuser, real prefills, fuse and generate."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from c2c_ext import Fuser, attached, fuse

E2E = Path(__file__).parent / "golden" / "e2e"
CACHE_TOLERANCE, LOGIT_TOLERANCE = 2e-4, 2e-3  # golden/FORMAT.md, section 5


def load_cases() -> dict[str, tuple[int, dict]]:
    with safe_open(E2E / "cases.safetensors", "pt") as file:
        cases = json.loads(file.metadata()["meta"])["cases"]
    return {
        case["name"]: (j, case)
        for j, case in enumerate(cases)
        if len(case["sharers"]) == 1 and len(case["sections"]) == 2
    }


CASES = load_cases()


class Case:
    """One golden case: its tensors, models and fuser."""

    def __init__(self, name: str) -> None:
        self.number, self.meta = CASES[name]
        self.receiver = self.model("receiver")
        entry = self.meta["sharers"][0]
        self.sharer = self.model(entry["model"])
        self.fuser = Fuser.from_published(
            E2E / entry["fuser"],
            receiver_config=self.receiver.config,
            sharer_config=self.sharer.config,
        )
        self.selected = self.meta["sections"][0]["mask"] > 0  # -1: nothing is fused
        self.ids = self.tensor("input_ids")

    def model(self, name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(E2E / name, attn_implementation="eager").eval()

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(E2E / "cases.safetensors", "pt") as file:
            return file.get_tensor(f"case{self.number}.{name}")

    def check_cache(self, cache: DynamicCache, kind: str, tokens: int) -> None:
        for layer in range(5):
            for which in ("key", "value"):
                got = getattr(cache.layers[layer], which + "s")[:, :, :tokens]
                expected = self.tensor(f"{kind}.{layer}.{which}")
                torch.testing.assert_close(got, expected, atol=CACHE_TOLERANCE, rtol=0)


def test_all_single_sharer_cases_are_here() -> None:
    assert len(CASES) == 7
    assert sum(case["sections"][0]["mask"] > 0 for _, case in CASES.values()) == 6


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_fuse_gives_the_golden_caches(name: str) -> None:
    case = Case(name)
    prompt = case.ids[:, :-1]
    receiver_cache, sharer_cache = DynamicCache(), DynamicCache()
    case.receiver(prompt, past_key_values=receiver_cache)
    case.sharer(prompt, past_key_values=sharer_cache)
    case.check_cache(receiver_cache, "receiver_clean", prompt.shape[1])
    start = 0 if case.selected else prompt.shape[1]
    fused = fuse(receiver_cache, sharer_cache, case.fuser, start=start)
    case.check_cache(fused, "fused", prompt.shape[1])
    # fuse returned a new cache: the clean one is as it was
    case.check_cache(receiver_cache, "receiver_clean", prompt.shape[1])


@pytest.mark.parametrize("name", CASES)
def test_generate_gives_the_golden_tokens_and_logits(name: str) -> None:
    case = Case(name)
    arguments = {
        "attention_mask": torch.ones_like(case.ids),
        "max_new_tokens": case.meta["new_tokens"],
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    length = case.ids.shape[1]
    with attached(case.receiver, case.sharer, case.fuser) as receiver:
        positions = None if case.selected else []
        output = receiver.generate(case.ids, positions=positions, **arguments)
    case.check_cache(output.past_key_values, "fused", length - 1)
    logits, expected = torch.stack(output.logits, dim=1), case.tensor("logits")
    torch.testing.assert_close(logits, expected, atol=LOGIT_TOLERANCE, rtol=0)
    assert torch.equal(output.sequences[:, length:], case.tensor("tokens"))

    plain = case.receiver.generate(case.ids, **arguments)
    change = (torch.stack(plain.logits, dim=1)[:, 0] - expected[:, 0]).abs().max()
    if case.selected:
        assert change > 100 * LOGIT_TOLERANCE
    else:
        assert change < LOGIT_TOLERANCE

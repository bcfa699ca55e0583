"""Answers of two models in three modes, on the CPU or a GPU: timed by part, checked by plain loops.

The modes are `bench_generate.py`'s.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import shapes
import torch
from gpu import Gpu
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from c2c_ext import Fuser, FuserConfig, attach, reference
from c2c_ext.cache import KVPairs
from c2c_ext.cache_columns import append
from c2c_ext.config import KINDS
from c2c_ext.fusion import fuse
from c2c_ext.fusion_bench import randomised
from c2c_ext.measure import Unverified, compare, worst
from c2c_ext.prefill import read_tokens

MODES = ("receiver", "T2T", "C2C")
BATCH = 1
CPU = torch.device("cpu")
# Of C2C, up to the first token.
PREFIX = (
    *("receiver prefill", "sharer prefill", "transfer"),
    *("fusing", "filling the cache", "last prompt token"),
)


class Clock(BaseStreamer):
    """When each token came: the first `put` is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self, start: float) -> tuple[float, list[float]]:
        """(until the first new token, from each to the next)."""
        tokens = self.times[1:]
        return tokens[0] - start, [b - a for a, b in pairwise(tokens)]


def modes_of(overlaps: Sequence[str]) -> tuple[str, ...]:
    """`MODES`, C2C once per way to overlap: `C2C` is that without, `C2C thread` and so on."""
    return (*MODES[:2], *(MODES[2] if how == "none" else f"{MODES[2]} {how}" for how in overlaps))


def is_fused(mode: str) -> bool:
    """Whether an attached receiver answers."""
    return mode.startswith(MODES[2])


def overlap_of(mode: str) -> str:
    """Of a fused mode, a name of `OVERLAPS`."""
    return mode.removeprefix(MODES[2]).strip() or "none"


@dataclass
class Answer:
    """Tokens of one answer, and its seconds by part; ``first`` and ``total`` are not parts."""

    tokens: Tensor
    parts: dict[str, float]
    first: float
    total: float
    steps: list[float]  # from each token to the next


class Pair:
    """Two random models, a random fuser where it is needed, and one prompt.

    Args:
        modes: which of `modes_of` will run; what they do not need is not made.
        gpu: where; None: on the CPU.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        modes: Sequence[str] = MODES,
        gpu: Gpu | None = None,
    ) -> None:
        receiver, sharer, settings = shapes.model_pair(name)
        self.gpu, self.device = gpu, CPU if gpu is None else gpu.device
        self.receiver = _model(receiver, dtype, seed=1).to(self.device)
        self.vocabulary = min(receiver.vocab_size, sharer.vocab_size)
        self.sharer = self.fuser = None
        if any(mode != "receiver" for mode in modes):
            self.sharer = _model(sharer, dtype, seed=2).to(self.device)
        fused = [mode for mode in modes if is_fused(mode)]
        if fused:
            torch.manual_seed(3)
            config = FuserConfig.for_models(receiver, sharer, **settings)
            self.fuser = randomised(Fuser(config)).to(self.device, dtype)
            self.fuser.packed(dtype, self.device)
            # Copies that share all weights: attached once, while the receiver answers alone too.
            self.attached = {
                mode: attach(
                    copy.copy(self.receiver), self.sharer, self.fuser, overlap=overlap_of(mode)
                )
                for mode in fused
            }

    def now(self) -> float:
        """Seconds, once the device has done what it was told to."""
        if self.gpu is not None:
            self.gpu.wait()
        return time.perf_counter()

    def prompt(self, tokens: int) -> Tensor:
        """Random token ids ``[1, tokens]``."""
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(3, self.vocabulary, (BATCH, tokens), generator=generator)
        return ids.to(self.device)

    def answer(self, mode: str, ids: Tensor, message: int, new_tokens: int) -> Answer:
        """One answer through generate."""
        if mode == "receiver":
            return self._receiver(ids, new_tokens)
        if mode == "T2T":
            return self._text(ids, message, new_tokens)
        tokens, first, steps, total = self._generate(self.attached[mode], ids, new_tokens)
        return Answer(tokens, {"decode": sum(steps)}, first, total, steps)

    def _receiver(self, ids: Tensor, new_tokens: int) -> Answer:
        tokens, first, steps, total = self._generate(self.receiver, ids, new_tokens)
        parts = {"receiver prefill": first, "decode": sum(steps)}
        return Answer(tokens, parts, first, total, steps)

    def _text(self, ids: Tensor, message: int, new_tokens: int) -> Answer:
        written, read, writing, spent = self._generate(self.sharer, ids, message)
        start = self.now()
        both = torch.cat([ids, written], dim=1)
        transfer = self.now() - start
        tokens, first, steps, total = self._generate(self.receiver, both, new_tokens)
        parts = {
            "sharer prefill": read,
            "sharer writing": sum(writing),
            "transfer": transfer,
            "receiver prefill": first,
            "decode": sum(steps),
        }
        before = spent + transfer
        return Answer(tokens, parts, before + first, before + total, steps)

    @torch.no_grad()
    def fused_parts(self, ids: Tensor) -> dict[str, float]:
        """Seconds, by part, of what an attached receiver does up to its first token.

        The same calls as `c2c_ext.prompt_fusion` makes, without generate around them.
        """
        times = [self.now()]

        def lap(result: Any) -> Any:
            times.append(self.now())
            return result

        read = ids[:, :-1]
        positions = torch.arange(read.shape[1], device=self.device).expand(read.shape)
        base = lap(_prefill("receiver", self.receiver, read, positions))
        shared = lap(_prefill("sharer", self.sharer, read, positions))
        shared = lap([(key.to(base[0][0]), value.to(base[0][0])) for key, value in shared])
        fused = lap(fuse(base, shared, self.fuser, inplace=True))
        cache = DynamicCache()
        lap(append(cache, fused, 0))
        lap(_next_logits(self.receiver, ids[:, -1:], cache).argmax(-1))
        return dict(zip(PREFIX, (b - a for a, b in pairwise(times)), strict=True))

    def _generate(
        self, model: PreTrainedModel, ids: Tensor, new_tokens: int
    ) -> tuple[Tensor, float, list[float], float]:
        """(new tokens, seconds to the first, from each to the next, in all).

        generate hands every token to the streamer on the CPU: it has waited for it.
        """
        clock = Clock()
        start = self.now()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        total = self.now() - start
        first, steps = clock.seconds(start)
        return output[:, ids.shape[1] :], first, steps, total

    def verify(self, mode: str, ids: Tensor, message: int, new_tokens: int) -> dict[str, Any]:
        """Raises `Unverified` unless generate gives the tokens of a plain greedy loop."""
        found: dict[str, Any] = {}
        read, cache = ids, DynamicCache()
        if mode == "T2T":
            read = torch.cat([ids, _greedy(self.sharer, ids, DynamicCache(), message)], dim=1)
        elif is_fused(mode):
            read = ids[:, -1:]
            fused, found = self._verified_fusion(ids[:, :-1])
            append(cache, fused, 0)
        expected = _greedy(self.receiver, read, cache, new_tokens)
        if is_fused(mode):
            alone = _greedy(self.receiver, ids, DynamicCache(), new_tokens)
            if torch.equal(expected, alone):
                raise Unverified(f"{mode}: the fused cache changes no token: nothing is verified")
        tokens = self.answer(mode, ids, message, new_tokens).tokens
        if not torch.equal(tokens, expected):
            raise Unverified(
                f"{mode}: generate gives {tokens.tolist()}, a plain loop {expected.tolist()}"
            )
        return {**found, "tokens_equal": expected.shape[1]}

    @torch.no_grad()
    def _verified_fusion(self, ids: Tensor) -> tuple[KVPairs, dict[str, float]]:
        """The fused prompt, first and last layer compared with float64 by the tests' tolerance."""
        positions = torch.arange(ids.shape[1], device=self.device).expand(ids.shape)
        base, sharer = (
            _prefill(role, model, ids, positions)
            for role, model in (("receiver", self.receiver), ("sharer", self.sharer))
        )
        fused, config, found = fuse(base, sharer, self.fuser), self.fuser.config, []
        for layer in sorted({0, len(base) - 1}):
            for k, kind in enumerate(KINDS):
                source, own = sharer[config.layer_map[layer]][k], base[layer][k]
                truth, plain = (
                    reference.fuse_stream(
                        self.fuser.stream(layer, kind, dtype=dtype),
                        source.to(dtype),
                        own.to(dtype),
                        own.new_ones((), dtype=dtype),
                        config,
                    )
                    for dtype in (torch.float64, own.dtype)
                )
                what = f"fused layer {layer} {kind}"
                found.append(compare(fused[layer][k], [plain], truth, what))
        return fused, worst(found)


def _model(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    # The default initialisation is so small that every prompt gives the same answer.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    model.generation_config.eos_token_id = None  # answers have the length they are asked for
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, count: int) -> Tensor:
    """``count`` tokens by argmax, ``ids`` being what the cache does not hold yet."""
    tokens = []
    for _ in range(count):
        ids = _next_logits(model, ids, cache).argmax(-1, keepdim=True)
        tokens.append(ids)
    return torch.cat(tokens, dim=1)


def _next_logits(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    held = cache.get_seq_length()
    positions = torch.arange(held, held + ids.shape[1], device=ids.device)[None]
    output = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return output.logits[:, -1].float()


def _prefill(role: str, model: PreTrainedModel, ids: Tensor, positions: Tensor) -> KVPairs:
    """(key, value) of every layer."""
    cache = read_tokens(role, model, ids, position_ids=positions)
    return [(layer.keys, layer.values) for layer in cache.layers]

"""How long until the receiver answers: alone, after a message in text, and through its cache?

usage: python benchmarks/bench_generate.py [--pairs tiny mid real] [--dtypes fp32 bf16]
           [--prompts N ...] [--message K] [--new-tokens M] [--threads T] [--quick] [--output FILE]

Three modes: `receiver` reads the prompt and answers; `T2T`: the sharer reads it, writes K tokens,
and the receiver reads prompt and message; `C2C`: an attached receiver. Models have the pair's
shapes and random weights. Every mode must give the tokens of a plain greedy loop, and the fused
cache must be as good as plain PyTorch's, before anything is timed. docs/benchmarks.md says how to
read the results.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import harness
import shapes
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from c2c_ext import Fuser, FuserConfig, attach, reference
from c2c_ext.cache import KVPairs
from c2c_ext.config import KINDS
from c2c_ext.fusion import fuse
from c2c_ext.fusion_bench import randomised
from c2c_ext.machine import peak_memory
from c2c_ext.measure import Cell, Effort, Timing, Unverified, alternate, compare, worst
from c2c_ext.prompt_fusion import _fill, _prefill
from c2c_ext.report import DTYPES

MODES = ("receiver", "T2T", "C2C")
PROMPTS = (64, 170, 512)
BATCH = 1
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
        modes: which of `MODES` will run; what they do not need is not made.
    """

    def __init__(self, name: str, dtype: torch.dtype, modes: tuple[str, ...] = MODES) -> None:
        receiver, sharer, settings = shapes.model_pair(name)
        self.receiver = _model(receiver, dtype, seed=1)
        self.vocabulary = min(receiver.vocab_size, sharer.vocab_size)
        self.sharer = self.fuser = None
        if modes != ("receiver",):
            self.sharer = _model(sharer, dtype, seed=2)
        if "C2C" in modes:
            torch.manual_seed(3)
            config = FuserConfig.for_models(receiver, sharer, **settings)
            self.fuser = randomised(Fuser(config)).to(dtype)
            self.fuser.packed(dtype, torch.device("cpu"))
            # A copy that shares all weights: attached once, while the receiver answers alone too.
            self.attached = attach(copy.copy(self.receiver), self.sharer, self.fuser)

    def prompt(self, tokens: int) -> Tensor:
        """Random token ids ``[1, tokens]``."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(3, self.vocabulary, (BATCH, tokens), generator=generator)

    def answer(self, mode: str, ids: Tensor, message: int, new_tokens: int) -> Answer:
        """One answer through generate."""
        if mode == "receiver":
            return self._receiver(ids, new_tokens)
        if mode == "T2T":
            return self._text(ids, message, new_tokens)
        tokens, first, steps, total = _generate(self.attached, ids, new_tokens)
        return Answer(tokens, {"decode": sum(steps)}, first, total, steps)

    def _receiver(self, ids: Tensor, new_tokens: int) -> Answer:
        tokens, first, steps, total = _generate(self.receiver, ids, new_tokens)
        parts = {"receiver prefill": first, "decode": sum(steps)}
        return Answer(tokens, parts, first, total, steps)

    def _text(self, ids: Tensor, message: int, new_tokens: int) -> Answer:
        written, read, writing, spent = _generate(self.sharer, ids, message)
        start = time.perf_counter()
        both = torch.cat([ids, written], dim=1)
        transfer = time.perf_counter() - start
        tokens, first, steps, total = _generate(self.receiver, both, new_tokens)
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
        times = [time.perf_counter()]

        def lap(result: Any) -> Any:
            times.append(time.perf_counter())
            return result

        read = ids[:, :-1]
        positions = torch.arange(read.shape[1]).expand(read.shape)
        base = lap(_prefill("receiver", self.receiver, read, None, positions))
        shared = lap(_prefill("sharer", self.sharer, read, None, positions))
        shared = lap([(key.to(base[0][0]), value.to(base[0][0])) for key, value in shared])
        fused = lap(fuse(base, shared, self.fuser, inplace=True))
        cache = DynamicCache()
        lap(_fill(cache, fused, 1))
        lap(_next_logits(self.receiver, ids[:, -1:], cache).argmax(-1))
        return dict(zip(PREFIX, (b - a for a, b in pairwise(times)), strict=True))

    def verify(self, mode: str, ids: Tensor, message: int, new_tokens: int) -> dict[str, Any]:
        """Raises `Unverified` unless generate gives the tokens of a plain greedy loop."""
        found: dict[str, Any] = {}
        read, cache = ids, DynamicCache()
        if mode == "T2T":
            read = torch.cat([ids, _greedy(self.sharer, ids, DynamicCache(), message)], dim=1)
        elif mode == "C2C":
            read = ids[:, -1:]
            fused, found = self._verified_fusion(ids[:, :-1])
            _fill(cache, fused, 1)
        expected = _greedy(self.receiver, read, cache, new_tokens)
        if mode == "C2C":
            alone = _greedy(self.receiver, ids, DynamicCache(), new_tokens)
            if torch.equal(expected, alone):
                raise Unverified("C2C: the fused cache changes no token: nothing is verified")
        tokens = self.answer(mode, ids, message, new_tokens).tokens
        if not torch.equal(tokens, expected):
            raise Unverified(
                f"{mode}: generate gives {tokens.tolist()}, a plain loop {expected.tolist()}"
            )
        return {**found, "tokens_equal": expected.shape[1]}

    @torch.no_grad()
    def _verified_fusion(self, ids: Tensor) -> tuple[KVPairs, dict[str, float]]:
        """The fused prompt, first and last layer compared with float64 by the tests' tolerance."""
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        base, sharer = (
            _prefill(role, model, ids, None, positions)
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
                        torch.ones((), dtype=dtype),
                        config,
                    )
                    for dtype in (torch.float64, own.dtype)
                )
                what = f"fused layer {layer} {kind}"
                found.append(compare(fused[layer][k], [plain], truth, what))
        return fused, worst(found)


def measure(
    cell: Cell, pair: Pair, ids: Tensor, message: int, new_tokens: int, effort: Effort
) -> tuple[list[Cell], list[Cell]]:
    """Rows of all modes that give the right tokens, timed in turns."""
    verified, left_out = {}, []
    for mode in MODES:
        try:
            verified[mode] = pair.verify(mode, ids, message, new_tokens)
        except Unverified as error:
            left_out.append({**cell, "provider": mode, "reason": str(error)})
    answers: dict[str, list[Answer]] = {mode: [] for mode in verified}
    prefix: list[dict[str, float]] = []  # parts of C2C up to the first token, by separate calls

    def call(mode: str) -> Callable[[int], None]:
        def run(_: int) -> None:
            answers[mode].append(pair.answer(mode, ids, message, new_tokens))

        return run

    calls = {mode: call(mode) for mode in verified}
    if "C2C" in verified:
        calls["parts"] = lambda _: prefix.append(pair.fused_parts(ids))
    if calls:
        alternate(calls, effort)
    medians = {m: _summary([a.total for a in answers[m]])["median"] for m in verified}
    rows = []
    for mode in verified:
        runs = answers[mode]
        parts: dict[str, list[float]] = {}
        for part in [a.parts for a in runs] + (prefix if mode == "C2C" else []):
            for name, seconds in part.items():
                parts.setdefault(name, []).append(seconds)
        row = {
            **cell,
            "provider": mode,
            "seconds": _summary([a.total for a in runs]),
            "calls": len(runs),
            "first_token": _summary([a.first for a in runs]),
            "per_token": _summary([s for a in runs for s in a.steps] or [0.0]),
            "parts": {name: _summary(seconds) for name, seconds in parts.items()},
        }
        if mode == "C2C":
            # Whatever generate does around all of it.
            known = sum(p["median"] for n, p in row["parts"].items() if n != "decode")
            row["first_token_unaccounted"] = row["first_token"]["median"] - known
        row["ratios"] = {other: m / medians[mode] for other, m in medians.items() if other != mode}
        rows.append(row | {"verified": verified[mode]})
    return rows, left_out


def peak(name: str, dtype: str, mode: str, tokens: int, message: int, new_tokens: int) -> dict:
    """Bytes resident in this process before and at most during one answer, models included."""
    pair = Pair(name, DTYPES[dtype], (mode,))
    ids = pair.prompt(tokens)
    measured = peak_memory(lambda: pair.answer(mode, ids, message, new_tokens))
    return {} if measured is None else dict(zip(("resident_before", "peak"), measured, strict=True))


def peak_in_a_process(*arguments: Any) -> dict[str, int]:
    """`peak` in a fresh process, which holds nothing but what the mode needs."""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads())]
    command += ["--one-peak", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench_generate.py --one-peak failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


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


def _generate(
    model: PreTrainedModel, ids: Tensor, new_tokens: int
) -> tuple[Tensor, float, list[float], float]:
    """(new tokens, seconds to the first, from each to the next, in all)."""
    clock = Clock()
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
    )
    total = time.perf_counter() - start
    first, steps = clock.seconds(start)
    return output[:, ids.shape[1] :], first, steps, total


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
    positions = torch.arange(held, held + ids.shape[1])[None]
    output = model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    return output.logits[:, -1].float()


def _summary(seconds: list[float]) -> Mapping[str, float]:
    return Timing(seconds, 0).summary()


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--pairs", nargs="+", choices=shapes.PAIRS, default=["tiny", "mid"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--prompts", nargs="+", type=harness.positive, default=list(PROMPTS))
    parser.add_argument("--message", type=harness.positive, default=64, help="tokens of T2T's text")
    parser.add_argument("--new-tokens", type=harness.positive, default=16)
    parser.add_argument("--no-memory", action="store_true", help="no processes to measure peaks in")
    parser.add_argument(
        "--one-peak", nargs=6, help="pair, dtype, mode, prompt, message, new tokens"
    )
    options = parser.parse_args(argv)
    if options.one_peak is not None:
        torch.set_num_threads(options.threads)  # the op's scratch depends on it
        name, dtype, mode, *numbers = options.one_peak
        print(json.dumps(peak(name, dtype, mode, *map(int, numbers))))
        return 0
    del options.one_peak
    if min(options.prompts) < 2:
        parser.error("--prompts must be at least 2: the last prompt token is never fused")
    if options.quick:
        options.pairs, options.prompts = ["tiny"], [8]
        options.message, options.new_tokens = 4, 3
    results = harness.Results("generate", options, options.dtypes)
    sizes = (options.message, options.new_tokens)
    for name in options.pairs:
        for dtype in options.dtypes:
            harness.say(f"models {name} {dtype}")
            pair = Pair(name, DTYPES[dtype])
            for tokens in options.prompts:
                cell = {
                    "shape": name,
                    "dtype": str(DTYPES[dtype]).removeprefix("torch."),
                    "batch": BATCH,
                    "tokens": tokens,
                    "message": sizes[0],
                    "new_tokens": sizes[1],
                }
                rows, left_out = measure(cell, pair, pair.prompt(tokens), *sizes, results.effort)
                if not options.no_memory:
                    for row in rows:
                        where = (name, dtype, row["provider"], tokens, *sizes)
                        row["memory_bytes"] = peak_in_a_process(*where)
                results.add(rows, left_out)
            del pair
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())

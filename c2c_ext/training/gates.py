"""Soft gates of training: noise keyed by sample and step, temperature schedules, two samplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import KINDS
from ..messages import shown
from ..packed import sum_dtype
from ..reference import soft_gate

if TYPE_CHECKING:
    from ..fuser import Fuser

# What every kind draws noise for by default: the paper speaks of a gate per stream, the published
# code draws per token and head.
_DEFAULT_PER = {"logistic": "stream", "gumbel": "token"}
_SCHEDULES = ("exponential", "linear")
# SplitMix64 (Steele, Lea and Flood 2014), constants as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_ROUNDS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


@dataclass(frozen=True)
class GateSampler:
    """Soft gates ``sigmoid((logit + noise) / T)`` while a fuser is trained (arXiv 2510.03215).

    ``"logistic"`` is the binary concrete distribution (arXiv 1611.00712): its noise is the
    difference of two Gumbel variables, so a gate opens with probability ``sigmoid(logit)`` as T
    goes to 0. ``"gumbel"`` is what the published code computes: one Gumbel variable, by which a
    gate opens with probability ``1 - exp(-exp(logit))``, 0.632 at logit 0.

    Noise depends on the seed, the step and (``per="token"``) the sample alone, not on the batch
    that a sample is in, its padding, the process or the device.

    Attributes:
        kind: ``"logistic"`` or ``"gumbel"``.
        per: ``"stream"``: one draw per stream and step; ``"token"``: one per stream, sample,
            receiver head and token. By default the former for logistic, the latter for gumbel.
        schedule: of the temperature T at optimizer step k; ``"exponential"`` (published code):
            ``start * (end / start) ** min(k / steps, 1)``; ``"linear"`` (paper):
            ``start + (end - start) * min(k / steps, 1)``.
        start, end: temperatures, above 0.
        steps: optimizer steps from ``start`` to ``end``.
    """

    kind: str = "logistic"
    per: str | None = None
    schedule: str = "exponential"
    start: float = 1.0
    end: float = 0.001
    steps: int = 1929

    def __post_init__(self) -> None:
        for name, known in (("kind", tuple(_DEFAULT_PER)), ("schedule", _SCHEDULES)):
            _check_choice(name, getattr(self, name), known)
        if self.per is None:
            object.__setattr__(self, "per", _DEFAULT_PER[self.kind])
        _check_choice("per", self.per, ("stream", "token"))
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"GateSampler: {name} must be a number, got {shown(value)}")
            if not 0 < value < math.inf:
                raise ValueError(f"GateSampler: {name} must be above 0 and finite, got {value}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(
                f"GateSampler: steps must be an integer of at least 1, got {shown(self.steps)}"
            )

    def temperature(self, step: int) -> float:
        """T at optimizer step ``step``, counted from 0; constant after ``steps``."""
        done = min(_checked_step(step) / self.steps, 1.0)
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * done
        return self.start * (self.end / self.start) ** done

    def noise(
        self,
        fuser: Fuser,
        batch: int,
        tokens: int,
        seed: int,
        *,
        step: int,
        sample_ids: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Uniform noise on the device of the fuser's gate logits, float32 (float64 for float64).

        Args:
            batch, tokens: B samples, whose fused spans all end at the last of N tokens.
            seed: of the training run.
            step: optimizer step.
            sample_ids: B integers; needed with ``per="token"``, where noise is keyed by them.
                Tokens are counted from the end, so padding in front changes nothing.

        Returns:
            ``[layers, kinds, 1, 1, 1]``; with ``per="token"`` ``[layers, kinds, B, H, N]``, H being
            the most heads of any receiver layer. In (0, 1) for logistic, in [0, 1) for gumbel.
        """
        logits = gate_logits(fuser)
        layers, kinds = logits.shape

        def numbers(values: range | list[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=logits.device)

        key = _mixed(numbers([_signed(seed)]), numbers([_checked_step(step)]))
        streams = numbers(range(layers * kinds)).view(layers, kinds, 1, 1, 1)
        if self.per == "stream":
            return self._uniform(_mixed(key, streams), sum_dtype(logits.dtype))
        if sample_ids is None:
            raise ValueError(
                "GateSampler: sample_ids must be given with per='token': noise is keyed by them"
            )
        ids = torch.as_tensor(sample_ids)
        if ids.dtype.is_floating_point or ids.dtype == torch.bool or ids.shape != (batch,):
            raise ValueError(
                f"GateSampler: sample_ids must be {batch} integers (one per row), got "
                f"{ids.dtype} of shape {list(ids.shape)}"
            )
        key = _mixed(key, ids.to(logits.device, torch.int64).view(batch, 1, 1))
        key = _mixed(key, streams)
        heads = max(shape.num_heads for shape in fuser.config.receiver.layers)
        key = _mixed(key, numbers(range(heads)).view(heads, 1))
        key = _mixed(key, numbers(range(tokens)).flip(0))
        return self._uniform(key, sum_dtype(logits.dtype))

    def gates(self, fuser: Fuser, noise: Tensor, step: int) -> Tensor:
        """Gates in (0, 1) at ``step``, differentiable in the fuser's gate logits.

        Args:
            noise: of `noise`, or any uniform noise that broadcasts with ``[layers, kinds, 1, 1,
                1]``.

        Returns:
            ``[layers, kinds, 1 or B, 1 or H, 1 or N]``.
        """
        logits = gate_logits(fuser)[:, :, None, None, None]
        temperature = self.temperature(step)
        if self.kind == "gumbel":
            return soft_gate(logits, noise, temperature)
        return torch.sigmoid((logits + torch.logit(noise)) / temperature)

    def _uniform(self, key: Tensor, dtype: torch.dtype) -> Tensor:
        """The upper bits of ``key`` as fractions; centred for logistic, which needs 0 < u < 1."""
        centred = self.kind == "logistic"
        bits = (53 if dtype == torch.float64 else 24) - centred
        fraction = (_shifted(key, 64 - bits)).to(dtype)
        return (fraction + 0.5 * centred) * 2.0**-bits


def gate_logits(fuser: Fuser) -> Tensor:
    """The fuser's gate logits ``[layers, kinds]``, receiver layer by receiver layer.

    Raises:
        ValueError: the fuser has no gates.
    """
    config = fuser.config
    if not config.gate:
        raise ValueError("GateSampler: the fuser has no gates (gate=False)")
    order = torch.tensor([layer for group in fuser.groups for layer in group.layers]).argsort()
    logits = torch.cat([group.gate_logit for group in fuser.groups]).view(-1, len(config.kinds))
    return logits[order.to(logits.device)]


def gate_pairs(gates: Tensor, fuser: Fuser) -> list[tuple[Tensor | None, Tensor | None]]:
    """`GateSampler.gates` as `c2c_ext.reference.fuse` takes them.

    Returns:
        (key gate, value gate) of every receiver layer, each ``[1 or B, 1 or Ht, 1 or N, 1]``; None
        for a kind that the fuser does not fuse.
    """
    config = fuser.config
    pairs = []
    for layer, shape in enumerate(config.receiver.layers):
        own = dict(zip(config.kinds, gates[layer, :, :, : shape.num_heads, :, None], strict=True))
        pairs.append(tuple(own.get(kind) for kind in KINDS))
    return pairs


def combined_seed(*values: int) -> int:
    """One seed in ``0 .. 2**63 - 1`` from several integers, keyed as the noise is."""
    key = torch.zeros(1, dtype=torch.int64)
    for value in values:
        key = _mixed(key, torch.tensor([_signed(value)]))
    return int(_shifted(key, 1))


def sample_seeds(seed: int, step: int, sample_ids: Sequence[int]) -> Tensor:
    """A seed per sample and step, int64 ``[B]``, keyed as the noise is."""
    key = _mixed(torch.tensor([_signed(seed)]), torch.tensor([_checked_step(step)]))
    return _mixed(key, torch.tensor(list(sample_ids), dtype=torch.int64))


def _mixed(key: Tensor, number: Tensor) -> Tensor:
    """A pseudorandom 64-bit integer of both; they are broadcast."""
    x = key + (number + 1) * _GOLDEN
    for shift, factor in _ROUNDS:
        x = (x ^ _shifted(x, shift)) * factor
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"GateSampler: seed must be an integer, got {shown(value)}")
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _checked_step(step: int) -> int:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"GateSampler: step must be an integer of at least 0, got {shown(step)}")
    return step


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"GateSampler: {name} must be one of {', '.join(known)}, got {value!r}")

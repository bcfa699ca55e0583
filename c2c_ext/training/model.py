"""C2CTrainingModel: two frozen language models and the fuser between them, with a loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .. import reference
from ..cache import KVPairs
from ..fuser import Fuser
from ..messages import shown
from ..training_op import fuse_training, op_missing
from .checks import check_masters, check_models, check_vocabulary
from .gates import GateSampler, combined_seed, gate_pairs, sample_seeds
from .layout import IGNORE, Layout, lay_out
from .prefill import prefill
from .prefix_cache import PrefixCache
from .prompt_rows import PromptRow, padded_batch
from .recomputation import checkpointed, decoder_layers

BACKENDS = ("op", "reference")


@dataclass
class TrainingOutput(CausalLMOutput):
    """What `C2CTrainingModel` returns.

    Attributes:
        loss: cross-entropy of the response, or None without labels.
        logits: ``[B, T, V]`` of every row's last prompt token and what follows it, padded on the
            right.
        targets: int64 ``[B, T]``: the token that each logit is to predict, or -100.
    """

    targets: Tensor | None = None


class C2CTrainingModel(nn.Module):
    """A receiver and a sharer, frozen, and the fuser that is trained between them.

    Both models prefill the prompt without its last token, without gradients; the two caches are
    fused; the receiver runs the rest over the fused cache. Gradients reach the fuser alone. Both
    models are put into eval mode and frozen here, and stay so. ``state_dict`` is the fuser's.

    In training mode gates are soft (with a ``sampler``) and dropout is on; in eval mode gates are
    hard and it is off, as at inference.

    Args:
        receiver, sharer: causal language models, two different ones.
        fuser: in float32 or float64, whatever the models' dtype: small steps are lost in halves.
        sampler: of soft gates; None: gates stay hard and their logits are not trained.
        dropout: probability; None: the fuser's ``config.dropout``.
        recompute: compute the fusion again in the backward pass instead of keeping what it needs.
        prefill_chunk: tokens that a prefill runs at a time; None: all.
        backend: ``"op"``, the compiled op where it knows the fuser's variant, or ``"reference"``,
            plain PyTorch.
        seed: of gate noise and dropout.

    Attributes:
        step: the optimizer step, which temperature and noise follow; set it before each.

    Raises:
        TypeError, ValueError: the models do not fit the fuser, are one model or share weights, the
            fuser's dtype is too short, or a setting is out of range.
    """

    # Read by transformers' Trainer: forward takes num_items_in_batch, and can checkpoint.
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        receiver: PreTrainedModel,
        sharer: PreTrainedModel,
        fuser: Fuser,
        *,
        sampler: GateSampler | None,
        dropout: float | None = None,
        recompute: bool = False,
        prefill_chunk: int | None = None,
        backend: str = "op",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_models(receiver, sharer, fuser)
        if sampler is not None and not isinstance(sampler, GateSampler):
            raise TypeError(
                f"C2CTrainingModel: sampler must be a GateSampler or None, got "
                f"{type(sampler).__name__}"
            )
        dropout = fuser.config.dropout if dropout is None else dropout
        if type(dropout) not in (int, float) or not 0 <= dropout < 1:
            raise ValueError(f"C2CTrainingModel: dropout must be in [0, 1), got {shown(dropout)}")
        if prefill_chunk is not None and (type(prefill_chunk) is not int or prefill_chunk < 1):
            raise ValueError(
                f"C2CTrainingModel: prefill_chunk must be None or an integer of at least 1, got "
                f"{shown(prefill_chunk)}"
            )
        if backend not in BACKENDS:
            raise ValueError(
                f"C2CTrainingModel: backend must be one of {', '.join(BACKENDS)}, got "
                f"{shown(backend)}"
            )
        self.receiver, self.sharer, self.fuser = receiver, sharer, fuser
        for model in (receiver, sharer):
            model.requires_grad_(False)
        self.sampler, self.dropout, self.recompute = sampler, float(dropout), bool(recompute)
        self.prefill_chunk, self.backend, self.seed = prefill_chunk, backend, seed
        self.step = 0
        self._checkpoints = False
        self.train()

    def train(self, mode: bool = True) -> C2CTrainingModel:
        """As of any module, but the two language models stay in eval mode."""
        super().train(mode)
        for model in (self.receiver, self.sharer):
            model.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> C2CTrainingModel:
        """Of the fuser's parameters; the two language models stay frozen."""
        self.fuser.requires_grad_(requires_grad)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The fuser's own state, under its own names."""
        return self.fuser.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads what `state_dict` gives."""
        return self.fuser.load_state_dict(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Runs every receiver layer again in the backward pass instead of keeping its activations.

        Args:
            gradient_checkpointing_kwargs: none but ``use_reentrant=False``, the only way that
                reaches a fused cache.
        """
        kwargs = dict(gradient_checkpointing_kwargs or {})
        if kwargs.pop("use_reentrant", False) or kwargs:
            raise ValueError(
                "C2CTrainingModel: gradient_checkpointing_kwargs must be none or "
                f"{{'use_reentrant': False}}, got {shown(gradient_checkpointing_kwargs)}"
            )
        decoder_layers(self.receiver)  # raises if there are none
        self._checkpoints = True

    def gradient_checkpointing_disable(self) -> None:
        """Keeps the receiver's activations for the backward pass, as at first."""
        self._checkpoints = False

    # Names that transformers' Trainer has for the two in newer versions.
    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """`gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `gradient_checkpointing_enable` is in force."""
        return self._checkpoints

    @property
    def device(self) -> torch.device:
        """The one device of all three.

        Raises:
            ValueError: they are on several.
        """
        devices = {
            name: next(module.parameters()).device
            for name, module in (
                ("receiver", self.receiver),
                ("sharer", self.sharer),
                ("fuser", self.fuser),
            )
        }
        if len(set(devices.values())) > 1:
            raise ValueError(
                "c2c_ext.training: receiver, sharer and fuser must be on one device, got "
                + ", ".join(f"{name} on {device}" for name, device in devices.items())
            )
        return devices["fuser"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        fused_mask: Tensor | None = None,
        sharer_input_ids: Tensor | None = None,
        sharer_attention_mask: Tensor | None = None,
        token_map: Tensor | None = None,
        sample_ids: Sequence[int] | Tensor | None = None,
        receiver_prefix: Sequence[PromptRow] | None = None,
        sharer_prefix: Sequence[PromptRow] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> TrainingOutput:
        """The receiver's loss on the response, answering from the fused cache of the prompt.

        A row's prompt is everything before its first label. What a row gives does not depend on
        the batch that it is in, but for rounding.

        Args:
            input_ids: int64 ``[B, L]``, prompt and response, padded on either side.
            attention_mask: ``[B, L]``, 0 where a row is padded; None: nowhere.
            labels: int64 ``[B, L]``: the token itself where it is to be learnt, else -100. None:
                the whole row is prompt, and there is no loss.
            fused_mask: bool ``[B, L]``, which prompt tokens are fused; by default all but the last.
            sharer_input_ids: int64 ``[B, S]``, what the sharer reads, with its mask and a
                ``token_map``; by default what the receiver prefills.
            token_map: int64 ``[B, L]``: the column of the sharer's ids that each prompt token is
                fused with, or -1 to leave it; without one: its own. Read where tokens are fused.
            sample_ids: B integers that name the samples over the whole run: dropout, and gate noise
                with ``per="token"``, are keyed by them (where `c2c_ext.reference` fuses, what a
                row drops depends on the whole batch's).
            receiver_prefix, sharer_prefix: caches of what the two models would prefill, one per
                row, unpadded, so that they need not (see `PromptCaches`).
            num_items_in_batch: divide the summed loss by it instead of by the number of labels.

        Raises:
            TypeError, ValueError: an argument that does not fit; the message names it, the rule and
                what came.
        """
        device = self.device
        layout = lay_out(
            input_ids,
            attention_mask,
            labels,
            fused_mask=fused_mask,
            sharer_input_ids=sharer_input_ids,
            sharer_attention_mask=sharer_attention_mask,
            token_map=token_map,
        )
        check_vocabulary("receiver", self.receiver, layout.prefix_ids, layout.rest_ids)
        check_vocabulary("sharer", self.sharer, layout.sharer_ids)
        if sample_ids is not None:
            sample_ids = torch.as_tensor(sample_ids).tolist()
            if len(sample_ids) != len(input_ids):
                raise ValueError(
                    f"c2c_ext.training: sample_ids must be {len(input_ids)} integers (one per "
                    f"row), got {len(sample_ids)}"
                )
        count = int((layout.targets != IGNORE).sum())
        layout = layout.to(device)
        base = self._clean(
            "receiver", self.receiver, layout.prefix_ids, layout.prefix_mask, receiver_prefix
        )
        shared = self._clean(
            "sharer", self.sharer, layout.sharer_ids, layout.sharer_mask, sharer_prefix
        )
        fused = self._fuse(*_in_one_dtype(base, shared), layout, sample_ids)
        logits = self._answer(fused, layout)
        loss = None
        if labels is not None:
            wide = logits.flatten(0, 1)
            wide = wide if wide.dtype == torch.float64 else wide.float()
            total = F.cross_entropy(wide, layout.targets.flatten(), reduction="sum")
            loss = total / (count if num_items_in_batch is None else num_items_in_batch)
        return TrainingOutput(loss=loss, logits=logits, targets=layout.targets)

    def _clean(
        self,
        role: str,
        model: PreTrainedModel,
        ids: Tensor,  # [B, N]
        mask: Tensor,  # [B, N]
        rows: Sequence[PromptRow] | None,
    ) -> KVPairs:
        """The clean slice ``[B, H, N, D]`` of every layer, from ``rows`` if they are given."""
        shapes = getattr(self.fuser.config, role).layers
        if rows is not None:
            counts = mask.sum(1).tolist()
            return padded_batch(f"{role}_prefix", rows, counts, shapes, mask.device)
        if ids.shape[1] == 0:
            return [
                tuple(
                    torch.zeros(
                        (len(ids), shape.num_heads, 0, shape.head_dim),
                        dtype=model.dtype,
                        device=ids.device,
                    )
                    for _ in range(2)
                )
                for shape in shapes
            ]
        return prefill(model, ids, mask, role, self.prefill_chunk)

    def _fuse(
        self, base: KVPairs, shared: KVPairs, layout: Layout, sample_ids: list[int] | None
    ) -> KVPairs:
        """The fused cache, differentiable in the fuser's parameters, in the dtype of ``base``."""
        gates, seed, dropout = None, 0, 0.0
        if self.training:
            gates, dropout = self._gates(layout, sample_ids), self.dropout
        by_op = self.backend == "op" and op_missing(self.fuser, base[0][0].device) is None
        row_seeds = None
        if dropout and sample_ids is None:
            seed = int(torch.randint(2**63 - 1, ()))
        elif dropout and by_op:
            row_seeds = sample_seeds(self.seed, self.step, sample_ids)
        elif dropout:
            seed = combined_seed(self.seed, self.step, *sample_ids)
        common = {"fuser": self.fuser, "dropout": dropout, "seed": seed}
        if by_op:
            return fuse_training(
                base,
                shared,
                token_map=layout.token_map,
                gates=gates,
                row_seeds=row_seeds,
                recompute=self.recompute,
                **common,
            )
        pairs = None if gates is None else gate_pairs(gates, self.fuser)
        run = functools.partial(_reference_fuse, gates=pairs, **common)
        if self.recompute and torch.is_grad_enabled():
            run = functools.partial(checkpoint, run, use_reentrant=False)
        return run(base, shared, token_map=layout.token_map)

    def _gates(self, layout: Layout, sample_ids: list[int] | None) -> Tensor | None:
        if self.sampler is None or not self.fuser.config.gate:
            return None
        batch, tokens = layout.prefix_ids.shape
        noise = self.sampler.noise(
            self.fuser, batch, tokens, self.seed, step=self.step, sample_ids=sample_ids
        )
        return self.sampler.gates(self.fuser, noise, self.step)

    def _answer(self, fused: KVPairs, layout: Layout) -> Tensor:
        """Logits ``[B, T, V]`` of what follows the prefix."""
        # What is padded behind a row is run as if it were the row's: no token of the row sees it.
        mask = torch.cat([layout.prefix_mask, torch.ones_like(layout.rest_ids) > 0], dim=1)
        positions = (mask.long().cumsum(1) - 1)[:, layout.prefix_mask.shape[1] :]
        with checkpointed(self.receiver) if self._checkpoints else nullcontext():
            return self.receiver(
                input_ids=layout.rest_ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=PrefixCache(fused),
                use_cache=True,
            ).logits


def parameter_groups(fuser: Fuser, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: gate logits and norms are not decayed.

    Only parameters that require gradients; a group that would be empty is left out.

    Raises:
        ValueError: a parameter is in half precision, where small steps are lost.
    """
    check_masters(fuser)
    decayed, kept = [], []
    for name, parameter in fuser.named_parameters():
        if parameter.requires_grad:
            short = name.rpartition(".")[2]
            (kept if short == "gate_logit" or short.endswith("_norm") else decayed).append(
                parameter
            )
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _reference_fuse(
    base: KVPairs,
    shared: KVPairs,
    *,
    token_map: Tensor | None,
    fuser: Fuser,
    gates: list | None,
    dropout: float,
    seed: int,
) -> KVPairs:
    """`c2c_ext.reference.fuse` with dropout drawn from ``seed``."""
    with _seeded(seed, base[0][0].device) if dropout else nullcontext():
        fused = reference.fuse(
            base, shared, fuser, token_map=token_map, gates=gates, dropout=dropout
        )
    # Gates are float32, and what is multiplied with them too.
    return [tuple(x.to(base[0][0].dtype) for x in pair) for pair in fused]


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The default generators as after ``manual_seed(seed)``; restores them."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _in_one_dtype(base: KVPairs, shared: KVPairs) -> tuple[KVPairs, KVPairs]:
    """Both caches in the dtype that autocast asks for, else in the receiver's."""
    first = base[0][0]
    dtype = first.dtype
    if torch.is_autocast_enabled(first.device.type):
        dtype = torch.get_autocast_dtype(first.device.type)
    return tuple([(k.to(dtype), v.to(dtype)) for k, v in pairs] for pairs in (base, shared))

"""What an attached receiver's `generate` takes: the prompt and its mask, ways to decode.

Checked before transformers sees them: a wrong shape must not reach a prefill that cuts it to size,
and a way to decode that cannot start from a fused prompt must not be fetched from the hub first.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

_HUB_CODE = "transformers fetches it as code that need not start from the fused prompt"
_HIDDEN_STATES = "it reads hidden states of the whole prompt, which a fused prompt does not have"


class Settings:
    """The settings of one call of `generate`.

    From its keywords, else its configuration, else the model's; None where none of them has it.
    """

    def __init__(self, *sources: Any) -> None:
        self._keywords, *self._configurations = sources

    def __getitem__(self, name: str) -> Any:
        if name in self._keywords:
            return self._keywords[name]
        found = (getattr(source, name, None) for source in self._configurations)
        return next((value for value in found if value is not None), None)


def check_decoding(settings: Settings, custom_generate: Any) -> None:
    """Refuses the ways to decode that do not work from a fused prompt.

    A callable ``custom_generate`` decodes in its own way, whatever the settings say.

    Raises:
        ValueError: names the setting and the way to decode.
    """
    if callable(custom_generate):
        return
    beams = settings["num_beams"] or 1
    top_k = 50 if settings["top_k"] is None else settings["top_k"]  # transformers' default
    alone = beams == 1 and settings["do_sample"] is not True
    refused = {
        "penalty_alpha": (
            alone and top_k > 1 and (settings["penalty_alpha"] or 0) > 0,
            "contrastive search",
            _HIDDEN_STATES,
        ),
        "use_mtp": (settings["use_mtp"], "multi-token prediction", _HIDDEN_STATES),
        "speculation_type": (
            settings["speculation_type"] is not None,
            "drafting by the assistant from the receiver's hidden states",
            _HIDDEN_STATES,
        ),
        "dola_layers": (settings["dola_layers"] is not None, "DoLa", _HUB_CODE),
        "num_beam_groups": (
            beams > 1 and (settings["num_beam_groups"] or 1) > 1,
            "group beam search",
            _HUB_CODE,
        ),
        "constraints": (
            settings["constraints"] is not None,
            "constrained beam search",
            _HUB_CODE,
        ),
        "force_words_ids": (
            settings["force_words_ids"] is not None,
            "constrained beam search",
            _HUB_CODE,
        ),
    }
    for name, (asked, way, reason) in refused.items():
        if asked:
            raise ValueError(
                f"c2c_ext: {name} ({way}) is not supported by an attached receiver: {reason}"
            )


def take_chunk_size(
    own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int | None, tuple[Any, ...], dict[str, Any]]:
    """``prefill_chunk_size``, and the arguments of generate without it.

    transformers' own chunks would split the prompt before it is fused. No configuration object of
    the caller's changes.

    Args:
        own: the model's configuration of generate.
        args, kwargs: of generate after the prompt.

    Raises:
        TypeError: no integer.
        ValueError: below 1.
    """
    name = "prefill_chunk_size"
    given = args[0] if args else kwargs.get("generation_config")
    chunk = Settings(kwargs, given, own)[name]
    if chunk is None:
        return None, args, kwargs
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(
            f"c2c_ext: prefill_chunk_size must be an integer, got {type(chunk).__name__}"
        )
    if chunk < 1:
        raise ValueError(f"c2c_ext: prefill_chunk_size must be at least 1, got {chunk}")
    if getattr(given, name, None) is not None:
        given = copy.copy(given)
        given.prefill_chunk_size = None
        if args:
            args = (given, *args[1:])
        else:
            kwargs = {**kwargs, "generation_config": given}
    # Not always: newer versions warn of a keyword beside a configuration.
    if name in kwargs or getattr(own, name, None) is not None:
        kwargs = {**kwargs, name: None}
    return chunk, args, kwargs


def assistant_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ``assistant_model`` of generate, from its arguments after the prompt."""
    return args[5] if len(args) > 5 else kwargs.get("assistant_model")


def tokens_held(cache: Any) -> int:
    """How many tokens the ``past_key_values`` of generate already hold."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def check_continuation(fused: bool, held: int, length: int) -> None:
    """What goes with a cache that holds tokens already.

    Args:
        fused: whether an attached receiver filled it.
        held: tokens in the cache, at least 1.
        length: tokens of ``input_ids``.

    Raises:
        ValueError: a cache of another origin, or nothing new to read.
    """
    if not fused:
        raise ValueError(
            "c2c_ext: past_key_values must be empty or come from an earlier generate of an "
            f"attached receiver: the {held} tokens that it holds were not fused (detach to answer "
            "from them as they are)"
        )
    if length <= held:
        raise ValueError(
            "c2c_ext: input_ids must be the whole conversation, longer than the "
            f"{held} tokens that past_key_values holds, got {length}"
        )


def check_movable(cache: Any, sections: Any) -> None:
    """What cannot go with rows that are padded on the right, and so are moved.

    Raises:
        ValueError: a later turn, whose earlier tokens stand where they are; or ``sections``, whose
            columns would be others in every row.
    """
    if tokens_held(cache):
        raise ValueError(
            "c2c_ext: attention_mask must not mask a row's last columns in a later turn: pad the "
            "new tokens on their left"
        )
    if sections is not None:
        raise ValueError(
            "c2c_ext: sections must not be given with rows that are padded on the right, which are "
            "moved by different numbers of columns: pad on the left"
        )


def prompt_shape(ids: Any) -> tuple[int, int]:
    """(batch, tokens) of the ``input_ids [B, P]`` of generate; None stands for one BOS token.

    Raises:
        TypeError: not a tensor.
        ValueError: not two-dimensional, or empty.
    """
    if ids is None:
        return 1, 1
    if not isinstance(ids, Tensor):
        raise TypeError(
            f"c2c_ext: input_ids must be a tensor [batch, tokens], got {type(ids).__name__}"
        )
    if ids.ndim != 2:
        raise ValueError(f"c2c_ext: input_ids must be [batch, tokens], got {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(
            f"c2c_ext: input_ids must hold at least one row of one token, got {list(ids.shape)}"
        )
    batch, length = ids.shape
    return batch, length


def check_prompt_tensors(attention_mask: Any, position_ids: Any, batch: int, length: int) -> None:
    """Both speak of all of ``input_ids`` and nothing else.

    Args:
        attention_mask: None or ``[B, P]``.
        position_ids: None or ``[.., 1 or B, P]``.
        batch, length: B and P.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape, or a mask of other numbers than 0 and 1.
    """
    for name, given in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"c2c_ext: {name} must be a tensor, got {type(given).__name__}")
    if attention_mask is not None and attention_mask.shape != (batch, length):
        raise ValueError(
            f"c2c_ext: attention_mask must be [batch, prompt tokens] = [{batch}, {length}], got "
            f"{list(attention_mask.shape)}"
        )
    if attention_mask is not None:
        check_zeros_and_ones("attention_mask", attention_mask)
    if position_ids is not None and position_ids.shape[-2:] not in ((1, length), (batch, length)):
        raise ValueError(
            f"c2c_ext: position_ids must be [batch, prompt tokens] = [{batch}, {length}] or "
            f"[1, {length}], got {list(position_ids.shape)}"
        )


def check_zeros_and_ones(name: str, mask: Tensor) -> None:
    """Refuses other numbers in a mask: transformers would count positions by their sums.

    Raises:
        ValueError: names ``name`` and the number.
    """
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise ValueError(
            f"c2c_ext: {name} must hold 1 where a token is real and 0 where it is padding, got "
            f"{wrong[0].item()}"
        )


def check_tokens(ids: Tensor, embeddings: Any) -> None:
    """Refuses what is no token of the receiver's; on a GPU its kinds of numbers only.

    Args:
        ids: ``input_ids`` of generate.
        embeddings: the module that embeds them.

    Raises:
        TypeError: neither int64 nor int32.
        ValueError: outside the vocabulary.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"c2c_ext: input_ids must be int64 or int32, got {ids.dtype}")
    known = getattr(embeddings, "num_embeddings", None)
    if known is None or ids.device.type != "cpu":
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= known:
        raise ValueError(
            "c2c_ext: input_ids must be at least 0 and below the receiver's vocabulary size "
            f"{known}, got {low if low < 0 else high}"
        )

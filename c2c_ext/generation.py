"""attach / detach / attached: a transformers receiver whose `generate` answers from a fused cache.

An attached receiver is the same object with a dynamic subclass of its own class. `generate` arms
one fusion; the first `prepare_inputs_for_generation` of that call prefills both models on the
prompt without its last token, fuses, fills the cache that `generate` decodes from, and leaves the
rest of the prompt to the receiver. Everything else of `generate` is transformers' own.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel

from .config import ModelKV
from .fuser import Fuser
from .fusion import fuse
from .generation_arguments import check_prompt_tensors, fused_columns, prompt_shape

_ATTACHMENT = "_c2c_attachment"
# Newer versions of transformers trim the inputs to this many tokens; older ones by cache_position.
_TRIMS_BY_LENGTH = (
    "next_sequence_length"
    in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)

# Ways to decode that never ask for prepared inputs and keep caches of their own.
_CONTINUOUS_BATCHING = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)

# Tensors about the prompt that the prefills follow, and labels, which generate drops.
_PROMPT_TENSORS = ("attention_mask", "position_ids", "cache_position", "labels")


@dataclass
class _Call:
    """One call of `generate` on an attached receiver."""

    batch: int  # rows of the prompt, before generate repeats them for beams
    prompt_length: int
    columns: Tensor | None  # bool [1 or batch, prompt_length - 1]: which to fuse; None: all
    position_ids: Tensor | None  # the caller's own, [1 or batch, prompt_length]
    fused: bool = False
    answered_inside: bool = False  # by a generate inside this one


@dataclass
class _Attachment:
    """What `attach` hangs on the receiver: no module, so the sharer is no part of the receiver."""

    original_class: type
    sharer: PreTrainedModel
    fuser: Fuser
    # By thread: streamers are usually read in one thread while generate runs in another.
    calls: dict[int, _Call] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "calls": {}}  # a copy has no threads in generate

    @contextmanager
    def armed(self, call: _Call) -> Iterator[None]:
        """Makes `call` this thread's current one; restores what was there, whatever happens."""
        thread = threading.get_ident()
        outer = self.calls.get(thread)
        self.calls[thread] = call
        try:
            yield
        finally:
            if outer is None:
                del self.calls[thread]
            else:
                self.calls[thread] = outer
                # A custom decoding loop is done with that; after token healing, the outer prompt
                # is still to be fused.
                outer.answered_inside |= call.fused or call.answered_inside

    def pending(self) -> _Call | None:
        """This thread's call, if its prompt is not fused yet."""
        call = self.calls.get(threading.get_ident())
        return None if call is None or call.fused else call


class _FusedGeneration:
    """Mixin in front of the receiver's own class."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        positions: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, answering from the fused cache of the prompt.

        Both models read the same token ids. The last prompt token and padding are never fused; a
        prompt of one token generates as the receiver alone does.

        Args:
            inputs: token ids ``[B, P]``, also accepted as ``input_ids``.
            positions: the prompt columns to fuse: column indices in ``0 .. P - 2`` (a range, list,
                tuple, 1-D array or 1-D tensor, the same for all rows), or a bool mask ``[P]`` or
                ``[B, P]``. All columns by default.
            *args, **kwargs: as transformers' `generate`; ``attention_mask`` is ``[B, P]``.

        Raises:
            ValueError: an empty prompt; a mask, position ids or ``positions`` that do not fit it;
                token ids that the sharer's vocabulary lacks; not supported: ``inputs_embeds`` and
                any other prompt tensor but a mask and position ids, ``use_cache=False``, a cache
                that already holds tokens, a prompt processed in chunks.
            TypeError: no tensors; ``positions`` neither integers nor bools.
            RuntimeError: a model kept no cache (gradient checkpointing in training mode), or this
                way of decoding never prepared its inputs.
        """
        attachment: _Attachment = getattr(self, _ATTACHMENT)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "c2c_ext: inputs_embeds is not supported by an attached receiver: the sharer reads "
                "token ids"
            )
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        batch, length = prompt_shape(ids)
        position_ids = kwargs.get("position_ids")
        if ids is not None:
            check_prompt_tensors(kwargs.get("attention_mask"), position_ids, batch, length)
        call = _Call(
            batch=batch,
            prompt_length=length,
            columns=fused_columns(positions, batch, length),
            position_ids=position_ids,
        )
        with attachment.armed(call):
            output = super().generate(inputs, *args, **kwargs)
        if not (call.fused or call.answered_inside):
            raise RuntimeError(
                "c2c_ext: generate ended without fusing the prompt: this way of decoding does not "
                "call prepare_inputs_for_generation"
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies as the original class, which attaches itself when rebuilt."""
        original = getattr(self, _ATTACHMENT).original_class
        build, arguments, *rest = super().__reduce_ex__(protocol)
        arguments = tuple(original if value is type(self) else value for value in arguments)
        return (_rebuild, (build, arguments), *rest)


def attach(receiver: PreTrainedModel, sharer: PreTrainedModel, fuser: Fuser) -> PreTrainedModel:
    """Makes ``receiver.generate`` answer from its own cache fused with the sharer's.

    The receiver stays the same object, with its own parameters, state dict and saved form only.
    The sharer may be the receiver itself.

    Args:
        receiver: a decoder-only transformers model that can generate.
        sharer: a decoder-only transformers model, with or without a language-model head.
        fuser: a fuser between the two.

    Returns:
        ``receiver``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the receiver is attached already, a model is an encoder-decoder or keeps no
            plain keys and values, or the fuser was made for other KV shapes; names the layer.
    """
    for name, model in (("receiver", receiver), ("sharer", sharer)):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"c2c_ext.attach: {name} must be a transformers model, got {type(model).__name__}"
            )
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"c2c_ext.attach: {name} must be decoder-only, {type(model).__name__} is an "
                "encoder-decoder model"
            )
    if not isinstance(receiver, GenerationMixin):
        raise TypeError(
            f"c2c_ext.attach: receiver must be a model that can generate, "
            f"{type(receiver).__name__} has no generate"
        )
    if not isinstance(fuser, Fuser):
        raise TypeError(
            f"c2c_ext.attach: fuser must be a c2c_ext.Fuser, got {type(fuser).__name__}"
        )
    if hasattr(receiver, _ATTACHMENT):
        raise ValueError("c2c_ext.attach: receiver is attached already: detach it first")
    problems = fuser.config.mismatches(
        ModelKV.from_config(receiver.config), ModelKV.from_config(sharer.config)
    )
    if problems:
        raise ValueError(f"c2c_ext.attach: {problems[0]}")
    original = type(receiver)
    setattr(receiver, _ATTACHMENT, _Attachment(original, sharer, fuser))
    receiver.__class__ = _attached_class(original)
    return receiver


def detach(receiver: PreTrainedModel) -> PreTrainedModel:
    """Undoes `attach`: the receiver has its own class again and nothing else on it.

    Raises:
        ValueError: the receiver is not attached.
    """
    attachment = getattr(receiver, _ATTACHMENT, None)
    if attachment is None:
        raise ValueError("c2c_ext.detach: receiver is not attached")
    receiver.__class__ = attachment.original_class
    delattr(receiver, _ATTACHMENT)
    return receiver


@contextmanager
def attached(
    receiver: PreTrainedModel, sharer: PreTrainedModel, fuser: Fuser
) -> Iterator[PreTrainedModel]:
    """``with attached(receiver, sharer, fuser):`` attaches and, whatever happens, detaches."""
    attach(receiver, sharer, fuser)
    try:
        yield receiver
    finally:
        detach(receiver)


def _attached_class(original: type) -> type:
    """Subclass of ``original`` that fuses; same name, so that saving records the original."""

    # generate validates its keyword arguments by this method's signature: wraps keeps it.
    @functools.wraps(original.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, **kwargs: Any) -> dict:
        attachment: _Attachment = getattr(self, _ATTACHMENT)
        call = attachment.pending()
        if call is not None:
            kwargs = _fuse_prompt(self, attachment, call, input_ids, kwargs)
            call.fused = True
        return original.prepare_inputs_for_generation(self, input_ids, **kwargs)

    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "prepare_inputs_for_generation": prepare_inputs_for_generation,
    }
    for name in _CONTINUOUS_BATCHING:
        if hasattr(original, name):
            namespace[name] = _refused(getattr(original, name))
    return type(original.__name__, (_FusedGeneration, original), namespace)


def _refused(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"c2c_ext: {method.__name__} is not supported by an attached receiver: continuous "
            "batching would answer from the receiver's own cache; use generate or detach first"
        )

    return refuse


def _rebuild(build: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The bare object of an attached receiver; its state, the attachment included, follows."""
    receiver = build(*arguments)
    receiver.__class__ = _attached_class(type(receiver))
    return receiver


def _fuse_prompt(
    receiver: PreTrainedModel,
    attachment: _Attachment,
    call: _Call,
    input_ids: Tensor,  # [batch * beams, prompt_length or more (drafted tokens)]
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Fills the cache to decode from with the fused prompt; returns kwargs for what is left."""
    if kwargs.get("use_cache") is False:
        raise ValueError(
            "c2c_ext: use_cache=False is not supported by an attached receiver: there is no cache "
            "to fuse"
        )
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in _PROMPT_TENSORS:
            raise ValueError(
                f"c2c_ext: {name} is not supported by an attached receiver: its prompt is read as "
                "token ids alone"
            )
    cache = kwargs.get("past_key_values")
    if cache is None:  # some versions leave the default cache to the model's forward
        cache = DynamicCache()
    held = int(cache.get_seq_length())
    if held:
        raise ValueError(
            f"c2c_ext: past_key_values must be empty for an attached receiver, it holds {held} "
            "tokens"
        )
    rows, given = input_ids.shape
    if given < call.prompt_length:
        raise ValueError(
            f"c2c_ext: the first step must see the whole prompt of {call.prompt_length} tokens, "
            f"got {given}: prefill_chunk_size is not supported by an attached receiver"
        )
    length = call.prompt_length - 1
    if length == 0:
        return kwargs
    repeats = rows // call.batch  # beams, return sequences: equal rows stand next to each other
    mask = kwargs.get("attention_mask")
    mask = None if mask is None else mask[::repeats, :length]
    fused = _fused_cache(receiver, attachment, call, input_ids[::repeats, :length], mask)
    for layer, (key, value) in enumerate(fused):
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        cache.update(key, value, layer)
        if getattr(cache.layers[layer], "record_past", False):
            # Assisted decoding makes a sliding layer keep more than its window until it is cropped.
            cache.layers[layer].crop(0)
    kwargs = {**kwargs, "past_key_values": cache}
    if _TRIMS_BY_LENGTH:
        kwargs["next_sequence_length"] = given - length
    if not _TRIMS_BY_LENGTH or kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(length, given, device=input_ids.device)
    return kwargs


def _fused_cache(
    receiver: PreTrainedModel,
    attachment: _Attachment,
    call: _Call,
    ids: Tensor,  # [batch, n]: the prompt without its last token
    mask: Tensor | None,  # [batch, n]
) -> list[tuple[Tensor, Tensor]]:
    """One fused (key, value) ``[batch, heads, n, dim]`` per receiver layer."""
    n = ids.shape[1]
    if call.position_ids is not None:
        position_ids = call.position_ids[..., :n]
    elif mask is not None:
        position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)
    else:
        position_ids = torch.arange(n, device=ids.device).expand(ids.shape)
    sharer_ids = _ids_for_sharer(receiver, attachment.sharer, ids, mask)
    base = _prefill("receiver", receiver, ids, mask, position_ids)
    shared = _prefill("sharer", attachment.sharer, sharer_ids, mask, position_ids)
    shared = [(key.to(base[0][0]), value.to(base[0][0])) for key, value in shared]
    token_map = _token_map(call.columns, mask, ids)
    # In place: these tensors are ours alone.
    return fuse(base, shared, attachment.fuser, token_map=token_map, inplace=True)


def _prefill(
    role: str, model: PreTrainedModel, ids: Tensor, mask: Tensor | None, position_ids: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(key, value) ``[batch, heads, n, dim]`` of every layer, sliding ones too."""
    cache = DynamicCache()  # made without the configuration, so that no layer slides
    # The base model: no logits are needed, and a compiled forward is left alone.
    model.base_model(
        input_ids=ids.to(model.device),
        attention_mask=None if mask is None else mask.to(model.device),
        position_ids=position_ids.to(model.device),
        past_key_values=cache,
        use_cache=True,
    )
    kept = [int(layer.get_seq_length()) for layer in cache.layers]
    if not kept or min(kept) != ids.shape[1]:
        cause = (
            "it is in training mode, where gradient checkpointing makes transformers drop the "
            "cache: call its eval()"
            if model.training
            else "its forward did not fill the past_key_values it was given"
        )
        raise RuntimeError(
            f"c2c_ext: the {role} ({type(model).__name__}) kept no cache of the prompt; {cause}"
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _ids_for_sharer(
    receiver: PreTrainedModel, sharer: PreTrainedModel, ids: Tensor, mask: Tensor | None
) -> Tensor:
    """``ids`` with padding replaced by token 0, all inside the sharer's vocabulary."""
    if mask is not None:  # the receiver's padding token need not exist in the sharer
        ids = ids.masked_fill(mask == 0, 0)
    vocabulary = sharer.config.get_text_config(decoder=True).vocab_size
    if vocabulary >= receiver.config.get_text_config(decoder=True).vocab_size:
        return ids  # without asking the device
    largest = int(ids.max())
    if largest >= vocabulary:
        raise ValueError(
            f"c2c_ext: both models read the same tokens: input_ids must be below the sharer's "
            f"vocabulary size {vocabulary}, got {largest}"
        )
    return ids


def _token_map(columns: Tensor | None, mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """int64 ``[batch, n]``: the column itself where it is fused, else -1; None: all are fused."""
    if columns is None and mask is None:
        return None
    fused = torch.ones_like(ids, dtype=torch.bool)
    if columns is not None:
        fused &= columns.to(ids.device)
    if mask is not None:
        fused &= mask.to(ids.device) != 0
    return torch.where(fused, torch.arange(ids.shape[1], device=ids.device), -1)

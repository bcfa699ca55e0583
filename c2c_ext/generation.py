"""attach / detach / attached: a transformers receiver whose `generate` answers from a fused cache.

An attached receiver is the same object with a dynamic subclass of its own class. `generate` arms
one fusion; the first `prepare_inputs_for_generation` of that call fuses the prompt
(prompt_fusion.py). Everything else of `generate` is transformers' own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .attach_checks import checked_sharing
from .conversation import extend
from .fuser import Fuser
from .generation_arguments import Settings, assistant_of, check_decoding
from .positions import Positions
from .prompt_arguments import Options, prompt_of
from .prompt_fusion import Prompt, fuse_prompt, read_on
from .response import Response
from .sharers import Sharing
from .target_cache import check_kept

_ATTACHMENT = "_c2c_attachment"

# Ways to decode that never ask for prepared inputs and keep caches of their own.
_CONTINUOUS_BATCHING = (
    "generate_batch",
    "init_continuous_batching",
    "continuous_batching_context_manager",
)


@dataclass
class _Call:
    """One call of `generate` on an attached receiver."""

    prompt: Prompt | None  # None: the receiver is to answer alone
    reads_on: bool = False  # what is new of it is read by the receiver alone
    begun: bool = False
    response: Response | None = None  # to be fused while it grows
    answered_inside: bool = False  # by a generate inside this one

    @property
    def fused(self) -> bool:
        return self.begun and not self.reads_on

    def end(self, cache: Any, output: Any, *, beams: bool) -> None:
        """Lets a later turn go on from ``cache``, that of what generate has given."""
        sequences, readings = getattr(output, "sequences", output), []
        if self.response is not None:
            self.response.fuse_due(cache, sequences)
            readings = list(self.response.readings.values())
        extend(cache, None if beams else sequences, readings)


@dataclass
class _Attachment:
    """What `attach` hangs on the receiver: no module, so no sharer is a part of the receiver."""

    original_class: type
    sharing: Sharing
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

    def current(self) -> _Call | None:
        """This thread's call."""
        return self.calls.get(threading.get_ident())


class _FusedGeneration:
    """Mixin in front of the receiver's own class."""

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        positions: Sequence[int] | slice | Tensor | Positions | None = None,
        sharers: Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
        sections: Sequence[tuple[int, Any]] | None = None,
        sharer_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        fuse_response: int = 0,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, answering from the fused cache of the prompt.

        All models read the same token ids, unless ``sharer_inputs`` says what a sharer reads. The
        last prompt token and padding are never fused; a prompt of one token generates as the
        receiver alone does.

        Rows may be padded on either side, as ``attention_mask`` says. Rows that are padded on the
        right are moved to the right first, with everything that speaks of their columns, so the
        sequences that come back are padded on the left.

        A later turn is given as in transformers: ``input_ids`` of the whole conversation and the
        ``past_key_values`` that an earlier call on an attached receiver returned or filled. What
        that cache holds stays as it is, and what is new is fused: every sharer reads on from its
        own cache, which is kept on the receiver's where that can outlive the call (it was given, or
        ``return_dict_in_generate``). The cache may have been cropped, copied or its rows moved;
        other sharers or fusers may go on from it, which then read the conversation from its start.
        ``positions`` and ``sections`` speak of the new tokens then. Beam search leaves the rows of
        its cache in another order than those that it returns, as in transformers: what such a row
        holds of the answer is not known, and not compared with ``input_ids``.

        With ``guidance_scale``, what the answer is guided away from (``negative_prompt_ids``, by
        default the last prompt token) is read by the receiver alone, so the fused prompt is
        contrasted with an unfused one. Returned ``hidden_states`` and ``attentions`` begin at the
        last prompt token.

        Args:
            inputs: token ids ``[B, P]``, also accepted as ``input_ids``.
            positions: the prompt columns to fuse: column indices in ``0 .. P - 2`` (a range, slice,
                list, tuple, 1-D array or 1-D tensor, the same for all rows), a bool mask ``[P]`` or
                ``[B, P]``, or `c2c_ext.Positions`, which count each row's own tokens. All columns
                by default.
            sharers: which sharers to fuse with: indices into the list that was attached (``[]``:
                none), the same for all rows; a list of indices for every row; or bools ``[K]`` or
                ``[B, K]``. All by default. They are fused in the list's order. A sharer that no row
                selects is not run; in a row that does not select it nothing of it is fused.
            sections: ``(length, sharers)`` of spans of prompt columns, one after the other from
                column 0, instead of ``sharers``. They are fused one by one: what the receiver
                computes for a later span has read the earlier ones as fused, while every sharer's
                own cache stays as it is. ``sharers`` of a section as above. What the sections leave
                over is not fused; ``positions`` and padding restrict them further.
            sharer_inputs: what a sharer reads in place of the receiver's tokens, for several
                sharers a list with None for those that read these. ``input_ids`` int64 ``[B, S]``,
                ``attention_mask`` and ``position_ids`` ``[B, S]`` (optional), and one of
                ``token_map``, int64 ``[P]`` or ``[B, P]``: for every prompt column the sharer's
                column that it is fused with, or -1, the last one's entry being unused; and
                ``span``, (receiver's start, sharer's start, length): columns one to one. The sharer
                reads all of its tokens; only those that are named reach the receiver.
            fuse_response: generated tokens are fused too, after every so many steps; 0: never. The
                sharers read the tokens of such a block and it is fused where it stands; what comes
                later is computed over it. A block that the answer's end leaves incomplete is not
                fused. Greedy decoding and sampling only.
            *args, **kwargs: as transformers' `generate`; ``attention_mask`` is ``[B, P]``.
                ``prefill_chunk_size`` bounds what one forward of either model reads of the prompt.

        Raises:
            ValueError: an empty prompt or row; a mask, position ids, ``positions``, ``sharers``,
                ``sections`` or ``sharer_inputs`` that do not fit it; more positions than a model
                has (unless its rotary scaling is declared); token ids that a sharer's vocabulary
                lacks; a cache whose tokens no attached receiver put there, or more of them than
                ``input_ids``; not supported: ``inputs_embeds`` and any other prompt tensor but a
                mask and position ids, ``use_cache=False``, a ``prefill_chunk_size`` below 1,
                contrastive search, DoLa, group and constrained beams, drafting from the prompt's
                hidden states; with ``fuse_response``: beams, drafting, ``custom_generate``,
                ``sharer_inputs``, ``sections``, ``position_ids``, quantised and offloaded caches.
            TypeError: no tensors; an argument of another kind than documented; a
                ``prefill_chunk_size`` that is no integer.
            RuntimeError: a model kept no cache (gradient checkpointing in training mode), or this
                way of decoding never prepared its inputs.
        """
        attachment: _Attachment = getattr(self, _ATTACHMENT)
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "c2c_ext: inputs_embeds is not supported by an attached receiver: the sharer reads "
                "token ids"
            )
        if assistant_of(args, kwargs) is self:
            raise ValueError(
                "c2c_ext: assistant_model must be another model than the attached receiver itself"
            )
        given = args[0] if args else kwargs.get("generation_config")
        settings = Settings(kwargs, given, self.generation_config)
        check_decoding(settings, kwargs.get("custom_generate"))
        call = _Call(prompt=None)
        # A model that drafts for itself may leave layers out, and drafts change no answer.
        if not (settings["is_assistant"] and attachment.current()):
            options = Options(positions, sharers, sections, sharer_inputs, fuse_response)
            call.prompt, inputs, args, kwargs = prompt_of(
                self, attachment.sharing, settings, options, inputs, args, kwargs
            )
            # What a model drafts for another is its answer: only that one's prompt is fused.
            call.reads_on = call.prompt.held > 0 and bool(settings["is_assistant"])
        with attachment.armed(call):
            output = super().generate(inputs, *args, **kwargs)
        if call.fused and call.prompt.keeps:
            cache = getattr(output, "past_key_values", kwargs.get("past_key_values"))
            call.end(cache, output, beams=(settings["num_beams"] or 1) > 1)
        if not (call.prompt is None or call.begun or call.answered_inside):
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


def attach(
    receiver: PreTrainedModel,
    sharer: PreTrainedModel | Sequence[PreTrainedModel],
    fuser: Fuser | Sequence[Fuser],
    *,
    fusion: str = "parallel",
    overlap: str = "none",
) -> PreTrainedModel:
    """Makes ``receiver.generate`` answer from its own cache fused with the sharer's.

    The receiver stays the same object, with its own parameters, state dict and saved form only.
    A sharer may be the receiver itself.

    Args:
        receiver: a decoder-only transformers model that can generate.
        sharer: a decoder-only transformers model, with or without a language-model head; or a list
            of several.
        fuser: a fuser between the two; with a list of sharers a list of one for each.
        fusion: how several sharers are fused, ``"parallel"`` or ``"sequential"``: as `fuse`.
        overlap: how the prefills of a prompt run. ``"none"``: one after the other. On GPUs the
            sharers' can run beside the receiver's: ``"stream"``, on a CUDA stream of their own, or
            ``"thread"``, launched by a thread too. Both are for trying out: whether they are faster
            has not been measured. The result is the same. Elsewhere ``"stream"`` changes nothing,
            and neither models that share parameters with the receiver nor sharers on several
            devices overlap.

    Returns:
        ``receiver``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: the receiver is attached already, a model is an encoder-decoder or keeps no
            plain keys and values, a fuser was made for other KV shapes (names the layer), lists of
            different lengths or empty ones, an unknown ``fusion`` or ``overlap``.
    """
    if hasattr(receiver, _ATTACHMENT):
        raise ValueError("c2c_ext.attach: receiver is attached already: detach it first")
    sharing = checked_sharing(receiver, sharer, fuser, fusion, overlap)
    original = type(receiver)
    setattr(receiver, _ATTACHMENT, _Attachment(original, sharing))
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
    receiver: PreTrainedModel,
    sharer: PreTrainedModel | Sequence[PreTrainedModel],
    fuser: Fuser | Sequence[Fuser],
    *,
    fusion: str = "parallel",
    overlap: str = "none",
) -> Iterator[PreTrainedModel]:
    """``with attached(receiver, sharer, fuser):`` attaches and, whatever happens, detaches.

    What the body has detached itself, or attached anew, it leaves alone.
    """
    attach(receiver, sharer, fuser, fusion=fusion, overlap=overlap)
    attachment = getattr(receiver, _ATTACHMENT)
    try:
        yield receiver
    finally:
        if getattr(receiver, _ATTACHMENT, None) is attachment:
            detach(receiver)


def _attached_class(original: type) -> type:
    """Subclass of ``original`` that fuses; same name, so that saving records the original."""

    # generate validates its keyword arguments by this method's signature: wraps keeps it.
    @functools.wraps(original.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, **kwargs: Any) -> dict:
        attachment: _Attachment = getattr(self, _ATTACHMENT)
        call = attachment.current()
        if call is not None and call.prompt is not None and not call.begun:
            if call.reads_on:
                kwargs = read_on(call.prompt, input_ids, kwargs)
            else:
                sharing, prompt = attachment.sharing, call.prompt
                kwargs, readings = fuse_prompt(self, sharing, prompt, input_ids, kwargs)
                if prompt.every:
                    call.response = Response(
                        prompt.every,
                        prompt.length,
                        readings,
                        prompt.spans[0].selected,
                        sharing.fusion,
                    )
            call.begun = True
        elif call is not None and call.response is not None:
            cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
            call.response.fuse_due(cache, input_ids, mask)
        prepared = original.prepare_inputs_for_generation(self, input_ids, **kwargs)
        if call is not None and call.prompt is not None:
            check_kept(prepared, kwargs, input_ids)
        return prepared

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

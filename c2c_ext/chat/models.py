"""The models that are talked to, loaded and checked: directories, Hub names or the shipped pair."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..estimate import uncompiled_reason
from ..fuser import Fuser
from ..messages import shown
from ..model_files import load_model, load_tokenizer
from ..model_kv import ModelKV
from ..position_limit import limit_of
from ..published import PROJECTOR_CONFIG_NAME
from ..report import DTYPES
from ..serialization import CONFIG_NAME
from .prompts import SIDES, T2T_PROMPT, ChatPrompts, Prompts


@dataclass
class ChatModels:
    """A receiver, a sharer, the fuser between them, and how they are talked to.

    Attributes:
        receiver, sharer: in evaluation mode.
        fuser: for their KV shapes.
        tokenizers: by side.
        prompts: what they read.
        names: of receiver, sharer and fuser, for people.
        lock: held while an answer is generated: attaching changes the receiver's class, so answers
            are generated one at a time.
    """

    receiver: PreTrainedModel
    sharer: PreTrainedModel
    fuser: Fuser
    tokenizers: dict[str, PreTrainedTokenizerBase]
    prompts: Prompts
    names: dict[str, str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # Packed now, so that no answer's time contains it.
        if uncompiled_reason(self.fuser.config, self.receiver.device) is None:
            self.fuser.packed(self.receiver.dtype, self.receiver.device)

    def check_length(self, side: str, prompt: int, new: int) -> None:
        """Raises ValueError unless a model was made for that many tokens.

        Args:
            side: the model.
            prompt: tokens that it reads.
            new: tokens that it may generate.
        """
        limit = limit_of(getattr(self, side))
        if limit is not None and prompt + new > limit:
            raise ValueError(
                f"too long: {prompt} tokens to read and {new} to write are more than the {limit} "
                f"that the {side} was made for"
            )


def load_models(
    receiver: str | None = None,
    sharer: str | None = None,
    fuser: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    t2t_prompt: str | None = None,
) -> ChatModels:
    """Loads what `c2c chat` and `c2c web` talk to.

    Args:
        receiver, sharer: model directories or names on the Hub; all three or none (the shipped
            pair).
        fuser: a fuser directory, ours or a published one, or a name on the Hub.
        dtype: of both models: a key of `DTYPES`, or ``"auto"``: as they are stored.
        device: as torch names them, or ``"auto"``: a GPU if there is one.
        t2t_prompt: see `ChatPrompts`.

    Raises:
        ValueError, OSError: a place holds no model, tokenizer or fuser that can be read, or they
            do not fit; names the option.
    """
    places = {"receiver": receiver, "sharer": sharer, "fuser": fuser}
    missing = [f"--{name}" for name, place in places.items() if place is None]
    if len(missing) == len(places):
        if t2t_prompt is not None:
            raise ValueError(
                "--t2t-prompt goes with models of your own: the shipped sharer fills in forms"
            )
        if dtype not in ("auto", "fp32"):
            raise ValueError(f"--dtype: the shipped pair runs in fp32, got {dtype}")
        if device not in ("auto", "cpu"):
            raise ValueError(f"--device: the shipped pair runs on the CPU, got {shown(device)}")
        from .shipped_pair import load_shipped_pair

        return load_shipped_pair()
    if missing:
        raise ValueError(
            f"--receiver, --sharer and --fuser go together (none: the shipped pair); "
            f"{' and '.join(missing)} missing"
        )
    target = _device(device)
    tokenizers = {side: load_tokenizer(f"--{side}", places[side]) for side in SIDES}
    prompts = ChatPrompts(tokenizers, T2T_PROMPT if t2t_prompt is None else t2t_prompt)
    torch_dtype = "auto" if dtype == "auto" else DTYPES[dtype]
    models = {
        side: load_model(f"--{side}", places[side], torch_dtype).eval().requires_grad_(False)
        for side in SIDES
    }
    loaded = _fuser(places["fuser"], models).eval().requires_grad_(False)
    kv = {side: ModelKV.from_config(model.config) for side, model in models.items()}
    problems = loaded.config.mismatches(*(kv[side] for side in SIDES))
    if problems:
        raise ValueError(f"--fuser: {problems[0]}")
    for part in (*models.values(), loaded):
        part.to(target)
    names = {name: Path(place).name or place for name, place in places.items()}
    return ChatModels(*(models[side] for side in SIDES), loaded, tokenizers, prompts, names)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} cannot be used: {line}") from error
    return device


def _fuser(place: str, models: dict[str, PreTrainedModel]) -> Fuser:
    configs: dict[str, Any] = {f"{side}_config": model.config for side, model in models.items()}
    try:
        if os.path.isfile(Path(place) / PROJECTOR_CONFIG_NAME) and not os.path.isfile(
            Path(place) / CONFIG_NAME
        ):
            return Fuser.from_published(place, **configs)
        return Fuser.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise type(error)(f"--fuser: {str(error).removeprefix('c2c_ext: ')}") from error

"""What a pair of models and a fuser must be to be trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..fuser import Fuser
from ..model_kv import ModelKV


def check_vocabulary(role: str, model: PreTrainedModel, *ids: Tensor) -> None:
    """Raises ValueError for an id that the model has no embedding of."""
    size = model.config.get_text_config(decoder=True).vocab_size
    for t in ids:
        for extreme in (t.min(), t.max()) if t.numel() else ():
            if not 0 <= extreme < size:
                raise ValueError(
                    f"c2c_ext.training: ids that the {role} reads must be in its vocabulary, 0 to "
                    f"{size - 1}, got {extreme}"
                )


def check_models(receiver: Any, sharer: Any, fuser: Any) -> None:
    """Raises TypeError or ValueError unless the fuser can be trained between the two models."""
    for role, model in (("receiver", receiver), ("sharer", sharer)):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"C2CTrainingModel: {role} must be a transformers PreTrainedModel, got "
                f"{type(model).__name__}"
            )
    if not isinstance(fuser, Fuser):
        raise TypeError(f"C2CTrainingModel: fuser must be a Fuser, got {type(fuser).__name__}")
    own = {id(p) for p in receiver.parameters()}
    if any(id(p) in own for p in sharer.parameters()):
        raise ValueError(
            "C2CTrainingModel: sharer must be another model than the receiver, got one that has "
            "parameters in common with it"
        )
    mismatches = fuser.config.mismatches(
        ModelKV.from_config(receiver.config), ModelKV.from_config(sharer.config)
    )
    if mismatches:
        raise ValueError(f"C2CTrainingModel: fuser does not fit: {'; '.join(mismatches)}")
    if fuser.inference_only:
        raise ValueError(
            "C2CTrainingModel: fuser was loaded for inference only (inference_dtype) and holds no "
            "parameters to train"
        )
    check_masters(fuser)


def check_masters(fuser: Fuser) -> None:
    """Raises ValueError for a parameter in half precision, where small steps are lost."""
    for name, parameter in fuser.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "c2c_ext.training: fuser must be float32 or float64 to be trained, its "
                f"{name} is {parameter.dtype}: call fuser.float()"
            )

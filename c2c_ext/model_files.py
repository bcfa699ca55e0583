"""Models and tokenizers from a directory or the Hub, with one clear error each."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .files import listed
from .messages import shown_name

TOKENIZER_FILE = re.compile("tokenizer|vocab|merges|spiece|sentencepiece")


def load_tokenizer(option: str, place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        option: begins the error message, e.g. ``"--receiver"``.
        place: a directory or a name on the Hub.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        # Asked first: transformers 5.0 makes one up where there is none.
        if Path(place).is_dir() and not any(map(TOKENIZER_FILE.match, os.listdir(place))):
            raise FileNotFoundError("there is no tokenizer file")
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds
        text = shown_name(" ".join(str(error).split()), 300)
        raise ValueError(f"{option}: {place} has no tokenizer that can be read: {text}") from error


def load_model(option: str, place: str, dtype: torch.dtype | str) -> PreTrainedModel:
    """A language model with all of its weights.

    Args:
        option: begins the error message, e.g. ``"--receiver"``.
        place: a directory or a name on the Hub.
        dtype: of its weights; ``"auto"``: as they are stored.

    Raises:
        ValueError: there is none, it cannot be read, or lacks weights.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds, from transformers and safetensors
        text = shown_name(" ".join(str(error).split()), 300)
        raise ValueError(f"{option}: the model in {place} cannot be loaded: {text}") from error
    if missing := loading["missing_keys"]:  # they would be random
        raise ValueError(
            f"{option}: the model in {place} lacks {len(missing)} of the weights that its "
            f"config.json speaks of: {listed(missing)}"
        )
    return model

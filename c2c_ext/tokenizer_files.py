"""Tokenizers from directories and the Hub, as data: no code of theirs is run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .messages import shown_name
from .model_card import HUB_ID

_TOKENIZER_FILE = re.compile("tokenizer|vocab|merges|spiece|sentencepiece")


def load_tokenizer(side: str, place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        side: "receiver" or "sharer", the option that messages name.
        place: a directory, or a model's name on the Hub.

    Raises:
        ValueError, FileNotFoundError: there is none, or it cannot be read.
    """
    path = Path(place)
    if not path.is_dir() and (path.exists() or not HUB_ID.fullmatch(place)):
        raise FileNotFoundError(f"--{side}: no model at {place}")
    try:
        # Asked first: transformers 5.0 makes one up where there is none.
        if path.is_dir() and not any(map(_TOKENIZER_FILE.match, os.listdir(place))):
            raise FileNotFoundError("there is no tokenizer file")
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds
        text = shown_name(" ".join(str(error).split()), 300)
        raise ValueError(f"--{side}: {place} has no tokenizer that can be read: {text}") from error

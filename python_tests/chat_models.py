"""Tiny models to chat with: loaded in memory, and saved where a command finds them."""

from __future__ import annotations

from pathlib import Path

from local_tokenizers import word_tokenizer
from tiny_models import fuser_between, receiver_model, sharer_model
from transformers import PreTrainedTokenizerBase

from c2c_ext.chat.models import ChatModels
from c2c_ext.chat.prompts import ChatPrompts

# Any number of tokens fits.
ROOMY = {"max_position_embeddings": 1 << 20}
NAMES = {"receiver": "R", "sharer": "S", "fuser": "F"}
T2T_PROMPT = "w1 {question}"
T2T_READING = "{text} w2 {question}"


def chat_models(
    receiver_tokenizer: PreTrainedTokenizerBase | None = None,
    sharer_tokenizer: PreTrainedTokenizerBase | None = None,
) -> ChatModels:
    """The trio of tiny_models with word tokenizers."""
    receiver, sharer = receiver_model(), sharer_model()
    tokenizers = {
        "receiver": receiver_tokenizer or word_tokenizer(),
        "sharer": sharer_tokenizer or word_tokenizer(),
    }
    prompts = ChatPrompts(tokenizers, T2T_PROMPT, T2T_READING)
    fuser = fuser_between(receiver, sharer)
    return ChatModels(receiver, sharer, fuser, tokenizers, prompts, NAMES)


def save_chat_models(place: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Saves a trio; returns the options of `c2c chat` that name it."""
    receiver, sharer = receiver_model(**ROOMY), sharer_model(**ROOMY)
    parts = {"receiver": receiver, "sharer": sharer, "fuser": fuser_between(receiver, sharer)}
    for name, part in parts.items():
        part.save_pretrained(place / name)
    for side in ("receiver", "sharer"):
        (tokenizer or word_tokenizer()).save_pretrained(place / side)
    return [word for name in parts for word in (f"--{name}", str(place / name))]

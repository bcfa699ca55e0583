"""What files say about a receiver, a sharer and a fuser, without loading a model.

Everything comes from configurations (a model's config.json and tokenizer.json, a fuser's
configuration); a fuser's weights are read, and so checked, where they are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import FuserConfig
from .estimate import ModelSizes, Streams
from .files import existing_directory, read_json
from .messages import shown, shown_name
from .model_kv import MAX_LAYERS, ModelKV, UnsupportedModelError
from .published import PROJECTOR_CONFIG_NAME, load_published, read_published_config
from .serialization import CONFIG_NAME, WEIGHTS_NAME, load_fuser

MODEL_CONFIG_NAME = "config.json"
TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20
MAX_REASON = 300  # characters of another library's message
MAX_EXPERTS = 4096
MAX_LABELS = 1 << 16
MAX_MODULES = 1 << 17  # layers x experts that are built to be counted: seconds
# Keys of counts, of which transformers builds one or several things each, or a list that long.
_COUNTS = (
    (re.compile(r"^(?!vocab)(?!.*label).*(layer|depth|block|stage)"), MAX_LAYERS),
    (re.compile(r"experts$"), MAX_EXPERTS),
    (re.compile(r"label"), MAX_LABELS),
)
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelFacts:
    """A model as its configuration describes it.

    Attributes:
        config: the transformers configuration.
        kv: its KV layout; None if the architecture is unsupported.
        unsupported: why it cannot be fused; empty if it can.
        sizes: its parameters; None if they are unknown.
        sizes_unknown: why.
        experts: whether only some of the parameters are used per token.
        quantized: whether its configuration asks for quantized weights.
        vocabulary: token ids that it can read.
        max_positions: the longest input that it was made for; None if not recorded.
        query_heads: of its attention; 0 if not recorded.
        directory: where it lies; None for a configuration file of another name.
    """

    config: Any
    kv: ModelKV | None
    unsupported: tuple[str, ...]
    sizes: ModelSizes | None
    sizes_unknown: str
    experts: bool
    quantized: bool
    vocabulary: int | None
    max_positions: int | None
    query_heads: int
    directory: Path | None


@dataclass(frozen=True)
class FuserFacts:
    """A fuser as its files describe it.

    Attributes:
        config: its configuration.
        dtype: of its parameters; None without weights.
        open_streams: (layer, kind) of every open stream; None without weights.
    """

    config: FuserConfig
    dtype: torch.dtype | None = None
    open_streams: Streams | None = None


def read_fuser(place: str | Path) -> FuserFacts:
    """Reads a fuser directory, ours or a published one, or its configuration file alone.

    Where a directory holds weights, every tensor is checked.

    Raises:
        FileNotFoundError: no such directory, or a file is missing.
        ValueError: a value or tensor breaks a rule; names it.
    """
    path = Path(place)
    if path.is_file():
        if path.name == PROJECTOR_CONFIG_NAME:
            return FuserFacts(read_published_config(path.parent))
        return FuserFacts(FuserConfig.from_dict(read_json(path)))
    existing_directory(path)
    if (path / PROJECTOR_CONFIG_NAME).exists() and not (path / CONFIG_NAME).exists():
        if not any(path.glob("projector_*.pt")):
            return FuserFacts(read_published_config(path))
        fuser = load_published(path)
    elif not (path / WEIGHTS_NAME).exists():
        return FuserFacts(FuserConfig.from_dict(read_json(path / CONFIG_NAME)))
    else:
        fuser = load_fuser(path)
    dtype = next(fuser.parameters()).dtype
    return FuserFacts(fuser.config, dtype, fuser.open_streams())


def read_model(place: str | Path) -> ModelFacts:
    """Reads the configuration of a model: its directory, or a configuration file.

    The file is data: its ``auto_map`` is not followed and no other file that it names is read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no configuration of a model that transformers knows, or a number is
            missing or out of range.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    path = Path(place)
    file = path if path.is_file() else path / MODEL_CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"no model at {path}: {MODEL_CONFIG_NAME} is missing")
    data = read_json(file)
    where = f"{file} is not a model configuration"
    model_type = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"{where}: model_type {shown(model_type)} is not one of transformers'")
    _check_counts(data, where)
    try:
        config: Any = CONFIG_MAPPING[model_type].from_dict(data)
    except Exception as error:  # transformers' own checks raise errors of many kinds
        raise ValueError(f"{where}: {_one_line(error)}") from error
    is_directory = file.name == MODEL_CONFIG_NAME
    config._name_or_path = file.absolute().parent.name if is_directory else file.stem
    for name in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads"):
        number = data.get(name, 1)
        if isinstance(number, int) and number < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {shown(number)}")
    kv, unsupported = None, ()
    try:
        layout = ModelKV.from_config(config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(
                f"c2c_ext: model type {model_type!r} has no causal language model in transformers"
            )
        kv = layout
    except UnsupportedModelError as error:
        unsupported = error.reasons
    except (ValueError, TypeError):
        raise
    except Exception as error:  # parts of a kind that no model has
        raise ValueError(f"{where}: {type(error).__name__}") from error
    text = config.get_text_config(decoder=True)
    experts = max((_count(text, name) or 0 for name in _EXPERT_FIELDS), default=0)
    sizes, unknown = None, "the architecture is not supported"
    if kv is not None and len(kv.layers) * experts > MAX_MODULES:
        unknown = f"{len(kv.layers)} layers of {experts} experts are too many to build"
    elif kv is not None:
        try:
            sizes, unknown = _model_sizes(config), ""
        except Exception as error:  # as above: a model's constructor may refuse in any way
            unknown = _one_line(error)
    return ModelFacts(
        config=config,
        kv=kv,
        unsupported=unsupported,
        sizes=sizes,
        sizes_unknown=unknown,
        experts=experts > 0,
        quantized=bool(getattr(config, "quantization_config", None)),
        vocabulary=_count(text, "vocab_size"),
        max_positions=_count(text, "max_position_embeddings"),
        query_heads=_count(text, "num_attention_heads") or 0,
        directory=file.parent if is_directory else None,
    )


def compare_vocabularies(receiver: ModelFacts, sharer: ModelFacts) -> list[str]:
    """Where the two models would read the same token ids differently; one sentence each."""
    notes = []
    both = "both models must read the same token ids"
    if None not in (receiver.vocabulary, sharer.vocabulary):
        if sharer.vocabulary < receiver.vocabulary:
            notes.append(
                f"the sharer's vocabulary ({sharer.vocabulary:,}) is smaller than the receiver's "
                f"({receiver.vocabulary:,}): prompts with ids from {sharer.vocabulary:,} are "
                "refused"
            )
    files = [
        None if model.directory is None else model.directory / TOKENIZER_NAME
        for model in (receiver, sharer)
    ]
    lacking = [
        side
        for side, file in zip(("receiver", "sharer"), files, strict=True)
        if file is None or not file.is_file()
    ]
    if lacking:
        notes.append(
            f"tokenizers not compared ({' and '.join(lacking)}: no tokenizer.json); {both}"
        )
        return notes
    try:
        own, other = (_token_ids(file) for file in files if file is not None)
    except ValueError as error:
        notes.append(f"tokenizers not compared ({error}); {both}")
        return notes
    differing = sum(other.get(token) != number for token, number in own.items())
    if differing:
        notes.append(
            f"the tokenizers differ: {differing:,} of the receiver's {len(own):,} tokens have "
            f"another id in the sharer, or none; {both}"
        )
    return notes


def _model_sizes(config: Any) -> ModelSizes:
    """Counts the parameters of the model itself, built on the meta device: no memory, exact."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # transformers 5.0 does not on the meta device
    decoder = model.get_decoder()
    embeddings = [m.weight for m in decoder.modules() if isinstance(m, torch.nn.Embedding)]
    skipped = {id(p) for p in embeddings}
    head = model.get_output_embeddings()
    return ModelSizes(
        total=sum(p.numel() for p in model.parameters()),
        decoder=sum(p.numel() for p in decoder.parameters() if id(p) not in skipped),
        head=sum(p.numel() for p in head.parameters()) if head is not None else 0,
    )


def _check_counts(data: Any, where: str) -> None:
    """Bounds what a stranger's configuration makes transformers build while reading it."""
    for key, value in _numbers(data):
        for pattern, limit in _COUNTS:
            if pattern.search(key) and abs(value) > limit:
                raise ValueError(
                    f"{where}: {shown_name(key)} must be at most {limit}, got {shown(value)}"
                )


def _numbers(data: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(nearest key, number) of everything in parsed JSON."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _numbers(value, name)
    elif isinstance(data, list):
        for value in data:
            yield from _numbers(value)
    elif isinstance(data, (int, float)):
        yield key, data


def _token_ids(file: Path) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included."""
    size = file.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{file} must be at most {MAX_TOKENIZER_BYTES} bytes, got {size}")
    try:
        data = json.loads(file.read_bytes())
        vocabulary = data["model"]["vocab"]
        if isinstance(vocabulary, list):  # [token, score] pairs; the place is the id
            vocabulary = {pair[0]: i for i, pair in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        return {**vocabulary, **added}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not a tokenizer of a known kind") from error


def _count(config: Any, name: str) -> int | None:
    """A positive integer of a configuration; None if it has none."""
    try:
        value = getattr(config, name, None)
    except Exception:  # transformers refuses numbers that differ between layers
        return None
    return value if type(value) is int and value > 0 else None


def _one_line(error: Exception) -> str:
    """Another library's message on one line, without what a file could do to a terminal."""
    return shown_name(" ".join(str(error).split()) or type(error).__name__, MAX_REASON)

"""Writes prompt caches: a frozen model prefills every prompt once, into shards on disk."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..messages import shown
from ..model_kv import ModelKV
from ..serialization import WEIGHT_DTYPES
from .checks import check_vocabulary
from .prefill import prefill
from .prompt_caches import (
    DIGEST_BYTES,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    MAX_TOKENS,
    ROW_TENSORS,
    ROWS_NAME,
    SHARD_NAME,
    PromptCaches,
    ids_digest,
    model_hash,
    shape_groups,
)


def write_prompt_caches(
    directory: str | os.PathLike,
    model: PreTrainedModel,
    prompts: Iterable[tuple[int, Tensor | Sequence[int]]],
    *,
    batch_size: int = 1,
    prefill_chunk: int | None = None,
    shard_bytes: int = 1 << 28,
) -> PromptCaches:
    """Prefills every prompt once and writes the caches, in the model's own dtype.

    A row's caches are those that the model computes in the batch that it is in here: with another
    ``batch_size`` than in training, losses differ by rounding.

    Args:
        directory: to be made; it appears whole or not at all.
        model: in eval mode, where it is to run.
        prompts: (sample id, token ids ``[n]``): for the receiver, and for a sharer of the same
            tokens, the prompt without its last token (`Layout.receiver_rows`), otherwise what the
            sharer reads (`Layout.sharer_rows`). Consumed one batch at a time.
        batch_size: prompts to prefill together.
        prefill_chunk: tokens that a prefill runs at a time; None: all.
        shard_bytes: a file is closed when it holds as much. No more than that and one batch is
            kept in memory.

    Raises:
        FileExistsError: ``directory`` exists and is not empty.
        ValueError: a sample id twice, ids outside the vocabulary, or the model is in training mode.
        OSError: a full disk among others; nothing is left.
    """
    path = Path(directory).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"c2c_ext: {path} must not exist, or be an empty directory")
    for name, value in (("batch_size", batch_size), ("shard_bytes", shard_bytes)):
        if type(value) is not int or value < 1:
            raise ValueError(
                f"c2c_ext: {name} must be an integer of at least 1, got {shown(value)}"
            )
    if model.training:
        raise ValueError("c2c_ext: model must be in eval mode to write prompt caches, call eval()")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        temporary.mkdir()
        writer = _Writer(temporary, model, shard_bytes)
        for batch in _batches(prompts, batch_size):
            writer.add(batch, prefill_chunk)
        writer.close()
        os.rename(temporary, path)  # also over an empty directory
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PromptCaches(path, model)


class _Writer:
    """Fills a directory with shards and, at the end, the index."""

    def __init__(self, directory: Path, model: PreTrainedModel, shard_bytes: int) -> None:
        self.directory, self.model, self.shard_bytes = directory, model, shard_bytes
        self.layers = ModelKV.from_config(model.config).layers
        self.groups = shape_groups(self.layers)
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self.rows: dict[str, list] = {name: [] for name in ROW_TENSORS}
        self.seen: set[int] = set()
        self.dtype = model.dtype

    def add(self, batch: list[tuple[int, Tensor]], prefill_chunk: int | None) -> None:
        """Prefills a batch and keeps its rows for the current shard."""
        for sample_id, ids in batch:
            if sample_id in self.seen:
                raise ValueError(
                    f"c2c_ext: prompts must have one row per sample, got {sample_id} twice"
                )
            self.seen.add(sample_id)
            check_vocabulary("model", self.model, ids)
        width = max(len(ids) for _, ids in batch)
        padded = torch.stack(
            [torch.nn.functional.pad(ids, (width - len(ids), 0)) for _, ids in batch]
        )
        counts = torch.tensor([len(ids) for _, ids in batch])
        mask = torch.arange(width) >= width - counts[:, None]
        pairs = None
        if width:
            device = next(self.model.parameters()).device
            pairs = prefill(self.model, padded.to(device), mask.to(device), "model", prefill_chunk)
            self.dtype = pairs[0][0].dtype
        for i, (sample_id, ids) in enumerate(batch):
            row, count = len(self.rows["tokens"]), len(ids)
            for g, (shape, places) in enumerate(self.groups):
                size = (2 * len(places), shape.num_heads, count, shape.head_dim)
                streams = torch.empty(size, dtype=self.dtype)
                for j, layer in enumerate(places) if count else ():
                    for kind in range(2):
                        streams[2 * j + kind] = pairs[layer][kind][i, :, width - count :]
                self.pending[f"{row}.{g}"] = streams
                self.pending_bytes += streams.nbytes
            values = (sample_id, count, len(self.shards), ids_digest(ids))
            for name, value in zip(ROW_TENSORS, values, strict=True):
                self.rows[name].append(value)
            if self.pending_bytes >= self.shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Closes the current shard."""
        name = SHARD_NAME.format(len(self.shards))
        _save(self.pending, self.directory / name)
        self.shards.append({"file": name, "bytes": (self.directory / name).stat().st_size})
        self.pending, self.pending_bytes = {}, 0

    def close(self) -> None:
        """Writes what is left, and the index last."""
        if self.pending:
            self.flush()
        rows = {
            name: torch.tensor(self.rows[name], dtype=torch.int64)
            for name in ("sample_ids", "tokens", "shards")
        }
        digests = bytearray(b"".join(self.rows["digests"]))
        rows["digests"] = torch.tensor(digests, dtype=torch.uint8).view(-1, DIGEST_BYTES)
        _save(rows, self.directory / ROWS_NAME)
        names = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}
        index = {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "model": model_hash(self.model),
            "dtype": names[self.dtype],
            "layers": [[shape.num_heads, shape.head_dim] for shape in self.layers],
            "rows": len(self.seen),
            "rows_sha256": hashlib.sha256((self.directory / ROWS_NAME).read_bytes()).hexdigest(),
            "shards": self.shards,
        }
        with open(self.directory / INDEX_NAME, "wb") as file:
            file.write((json.dumps(index, indent=1) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def _batches(
    prompts: Iterable[tuple[int, Tensor | Sequence[int]]], size: int
) -> Iterator[list[tuple[int, Tensor]]]:
    batch = []
    for sample_id, ids in prompts:
        ids = torch.as_tensor(ids).cpu()
        if ids.numel() == 0:
            ids = ids.long()
        if ids.dim() != 1 or ids.dtype != torch.int64 or len(ids) > MAX_TOKENS:
            raise ValueError(
                f"c2c_ext: the ids of sample {sample_id} must be up to {MAX_TOKENS} integers, got "
                f"{ids.dtype} of shape {list(ids.shape)}"
            )
        batch.append((int(sample_id), ids))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, str(path))
    except SafetensorError as error:  # a full disk among others
        raise OSError(f"c2c_ext: {path} cannot be written: {error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())

"""Prompt caches on disk: what a frozen model prefills, computed once and read row by row.

A directory holds ``index.json`` (what the caches depend on, the shards and their sizes),
``rows.safetensors`` (per row: sample id, tokens, hash of its token ids, shard) and shards
``caches-00000.safetensors`` with tensors ``"{row}.{g}"`` of shape [streams, H, tokens, D]: streams
are key and value of one layer after the other, of the g-th different KV shape.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from ..files import open_regular, read_json
from ..messages import shown, shown_name
from ..model_kv import MAX_LAYERS, KVShape
from ..serialization import WEIGHT_DTYPES
from .prompt_rows import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_NAME = "c2c_ext.prompt_caches"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
ROWS_NAME = "rows.safetensors"
SHARD_NAME = "caches-{:05d}.safetensors"
MAX_ROWS = 1 << 28
MAX_TOKENS = 1 << 24  # of one row
DIGEST_BYTES = 16
# Of rows.safetensors: dtype, shape behind the rows.
ROW_TENSORS = {
    "sample_ids": (torch.int64, ()),
    "tokens": (torch.int64, ()),
    "shards": (torch.int64, ()),
    "digests": (torch.uint8, (DIGEST_BYTES,)),
}
# Of a model's configuration: where it came from, not what it computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
_PROBED = 8  # elements of every parameter that the model's hash takes


class PromptCaches:
    """Caches that `write_prompt_caches` wrote, read from disk row by row.

    Nothing but a few numbers per row is held in memory. Pickled, it opens the same directory again,
    so it can go into the workers of a data loader.

    Args:
        directory: of the caches.
        model: the model that they must be of; None: not checked.

    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: a file is damaged or of another format, or the caches are of another model;
            names the file.
    """

    def __init__(self, directory: str | os.PathLike, model: PreTrainedModel | None = None) -> None:
        self.directory = Path(directory).resolve()
        path = self.directory / INDEX_NAME
        index = read_json(path)
        try:
            self._layers, self._dtype, self._model, self._shards, rows = _parsed(index)
        except ValueError as error:
            raise ValueError(f"c2c_ext: {path}: {error}") from None
        self._rows = _read_rows(self.directory / ROWS_NAME, *rows, len(self._shards))
        ids = self._rows["sample_ids"]
        self._sorted, self._order = ids.sort()
        if bool((self._sorted[1:] == self._sorted[:-1]).any()):
            raise ValueError(f"c2c_ext: {self.directory / ROWS_NAME}: a sample id occurs twice")
        self._groups = shape_groups(self._layers)
        if model is not None and model_hash(model) != self._model:
            raise ValueError(
                f"c2c_ext: {self.directory} holds prompt caches of another model than this "
                f"{type(model).__name__} (configuration, dtype or weights differ): write them anew"
            )

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, sample_id: int) -> bool:
        return self._row(sample_id) is not None

    def __getstate__(self) -> Path:
        return self.directory

    def __setstate__(self, directory: Path) -> None:
        self.__init__(directory)

    def read(self, sample_ids: Iterable[int] | Tensor, ids: Sequence[Tensor]) -> list[PromptRow]:
        """The caches of some samples, as `C2CTrainingModel.forward` takes them.

        Args:
            sample_ids: B integers.
            ids: token ids ``[n]`` of each, as the model would prefill them
                (`Layout.receiver_rows`); the caches must be of the same ones.

        Raises:
            LookupError: a sample that is not there.
            ValueError: a sample's caches are of other tokens, or a shard is damaged; names it.
        """
        sample_ids = torch.as_tensor(sample_ids).tolist()
        return [self._read(*pair) for pair in zip(sample_ids, ids, strict=True)]

    def _row(self, sample_id: int) -> int | None:
        place = int(torch.searchsorted(self._sorted, sample_id))
        if place == len(self._sorted) or self._sorted[place] != sample_id:
            return None
        return int(self._order[place])

    def _read(self, sample_id: int, ids: Tensor) -> PromptRow:
        row = self._row(sample_id)
        if row is None:
            raise LookupError(
                f"c2c_ext: {self.directory} holds no prompt caches of sample {sample_id}"
            )
        if bytes(self._rows["digests"][row].tolist()) != ids_digest(ids):
            raise ValueError(
                f"c2c_ext: {self.directory}: the prompt caches of sample {sample_id} are of other "
                "tokens than it has now: write them anew"
            )
        tokens = int(self._rows["tokens"][row])
        path, size = self._shards[int(self._rows["shards"][row])]
        layers: list[Any] = [None] * len(self._layers)
        with _opened(self.directory / path, size) as file:
            for g, (shape, places) in enumerate(self._groups):
                name = f"{row}.{g}"
                expected = [2 * len(places), shape.num_heads, tokens, shape.head_dim]
                header = file.get_slice(name)
                found = [header.get_dtype(), header.get_shape()]
                if found != [self._dtype, expected]:
                    raise ValueError(
                        f"c2c_ext: {self.directory / path}: {name} must be {self._dtype} of shape "
                        f"{expected}, got {found[0]} of shape {shown(found[1])}"
                    )
                # Cloned: the library's tensors are views of the mapped file.
                streams = file.get_tensor(name).clone()
                for i, layer in enumerate(places):
                    layers[layer] = (streams[2 * i], streams[2 * i + 1])
        return layers


def model_hash(model: PreTrainedModel) -> str:
    """Hash of a model's configuration and of a few elements of every parameter, with its dtype."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {list(p.shape)}".encode())
        if p.numel():
            at = torch.linspace(0, p.numel() - 1, _PROBED, dtype=torch.float64).long()
            probe = p.detach().reshape(-1)[at.to(p.device)].cpu().double()
            digest.update(probe.numpy().tobytes())
    return digest.hexdigest()


def shape_groups(layers: Sequence[KVShape]) -> list[tuple[KVShape, list[int]]]:
    """Layers by their KV shape."""
    groups: dict[KVShape, list[int]] = {}
    for layer, shape in enumerate(layers):
        groups.setdefault(shape, []).append(layer)
    return list(groups.items())


def ids_digest(ids: Tensor) -> bytes:
    """Hash of token ids."""
    return hashlib.sha256(ids.cpu().to(torch.int64).numpy().tobytes()).digest()[:DIGEST_BYTES]


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Any]:
    """A safetensors file of ``size`` bytes, mapped and not read."""
    with open_regular(path, size) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise ValueError(f"c2c_ext: {path} must be of {size} bytes, got {found}")
        try:
            # By descriptor, so that it is the file whose size was checked.
            with safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as opened:
                yield opened
        except SafetensorError as error:
            raise ValueError(
                f"c2c_ext: {path} is not a shard of prompt caches: {shown_name(str(error), 300)}"
            ) from error


def _parsed(
    index: Any,
) -> tuple[tuple[KVShape, ...], str, str, list[tuple[str, int]], tuple[int, str]]:
    """Layers, safetensors dtype, model hash, shards (file, bytes), rows (number, hash of file)."""

    def field(data: Any, name: str, kind: type, where: str = "") -> Any:
        value = data.get(name) if isinstance(data, dict) else None
        if type(value) is not kind:
            raise ValueError(f"{where}{name} must be a {kind.__name__}, got {shown(value)}")
        return value

    if field(index, "format", str) != FORMAT_NAME:
        raise ValueError(f"format must be {FORMAT_NAME!r}, got {shown(index['format'])}")
    if field(index, "format_version", int) != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION}, got {shown(index['format_version'])}: "
            "written by another version of c2c_ext"
        )
    dtype = field(index, "dtype", str)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(WEIGHT_DTYPES)}, got {shown(dtype)}")
    layers = field(index, "layers", list)
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise ValueError(f"layers must have 1..{MAX_LAYERS} entries, got {len(layers)}")
    for i, pair in enumerate(layers):
        if type(pair) is not list or len(pair) != 2:
            raise ValueError(f"layers[{i}] must be [num_heads, head_dim], got {shown(pair)}")
        layers[i] = KVShape(*pair)
    hashes = {name: field(index, name, str) for name in ("model", "rows_sha256")}
    for name, value in hashes.items():
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(f"{name} must be a SHA-256 in hexadecimal digits, got {shown(value)}")
    shards = []
    for i, shard in enumerate(field(index, "shards", list)):
        name, size = (
            field(shard, n, t, f"shards[{i}].") for n, t in (("file", str), ("bytes", int))
        )
        if name != SHARD_NAME.format(i):
            raise ValueError(f"shards[{i}].file must be {SHARD_NAME.format(i)}, got {shown(name)}")
        if size < 0:
            raise ValueError(f"shards[{i}].bytes must be at least 0, got {shown(size)}")
        shards.append((name, size))
    count = field(index, "rows", int)
    if not 0 <= count <= MAX_ROWS:
        raise ValueError(f"rows must be in 0..{MAX_ROWS}, got {shown(count)}")
    return tuple(layers), dtype, hashes["model"], shards, (count, hashes["rows_sha256"])


def _read_rows(path: Path, count: int, sha256: str, shards: int) -> dict[str, Tensor]:
    limit = 4096 + count * (3 * 8 + DIGEST_BYTES)
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"c2c_ext: {path} is not the file that {INDEX_NAME} beside it speaks of")
    try:
        rows = load(data)
    except SafetensorError as error:
        raise ValueError(f"c2c_ext: {path} is not a safetensors file: {error}") from error
    for name, (dtype, shape) in ROW_TENSORS.items():
        expected, t = [count, *shape], rows.get(name)
        if t is None or t.dtype != dtype or list(t.shape) != expected:
            got = "none" if t is None else f"{t.dtype} of shape {list(t.shape)}"
            raise ValueError(
                f"c2c_ext: {path}: {name} must be {dtype} of shape {expected}, got {got}"
            )
    for name, bound in (("tokens", MAX_TOKENS + 1), ("shards", shards)):
        outside = (rows[name] < 0) | (rows[name] >= bound)
        if bool(outside.any()):
            raise ValueError(
                f"c2c_ext: {path}: {name} must be in 0..{bound - 1}, got {rows[name][outside][0]}"
            )
    return rows

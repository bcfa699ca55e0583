"""Fusers on the Hugging Face Hub: upload through huggingface_hub's mixin, bounded download.

huggingface_hub is imported inside the functions that need it: importing it takes longer than all of
c2c_ext. The mixin's own `from_pretrained` is not used: it first downloads and parses a config.json
of any size, a file that a fuser does not have.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import FuserConfig
from .files import MAX_JSON_BYTES, read_json
from .model_card import CARD_NAME, MAX_CARD_BYTES, CardInfo, is_hub_id, is_own_card
from .serialization import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_card,
    check_has_numbers,
    check_parameters,
    save_fuser,
)

if TYPE_CHECKING:
    from .fuser import Fuser

LIBRARY = "c2c_ext"
COMMIT = re.compile(r"[0-9a-f]{40}")
# Of the HTTP clients that huggingface_hub has used: 0.x, 1.x, 2.x.
CLIENT_MODULES = ("requests", "urllib3", "httpx", "httpcore", "httpx2", "httpcore2")


def load_pretrained(
    directory_or_repo_id: str | os.PathLike,
    load: Callable[[Path], Fuser],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Fuser:
    """Loads a fuser from a directory or a Hub repository; see `Fuser.from_pretrained`.

    Args:
        load: reads a directory.
    """
    source = directory_or_repo_id
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"c2c_ext: directory_or_repo_id must be a path or 'org/name', got {source!r:.80}"
        )
    if os.path.isdir(source):
        if revision is not None:
            raise ValueError(
                f"c2c_ext: revision goes with a repository of the Hub, but {source} is a local "
                "directory"
            )
        return load(Path(source))
    if not (isinstance(source, str) and is_hub_id(source)):
        raise FileNotFoundError(
            f"c2c_ext: directory_or_repo_id: no fuser directory at {os.fspath(source)!s}, and that "
            "is not the name of a Hub repository ('org/name')"
        )
    if local_files_only and force_download:
        raise ValueError("c2c_ext: local_files_only and force_download exclude each other")
    repository = _Repository(source, token, cache_dir, local_files_only, force_download)
    return repository.load(revision, load)


def push_to_hub(
    fuser: Fuser, repo_id: str, *, card: CardInfo | None, branch: str | None, **options: Any
) -> str:
    """Uploads a fuser; see `Fuser.push_to_hub`."""
    from huggingface_hub import ModelHubMixin

    # The part before the slash may be left out, so that the token's user is taken.
    if not (isinstance(repo_id, str) and (is_hub_id(repo_id) or is_hub_id(f"user/{repo_id}"))):
        raise ValueError(
            f"c2c_ext: repo_id must be the name of a Hub repository ('org/name'), got {repo_id!r}"
        )
    check_card(card)
    # Before anything is created on the Hub.
    check_has_numbers(fuser)
    check_parameters(fuser.config, {name: t.detach() for name, t in fuser.state_dict().items()})
    token = options.get("token")

    class Pusher(ModelHubMixin, library_name=LIBRARY):
        """Without arguments: the mixin would write them, a token too, into a config.json."""

        def _save_pretrained(self, save_directory: Path) -> None:
            target = "/".join(save_directory.parts[-2:])  # the mixin's way to tell the full name
            _copy_foreign_card(target, branch, token, save_directory)
            save_fuser(fuser, save_directory, card, target)

    names = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME]
    with _clear_errors(repo_id, branch):
        commit = Pusher().push_to_hub(repo_id, branch=branch, allow_patterns=names, **options)
    return commit.commit_url


def _copy_foreign_card(
    repo_id: str, branch: str | None, token: str | None, directory: Path
) -> None:
    """Copies the repository's README.md to ``directory`` unless it is ours or there is none."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            path = _Repository(repo_id, token, cache).fetch(CARD_NAME, branch, MAX_CARD_BYTES)
        except FileNotFoundError:
            return
        if not is_own_card(path):
            shutil.copyfile(path, directory / CARD_NAME)


@dataclass
class _Repository:
    """A repository on the Hub, and how to download from it."""

    repo_id: str
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False

    def load(self, revision: str | None, load: Callable[[Path], Fuser]) -> Fuser:
        """Downloads the two files of one commit, the small one first, and reads them strictly."""
        config_file = self.fetch(CONFIG_NAME, revision, MAX_JSON_BYTES)
        snapshot = config_file.parent
        try:
            config = FuserConfig.from_dict(read_json(config_file))
            self.fetch(WEIGHTS_NAME, snapshot.name, _max_weight_bytes(config))
            return load(snapshot)
        except ValueError as error:
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                _drop_if_damaged(snapshot / name)
            raise ValueError(f"{error} (commit {snapshot.name} of {self.repo_id})") from error

    def fetch(self, name: str, revision: str | None, max_bytes: int) -> Path:
        """One file's place in the cache, downloaded if it is not there and not too large.

        Where the Hub cannot be reached, what was downloaded before is taken, with a warning.
        """
        from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

        local, outage = self.local_files_only, None
        with _clear_errors(self.repo_id, revision, name):
            if not local and not self._has_commit(name, revision):
                try:
                    self._check_remote(name, revision, max_bytes)
                except Exception as error:
                    if self.force_download or not _is_outage(error):
                        raise
                    local, outage = True, error
            try:
                path = self._download(name, revision, local)
            except LocalEntryNotFoundError:
                if outage is not None:
                    raise outage from None
                raise
        if outage is not None and not isinstance(outage, OfflineModeIsEnabled):
            warnings.warn(
                f"c2c_ext: {_unreachable(outage)}; {name} of {self.repo_id} is taken as it was "
                "downloaded before",
                stacklevel=6,
            )
        return Path(path)

    def _download(self, name: str, revision: str | None, local: bool) -> str:
        from huggingface_hub import hf_hub_download

        from . import __version__

        options = {
            "revision": revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "local_files_only": local,
            "library_name": LIBRARY,
            "library_version": __version__,
        }
        try:
            return hf_hub_download(
                self.repo_id, name, force_download=self.force_download, **options
            )
        except OSError as error:
            if self.force_download or not _is_wrong_size(error):
                raise
            # Older versions of huggingface_hub resume what an earlier call left, however damaged.
            return hf_hub_download(self.repo_id, name, force_download=True, **options)

    def _has_commit(self, name: str, revision: str | None) -> bool:
        """Whether the file of exactly this commit is in the cache, so that nothing can be newer."""
        from huggingface_hub import try_to_load_from_cache

        return (
            not self.force_download
            and revision is not None
            and COMMIT.fullmatch(revision) is not None
            and isinstance(
                try_to_load_from_cache(self.repo_id, name, self.cache_dir, revision), str
            )
        )

    def _check_remote(self, name: str, revision: str | None, max_bytes: int) -> None:
        """Raises unless the Hub has the file and it is not too large."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.repo_id, name, revision=revision)
        remote = get_hf_file_metadata(url, token=self.token, library_name=LIBRARY)
        # Both become part of names in the cache.
        if not COMMIT.fullmatch(remote.commit_hash or "") or not re.fullmatch(
            r"[\w-]+", remote.etag or ""
        ):
            raise ConnectionError(
                f"{_endpoint()} does not answer like a Hub: no commit or no ETag in its headers"
            )
        if remote.size is None or not 0 <= remote.size <= max_bytes:
            raise ValueError(
                f"c2c_ext: {name} of {self.repo_id} must be at most {max_bytes} bytes, got "
                f"{'an unknown number' if remote.size is None else remote.size}; not downloaded"
            )


def _max_weight_bytes(config: FuserConfig) -> int:
    """The most that a weights file of this configuration can take: float64 and a header."""
    from .parameters import parameter_shapes

    return 8 * sum(math.prod(shape) for _, shape in parameter_shapes(config)) + MAX_JSON_BYTES


def _drop_if_damaged(file: Path) -> None:
    """Removes a file from the Hub's cache if its content is not what its blob's name says.

    A blob is named by its SHA-256 or its Git hash. What was damaged on the way would otherwise be
    found again by every later call.
    """
    if not file.is_symlink():
        return
    blob = file.parent / os.readlink(file)
    if not blob.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return
    if len(blob.name) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(blob, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        file.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)


@contextmanager
def _clear_errors(repo_id: str, revision: str | None, name: str | None = None) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into one clear error each."""
    from huggingface_hub import errors

    where = f"{repo_id} on {_endpoint()}"
    what = f"{name} of {where}" if name else where
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"c2c_ext: {where} is gated: accept its terms there and pass the token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"c2c_ext: no fuser directory at {repo_id}, and no such repository on {_endpoint()} "
            "(or it is private and needs a token)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"c2c_ext: {where} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"c2c_ext: {what} (revision {revision or 'main'}) was not downloaded before, and "
            "local_files_only keeps from doing so"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(
            f"c2c_ext: {what} is missing (revision {revision or 'main'})"
        ) from error
    except Exception as error:
        status = _status(error)
        if status is not None:
            kind = PermissionError if status in (401, 403) else OSError
            raise kind(f"c2c_ext: {what}: the Hub refused with HTTP status {status}") from error
        if _is_network_error(error):
            raise ConnectionError(f"c2c_ext: {_unreachable(error)}, needed for {what}") from error
        if _is_wrong_size(error):
            raise OSError(f"c2c_ext: {what}: {_one_line(error)}") from error
        raise


def _is_network_error(error: Exception) -> bool:
    client = type(error).__module__.partition(".")[0]
    return isinstance(error, (ConnectionError, TimeoutError)) or client in CLIENT_MODULES


def _is_wrong_size(error: Exception) -> bool:
    """Whether this is huggingface_hub's own OSError, which has no number: not as long as said."""
    return type(error) is OSError and error.errno is None


def _is_outage(error: Exception) -> bool:
    """Whether the Hub gave no answer, or said that it cannot right now."""
    status = _status(error)
    return _is_network_error(error) if status is None else status == 429 or status >= 500


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _unreachable(error: Exception) -> str:
    reason = f"{type(error).__name__}: {_one_line(error)}"
    return f"the Hub at {_endpoint()} cannot be reached ({reason})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT

"""A Hugging Face Hub in miniature on 127.0.0.1, and a process that talks to it and to nothing else.

`FakeHub` serves what huggingface_hub's upload and download use: repositories, branches, commits,
regular and LFS files, tokens, gates. `faults` replaces the answer for one file. `HubClient` runs
c2c_ext's verbs in an interpreter of its own, whose environment names the fake as the endpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_theonegoodtoken"
USER = "me"
ROOT = Path(__file__).parent


@dataclass
class Repository:
    """Files by commit, commits by branch. ``lfs`` names the files that are stored as such."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    lfs: set[str] = field(default_factory=set)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds or replaces files; returns the commit's hash."""
        tree = {**self.commits[self.branches[branch]], **files}
        listing = [(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(tree.items())]
        sha = hashlib.sha1(repr((self.branches[branch], listing)).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class FakeHub:
    """The server; a context manager. `requests` lists (method, path) of all that was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # LFS
        self.lfs_suffixes: tuple[str, ...] = ()  # which uploads go the LFS way
        self.faults: dict[tuple[str, str], Callable[[Handler, bytes], None]] = {}
        self.requests: list[tuple[str, str]] = []
        self._listen(0)

    def _listen(self, port: int) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def _close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Forgets everything; the address stays."""
        for state in (self.repositories, self.renamed, self.objects, self.faults, self.requests):
            state.clear()
        self.lfs_suffixes = ()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Connections are refused meanwhile."""
        self._close()
        try:
            yield
        finally:
            self._listen(self.port)

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: every answer ends with its connection, however wrong its length."""

    @property
    def hub(self) -> FakeHub:
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", head: bool = False, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def answer_json(self, data: object, status: int = 200) -> None:
        self.answer(status, json.dumps(data).encode(), Content_Type="application/json")

    def fail(self, status: int, code: str, message: str = "no") -> None:
        headers = {"X_Error_Code": code, "X_Error_Message": message}
        self.answer(status, b"", self.command == "HEAD", **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def route(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate),
            ("POST", r"/api/models/(.+)/preupload/([^/]+)", self.preupload),
            ("POST", r"/api/models/(.+)/commit/([^/]+)", self.commit),
            ("GET", r"/api/models/(.+)/revision/([^/]+)", self.revision),
            ("POST", r"/(.+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", r"/lfs/(\w+)", self.lfs_put),
            ("GET", r"/lfs/(\w+)", self.lfs_get),
            ("HEAD|GET", r"/(.+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        for methods, pattern, handle in routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                handle(*map(unquote, match.groups()))
                return
        self.fail(404, "RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def create(self) -> None:
        data = json.loads(self.body())
        if not self.authorized():
            self.fail(401, "", "Invalid username or password.")
            return
        name = f"{data.get('organization') or USER}/{data['name']}"
        exists = name in self.hub.repositories
        if not exists:
            private = data.get("visibility") == "private" or data.get("private") is True
            self.hub.repositories[name] = Repository(private)
        url = f"{self.hub.endpoint}/{name}"
        self.answer_json({"url": url, "name": name, "id": name}, 409 if exists else 200)

    def validate(self) -> None:
        content = json.loads(self.body())["content"]
        bad = "license: unheard-of" in content
        errors = [{"message": '"license" must be one of the known'}] if bad else []
        self.answer_json({"errors": errors, "warnings": []}, 400 if bad else 200)

    def preupload(self, name: str, revision: str) -> None:
        if self.writable(name, revision) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(self.hub.lfs_suffixes) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body())["files"]
        ]
        self.answer_json({"files": files})

    def commit(self, name: str, revision: str) -> None:
        repository = self.writable(name, revision)
        if repository is None:
            return
        files = {}
        for line in self.body().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
                repository.lfs.add(value["path"])
        sha = repository.commit(files, revision)
        url = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.answer_json({"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def writable(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.fail(404, "RepoNotFound")
        elif not self.authorized():
            self.fail(401, "")
        elif revision not in repository.branches:
            self.fail(404, "RevisionNotFound")
        else:
            return repository
        return None

    def revision(self, name: str, revision: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.fail(404, "RepoNotFound")
        elif revision not in repository.branches:
            self.fail(404, "RevisionNotFound")
        else:
            self.answer_json({"id": name, "sha": repository.branches[revision], "siblings": []})

    def lfs_batch(self, name: str) -> None:
        objects = json.loads(self.body())["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        data = self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.answer(200)

    def lfs_get(self, oid: str) -> None:
        self.answer(200, self.hub.objects[oid])

    def resolve(self, name: str, revision: str, file: str) -> None:
        if name in self.hub.renamed:
            new = self.path.replace(name, self.hub.renamed[name], 1)
            self.answer(307, b"", self.command == "HEAD", Location=new)
            return
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.authorized()):
            self.fail(404 if self.authorized() else 401, "RepoNotFound")
            return
        if repository.gated and not self.authorized():
            self.fail(403, "GatedRepo")
            return
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self.fail(404, "RevisionNotFound")
            return
        data = repository.commits[sha].get(file)
        fault = self.hub.faults.get((self.command, file))
        if fault is not None:
            fault(self, data or b"")
        elif data is None:
            self.fail(404, "EntryNotFound")
        elif file in repository.lfs:
            oid = hashlib.sha256(data).hexdigest()
            self.hub.objects[oid] = data
            linked = {"X_Linked_Size": len(data), "X_Linked_Etag": f'"{oid}"'}
            location = f"http://localhost:{self.hub.port}/lfs/{oid}"  # another host, like a CDN
            head = self.command == "HEAD"
            self.answer(302, b"", head, Location=location, X_Repo_Commit=sha, **linked)
        else:
            self.serve(sha, data, data)

    def serve(self, sha: str, data: bytes, sent: bytes, **headers: object) -> None:
        """Answers with ``sent`` under the ETag of ``data``, as the Hub gives it."""
        etag = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        known = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, **headers}
        self.answer(200, sent, self.command == "HEAD", **known)


class HubClient:
    """A process in which the Hub's address is ``endpoint``; a context manager."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "127.0.0.1,localhost",
            **environment,
        }
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        self.errors = open(home / "stderr", "w+")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "hub_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=kept | settings,
            text=True,
        )

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Runs one verb of hub_worker.py and returns its answer."""
        print(json.dumps({"verb": verb, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"the worker ended: {self.errors.read()}")
        return json.loads(line)

    def __enter__(self) -> HubClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

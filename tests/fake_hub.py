"""A stand-in for the Hugging Face hub on the loopback: enough of its API for the real libraries.

HF_ENDPOINT is read when `huggingface_hub` is imported, so a program that is to use the stand-in is
started with `FakeHub.environment` set, or sets it itself before that import.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class _Repository:
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """Serve data sets and models between `with FakeHub() as hub:` and its end.

    Adding a repository again adds a commit, which becomes "main"; the older ones stay.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, _Repository] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: from now on nothing answers."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that lead the libraries here, with an empty cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "USE_PARQUET_EXPORT": "0",
            "NO_PROXY": "127.0.0.1",
        }

    def add_dataset(
        self, repository: str, files: Files, *, gated: bool = False, tag: str | None = None
    ) -> str:
        """Add a commit of a data set, e.g. {"data/train-00000-of-00001.parquet": ...}."""
        return self._add(f"datasets/{repository}", files, gated, tag)

    def add_model(
        self, repository: str, folder: Path, *, gated: bool = False, tag: str | None = None
    ) -> str:
        """Add a commit of a model with the files of a folder; return the commit."""
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self._add(f"models/{repository}", files, gated, tag)

    def clear(self) -> None:
        """Forget every repository."""
        self.repositories.clear()

    def _add(self, key: str, files: Files, gated: bool, tag: str | None) -> str:
        repository = self.repositories.setdefault(key, _Repository())
        repository.gated = gated
        digest = hashlib.sha1(f"{key} {len(repository.commits)}".encode())
        for path in sorted(files):
            digest.update(path.encode() + b"\0" + files[path])
        commit = digest.hexdigest()
        repository.commits[commit] = dict(files)
        repository.refs["main"] = commit
        if tag is not None:
            repository.refs[tag] = commit
        return commit


class _Refused(Exception):
    def __init__(self, status: int, code: str, commit: str | None = None) -> None:
        self.status, self.code, self.commit = status, code, commit


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.0"  # a connection for each request: none outlives `stop`

    def do_GET(self) -> None:
        self._answer(self._route)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self._answer(lambda path: self._paths_info(path, parse_qs(body).get("paths", [])))

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, route: Callable[[str], None]) -> None:
        try:
            route(urlsplit(self.path).path)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code}
            if refused.commit:
                headers["X-Repo-Commit"] = refused.commit
            self._send(refused.status, b"", headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _find(self, kind: str, name: str, revision: str) -> tuple[_Repository, str, Files]:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            raise _Refused(404, "RepoNotFound")
        revision = unquote(revision)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return repository, commit, repository.commits[commit]

    def _route(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 4:
            self._api(parts[1], "/".join(parts[2:4]), parts[4:])
            return
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if len(parts) < 5 or parts[2] != "resolve":
            raise _Refused(404, "EntryNotFound")
        self._file(kind, "/".join(parts[:2]), parts[3], unquote("/".join(parts[4:])))

    def _api(self, kind: str, name: str, rest: list[str]) -> None:
        what, revision, *folders = rest or ["revision", "main"]
        repository, commit, files = self._find(kind, name, revision)
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            shown = {"gated": "manual" if repository.gated else False, "private": False}
            self._json({"id": name, "sha": commit, "siblings": siblings, "tags": [], **shown})
        elif what == "tree":
            recursive = "recursive=true" in self.path.lower()
            self._json(_tree(files, unquote("/".join(folders)), recursive, commit))
        else:
            raise _Refused(404, "EntryNotFound")

    def _paths_info(self, path: str, wanted: list[str]) -> None:
        _, _, kind, *parts = path.split("/")
        _, commit, files = self._find(kind, "/".join(parts[:2]), parts[3])
        entries = {entry["path"]: entry for entry in _tree(files, "", True, commit)}
        self._json([entries[path] for path in wanted if path in entries])

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository, commit, files = self._find(kind, name, revision)
        if repository.gated:  # as on the hub: the card and the tree are public, the files are not
            raise _Refused(401, "GatedRepo")
        if path not in files:
            raise _Refused(404, "EntryNotFound", commit)
        content, status = files[path], 200
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        self._send(status, content, headers)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files: Files, folder: str, recursive: bool, commit: str) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    inside = {path: content for path, content in files.items() if path.startswith(prefix)}
    if folder and not inside:
        raise _Refused(404, "EntryNotFound", commit)
    entries: dict[str, dict[str, object]] = {}
    for path, content in inside.items():
        names = path.removeprefix(prefix).split("/")
        for depth in range(1, len(names)):
            parent = prefix + "/".join(names[:depth])
            if recursive or depth == 1:
                oid = hashlib.sha1(parent.encode()).hexdigest()
                entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        if recursive or len(names) == 1:
            size = len(content)
            entries[path] = {"type": "file", "path": path, "oid": _oid(content), "size": size}
    return list(entries.values())

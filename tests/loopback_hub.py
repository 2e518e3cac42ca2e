"""A hub on loopback: the part of huggingface.co's protocol that downloads and commits use, of
repositories held in memory.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import pathlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

Files = dict[str, bytes]
_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(.*))?")
_FILE = re.compile(r"(?:/(datasets))?/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Hub:
    """Repositories by kind and name, `{(kind, name): {revision: files}}`; and what was asked for.

    Attributes:
      requests: (method, path) of each request so far. ranges: the parts of files that were asked
        for. cut: files whose next download ends after that many bytes.
    """

    def __init__(self, address: str):
        self.address = address
        self.repos: dict[tuple[str, str], dict[str, Files]] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.cut: dict[str, int] = {}

    def add(self, name: str, files: Files, revision: str = "main", kind: str = "models") -> None:
        """Puts files at a branch of a repository."""
        self.repos.setdefault((kind, name), {})[revision] = files

    def commit_of(self, kind: str, name: str, revision: str) -> str | None:
        """The hash of a revision's files; None if there is no such revision."""
        branches = self.repos.get((kind, name), {})
        hashes = {branch: _hash(files) for branch, files in branches.items()}
        return hashes.get(revision, revision if revision in hashes.values() else None)

    def files(self, kind: str, name: str, revision: str) -> Files:
        """The files of a branch or a commit."""
        branches = self.repos[kind, name]
        commit = self.commit_of(kind, name, revision)
        return next(files for files in branches.values() if _hash(files) == commit)


def _hash(files: Files) -> str:
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + hashlib.sha1(files[path]).digest())
    return digest.hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """No line on the terminal a request."""

    def _json(self, values: object) -> None:
        self._send(json.dumps(values).encode(), 200, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str], cut: int = -1) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut < 0 else content[:cut])
        if cut >= 0:
            self.close_connection = True

    def _missing(self, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        self._send(b"{}", 404, headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(url.path)))
        if match := _API.fullmatch(unquote(url.path)):
            return self._answer(*match.groups(), parse_qs(url.query))
        if match := _FILE.fullmatch(unquote(url.path)):
            return self._file(match[1] or "models", *match.groups()[1:])
        self._missing("EntryNotFound")

    def _answer(self, kind: str, name: str, rest: str | None, query: dict) -> None:
        """What there is in a repository."""
        if (kind, name) not in self.hub.repos:
            return self._missing("RepoNotFound")
        what, _, more = (rest or "revision/main").partition("/")
        revision, _, folder = more.partition("/")
        commit = self.hub.commit_of(kind, name, revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        files = self.hub.files(kind, name, revision)
        if what == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts = {"id": name, "sha": commit, "siblings": siblings, "private": False}
            return self._json(facts | {"tags": [], "downloads": 0, "lastModified": None})
        inside = {path: files[path] for path in sorted(files) if path.startswith(folder)}
        if folder and not inside:
            return self._missing("EntryNotFound")
        self._json(list(_entries(inside, folder, "recursive" in query)))

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        if (kind, name) not in self.hub.repos:
            return self._missing("RepoNotFound")
        commit = self.hub.commit_of(kind, name, revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        content = self.hub.files(kind, name, revision).get(path)
        if content is None:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit}
        headers |= {"X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            cut = self.hub.cut.pop(path, -1) if self.command == "GET" else -1
            return self._send(content, 200, headers, cut)
        first, last = int(span[1]), int(span[2] or len(content) - 1)
        self.hub.ranges.append(self.headers["Range"])
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(content[first : last + 1], 206, headers)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(("POST", path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.headers.get("Authorization"):
            return self._send(b'{"error": "no token"}', 401, {"X-Error-Message": "no token"})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.hub.repos.setdefault(("models", name), {"main": {}})
            return self._json({"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":  # of a card's head
            return self._json({"errors": [], "warnings": []})
        kind, name, rest = _API.fullmatch(path).groups()
        what, _, revision = rest.partition("/")
        branches = self.hub.repos[kind, name]
        if what == "branch":
            branches.setdefault(revision, dict(branches["main"]))
            return self._json({})
        if what == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        files = dict(branches[revision])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        branches[revision] = files
        commit = _hash(files)
        address = f"{self.hub.address}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address})


def _entries(files: Files, folder: str, recursive: bool) -> Iterator[dict]:
    """The tree of the files, with folders."""
    seen = set()
    for path, content in files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            direct = above.count("/") == (folder.count("/") + 1 if folder else 0)
            if above not in seen and above != folder and (recursive or direct):
                seen.add(above)
                yield {"type": "directory", "path": above, "oid": _hash({above: b""}), "size": 0}
        if recursive or "/" not in path.removeprefix(folder).strip("/"):
            yield {"type": "file", "path": path, "oid": _blob(content), "size": len(content)}


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `Hub.address` inside of the block."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_to(monkeypatch: pytest.MonkeyPatch, address: str, cache: pathlib.Path) -> None:
    """Sets HF_ENDPOINT and HF_HUB_CACHE, which huggingface_hub reads when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def below(folder: str | pathlib.Path) -> set[str]:
    """The files in a folder, by their paths from there."""
    return {str(file.relative_to(folder)) for file in pathlib.Path(folder).rglob("*.*")}

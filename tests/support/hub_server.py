"""A stand-in for the Hugging Face Hub on the loopback interface: enough of its API to be downloaded from.

A folder `root` holds `models/OWNER/NAME/...` and `datasets/OWNER/NAME/...`. Run the code under test in its own
process with `HubServer.environment`, since the client libraries read HF_ENDPOINT when they are imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"^/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?$")
_FILE = re.compile(r"^/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class HubServer:
    """Serves `root` until the `with` block ends; `requests` lists what was asked for, `bytes_sent` how much left."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[str] = []
        self.bytes_sent = 0
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a child process that sees this hub, the network switched on, and an empty cache."""
        dropped = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(dropped)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def folder(self, kind: str, repo: str) -> Path:
        return self.root / kind / repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server_of.requests.append(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        if api := _API.match(path):
            self._api(*api.groups(), body=body, query=query)
        elif file := _FILE.match(path):
            self._file(*file.groups())
        else:
            self._missing("EntryNotFound")

    def _api(
        self,
        kind: str,
        repo: str,
        what: str | None,
        revision: str | None,
        below: str | None,
        *,
        body: bytes,
        query: Any,
    ) -> None:
        folder = self.server_of.folder(kind, repo)
        if not folder.is_dir():
            return self._missing("RepoNotFound")
        commit = _commit(folder)
        if revision not in (None, "main", commit):
            return self._missing("RevisionNotFound")
        files = _files(folder)
        if what == "tree":
            return self._tree(folder, below or "", recursive=query.get("recursive", ["false"])[0].lower() == "true")
        if what == "paths-info":
            asked = _paths(body, self.headers.get("Content-Type") or "")
            found = [_entry(folder, folder / path) for path in asked if path and (folder / path).exists()]
            return self._json(found)
        siblings = [{"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in files]
        return self._json(
            {"id": repo, "sha": commit, "siblings": siblings, "private": False, "gated": False, "disabled": False,
             "tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z",
             "createdAt": "2026-01-01T00:00:00.000Z"}
        )  # fmt: skip

    def _tree(self, folder: Path, below: str, *, recursive: bool) -> None:
        top = folder / below
        if not top.is_dir():
            return self._missing("EntryNotFound")
        paths = sorted(top.rglob("*") if recursive else top.iterdir())
        return self._json([_entry(folder, path) for path in paths])

    def _file(self, kind: str | None, repo: str, revision: str, name: str) -> None:
        folder = self.server_of.folder(kind or "models", repo)
        if not folder.is_dir():
            return self._missing("RepoNotFound")
        path = folder / name
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return self._missing("EntryNotFound")
        content = path.read_bytes()
        headers = {"ETag": f'"{_blob(path)}"', "X-Repo-Commit": _commit(folder), "Accept-Ranges": "bytes"}
        status = 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return self._send(status, content, headers | {"Content-Type": "application/octet-stream"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        body = json.dumps({"error": code}).encode()
        self._send(404, body, {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.server_of.bytes_sent += len(body)
            self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    return {"type": "file", "oid": _blob(path), "size": path.stat().st_size, "path": name}


def _blob(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _commit(folder: Path) -> str:
    names = "".join(f"{path.relative_to(folder)}:{_blob(path)}\n" for path in _files(folder))
    return hashlib.sha1(names.encode()).hexdigest()


def _paths(body: bytes, content_type: str) -> list[str]:
    if "json" in content_type:
        asked = json.loads(body)["paths"]
        return [asked] if isinstance(asked, str) else list(asked)
    return parse_qs(body.decode()).get("paths", [])

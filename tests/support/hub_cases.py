"""A hub for tests: what the client asks of the real one, of repositories in memory; processes that use it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    """Files by commit; `main` is the last one."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    access: str = "open"  # gated: nobody has accepted the terms; private: the token is needed

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files on top of the last commit and return the new one."""
        before = list(self.commits.values())[-1] if self.commits else {}
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = before | files
        return name

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class Hub(ThreadingHTTPServer):
    """The server; `asked` has every request as it came, `tokens` those that arrived where files are kept."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.tokens: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], access: str = "open") -> str:
        return self.repositories.setdefault(name, Repository(access=access)).commit(files)

    def add_folder(self, name: str, folder: Path, below: str) -> str:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(
            name, {f"{below}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}
        )


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def run_python(
    script: str, *arguments: object, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process whose hub client has no cache but `home` and no other settings than these."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    folders = {"HF_HOME": str(home / "hub"), "XDG_CACHE_HOME": str(home / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=clean | folders | environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )


def run_cli(*arguments: object, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as `run_python` does."""
    script = "import sys; from cosettle_cache.cli import run_command; sys.exit(run_command(sys.argv[1:]))"
    return run_python(script, *arguments, home=home, **environment)


_API = re.compile(r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/?]+)(?P<rest>/[^?]*)?(\?(?P<query>.*))?")
_FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def _get(self, *, body: bool) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(self.path)
        if path == "/":
            self._send(b"", {})
        elif path.startswith("/kept/"):
            self.server.tokens.append(self.headers["Authorization"])
            self._file(bytes.fromhex(path[6:]).decode().split("\n"), body)
        elif match := _FILE.fullmatch(path):
            name = ("datasets/" if match["kind"] else "") + match["name"]
            self._resolve(name, match["revision"], match["file"], body)
        elif match := _API.fullmatch(path):
            self._ask(match)
        else:
            self._refuse(404, "")

    def _find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files, or None when a refusal was sent."""
        repository = self.server.repositories.get(name)
        is_known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repository is None or (repository.access == "private" and not is_known):
            self._refuse(404 if is_known else 401, "RepoNotFound")
            return None
        if repository.access == "gated":
            self._refuse(403 if is_known else 401, "GatedRepo")
            return None
        commit = repository.head if revision == "main" else revision
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _resolve(self, name: str, revision: str, file: str, body: bool) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        commit, files = found
        if file not in files:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif name.startswith("datasets/") and "tokens/" in file:
            # As large files of the real hub: they are kept elsewhere, where the token has no business.
            kept = "\n".join([name, commit, file]).encode().hex()
            port = self.server.server_port
            self._send(b"", {"Location": f"http://localhost:{port}/kept/{kept}"}, status=302)
        else:
            self._file([name, commit, file], body)

    def _file(self, place: list[str], body: bool) -> None:
        name, commit, file = place
        data = self.server.repositories[name].commits[commit][file]
        tag = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
        if span is None:
            self._send(data, tag, body=body)
            return
        first = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
        last = min(int(span[2]), len(data) - 1) if span[1] and span[2] else len(data) - 1
        tag["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(data[first : last + 1], tag, status=206, body=body)

    def _ask(self, match: re.Match[str]) -> None:
        name = ("datasets/" if match["kind"] == "dataset" else "") + match["name"]
        verb, _, rest = (match["rest"] or "/")[1:].partition("/")
        revision, _, folder = rest.partition("/")
        found = self._find(name, revision or "main")
        if found is None:
            return
        commit, files = found
        if verb == "tree":
            below = [file for file in files if file.startswith(folder and f"{folder}/")]
            if not below:
                self._refuse(404, "EntryNotFound")
                return
            recursive = "recursive=true" in (match["query"] or "").lower()
            listed: dict[str, dict[str, Any]] = {}
            for file in below:
                inner = file[len(folder) + 1 if folder else 0 :]
                if recursive or "/" not in inner:
                    listed[file] = {"type": "file", "path": file, "size": len(files[file]), "oid": "0" * 40}
                else:
                    path = f"{folder}/{inner.partition('/')[0]}".lstrip("/")
                    listed[path] = {"type": "directory", "path": path, "oid": "0" * 40}
            self._json(list(listed.values()))
            return
        siblings = [{"rfilename": file} for file in files]
        private = self.server.repositories[name].access == "private"
        facts = {"id": match["name"], "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
        self._json({**facts, "likes": 0, "private": private, "gated": False, "lastModified": None})

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._refuse(401, "")
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.add(name, {".gitattributes": b""}, "private" if private else "open")
            self._json({"url": f"{self.server.address}/{name}"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path):
            self._write(match[1], match[2], data)
        else:
            self._refuse(404, "")

    def _write(self, name: str, verb: str, data: bytes) -> None:
        if verb == "preupload":
            files = [item["path"] for item in json.loads(data)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            self._json({"files": modes})
            return
        lines = [json.loads(line) for line in data.splitlines()]
        head = lines[0]["value"].get("parentCommit")
        if head not in (None, self.server.repositories[name].head):
            self._refuse(412, "")
            return
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        commit = self.server.add(name, added)
        self._json({"commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}"})

    def _json(self, document: Any) -> None:
        self._send(json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(b"", {"X-Error-Code": code, **(headers or {})}, status=status)

    def _send(self, data: bytes, headers: dict[str, str], *, status: int = 200, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass

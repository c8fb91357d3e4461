"""A stand-in for the hub: its HTTP, as huggingface_hub's client speaks it, on this machine; it misbehaves on command.

Weights and tokenizer.json are in LFS: HEAD and GET are redirected to another host name (localhost for 127.0.0.1), as
the hub does to its CDN. Other files are sent by the hub itself.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", "tokenizer.json")


@dataclass
class Fault:
    """What goes wrong with GETs of files whose name ends in `file`, `times` times.

    cut: the connection ends after `at` bytes of an answer. status: this one, with `code` as X-Error-Code. flip: the
    byte at `at` is another. truncate: the file ends `at` bytes early, the answer whole. slow: a wait of `at`
    seconds before every 64 KB or less. whole: ranges are ignored.
    """

    kind: str
    file: str = ""
    at: float = 0
    code: str = ""
    times: int = 1


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    host: str


@dataclass
class Hub:
    """Repositories by (name, commit), branches by (name, branch), and what was asked of the server so far."""

    repositories: dict[tuple[str, str], Path] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)  # repository: the token that may read it
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    most_at_once: int = 0
    sending: int = 0
    bytes_sent: int = 0
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repository: str, directory: Path, branch: str = "main") -> str:
        """Serves `directory`; returns the commit that `branch` points at."""
        commit = hashlib.sha1(f"{repository} {directory}".encode()).hexdigest()
        self.repositories[repository, commit] = directory
        self.branches[repository, branch] = commit
        return commit

    def start(self) -> str:
        """Begins to answer; returns the endpoint."""
        self.server = ThreadingHTTPServer(("", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        """Stops to answer; the port is closed."""
        self.server.shutdown()
        self.server.server_close()

    def fault_for(self, name: str) -> Fault | None:
        """The next fault of a file, used up by this call."""
        with self.mutex:
            for fault in self.faults:
                if fault.times > 0 and name.endswith(fault.file):
                    fault.times -= 1
                    return fault
        return None

    def gets(self, name: str) -> list[Request]:
        """GETs of a file's bytes, from hub or CDN, that were not redirects."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith("/" + name) and "sent" in r.host]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        """Nothing: pytest shows what a test asserts."""

    def do_HEAD(self) -> None:
        """Metadata of a file."""
        self._answer()

    def do_GET(self) -> None:
        """A file, a part of one, or what the hub says of a repository."""
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.noted = Request(
            self.command,
            unquote(url.path),
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            self.headers["Host"],
        )
        self.hub.requests.append(self.noted)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", url.path):
            self._repository(found[1], unquote(found[2] or "main"), "blobs" in parse_qs(url.query))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", url.path):
            self._send(self.hub.repositories[found[1], found[2]] / unquote(found[3]), {})
        else:
            self._refuse(404, "")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _commit(self, repository: str, revision: str) -> str | None:
        if all(name != repository for name, _ in self.hub.repositories):
            self._refuse(404, "RepoNotFound")
            return None
        commit = self.hub.branches.get((repository, revision), revision)
        if (repository, commit) not in self.hub.repositories:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _repository(self, name: str, revision: str, blobs: bool) -> None:
        if (commit := self._commit(name, revision)) is None:
            return
        if (fault := self.hub.fault_for("/api")) is not None:
            self._refuse(int(fault.at), fault.code)
            return
        siblings = []
        for path in sorted(self.hub.repositories[name, commit].iterdir()):
            sibling = {"rfilename": path.name}
            if blobs:
                sibling |= {"size": path.stat().st_size, "blobId": git_hash(path)}
                if path.name.endswith(LFS):
                    sibling["lfs"] = {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 135}
            siblings.append(sibling)
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        if (commit := self._commit(name, revision)) is None:
            return
        token = self.hub.gated.get(name)
        if token is not None and self.noted.authorization != f"Bearer {token}":
            self._refuse(403 if self.noted.authorization else 401, "GatedRepo")
            return
        path = self.hub.repositories[name, commit] / file
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        lfs = file.endswith(LFS)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256(path) if lfs else git_hash(path)}"'}
        if not lfs:
            self._send(path, headers)
            return
        self.send_response(302)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("X-Linked-ETag", f'"{sha256(path)}"')
        self.send_header("X-Linked-Size", str(path.stat().st_size))
        port = self.server.server_port
        self.send_header("Location", f"http://localhost:{port}/cdn/{name}/{commit}/{file}?X-Signature=signed-secret")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, path: Path, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        fault = self.hub.fault_for(path.name) if self.command == "GET" else None
        kind = fault.kind if fault else ""
        if kind == "status":
            self._refuse(int(fault.at), fault.code)
            return
        if kind == "truncate":
            content = content[: -int(fault.at)]
        if kind == "flip":
            changed = bytearray(content)
            changed[int(fault.at)] ^= 1
            content = bytes(changed)
        first, last = 0, len(content) - 1
        partly = re.fullmatch(r"bytes=(\d+)-(\d*)", self.noted.range or "") if kind != "whole" else None
        if partly:
            first, last = int(partly[1]), min(int(partly[2] or last), last)
        self.noted.host += " sent" if self.command == "GET" else ""
        self.send_response(206 if partly else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if partly:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command == "GET":
            self._body(content[first : last + 1], fault)

    def _body(self, body: bytes, fault: Fault | None) -> None:
        hub, kind = self.hub, fault.kind if fault else ""
        with hub.mutex:
            hub.sending += 1
            hub.most_at_once = max(hub.most_at_once, hub.sending)
        try:
            if kind == "cut":
                body = body[: int(fault.at)]
            pieces = range(0, len(body), 65_536 if kind == "slow" else max(len(body), 1))
            for start in pieces:
                time.sleep(fault.at if kind == "slow" else 0)
                piece = body[start : start + pieces.step]
                self.wfile.write(piece)
                self.wfile.flush()
                hub.bytes_sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed
        finally:
            with hub.mutex:
                hub.sending -= 1
        if kind == "cut":
            self.close_connection = True


def sha256(path: Path) -> str:
    """As the hub gives it for LFS files."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_hash(path: Path) -> str:
    """The entity tag of a file that is not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

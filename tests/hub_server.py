"""A stand-in for the hub: its HTTP, as huggingface_hub's client speaks it, on this machine; it misbehaves on command.

Weights, pictures and tokenizer.json are in LFS: HEAD and GET are redirected to another host name (localhost for
127.0.0.1), as the hub does to its CDN. Other files are sent by the hub itself.

With a `storage` it takes uploads: repositories and branches are made, large files come by LFS (in one piece or in
parts) or by Xet (xorbs and shards, which are taken apart, so that a file counts as there only if its bytes are), and
commits that name files which have not come are refused. What it knows of the protocols was read in the client and
in what the client sends; the real hub was not asked.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow

LFS = (".safetensors", "tokenizer.json", ".png")
GIT_ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Fault:
    """What goes wrong with GETs of files whose name ends in `file`, `times` times.

    Of uploads, with requests whose method and path end so, /api/models/{repository}/commit/main say: status, with a
    body and a reason that have the request's Authorization in them; cut, once `at` bytes of the body have come; hang:
    as cut, a second later; lost: all is done as asked, and the connection ends without an answer; flip: a large file
    is kept with its byte at `at` another.

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
    storage: Path | None = None  # where uploads go
    tokens: dict[str, str] = field(default_factory=dict)  # token: its role, write or read; who may upload
    owners: tuple[str, ...] = ("org",)  # who these tokens may make repositories of
    private: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256, once they are whole
    pieces: dict[tuple[str, int], bytes] = field(default_factory=dict)  # parts of large files
    xorbs: dict[str, list[bytes]] = field(default_factory=dict)  # chunks of each xorb of Xet
    part_size: int | None = None  # of large files over LFS; in one piece if None
    commits: list[tuple[str, str, dict]] = field(default_factory=list)  # repository, branch, operations by path
    bytes_received: int = 0  # of large files and their parts, headers not counted
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def add(self, repository: str, directory: Path, branch: str = "main") -> str:
        """Serves `directory`; returns the commit that `branch` points at."""
        commit = hashlib.sha1(f"{repository} {directory}".encode()).hexdigest()
        self.repositories[repository, commit] = directory
        self.branches[repository, branch] = commit
        return commit

    def start(self) -> str:
        """Begins to answer; returns the endpoint."""
        self.server = Server(("", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        """Stops to answer; the port is closed."""
        self.server.shutdown()
        self.server.server_close()

    def put(self, repository: str, branch: str, added: dict[str, bytes], removed: list[str]) -> str:
        """Makes a commit of what the branch has, and these changes; returns it."""
        before = self.repositories.get((repository, self.branches.get((repository, branch), "")))
        folder = self.storage / f"{len(self.repositories)}"
        if before is None:
            folder.mkdir(parents=True)
        else:
            shutil.copytree(before, folder)
        for name in removed:
            (folder / name).unlink()
        for name, content in added.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return self.add(repository, folder, branch)

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


class Server(ThreadingHTTPServer):
    """A server whose clients may be killed."""

    def handle_error(self, request, client_address) -> None:
        """Show what went wrong, unless it is that the client has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


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
        if url.path == "/api/whoami-v2":
            self._whoami()
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", url.path):
            self._repository(found[1], unquote(found[2] or "main"), "blobs" in parse_qs(url.query))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", url.path):
            self._send(self.hub.repositories[found[1], found[2]] / unquote(found[3]), {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", url.path):
            self._tree(found[1], unquote(found[2]))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-write-token/(.+)", url.path):
            self._xet_token(found[1])
        else:
            self._refuse(404, "")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _commit(self, repository: str, revision: str) -> str | None:
        hidden = repository in self.hub.private and self._token() not in self.hub.tokens
        if hidden or all(name != repository for name, _ in self.hub.repositories):
            self._refuse(401 if hidden else 404, "RepoNotFound")
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
        siblings, folder = [], self.hub.repositories[name, commit]
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            sibling = {"rfilename": str(path.relative_to(folder))}
            if blobs:
                sibling |= {"size": path.stat().st_size, "blobId": git_hash(path)}
                if path.name.endswith(LFS):
                    sibling["lfs"] = {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 135}
            siblings.append(sibling)
        said = {"id": name, "modelId": name, "sha": commit, "private": name in self.hub.private}
        self._json(said | {"siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str) -> None:
        if (commit := self._commit(name, revision)) is None:
            return
        files, folder = [], self.hub.repositories[name, commit]
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found = {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size}
            lfs = {"oid": sha256(path), "size": found["size"], "pointerSize": 135}
            files.append(found | {"oid": git_hash(path)} | ({"lfs": lfs} if path.name.endswith(LFS) else {}))
        self._json(files)

    def _json(self, said: dict | list, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
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

    # Uploads

    def do_POST(self) -> None:
        """A step of an upload, or a part of one."""
        self._take()

    def do_PUT(self) -> None:
        """A large file, or a part of one."""
        self._take()

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _take(self) -> None:
        """Reads a request whole, unless it is to be cut, and does what it asks for."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.noted = Request(self.command, path, None, self.headers.get("Authorization"), self.headers["Host"])
        self.hub.requests.append(self.noted)
        fault = self.hub.fault_for(f"{self.command} {path}")
        kind = fault.kind if fault else ""
        body = self._read(fault)
        if kind in ("cut", "hang"):
            time.sleep(1 if kind == "hang" else 0)
            self.close_connection = True
            return
        if kind == "flip":
            changed = bytearray(body)
            changed[int(fault.at)] ^= 1
            self.hub.objects[path.split("/")[-1]] = bytes(changed)
            self._json({})
            return
        if kind == "status":
            said = f"refused: {self.headers.get('Authorization')}"
            self.send_response(int(fault.at), said)
            self.send_header("X-Error-Message", said)
            if fault.code:
                self.send_header("X-Error-Code", fault.code)
            content = json.dumps({"error": said}).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        if kind == "lost":
            self.wfile, answers = io.BytesIO(), self.wfile
            self._do(path, body)
            self.wfile, self.close_connection = answers, True
            return
        self._do(path, body)

    def _read(self, fault: Fault | None) -> bytes:
        """The body, or its first bytes if the connection is to be cut; large files are counted as they come."""
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind in ("cut", "hang"):
            length = min(length, int(fault.at))
        large = self.command == "PUT" or "/xorbs/" in self.path
        body = bytearray()
        while len(body) < length and (piece := self.rfile.read1(min(65_536, length - len(body)))):
            body += piece
            with self.hub.mutex:
                self.hub.bytes_received += len(piece) if large else 0
        return bytes(body)

    def _do(self, path: str, body: bytes) -> None:
        if int(self.headers.get("Content-Length") or 0) != len(body):
            self.close_connection = True  # the client was killed
            return
        for pattern, step in UPLOAD_STEPS.items():
            if found := re.fullmatch(pattern, path):
                getattr(self, step)(body, *found.groups())
                return
        self._refuse(404, "")

    def _may_write(self) -> bool:
        """Whether the token may; if not, the request has been refused."""
        role = self.hub.tokens.get(self._token())
        if role != "write":
            self._refuse(403 if role else 401, "")
        return role == "write"

    def _whoami(self) -> None:
        role = self.hub.tokens.get(self._token())
        if role is None:
            self._json({"error": f"Invalid user token {self._token()}"}, 401)
        else:
            self._json({"name": "someone", "type": "user", "auth": {"accessToken": {"role": role}}})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write():
            return
        if asked["organization"] not in self.hub.owners:
            self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif any(name == known for known, _ in self.hub.repositories):
            self._json({"error": "You already created this model repo", "url": name}, 409)
        else:
            if asked["visibility"] == "private":
                self.hub.private.add(name)
            self.hub.put(name, "main", {".gitattributes": GIT_ATTRIBUTES.encode()}, [])
            self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def _branch(self, body: bytes, repository: str, branch: str) -> None:
        if self._may_write() and (commit := self._commit(repository, "main")) is not None:
            self.hub.branches[repository, branch] = commit
            self._json({})

    def _validate(self, _: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repository: str, branch: str) -> None:
        if not self._may_write() or (commit := self._commit(repository, branch)) is None:
            return
        files = []
        for asked in json.loads(body)["files"]:
            mode = "lfs" if asked["path"].endswith(LFS) else "regular"
            known = self.hub.repositories[repository, commit] / asked["path"]
            oid = (sha256 if mode == "lfs" else git_hash)(known) if known.is_file() else None
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files, "commitOid": commit})

    def _batch(self, body: bytes, repository: str) -> None:
        """What is to be done for each large file: nothing for one that is here."""
        if not self._may_write():
            return
        here, objects, part = f"http://{self.headers['Host']}", [], self.hub.part_size
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            found = {"oid": oid, "size": size}
            objects.append(found)
            if oid in self.hub.objects:
                continue
            upload = {"href": f"{here}/lfs/{oid}?X-Signature=signed-secret"}
            if part is not None and size > part:
                parts = {
                    f"{number:05d}": f"{here}/lfs/{oid}/{number}?X-Signature=signed-secret"
                    for number in range(1, -(-size // part) + 1)
                }
                upload = {"href": f"{here}/lfs/{oid}/whole", "header": {"chunk_size": str(part), **parts}}
            found["actions"] = {"upload": upload, "verify": {"href": f"{here}/lfs/{oid}/verify"}}
        self._json({"transfer": "basic" if part is None else "multipart", "objects": objects})

    def _object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "")
            return
        self.hub.objects[oid] = body
        self._json({})

    def _part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.pieces[oid, int(number)] = body
        self._json({}, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _whole(self, body: bytes, oid: str) -> None:
        parts = [self.hub.pieces.get((oid, part["partNumber"]), b"") for part in json.loads(body)["parts"]]
        self._object(b"".join(parts), oid)

    def _verify(self, body: bytes, oid: str) -> None:
        known = self.hub.objects.get(oid)
        same = known is not None and len(known) == json.loads(body)["size"]
        self._json({}) if same else self._refuse(404, "")

    def _write(self, body: bytes, repository: str, branch: str) -> None:
        """A commit: a header, then an operation a line."""
        if not self._may_write() or (parent := self._commit(repository, branch)) is None:
            return
        header, *operations = [json.loads(line) for line in body.splitlines()]
        if header["value"].get("parentCommit", parent) != parent:
            self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            return
        added, removed = {}, []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                removed.append(value["path"])
            elif operation["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.hub.objects:
                added[value["path"]] = self.hub.objects[value["oid"]]
            else:
                self._json({"error": f"{value['path']}: its content has not come"}, 400)
                return
        said = {operation["value"]["path"]: operation["key"] for operation in operations}
        self.hub.commits.append((repository, branch, {"": header["value"], **said}))
        commit = self.hub.put(repository, branch, added, removed)
        self._json({"success": True, "commitOid": commit, "commitUrl": f"/{repository}/commit/{commit}"})

    # Xet

    def _xet_token(self, repository: str) -> None:
        if self._may_write() and self._commit(repository, "main") is not None:
            address = f"http://{self.headers['Host']}/cas"
            self._json({"casUrl": address, "accessToken": "xet-secret", "exp": int(time.time()) + 3600})

    def _xorb(self, body: bytes, name: str) -> None:
        new = name not in self.hub.xorbs
        self.hub.xorbs[name] = xorb_chunks(body)
        self._json({"was_inserted": new})

    def _shard(self, body: bytes) -> None:
        """Files, each of chunks of xorbs; one counts as here if its bytes have the sha256 that the shard gives."""
        for digest, terms in shard_files(body):
            if any(name not in self.hub.xorbs for name, *_ in terms):
                self._refuse(400, "")
                return
            content = b"".join(part for name, first, end in terms for part in self.hub.xorbs[name][first:end])
            if hashlib.sha256(content).hexdigest() != digest:
                self._refuse(400, "")
                return
            self.hub.objects[digest] = content
        self._json({"result": 1})


UPLOAD_STEPS = {
    r"/api/repos/create": "_create",
    r"/api/validate-yaml": "_validate",
    r"/api/models/([^/]+/[^/]+)/branch/(.+)": "_branch",
    r"/api/models/([^/]+/[^/]+)/preupload/(.+)": "_preupload",
    r"/api/models/([^/]+/[^/]+)/commit/(.+)": "_write",
    r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": "_batch",
    r"/lfs/([0-9a-f]{64})": "_object",
    r"/lfs/([0-9a-f]{64})/(\d+)": "_part",
    r"/lfs/([0-9a-f]{64})/whole": "_whole",
    r"/lfs/([0-9a-f]{64})/verify": "_verify",
    r"/cas/v1/xorbs/default/([0-9a-f]{64})": "_xorb",
    r"/cas/v1/shards": "_shard",  # asked for after /cas/v2/shards, which is not here
}


def xorb_chunks(body: bytes) -> list[bytes]:
    """The chunks of a xorb: each has a header of 8 bytes (version, stored size, compression, size) before it."""
    chunks, start = [], 0
    while start < len(body) and body[start] == 0:
        stored, size = (int.from_bytes(body[at : at + 3], "little") for at in (start + 1, start + 5))
        compression = body[start + 4]
        data = body[start + 8 : start + 8 + stored]
        if compression:
            data = pyarrow.decompress(data, size, codec="lz4", asbytes=True)
        if compression == 2:  # bytes grouped by their place in words of four
            grouped, data, begin = data, bytearray(size), 0
            for place in range(4):
                length = len(data[place::4])
                data[place::4] = grouped[begin : begin + length]
                begin += length
        chunks.append(bytes(data))
        start += 8 + stored
    return chunks


def shard_files(body: bytes) -> list[tuple[str, list[tuple[str, int, int]]]]:
    """(sha256, [(xorb, first chunk, end)]) of each file of a shard, whose first section lists them in rows of 48
    bytes: a header each, its terms, as many rows to verify them if bit 31 of its flags is set, its sha256 if bit 30 is.
    """
    files, start = [], 48
    while body[start : start + 32] != b"\xff" * 32:
        flags, count = struct.unpack_from("<II", body, start + 32)
        rows = [body[start + 48 * row : start + 48 * (row + 1)] for row in range(1, count + 1)]
        terms = [(xet_hash(row), *struct.unpack_from("<II", row, 40)) for row in rows]
        start += 48 * (1 + count * (2 if flags >> 31 else 1))
        files.append((xet_hash(body[start:]), terms))
        start += 48 * (flags >> 30 & 1)
    return files


def xet_hash(data: bytes) -> str:
    """The first 32 bytes, as Xet writes hashes: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", data))


def sha256(path: Path) -> str:
    """As the hub gives it for LFS files."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_hash(path: Path) -> str:
    """The entity tag of a file that is not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

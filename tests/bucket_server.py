"""A server of the S3 protocol: moto's, on the loopback, with requests noted and faults put in."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from requant.bucket import client

BUCKET = "weights"
KEY, SECRET = "AKIAREQUANTTESTS0000", "secret+of/the/tests0123456789"


@dataclass
class Fault:
    """What befalls the next `times` requests of `method` whose path holds `path`: an answer of that `status`, or an end
    of the answer after `cut` bytes."""

    path: str
    status: int = 0
    cut: int = 0
    times: int = 1
    method: str = "GET"


class Silent(WSGIRequestHandler):
    """A handler that writes no log, and takes a connection that is gone for granted."""

    def log(self, *_) -> None:
        pass

    def connection_dropped(self, *_) -> None:
        pass


class BucketServer:
    """moto behind faults. requests: (method, path, range) of each."""

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=Silent)
        self.endpoint = f"http://127.0.0.1:{self.server.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, environ.get("HTTP_RANGE")))
        fault = next((each for each in self.faults if each.times and each.method == method and each.path in path), None)
        if fault is None:
            return self.moto(environ, start_response)
        fault.times -= 1
        if fault.status:
            body = f"<Error><Code>Fault</Code><Message>{KEY} {SECRET}</Message></Error>".encode()
            start_response(f"{fault.status} Fault", [("Content-Length", str(len(body)))])
            return [body]
        return self.cut(self.moto(environ, start_response), fault.cut)

    def cut(self, answer, count: int) -> Iterator[bytes]:
        """The first `count` bytes; then the line breaks, for the header promises more."""
        for piece in answer:
            yield piece[:count]
            count -= len(piece[:count])
            if not count:
                raise ConnectionResetError("cut")

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def upload(self, folder: Path, prefix: str) -> None:
        """Puts the files of a folder, and of those in it, under a prefix."""
        for path in (path for path in folder.rglob("*") if path.is_file()):
            boto3.client("s3").upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")

    def keys(self, prefix: str) -> set[str]:
        found = boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return {entry["Key"] for entry in found.get("Contents", [])}


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """A server with an empty bucket, which boto3 finds by its environment, here and in processes that start."""
    s3_backends.reset()
    server = BucketServer()
    settings = {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    client.cache_clear()
    yield server
    server.stop()

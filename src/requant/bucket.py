"""Files of an S3-compatible bucket, by boto3: read from any byte on, so that a transfer goes on where it ended.

Credentials, region and address are boto3's own settings: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, the
role of a machine; AWS_ENDPOINT_URL for a server other than Amazon's. None of them gets into a message: a server's
answer is told by its code, and what boto3 raised is not chained to it.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from requant.config import ADDRESS
from requant.errors import RequantError
from requant.patience import WAITS, Server, tried

COMPUTES = False  # files are what their hashes say, whoever fetched them
CHUNK = 1 << 20  # bytes
TRANSIENT = (408, 429, 500, 502, 503, 504)
LOGIN = "expected credentials that boto3 finds (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Folder:
    """A bucket, or what is under a prefix of it."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> "Folder":
        """The folder that `s3://bucket/prefix` names. Raises RequantError for another address."""
        if (found := ADDRESS.fullmatch(url)) is None:
            raise RequantError(f"{url}: no address in a bucket; expected s3://BUCKET/PREFIX")
        return cls(found["bucket"], found["prefix"] or "")

    def below(self, name: str) -> "Folder":
        """What is under `name` in it."""
        return Folder(self.bucket, self.key(name))

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def url(self, name: str) -> str:
        return f"s3://{self.bucket}/{self.key(name)}"


def sizes(folder: Folder) -> dict[str, int]:
    """{name: bytes} of the files that are in the folder itself, not in those below it."""

    def listed() -> dict[str, int]:
        pages = client().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=folder.bucket, Prefix=folder.key(""), Delimiter="/")
        entries = (entry for page in found for entry in page.get("Contents", []))
        return {entry["Key"].removeprefix(folder.key("")): entry["Size"] for entry in entries}

    return {name: size for name, size in patiently(listed, folder.url("")).items() if name}


def names_below(folder: Folder, name: str) -> set[str]:
    """The names of the files that are below `name`, from there on."""

    def listed() -> set[str]:
        pages, top = client().get_paginator("list_objects_v2"), folder.key(f"{name}/")
        found = pages.paginate(Bucket=folder.bucket, Prefix=top)
        return {entry["Key"].removeprefix(top) for page in found for entry in page.get("Contents", [])}

    return patiently(listed, folder.url(f"{name}/"))


def put(folder: Folder, name: str, file: BinaryIO) -> None:
    """Sends a file, a large one in parts: it appears whole. Raises what boto3 raises."""
    from boto3.exceptions import S3UploadFailedError

    try:
        client().upload_fileobj(file, folder.bucket, folder.key(name))
    except S3UploadFailedError as error:
        raise error.__cause__ or error from None


def pieces(folder: Folder, name: str, start: int, size: int) -> Iterator[bytes]:
    """The bytes of a file of `size` bytes from `start` on. Raises RequantError if it is of another size."""
    asked = client().get_object(Bucket=folder.bucket, Key=folder.key(name), Range=f"bytes={start}-{size - 1}")
    total = asked.get("ContentRange", "").rpartition("/")[2] or str(asked["ContentLength"])
    if total != str(size):
        raise RequantError(f"{folder.url(name)}: {total} bytes found; expected {size}")
    yield from asked["Body"].iter_chunks(CHUNK)


@dataclass(frozen=True)
class BucketModel:
    """A model in a bucket (`bucket`: its address), and the directory that its files go to."""

    bucket: str
    directory: str

    @property
    def root(self) -> Path:
        return Path(os.path.expanduser(self.directory)).absolute()

    def what(self, name: str) -> str:
        """A file, for messages."""
        return Folder.of(self.bucket).url(name)

    def place(self, name: str) -> Path:
        """Where a file is once it is whole."""
        return self.root / name

    def partial(self, name: str) -> Path:
        """Where a file grows; its name is the file's, so that it can be checked there."""
        return self.root / ".cache" / "requant" / name

    def is_here(self, name: str) -> bool:
        """Whether a file is in its place."""
        return self.place(name).exists()

    def grow(self, name: str, size: int) -> None:
        """Appends to a partial file what it lacks of `size` bytes."""
        partial, folder = self.partial(name), Folder.of(self.bucket)

        def append() -> None:
            with partial.open("ab") as file:
                if file.tell() < size:
                    for piece in pieces(folder, name, file.tell(), size):
                        file.write(piece)

        patiently(append, self.what(name), kept=lambda: partial.stat().st_size if partial.exists() else 0)

    def put(self, name: str) -> None:
        """Moves a checked file to its place."""
        self.place(name).parent.mkdir(exist_ok=True)
        os.replace(self.partial(name), self.place(name))


def nothing_stays() -> int:
    """For an action that keeps nothing of an attempt that failed."""
    return 0


def patiently(action: Callable[[], Result], what: str, kept: Callable[[], int] = nothing_stays) -> Result:
    """The result of `action`, which is tried again after a failure that may pass (`patience.tried`)."""
    return tried(Server("the bucket's server", describe, may_pass), action, what, kept, WAITS)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: the server or the line was at fault."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        return _status(error) in TRANSIENT or _code(error) in ("SlowDown", "RequestTimeout", "InternalError")
    line = exceptions.HTTPClientError | exceptions.ConnectionError | exceptions.IncompleteReadError
    return isinstance(error, line)


def describe(error: Exception) -> str | None:
    """What went wrong with a request and what to do about it; None if `error` is none of boto3's."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code, status = _code(error), _status(error)
        if code == "NoSuchBucket":
            return "no such bucket"
        if status == 404:
            return "not there"
        if status == 416:
            return "shorter than expected"
        if status in (400, 401, 403):
            return f"refused ({status} {code}); {LOGIN} and that may do this"
        return f"{status} {code} from the server"
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return f"no credentials; {LOGIN}"
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return f"no answer ({type(error).__name__})"
    if isinstance(error, exceptions.IncompleteReadError):
        return "the file came short"
    return f"{type(error).__name__}: {error}" if isinstance(error, exceptions.BotoCoreError) else None


def _code(error: Any) -> str:
    """The code of a server's answer, if it is one: what it writes in its place is not shown."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return code if re.fullmatch(r"[A-Za-z0-9.]{1,60}", code) else "unknown code"


def _status(error: Any) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


@cache
def client():
    """boto3's client, one a process: threads may share it. Checksums that not every server knows are not asked for."""
    import boto3
    from botocore.config import Config

    wanted = Config(
        connect_timeout=30,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": 3},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=16,
    )
    return boto3.session.Session().client("s3", config=wanted)

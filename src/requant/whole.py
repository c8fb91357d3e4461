"""Files appear whole: written under a temporary name beside their place, then renamed."""

import contextlib
import errno
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from requant.errors import RequantError

COMPUTES = False  # where bytes go, not which

# Why a disk takes no more, and what to do about it.
REFUSALS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "make the disk writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EIO: "check the disk",
}
# Those of them that only a write meets.
OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in messages of libraries written in Rust


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it takes the name `path` when the block ends, and is gone if that fails.

    What a killed writer of the same file left behind is removed first (`remove_leftovers`). The bytes are on the disk
    before the name is: no power cut leaves a file of that name without them. Raises RequantError naming the file if the
    disk refuses it.
    """
    path = Path(path)
    partial = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        partial.unlink(missing_ok=True)  # of an earlier process with the number of this one
        yield partial
        _to_disk(partial)
        os.replace(partial, path)
    except Exception as error:
        if (code := refusal(error, path.parent)) is None:
            raise
        raise RequantError(not_written(path, code)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """The name of the file `name` while this process writes it."""
    return f".{name}.{_place()}.{os.getpid()}.partial"


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of the file `name` in `folder`, of any file if none is named.

    Only of processes that have ended, and were of this machine: of others nobody here can tell.
    """
    of_this_machine = re.compile(rf"\.(?P<file>.+)\.{_place()}\.(?P<process>\d+)\.partial", re.DOTALL)
    for entry in os.listdir(folder):
        found = of_this_machine.fullmatch(entry)
        if found and name in (None, found["file"]) and not _runs(int(found["process"])):
            (folder / entry).unlink(missing_ok=True)


@cache
def _place() -> str:
    """Where the numbers of processes mean the same: this machine, or the container that this process is in."""
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = str(os.stat("/proc/self/ns/pid").st_ino)
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def not_written(what: str | Path, code: int) -> str:
    """The line on what the disk refused with that number of the system's error, one of REFUSALS."""
    return f"{what}: not written: {os.strerror(code)}; {REFUSALS[code]}, then run the same command again"


def refusal(error: Exception, folder: Path) -> int | None:
    """The number of the system's error if `error` says that the disk of `folder` takes nothing; None for others."""
    if isinstance(error, OSError) and error.filename and not Path(error.filename).is_relative_to(folder):
        return None
    named = _OS_ERROR.search(str(error))
    code = error.errno if isinstance(error, OSError) else int(named.group(1)) if named else None
    return code if code in REFUSALS else None


def _to_disk(path: Path) -> None:
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A build that was killed leaves Snakemake's lock files behind; this tells a dead build's from a living one's.

A build holds a shared operating-system lock on a file of its own for as long as its process lives; the system drops
it at SIGKILL or power loss. Whoever gets that lock for itself alone knows that no other build runs in this directory,
and that lock files found there are left over. The file holds the process id of a build, for whoever comes second.
"""

import contextlib
import fcntl
import os
from pathlib import Path

_held: list[int] = []


def drop_stale_locks(directory: str | Path, builds: bool = True) -> list[str]:
    """Takes this directory's build lock and, if nobody else has it, removes Snakemake's left-over lock files.

    Returns their names. Nothing is removed while another build lives. This process becomes the one that
    `other_build` names, unless it only plans (`builds` is false) or another one is named already.
    """
    state = Path(directory) / ".snakemake"
    state.mkdir(exist_ok=True)
    handle = os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.append(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stale = []
        named = _lives(_named(directory))
    else:
        stale = _locks(directory)
        for path in stale:
            path.unlink()
        named = False
    if not named:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode() if builds else b"", 0)
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return [path.name for path in stale]


def other_build(directory: str | Path) -> int | None:
    """Process id of another build that holds Snakemake's locks in this directory; call `drop_stale_locks` before."""
    named = _named(directory)
    return named if _locks(directory) and named != os.getpid() and _lives(named) else None


def _lock_file(directory: str | Path) -> Path:
    return Path(directory) / ".snakemake" / "requant.lock"


def _locks(directory: str | Path) -> list[Path]:
    return sorted((Path(directory) / ".snakemake" / "locks").glob("*.lock"))


def _named(directory: str | Path) -> int | None:
    text = _lock_file(directory).read_text(encoding="utf-8")
    return int(text) if text.isdecimal() else None


def _lives(process: int | None) -> bool:
    import psutil

    return process is not None and psutil.pid_exists(process)

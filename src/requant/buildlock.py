"""One build at a time in a directory; what a killed one left of Snakemake's lock files is told from a living one's.

A build has an operating-system lock on a file of its own, to itself, for as long as its process lives; the system drops
it at SIGKILL or power loss. Whoever gets that lock knows that no other build runs in this directory, and that lock
files found there are left over. The file names the build's process: whoever comes second is told.

Snakemake's own locks would let two builds go on that write different files, and the first of the two that ends removes
all of them. Not every network file system shows a lock to other machines. Where it may not, what a build of another
machine has left is kept: that build may be alive.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from requant.errors import RequantError
from requant.process import Process

COMPUTES = False  # who may write, not what

PATIENCE = 2.0  # seconds that a build waits for one that only looks
# File systems that only one machine writes to at a time.
OF_ONE_MACHINE = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")


@contextlib.contextmanager
def alone(directory: str | Path, even_beside_other_machines: bool = False) -> Iterator[list[str]]:
    """Has a build's directory to itself for the block; yields the names of the left-over lock files that it removed.

    Raises RequantError naming the other process if a build lives here, or left lock files from a machine where it may
    live unseen; the latter does not matter with `even_beside_other_machines`.
    """
    handle = _opened(directory)
    try:
        seen = _is_locked(handle, directory)
        named, left = _named(directory), _locks(directory)
        if not even_beside_other_machines and left and _may_live_unseen(named, directory, seen):
            raise RequantError(
                f"another build is running here ({_shown(named)}), or has been killed: wait for it or end it; if it is "
                "dead: snakemake --unlock"
            )
        for path in left:
            path.unlink(missing_ok=True)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(Process.this()).encode(), 0)
        yield [path.name for path in left]
    finally:
        os.close(handle)


def drop_stale_locks(directory: str | Path) -> str | None:
    """Removes Snakemake's lock files if no build lives here; else says which does, in words.

    For who only looks: a build that begins meanwhile waits for it.
    """
    if not _lock_file(directory).exists():
        return None
    handle = os.open(_lock_file(directory), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _shown(_named(directory))
    except OSError:
        return None  # a file system without locks: nobody can tell
    else:
        if (left := _locks(directory)) and _may_live_unseen(_named(directory), directory):
            return _shown(_named(directory))
        for path in left:
            path.unlink(missing_ok=True)
        return None
    finally:
        os.close(handle)


def seen_by_all(directory: str | Path) -> bool:
    """Whether each machine that has these files sees a lock on one of them, by file system and mount options."""
    import psutil

    place, mounted = Path(directory).resolve(), psutil.disk_partitions(all=True)
    over = [disk for disk in reversed(mounted) if place.is_relative_to(disk.mountpoint)]
    if not over:
        return False
    disk = max(over, key=lambda found: len(found.mountpoint))
    shows = {"nfs": "local_lock=none", "nfs4": "local_lock=none", "lustre": "flock"}.get(disk.fstype)
    return shows in disk.opts.split(",") if shows else disk.fstype in OF_ONE_MACHINE


def _opened(directory: str | Path) -> int:
    _lock_file(directory).parent.mkdir(exist_ok=True)
    return os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _is_locked(handle: int, directory: str | Path) -> bool:
    """Locks the file for this process alone; whether the file system has such locks.

    Raises RequantError if a build has it.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        except OSError:
            return False
    raise RequantError(f"another build is running here ({_shown(_named(directory))}): wait for it or end it")


def _lock_file(directory: str | Path) -> Path:
    return Path(directory) / ".snakemake" / "requant.lock"


def _locks(directory: str | Path) -> list[Path]:
    return sorted((Path(directory) / ".snakemake" / "locks").glob("*.lock"))


def _named(directory: str | Path) -> Process | None:
    return Process.read(_lock_file(directory).read_text(encoding="utf-8", errors="replace"))


def _may_live_unseen(named: Process | None, directory: str | Path, seen: bool = True) -> bool:
    """Whether the process may live although this one got the lock: on another machine, or `seen` is false, and the file
    system has no such locks."""
    if named is None or named.has_ended:
        return False
    return not seen or (named.is_elsewhere and not seen_by_all(directory))


def _shown(named: Process | None) -> str:
    if named is None:
        return "a process without a name"
    return f"process {named.pid}" + (f" of {named.host}" if named.is_elsewhere else "")

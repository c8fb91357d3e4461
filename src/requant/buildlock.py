"""A build that was killed leaves Snakemake's lock files behind; this tells a dead build's from a living one's.

A build holds a shared operating-system lock on a file of its own for as long as its process lives; the system drops
it at SIGKILL or power loss. Whoever gets that lock for itself alone knows that no other build runs in this directory,
and that lock files found there are left over. The file holds process id and machine of a build: whoever comes second is
told.

Not every network file system shows such a lock to other machines. Where it may not, what a build of another machine
has left is kept: that build may be alive.
"""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

_held: list[int] = []
# File systems that only one machine writes to at a time.
OF_ONE_MACHINE = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")


def drop_stale_locks(directory: str | Path, builds: bool = True) -> list[str]:
    """Takes this directory's build lock and, if nobody else has it, removes Snakemake's left-over lock files.

    Returns their names. Nothing is removed while another build lives, or may live on another machine. This process
    becomes the one that `other_build` names, unless it only plans (`builds` is false) or another one is named already.
    """
    state = Path(directory) / ".snakemake"
    state.mkdir(exist_ok=True)
    handle = os.open(_lock_file(directory), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.append(handle)
    named, stale = _may_live(_named(directory)), []
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = _locks(directory)
        named = bool(left) and _is_elsewhere(_named(directory)) and not seen_by_all(directory)
        stale = [] if named else left
    for path in stale:
        path.unlink()
    if not named:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}".encode() if builds else b"", 0)
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return [path.name for path in stale]


def other_build(directory: str | Path) -> str | None:
    """Another build that holds Snakemake's locks in this directory, in words; call `drop_stale_locks` before."""
    named = _named(directory)
    if named in (None, (os.getpid(), socket.gethostname())) or not _locks(directory) or not _may_live(named):
        return None
    return f"process {named[0]}" + (f" of {named[1]}" if _is_elsewhere(named) else "")


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


def _lock_file(directory: str | Path) -> Path:
    return Path(directory) / ".snakemake" / "requant.lock"


def _locks(directory: str | Path) -> list[Path]:
    return sorted((Path(directory) / ".snakemake" / "locks").glob("*.lock"))


def _named(directory: str | Path) -> tuple[int, str] | None:
    process, _, machine = _lock_file(directory).read_text(encoding="utf-8").partition(" ")
    return (int(process), machine) if process.isdecimal() else None


def _is_elsewhere(named: tuple[int, str] | None) -> bool:
    return named is not None and named[1] != socket.gethostname()


def _may_live(named: tuple[int, str] | None) -> bool:
    import psutil

    return named is not None and (_is_elsewhere(named) or psutil.pid_exists(named[0]))

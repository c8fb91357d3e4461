"""A build that was killed leaves Snakemake's lock files behind; this tells a dead build's from a living one's.

A build holds a shared operating-system lock on a file of its own for as long as its process lives; the system drops
it at SIGKILL or power loss. Whoever gets that lock for itself alone knows that no other build runs in this directory,
and that lock files found there are left over.
"""

import contextlib
import fcntl
import os
from pathlib import Path

_held: list[int] = []


def drop_stale_locks(directory: str | Path) -> list[str]:
    """Takes this directory's build lock and, if nobody else has it, removes Snakemake's left-over lock files.

    Returns their names. Nothing is removed while another build lives: Snakemake then says so itself.
    """
    state = Path(directory) / ".snakemake"
    state.mkdir(exist_ok=True)
    handle = os.open(state / "requant.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.append(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stale = []
    else:
        locks = state / "locks"
        stale = sorted(locks.glob("*.lock")) if locks.is_dir() else []
        for path in stale:
            path.unlink()
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return [path.name for path in stale]

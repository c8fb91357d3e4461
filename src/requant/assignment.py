"""Which of a machine's GPUs a job works on: Snakemake counts GPUs and hands out no numbers.

A job locks a file for each GPU that it takes and sees no others from then on (CUDA_VISIBLE_DEVICES, which engines that
it starts inherit). The operating system drops the locks when the process ends, however it ends. Where more jobs are
let run than there are GPUs (`--resources gpu=4` on a machine with one), each GPU gets as many as the others.
"""

import contextlib
import fcntl
import os
import re
import sys
import tempfile
from pathlib import Path

from requant.errors import RequantError

COMPUTES = False  # the same bytes on any GPU of a kind; of which kind it is stands in the records

VISIBLE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")  # nvidia0, nvidia1, ...; dxg, of WSL, stands for one
WANTED = "expected a folder of yours, mode 700, where GPUs are locked: remove it, or set TMPDIR to another place"

_held: dict[str, int] = {}


def gpus_of(device: str) -> int:
    """How many GPUs a job on `device` is to be given: none on a CPU, nor where the config names one by its number."""
    return int(device == "cuda")


def taken() -> list[str]:
    """The GPUs that `take` gave this process."""
    return list(_held)


def take(count: int) -> None:
    """Takes `count` GPUs for this process, of those that it sees, and says so on stderr, which is the job's log.

    What it sees may be chosen already by Slurm, a pod or a person. RequantError if that is fewer.
    """
    there = visible() if count else []
    if count > len(there):
        raise RequantError(f"{len(there)} of {count} GPUs are here ({VISIBLE}: {os.environ.get(VISIBLE, 'not set')})")
    share = 0
    while len(_held) < count:
        for name in there:
            if len(_held) < count and name not in _held and (lock := _lock(name, share)) is not None:
                _held[name] = lock
        share += 1
    if count:
        if VISIBLE not in os.environ:
            # By place on the bus, as Docker numbers them; CUDA's own order, which a list of others' may be in, puts
            # the fastest first.
            os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ[VISIBLE] = ",".join(_held)
        others = f", beside {share - 1} other jobs" if share > 1 else ""
        print(f"on GPU {', '.join(_held)} of {', '.join(there)}{others}", file=sys.stderr)


def visible() -> list[str]:
    """The GPUs that this process may use: as CUDA_VISIBLE_DEVICES names them, else the numbers of all."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    files = [path for path in DEVICES.iterdir() if re.fullmatch(r"nvidia\d+", path.name)]
    return list(map(str, range(len(files) or int((DEVICES / "dxg").exists()))))


def _lock(name: str, share: int) -> int | None:
    """The lock of a GPU's share, of all this user's jobs on this machine; None if another process has it."""
    folder = _folder()
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        handle = os.open(f"{name.replace('/', '_')}.{share}", flags, 0o600, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _folder() -> int:
    """The folder of this user's locks, opened: others can write beside it, not into it.

    Raises RequantError if what has its name is a link, or is another user's, or is open to others.
    """
    path = Path(tempfile.gettempdir()) / f"requant-gpus-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise RequantError(f"{path}: no folder that can be read; {WANTED}") from None
    found = os.fstat(handle)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        os.close(handle)
        raise RequantError(f"{path}: of user {found.st_uid}, mode {found.st_mode & 0o777:o}; {WANTED}")
    return handle

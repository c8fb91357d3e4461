"""Files below a folder, by handles of the folders on the way: no link there is followed, whoever makes one meanwhile.

For what lays out a folder by somebody else's list. The first folder on the way may be a link: results/ on another disk
is the user's own doing.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from requant.errors import RequantError
from requant.whole import not_written, refusal, temporary_name

COMPUTES = False  # where bytes go, not which


@contextlib.contextmanager
def folder_of(directory: Path, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
    """(handle of the folder that `path`, a relative one without `..`, is in below `directory`; its last name).

    make: whether folders that are missing are made; else FileNotFoundError. Raises RequantError naming a link or a file
    in place of one of them.
    """
    *folders, name = PurePosixPath(path).parts
    handle, at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), directory
    try:
        for number, folder in enumerate(folders):
            at = at / folder
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, dir_fd=handle)
            outer, handle = handle, _opened(folder, handle, at, follow=number == 0)
            os.close(outer)
        yield handle, name
    finally:
        os.close(handle)


def _opened(folder: str, outer: int, at: Path, follow: bool) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        return os.open(folder, flags, dir_fd=outer)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise RequantError(f"{at}: a link or a file; expected a folder, or nothing") from None


def put(directory: Path, path: str, write: Callable[[int, str], None]) -> None:
    """Makes the file `path` below `directory` whole: `write` is given a handle of its folder, and a temporary name.

    What was there is replaced. Raises RequantError naming the file if the disk refuses it, or as `folder_of`.
    """
    try:
        with folder_of(directory, path, make=True) as (handle, name):
            temporary = temporary_name(name)
            try:
                _remove(temporary, handle)
                write(handle, temporary)
                os.replace(temporary, name, src_dir_fd=handle, dst_dir_fd=handle)
            finally:
                _remove(temporary, handle)
    except OSError as error:
        if (code := refusal(error, directory)) is None:
            raise
        raise RequantError(not_written(directory / path, code)) from error


def move(source: Path, handle: int, name: str) -> None:
    """Moves the file `source` to `name` in the folder of `handle`; what was there is replaced."""
    file = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
        try:
            os.replace(source, name, dst_dir_fd=handle)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            copy(file, handle, name)
            source.unlink()
    finally:
        os.close(file)


def copy(file: int, handle: int, name: str) -> None:
    """Copies the bytes of the open `file` to the new file `name` in the folder of `handle`."""
    new = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=handle)
    with os.fdopen(new, "wb") as target, os.fdopen(os.dup(file), "rb") as source:
        shutil.copyfileobj(source, target, 1 << 20)
        target.flush()
        os.fsync(target.fileno())


def _remove(name: str, handle: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=handle)

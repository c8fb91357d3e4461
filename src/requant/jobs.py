"""What every job of the graph does around its one function: log, one-line errors, an end with its parent."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from requant.errors import RequantError


@contextlib.contextmanager
def job(log_path: str) -> Iterator[None]:
    """Runs a job's body: output of libraries goes to the log, an error becomes one line on stderr that names the log.

    `progress` lines go to both. The process ends with its parent: after SIGKILL of the build no job may go on
    writing beside the one that takes its place.
    """
    path = Path(log_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_with_parent()
    terminal = os.dup(2)
    with path.open("w", encoding="utf-8", buffering=1) as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        _TERMINAL.append(terminal)
        try:
            yield
        except RequantError as error:
            traceback.print_exc()
            progress(f"error: {error} (see {path})")
            _exit_failed()
        except Exception as error:
            traceback.print_exc()
            progress(f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} (see {path})")
            _exit_failed()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


SHELLS = ("sh", "bash", "dash", "zsh")
_TERMINAL: list[int] = []


def progress(message: str) -> None:
    """One line for a person: on the terminal and, inside a job, in its log."""
    line = f"{time.strftime('%H:%M:%S')} {message}\n"
    if _TERMINAL:
        os.write(_TERMINAL[-1], line.encode())
        os.write(2, line.encode())
    else:
        sys.stderr.write(line)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _exit_failed() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # the line above says it all: no second traceback by the caller


def _end_with_parent() -> None:
    """Ends this process within a second after the one that started it, shells between them not counted."""
    import psutil

    started_by = next((found for found in psutil.Process().parents() if found.name() not in SHELLS), None)
    if started_by is None:
        return

    def lives() -> bool:
        try:
            return started_by.is_running() and started_by.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        while lives():
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

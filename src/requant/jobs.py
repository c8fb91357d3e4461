"""What every job of the graph does around its one function: log, one-line errors, an end with its build."""

import atexit
import contextlib
import gc
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from requant.assignment import take
from requant.errors import RequantError
from requant.process import Process
from requant.whole import OF_WRITES, not_written

COMPUTES = False  # what surrounds a job: its log, its errors, its end


@contextlib.contextmanager
def job(log_path: str, inputs: Iterable[str] = (), gpus: int = 0, source: str | None = None) -> Iterator[None]:
    """Runs a job's body: output of libraries goes to the log, an error becomes one line on stderr that names the log.

    `progress` lines go to both. The process ends with its build: after SIGKILL of that no job may go on writing
    beside the one that takes its place. Its input is empty: nothing that a library asks can be waited for. Those of
    the job's `inputs` that an earlier job has hashed are held against that (`requant.intact`), the files of the model
    in the folder `source` among them. The body sees `gpus` GPUs that no other job has (`requant.assignment`).
    """
    path = Path(log_path)
    spare_collector()
    _end_with_build()
    _close_input()
    terminal = os.dup(2)
    with _log(path) as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        _TERMINAL.append(terminal)
        try:
            _check_inputs(inputs, source)
            take(gpus)
            yield
        except RequantError as error:
            _end_with(str(error), path)
        except Exception as error:
            _end_with(_in_a_line(error), path)
        finally:
            _flush()


def spare_collector() -> None:
    """Lets Python look for cycles of garbage every 10,000 objects instead of 700, and not when this process ends.

    Torch and transformers are a million objects. To look through them while they are imported, and once more only to
    take them apart, took a third of the time of a small job, and of a plan.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def _close_input() -> None:
    """Puts an end before whoever reads the standard input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _in_a_line(error: Exception) -> str:
    """What a library raised. A full disk is met by any write, also by one to the log, which names no file."""
    if isinstance(error, OSError) and error.errno in OF_WRITES:
        return not_written(error.filename or "a file of this job", error.errno)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _check_inputs(inputs: Iterable[str], source: str | None) -> None:
    if inputs:
        from requant.intact import check_inputs

        check_inputs(inputs, source)


def _log(path: Path) -> TextIO:
    """The log, opened for writing; none where the disk takes it not: what the job says of that goes to the terminal."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        progress(f"warning: {path}: no log: {os.strerror(error.errno)}")
        return open(os.devnull, "w", encoding="utf-8")


def _end_with(message: str, log: Path) -> NoReturn:
    with contextlib.suppress(OSError):
        traceback.print_exc()
    progress(f"error: {message} (see {log})")
    _exit_failed()


SHELLS = ("sh", "bash", "dash", "zsh")
BUILD = "REQUANT_BUILD"  # the variable that names the process of the build to its jobs
_TERMINAL: list[int] = []


def progress(message: str) -> None:
    """One line for a person: on the terminal and, inside a job, in its log."""
    line = f"{time.strftime('%H:%M:%S')} {message}\n"
    if _TERMINAL:
        os.write(_TERMINAL[-1], line.encode())
        with contextlib.suppress(OSError):  # a full disk takes no log
            os.write(2, line.encode())
    else:
        sys.stderr.write(line)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _exit_failed() -> NoReturn:
    _flush()
    os._exit(1)  # the line above says it all: no second traceback by the caller


def announce_build() -> None:
    """Tells the jobs that this process starts whose they are, by their environment."""
    os.environ[BUILD] = str(Process.this())


def _end_with_build() -> None:
    """Ends this process at once if its build has ended, else within a second after that.

    The build is the process that called `announce_build`; without one, whatever started this, shells not counted. A
    parent that is gone would not do: its children have another one, which lives on.
    """
    build = Process.read(os.environ.get(BUILD, ""))
    if build is None or build.is_elsewhere:
        build = _started_by()
    if build is None:
        return
    if build.has_ended:
        os._exit(1)

    def watch() -> None:
        while not build.has_ended:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _started_by() -> Process | None:
    import psutil

    for found in psutil.Process().parents():
        with contextlib.suppress(psutil.NoSuchProcess):
            if found.name() not in SHELLS:
                return Process(socket.gethostname(), found.pid, found.create_time())
    return None

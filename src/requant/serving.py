"""Starting an engine on a loopback port, and never leaving it behind.

The engine is a child process in a session of its own. It ends with the `with` block, whatever ends that: an
answer, an exception, Ctrl-C or SIGTERM. If this process is killed outright, the kernel kills the engine
(PR_SET_PDEATHSIG): nothing in user space could, and a server that stays holds its port and the model's
memory.
"""

import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from requant.errors import RequantError

STOP_SECONDS = 10.0  # for an orderly end before SIGKILL
POLL_SECONDS = 0.1
# The engine reads local files only: it needs none of the credentials that the caller's environment may hold.
_SECRET = re.compile(r"TOKEN|API_?KEY|ACCESS_KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|NETRC", re.IGNORECASE)
_LISTENING = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
_HARMLESS_NAMES = {"TOKENIZERS_PARALLELISM"}
# Sets the parent-death signal in the process that becomes the engine. A preexec_fn would run in a fork of a
# process with threads, where only async-signal-safe code is allowed.
_LAUNCHER = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Server:
    """An engine that answers. `command` has {model} and {port} in place of the directory and the port."""

    url: str
    model: str
    pid: int
    engine: str
    version: str
    command: list[str]
    environment: dict[str, str]
    startup_seconds: float


@contextlib.contextmanager
def serve(
    model: str | Path,
    log: str | Path,
    *,
    device: str = "cpu",
    threads: int = 1,
    startup_seconds: float = 180.0,
) -> Iterator[Server]:
    """Serves the checkpoint in `model` with `transformers serve`; its output goes to `log`.

    Requests name the model `Server.model`. The engine sees no network, an empty Hugging Face home and no
    credentials. Call it from the main thread: the parent-death signal is bound to the thread that starts the
    engine. Raises RequantError, with the log's last line and path, if the engine ends or does not answer its
    health check within `startup_seconds`.
    """
    model = Path(model).resolve()
    shown = [
        "transformers",
        "serve",
        "{model}",
        "--host",
        "127.0.0.1",
        "--port",
        "{port}",
        "--device",
        device,
    ]
    # Port 0: the kernel chooses when the engine binds, so nobody can take the port in between.
    # The model is named relative to its parent: the engine reads '@' and '.gguf' in a name as its own syntax.
    fillings = {"{model}": model.name, "{port}": "0"}
    command = [_transformers_command(), *(fillings.get(part, part) for part in shown[1:])]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with (
        unwinding_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="requant-engine-") as home,
        _engine(command, model.parent, _child_environment(environment, Path(home)), Path(log)) as process,
    ):
        started = time.monotonic()
        url = _wait_until_healthy(process, Path(log), startup_seconds)
        yield Server(
            url=url,
            model=model.name,
            pid=process.pid,
            engine="transformers serve",
            version=importlib.metadata.version("transformers"),
            command=shown,
            environment=environment,
            startup_seconds=time.monotonic() - started,
        )


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exception in the block, so that `finally` clauses run; leaves other handlers alone."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _engine(command: list[str], directory: Path, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, str(os.getpid()), *command],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Ends the engine's process group: SIGTERM, then SIGKILL for whatever is left of it."""
    _signal_group(process, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _child_environment(settings: dict[str, str], home: Path) -> dict[str, str]:
    """The caller's environment without credentials, with `settings` and an empty Hugging Face home."""
    kept = {name: value for name, value in os.environ.items() if name in _HARMLESS_NAMES or not _SECRET.search(name)}
    cache = home / "hub"
    cache.mkdir()  # the engine fails on a cache folder that is absent
    private = {"HF_HOME": str(home), "HF_HUB_CACHE": str(cache), "HF_XET_CACHE": str(home / "xet")}
    plain = {"DO_NOT_TRACK": "1", "NO_COLOR": "1", "TYPER_STANDARD_TRACEBACK": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **plain, **private, **settings}


def _transformers_command() -> str:
    """Path of the `transformers` program of this interpreter's environment."""
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    found = shutil.which("transformers", path=os.pathsep.join(folders))
    if found is None:
        raise RequantError(
            f"transformers: no such program in {folders[0]} or PATH; expected the serving engine: install "
            "`transformers[serving]`"
        )
    return found


def _wait_until_healthy(process: subprocess.Popen, log: Path, seconds: float) -> str:
    """The engine's base URL, once its health check answers 200."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RequantError(
                f"{log}: the engine ended with status {process.returncode} before it served: "
                f"{_last_line(log)}; expected an answer to /health; the log has the rest"
            )
        listening = _LISTENING.search(log.read_text(errors="replace"))
        if listening and _status(f"http://127.0.0.1:{listening[1]}/health") == 200:
            return f"http://127.0.0.1:{listening[1]}"
        time.sleep(POLL_SECONDS)
    raise RequantError(
        f"{log}: no answer to /health after {seconds:g} s: {_last_line(log)}; expected 200; "
        "raise `startup_seconds` of the target if the engine was only slow"
    )


def _status(url: str) -> int | None:
    """HTTP status of a GET that no proxy sees; None if nothing answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _last_line(log: Path) -> str:
    """The last line that says something, cut to 200 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it wrote nothing"

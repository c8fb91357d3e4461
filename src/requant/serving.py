"""Starting an engine on a loopback port, and never leaving it behind.

Here the engine is a program of this machine; `requant.container` starts one in a container. The program is a child
process in a session of its own. It ends with the `with` block, whatever ends that: an answer, an exception, Ctrl-C
or SIGTERM. If this process is killed outright, the kernel kills the engine (PR_SET_PDEATHSIG): nothing in user
space could, and a server that stays holds its port and the model's memory.
"""

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant import engine_log
from requant.config import Target, is_credential
from requant.engine_arguments import INHERITED
from requant.engine_command import LOOPBACK, engine_command, quantization_of
from requant.errors import RequantError

STOP_SECONDS = 10.0  # for an orderly end before SIGKILL
POLL_SECONDS = 0.1
END_SECONDS = 5.0  # that an engine which answers no more may take to end
UNKNOWN = "unknown"  # version of an engine that does not tell
ENGINES = {"transformers": "transformers serve", "vllm": "vllm serve", "sglang": "sglang"}
# Engines ask nobody, and their logs are plain lines that appear when they are written.
PLAIN = {"DO_NOT_TRACK": "1", "NO_COLOR": "1", "TYPER_STANDARD_TRACEBACK": "1", "PYTHONUNBUFFERED": "1"}
# The directory that an engine is started in has a checkpoint, and what came with it: no modules are looked for there.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
_LISTENING = re.compile(r"running on http://127\.0\.0\.1:(\d+)")
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
    """An engine that answers. `command` has {model} and {port} in place of the directory and the port.

    container: None for a program; else {request: what was asked of Docker, with the same placeholders, image_id: hash
    of the image's configuration, image_digests: its names by digest in the registries that it came from}. log: what it
    writes; how_ended: how it ended, None while it runs.
    """

    url: str
    model: str
    pid: int
    engine: str
    version: str
    command: list[str]
    environment: dict[str, str]
    startup_seconds: float
    container: dict[str, Any] | None = None
    log: Path | None = None
    how_ended: Callable[[], str | None] = lambda: None


def trouble(server: Server) -> str | None:
    """What became of an engine that did not answer: how it ended, and the first real error in its log; None if it runs
    and its log has none. An engine whose parts fail ends a little later: that is waited for."""
    end = time.monotonic() + END_SECONDS
    while (ended := server.how_ended()) is None and time.monotonic() < end and server.log is not None:
        time.sleep(POLL_SECONDS)
    if server.log is None:
        return None if ended is None else f"the engine {ended}"
    if ended is not None:
        return f"the engine {ended}: {engine_log.told(server.log, ended)} ({server.log})"
    error = engine_log.first_error(engine_log.read(server.log))
    return None if error is None else f"{server.log}: {error}"


@contextlib.contextmanager
def serve(
    model: str | Path,
    log: str | Path,
    target: Target | None = None,
    *,
    threads: int = 1,
    name: str | None = None,
    port: int = 0,
) -> Iterator[Server]:
    """Serves the checkpoint in `model` with the program of the target's engine; its output goes to `log`.

    The target is `transformers serve` on the CPU unless given. Requests name the model `Server.model`: `name`, by
    default the directory's own, where the engine can be told. A `port` of 0 is a free one. The engine sees no
    network, an empty Hugging Face home and no credentials. Call it from the main thread: the parent-death signal is
    bound to the thread that starts the engine. Raises RequantError if the port is taken or the program is not
    installed, and, with the log's first error and path, if the engine ends or does not answer its health check in
    the target's `startup_seconds`.
    """
    target = target or Target()
    model, log = Path(model).resolve(), Path(log)
    # The model is named relative to its parent: the engine reads '@' and '.gguf' in a name as its own syntax.
    name = name_for_requests(target, model.name, name or model.name)
    port = chosen_port(port, target)
    quantization = checkpoint_quantization(target, model)
    command = engine_command(target, model.name, name, port, LOOPBACK, quantization)
    environment = engine_environment(target, threads)
    program = _program(command[0], target)
    with (
        unwinding_on_sigterm(),
        tempfile.TemporaryDirectory(prefix="requant-engine-") as home,
        _engine([program, *command[1:]], model.parent, _child_environment(environment, Path(home)), log) as process,
    ):
        started = time.monotonic()
        url = wait_until_healthy(lambda: _url(port, log), lambda: _how_ended(process), log, target.startup_seconds)
        seconds = time.monotonic() - started
        yield Server(
            url=url,
            model=name,
            pid=process.pid,
            engine=ENGINES[target.engine],
            version=_version(program, target.engine),
            command=shown_command(target, name, quantization, LOOPBACK),
            environment=environment,
            startup_seconds=seconds,
            log=log,
            how_ended=lambda: _how_ended(process),
        )


def _how_ended(process: subprocess.Popen) -> str | None:
    """None while it runs."""
    status = process.poll()
    if status is None:
        return None
    return f"ended with status {status}" if status >= 0 else f"was ended by {_signal_name(-status)}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def engine_environment(target: Target, threads: int) -> dict[str, str]:
    """What an engine is told by variables: no network, on a CPU how many threads, and what the target says.

    sglang asks itself first, which compiles kernels, and ends if that takes it longer than it is told.
    """
    on_cpu = {"OMP_NUM_THREADS": str(threads)} if target.device == "cpu" else {}
    patience = {"SGLANG_WARMUP_TIMEOUT": str(target.startup_seconds)} if target.engine == "sglang" else {}
    return {"HF_HUB_OFFLINE": "1", **on_cpu, **patience, **target.environment}


def name_for_requests(target: Target, path: str, name: str) -> str:
    """What requests call the model: `name`, but for transformers the path that the engine was given."""
    return path if target.engine == "transformers" else name


def checkpoint_quantization(target: Target, model: Path) -> str | None:
    """The quantization that the engine has to be told; transformers reads it itself."""
    return None if target.engine == "transformers" else quantization_of(model)


def shown_command(target: Target, name: str, quantization: str | None, host: str) -> list[str]:
    """The engine's command, with {model} for the checkpoint's directory and {port} for the port."""
    command = engine_command(target, "{model}", name, 0, host, quantization)
    command[command.index("--port") + 1] = "{port}"
    return command


def chosen_port(port: int, target: Target) -> int:
    """`port` if it is free, else an error. For 0 a free one, or 0 where the engine itself finds one.

    transformers as a program does: the kernel chooses when it binds, so nobody can take the port in between.
    """
    if port == 0 and target.engine == "transformers" and target.image is None:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise RequantError(
                f"port {port} of {LOOPBACK}: {os.strerror(error.errno)}; expected a free one: end what listens there, "
                "or choose another port"
            ) from error
        return probe.getsockname()[1]


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
            [sys.executable, "-P", "-c", _LAUNCHER, str(os.getpid()), *command],
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
    """What an engine needs of the caller's environment, with `settings` and an empty Hugging Face home."""
    kept = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name) and not is_credential(name)}
    cache = home / "hub"
    cache.mkdir()  # the engine fails on a cache folder that is absent
    private = {"HF_HOME": str(home), "HF_HUB_CACHE": str(cache), "HF_XET_CACHE": str(home / "xet")} | SAFE_PATH
    return {**kept, **PLAIN, **private, **settings}


def _program(name: str, target: Target) -> str:
    """Path of the program `name`: in the target's PATH if it names one, else in this interpreter's environment."""
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    if "PATH" in target.environment:
        folders = target.environment["PATH"].split(os.pathsep)
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        package = {"transformers": "transformers[serving]"}.get(target.engine, target.engine)
        raise RequantError(
            f"{name}: no such program in {folders[0]} or PATH; expected the serving engine: install `{package}`, or "
            "give the target an `image`"
        )
    return found


def _version(program: str, engine: str) -> str:
    """The engine's version, as the Python says that `program` belongs to."""
    python = Path(program).parent / "python3"
    if not python.exists():
        python = Path(program).resolve().parent / "python3"  # of a link that pipx or uv made
    try:
        command = [python, "-c", version_script(engine)]
        environment = os.environ | SAFE_PATH
        done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60, env=environment)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def version_script(engine: str) -> str:
    """Python code that prints the version of an engine."""
    return f"from importlib.metadata import version; print(version({engine!r}))"


def _url(port: int, log: Path) -> str | None:
    """Where the engine should answer; None while it has not yet said which port it found."""
    listening = port or ((said := _LISTENING.search(log.read_text(errors="replace"))) and said[1])
    return f"http://{LOOPBACK}:{listening}" if listening else None


def wait_until_healthy(
    find_url: Callable[[], str | None], how_ended: Callable[[], str | None], log: Path, seconds: float
) -> str:
    """The engine's base URL, once its health check answers 200.

    find_url: the URL as soon as it is known. how_ended: how the engine ended, None while it runs. Raises RequantError
    with the first real error in the log, else its last lines, if it ends, or does not answer in `seconds`.
    """
    started = time.monotonic()
    while (waited := time.monotonic() - started) < seconds:
        url = find_url()
        healthy = url is not None and _status(f"{url}/health") == 200
        if (ended := how_ended()) is not None:  # asked last: what answers may be another engine on the same port
            told = engine_log.told(log, ended)
            raise RequantError(
                f"{log}: the engine {ended} before it served: {told}; expected an answer to /health; the log has "
                "the rest"
            )
        if healthy:
            return url
        time.sleep(max(POLL_SECONDS, min(waited / 20, 1)))  # engines write a line a check into their logs
    text = engine_log.read(log)
    error = engine_log.first_error(text)
    doing = f"its log has {error}" if error else f"its log ends with {engine_log.last_lines(text, 1)}"
    raise RequantError(
        f"{log}: no answer to /health after {seconds:g} s: {doing}; expected 200: if the engine was only slow (a first "
        "start reads the weights from disk and compiles kernels), raise `startup_seconds` of the target"
    )


def _status(url: str) -> int | None:
    """HTTP status of a GET that no proxy sees; None if nothing answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None

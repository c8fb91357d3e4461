"""Running a Python program that nobody trusts: what a model wrote, and the tests that judge it.

It never runs in a process of the build. It runs in a container (Docker) or, where no engine answers, in bubblewrap:
without network, credentials, environment and files of this machine but those that Python needs, as user 65534, and
within limits of memory, processes, time, output and temporary files. Inside, `requant.confined` is process 1; it
starts the program, and reports how it ended. docs/sandbox.md has what each promises.

A program has passed if its last line was reached and it ended with status 0. `sys.exit(0)` before the tests, or any
output, is no pass. A program that is written to deceive can still pass its own tests: by values that equal everything,
or by looking for the proof in the frames above its own. The sandbox protects the machine; no test of a program
in the program's own process can protect the score.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from requant import confined
from requant.config import Sandbox
from requant.docker_host import docker_host
from requant.errors import RequantError, plain
from requant.serving import unwinding_on_sigterm

Outcome = Literal["passed", "failed", "unfinished", "timeout", "memory", "output limit"]

START_SECONDS = 60.0  # for the sandbox itself to be there, on a busy machine
STOP_SECONDS = 5.0  # beyond the time limit, which is kept inside: then it is ended from outside
POLL_SECONDS = 0.1
PING_SECONDS = 5
TEMPORARY_MB = 16
SHARED_MB = 1  # of /dev/shm
DEFAULTS = Sandbox()
LABEL = "requant.sandbox"
HOST_IMAGE = "requant-sandbox"
NOT_THERE = (
    "sandbox: neither Docker (Debian: docker.io) nor bubblewrap (Debian: bubblewrap) is usable here{why}; "
    "expected one of them: code that a model wrote runs only in a sandbox"
)


@dataclass(frozen=True)
class Limits:
    """What a program may take. `seconds` is wall time, and processor time of each process."""

    memory_mb: int = 1024
    seconds: float = 10.0
    processes: int = 8
    output_bytes: int = 65536
    temporary_mb: int = TEMPORARY_MB


@dataclass(frozen=True)
class Backend:
    """A sandbox of this machine. `image` is None where Python is this machine's; `python`, its version, else."""

    kind: Literal["docker", "bubblewrap"]
    version: str
    python: str | None
    image: str | None = None

    def record(self) -> dict[str, Any]:
        """Keys and values for a record."""
        return asdict(self)


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    outcome: passed; failed (an exception, a status other than 0, a signal); unfinished (status 0 before its last
    line); or the limit that stopped it. status: exit status, negative for a signal, None if a limit stopped it.
    stdout, stderr: cut after the limit of output. seconds: wall time from its start.
    """

    outcome: Outcome
    status: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.outcome == "passed"


def limits_of(settings: Sandbox) -> Limits:
    """The limits that a config asks for."""
    return Limits(memory_mb=settings.memory_mb, seconds=settings.seconds, processes=settings.processes)


def which_sandbox(settings: Sandbox = DEFAULTS) -> Backend:
    """The sandbox that this machine has, of the kind that `settings` ask for; Docker before bubblewrap.

    It costs a request to Docker, or the start of one empty sandbox: 0.2 s or so. Raises RequantError if there is none.
    """
    reasons = []
    if settings.backend != "bubblewrap":
        try:
            return _docker(settings.image)
        except RequantError as error:
            if settings.backend == "docker":
                raise
            reasons.append(str(error))
    try:
        return _bubblewrap()
    except RequantError as error:
        if settings.backend == "bubblewrap":
            raise
        reasons.append(str(error))
    raise RequantError(NOT_THERE.format(why=f" ({'; '.join(reasons)})"))


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """A row of HumanEval with a model's completion, as one program: definitions, tests, and their call at the end."""
    return f"{prompt}{completion}\n{test}\ncheck({entry_point})\n"


def run_untrusted(program: str, limits: Limits, backend: Backend) -> SandboxResult:
    """Runs the text of a Python program in a sandbox of its own, which is gone when this returns or raises.

    Raises RequantError if the sandbox can't be started; whatever the program does ends in a result.
    """
    with unwinding_on_sigterm():
        return _run(program, limits, backend, threading.Event())


def run_all(programs: Iterable[str], limits: Limits, backend: Backend, jobs: int = 1) -> Iterator[SandboxResult]:
    """The results of many programs, in their order, `jobs` at a time, each in a sandbox of its own."""
    stop = threading.Event()
    with unwinding_on_sigterm(), ThreadPoolExecutor(jobs, thread_name_prefix="sandbox") as pool:
        waiting = [pool.submit(_run, program, limits, backend, stop) for program in programs]
        try:
            for future in waiting:
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _run(program: str, limits: Limits, backend: Backend, stop: threading.Event) -> SandboxResult:
    request = asdict(limits) | {"program": program, "count_processes": backend.kind == "bubblewrap"}
    text = json.dumps(request).encode()
    began = time.monotonic()
    with _started(limits, backend) as running:
        answer = _exchange(running, b"%d\n%s" % (len(text), text), limits, stop)
        seconds = time.monotonic() - began
        output, errors = running.parts(answer)
    started, _, report = output.partition(b"\n")
    if started.decode(errors="replace") != confined.STARTED:
        said = (errors or output).decode(errors="replace").strip().rpartition("\n")[2]
        raise RequantError(f"sandbox: {backend.kind} did not start: {plain(said) or 'it wrote nothing'}")
    if not report.endswith(b"\n"):  # process 1 itself was ended, from here or by the kernel
        if errors:
            raise RequantError(f"sandbox: {backend.kind} broke off: {plain(errors.decode(errors='replace')[-200:])}")
        return SandboxResult("timeout" if seconds > limits.seconds else "failed", None, "", "", seconds)
    found = json.loads(report)
    if "error" in found:
        raise RequantError(f"sandbox: {backend.kind} did not start the program: {plain(found['error'])}")
    return SandboxResult(_outcome(found), found["status"], found["stdout"], found["stderr"], found["seconds"])


def _outcome(found: dict[str, Any]) -> Outcome:
    """The one word for a report of `requant.confined`."""
    if found["stopped"]:
        return found["stopped"]
    if found["status"] == 0:
        return "passed" if found["finished"] else "unfinished"
    if found["status"] == -signal.SIGXCPU:
        return "timeout"
    last = found["stderr"].rstrip().rpartition("\n")[2]
    return "memory" if last.startswith("MemoryError") else "failed"


@dataclass(frozen=True)
class _Running:
    """A started sandbox: where the request goes, where the answer comes from, and its standard output and error."""

    send: Callable[[bytes], None]
    descriptor: int
    parts: Callable[[bytes], tuple[bytes, bytes]]


def _exchange(running: _Running, request: bytes, limits: Limits, stop: threading.Event) -> bytes:
    """Sends the request and reads the answer, to its end or as long as it may take."""
    threading.Thread(target=running.send, args=(request,), daemon=True).start()
    answer = b""
    end = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(running.descriptor, selectors.EVENT_READ)
        while time.monotonic() < end and not stop.is_set():
            if selector.select(POLL_SECONDS):
                part = os.read(running.descriptor, 65536)
                if not part:
                    break
                if not answer:  # it has started
                    end = time.monotonic() + limits.seconds + STOP_SECONDS
                answer += part
    return answer


def _started(limits: Limits, backend: Backend) -> contextlib.AbstractContextManager[_Running]:
    """A sandbox whose process 1 waits for a request; it is gone after the block."""
    return _in_bubblewrap(limits) if backend.kind == "bubblewrap" else _in_docker(limits, backend.image)


# What a Python on Linux needs from its machine.


@dataclass(frozen=True)
class _HostPython:
    """This machine's Python: its program, and what it needs at the places where it is."""

    program: Path
    files: tuple[Path, ...]
    links: tuple[tuple[str, str], ...]  # (place, what it points to)


@functools.cache
def _host_python() -> _HostPython:
    """The interpreter below this environment, with nothing of the environment. RequantError if it has no limits."""
    if sys.platform != "linux" or platform.machine() not in confined.MACHINES:
        raise RequantError(
            f"{sys.platform} on {platform.machine()}: this machine's Python runs in a sandbox only on Linux on "
            f"{' or '.join(confined.MACHINES)}; expected backend docker, with an image"
        )
    program = Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))
    prefix = Path(os.path.realpath(sys.base_prefix))
    files, links = [program], []
    wanted = [Path("/lib"), Path("/lib64"), Path("/usr/lib"), Path("/usr/lib64"), Path("/etc/ld.so.cache")]
    wanted += [Path("/usr/share/zoneinfo"), prefix / "lib", prefix / "lib64"]
    wanted += [Path("/nix/store")] if prefix.is_relative_to("/nix/store") else []
    for path in wanted:
        if path.is_symlink():
            links.append((str(path), os.readlink(path)))
        elif path.exists() and not any(path.is_relative_to(other) for other in files):
            files.append(path)
    return _HostPython(program, tuple(files), tuple(links))


def _check_private(files: Iterable[Path]) -> None:
    """Raises RequantError if one of the `files` that a sandbox sees holds the home directory or the build's."""
    for private in (Path.home(), Path.cwd()):
        for path in files:
            if private.resolve().is_relative_to(path):
                raise RequantError(f"sandbox: {path} is needed by Python and holds {private}; expected it elsewhere")


# bubblewrap


def _bubblewrap() -> Backend:
    program = shutil.which("bwrap")
    if program is None:
        raise RequantError("bubblewrap: no program `bwrap` in PATH; expected it (Debian: bubblewrap)")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.split()
    backend = Backend("bubblewrap", version[-1] if version else "unknown", platform.python_version())
    found = run_untrusted("", Limits(), backend)
    if not found.passed:
        raise RequantError(f"sandbox: bubblewrap: an empty program ended as {found.outcome!r}; expected 'passed'")
    return backend


def _bubblewrap_command(limits: Limits) -> list[str]:
    """bwrap and its arguments, up to the program inside."""
    host = _host_python()
    _check_private(host.files)
    command = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1"]
    if os.geteuid() == 0:
        # Nobody can't reach a Python in a home directory. Mounted by root, it is left to process 1 to become nobody,
        # and bubblewrap has to be allowed to kill a process of another user with itself.
        command += ["--cap-drop", "ALL"]
        command += [word for name in ("SETUID", "SETGID", "KILL") for word in ("--cap-add", f"CAP_{name}")]
    else:
        command += ["--unshare-user", "--uid", str(confined.NOBODY), "--gid", str(confined.NOBODY)]
    for folder in sorted({folder for path in host.files for folder in path.parents} | {Path("/dev")}):
        command += ["--perms", "0755", "--dir", str(folder)]  # bubblewrap's own would be closed to others than root
    for path in host.files:
        command += ["--ro-bind", str(path), str(path)]
    for place, target in host.links:
        command += ["--symlink", target, place]
    for device in ("null", "zero", "full", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for folder, megabytes in (("/tmp", limits.temporary_mb), ("/dev/shm", SHARED_MB)):
        command += ["--perms", "1777", "--size", str(megabytes * 2**20), "--tmpfs", folder]
    return [*command, "--proc", "/proc", "--remount-ro", "/", "--clearenv", "--chdir", "/tmp", "--"]


@contextlib.contextmanager
def _in_bubblewrap(limits: Limits) -> Iterator[_Running]:
    command = [*_bubblewrap_command(limits), str(_host_python().program), *_arguments()]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={})

        def send(request: bytes) -> None:
            with contextlib.suppress(OSError):
                process.stdin.write(request)
                process.stdin.flush()

        def parts(answer: bytes) -> tuple[bytes, bytes]:
            errors.seek(0)
            return answer, errors.read()

        try:
            yield _Running(send, process.stdout.fileno(), parts)
        finally:
            _end(process)
            process.stdout.close()
            with contextlib.suppress(OSError):  # what it did not read
                process.stdin.close()


def _end(process: subprocess.Popen) -> None:
    """Ends a bubblewrap and all inside: by its child, process 1 of the sandbox, for whose end it waits."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    process.kill()
    process.wait()


def _arguments() -> list[str]:
    """Arguments of Python that make it run `requant.confined`, isolated from its environment."""
    return ["-I", "-S", "-B", "-c", Path(confined.__file__).read_text(encoding="utf-8")]


# Docker


def _docker(image: str | None) -> Backend:
    if image is None:
        _host_python()
    with _docker_client(PING_SECONDS) as client:
        version = client.version()["Version"]
    return Backend("docker", version, platform.python_version() if image is None else None, image)


@contextlib.contextmanager
def _docker_client(timeout: float) -> Iterator[Any]:
    """A client of this machine's engine; RequantError if DOCKER_HOST names another's, and for whatever it says."""
    import docker
    import requests

    docker_host()
    try:
        with contextlib.closing(docker.from_env(timeout=timeout)) as client:
            yield client
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise RequantError(f"docker: {plain(getattr(error, 'explanation', None) or error)}") from None


@contextlib.contextmanager
def _in_docker(limits: Limits, image: str | None) -> Iterator[_Running]:
    import docker

    name = f"requant-sandbox-{uuid.uuid4().hex}"
    with _docker_client(START_SECONDS) as client:
        try:
            _container(client, name, image, limits)
            socket = client.api.attach_socket(name, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            with contextlib.closing(socket):
                client.api.start(name)

                def send(request: bytes) -> None:
                    with contextlib.suppress(OSError):
                        socket._sock.sendall(request)  # the SDK opens it for reading

                yield _Running(send, socket.fileno(), _frames)
        finally:
            # It may be removing itself at this moment: then the one is refused, and the other waits for it.
            with contextlib.suppress(docker.errors.APIError):
                client.api.remove_container(name, force=True)
            with contextlib.suppress(docker.errors.APIError):
                client.api.wait(name, condition="removed")


def _container(client: Any, name: str, image: str | None, limits: Limits) -> None:
    """Creates the container `name`, which removes itself when it ends. Nothing of this machine is given to it but,
    without an image, what Python needs."""
    if image is None:
        host = _host_python()
        _check_private(host.files)
        image, program = _host_image(client, host), str(host.program)
        volumes = {str(path): {"bind": str(path), "mode": "ro"} for path in host.files}
    else:
        _pull(client, image)
        program, volumes = "python3", {}
    size = f"{limits.memory_mb}m"
    client.containers.create(
        image,
        name=name,
        entrypoint=[program, *_arguments()],
        stdin_open=True,
        user=f"{confined.NOBODY}:{confined.NOBODY}",
        volumes=volumes,
        read_only=True,
        tmpfs={"/tmp": f"rw,nosuid,nodev,size={limits.temporary_mb}m,mode=1777"},
        shm_size=f"{SHARED_MB}m",
        network_mode="none",
        ipc_mode="private",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        mem_limit=size,
        memswap_limit=size,
        pids_limit=limits.processes + 1,
        nano_cpus=10**9,
        hostname="sandbox",
        working_dir="/",
        labels={LABEL: "1"},
        log_config={"Type": "none", "Config": {}},
        auto_remove=True,
    )


def _host_image(client: Any, host: _HostPython) -> str:
    """Name of an image of empty folders, where this machine's Python is mounted; made if it isn't there."""
    import docker

    root = _empty_root(host.links)
    tag = hashlib.sha256(root).hexdigest()[:16]
    try:
        client.images.get(f"{HOST_IMAGE}:{tag}")
    except docker.errors.ImageNotFound:
        client.api.import_image_from_data(root, repository=HOST_IMAGE, tag=tag)
    return f"{HOST_IMAGE}:{tag}"


def _empty_root(links: Iterable[tuple[str, str]]) -> bytes:
    """A tar file of the folders that a root has, and of `links`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, mode in (("dev", 0o755), ("etc", 0o755), ("proc", 0o755), ("tmp", 0o1777), ("usr", 0o755)):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, mode  # runc gives a tmpfs the mode of the folder below it
            archive.addfile(folder)
        for place, target in links:
            link = tarfile.TarInfo(place.lstrip("/"))
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
    return data.getvalue()


def _pull(client: Any, image: str) -> None:
    """Gets an image that the engine doesn't have; nothing is asked of a registry otherwise."""
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        client.images.pull(image)


def _frames(answer: bytes) -> tuple[bytes, bytes]:
    """Standard output and error of what Docker sent: parts with a header of 8 bytes, stream and length."""
    streams = {1: b"", 2: b""}
    while len(answer) >= 8:
        stream, length = struct.unpack(">BxxxL", answer[:8])
        streams[stream] = streams.get(stream, b"") + answer[8 : 8 + length]
        answer = answer[8 + length :]
    return streams[1], streams[2]

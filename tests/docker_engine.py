"""A real Docker engine for tests, and an image that runs this environment's programs; no registry is asked.

Fixtures (tests/conftest.py makes them known to all tests):

    docker_engine   session; a `DockerEngine`: `url` (what DOCKER_HOST has to be) and `client` (docker SDK)
    docker_host     one test; the same, with DOCKER_HOST set to it in this process and those it starts
    host_image      session; the name of an image that holds busybox alone. With `host_mounts()` it runs what is
                    installed on this machine: mounted read-only, not copied

The engine is the one that DOCKER_HOST or the usual socket leads to, if one answers. Else root starts one and stops it
with the session: without bridge and iptables rules, so that the machine's network stays as it was (containers have
`network_mode` host or none), with folders, socket and cgroup of its own, so that two test processes have two. Tests
skip where neither can be.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 60.0
STOP_SECONDS = 30.0
BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "echo", "httpd", "id", "ls", "mkdir", "rm", "sleep", "touch", "true", "wget")
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ssl")  # what programs of this machine need besides their own folders
DAEMON = (
    "--bridge=none",
    "--iptables=false",
    "--ip6tables=false",
    "--ip-forward=false",
    "--ip-masq=false",
    "--log-level=warn",
)


@dataclass(frozen=True)
class DockerEngine:
    """An engine that answers at `url`; `client` is a docker.DockerClient of it."""

    url: str
    client: Any


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[DockerEngine]:
    """The running engine, else one of this session's own; skips where there can be none."""
    running = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_connected(running)) or stack.enter_context(_started())
        yield engine


@pytest.fixture
def docker_host(docker_engine, monkeypatch) -> DockerEngine:
    """`docker_engine`, which programs that this test starts find too."""
    monkeypatch.setenv("DOCKER_HOST", docker_engine.url)
    return docker_engine


@pytest.fixture(scope="session")
def host_image(docker_engine) -> Iterator[str]:
    """Name of an image with a static busybox and empty folders to mount at; gone with the session."""
    if not BUSYBOX.is_file() or b"/ld-linux" in BUSYBOX.read_bytes():
        pytest.skip(f"needs a static {BUSYBOX} (Debian: busybox-static)")
    repository = f"requant-test-{uuid.uuid4().hex[:12]}"
    docker_engine.client.api.import_image_from_data(busybox_archive(), repository=repository, tag="busybox")
    try:
        yield f"{repository}:busybox"
    finally:
        docker_engine.client.images.remove(f"{repository}:busybox", force=True)


def host_mounts() -> list[dict[str, Any]]:
    """`mounts` of a target, or of a sandbox: system folders and this Python's environment, as on this machine."""
    named = sorted({os.path.abspath(folder) for folder in (*SYSTEM, sys.base_prefix, sys.prefix, *_module_folders())})
    folders = [Path(folder) for folder in named if Path(folder).is_dir()]
    # A folder inside another one of the list is there already.
    outer = [folder for folder in folders if not any(other in folder.parents for other in folders)]
    return [{"source": str(folder), "target": str(folder), "read_only": True} for folder in outer]


def host_environment() -> dict[str, str]:
    """Variables with which a container that has `host_mounts()` finds this environment's programs."""
    programs = [str(Path(sys.executable).parent), "/bin", "/usr/bin"]
    return {"PATH": ":".join(programs), "PYTHONDONTWRITEBYTECODE": "1"}


def _module_folders() -> list[str]:
    return [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def busybox_archive() -> bytes:
    """A tar of the image's files. Folders have modes of their own, else a user who is not root enters none."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:

        def add(name: str, kind: bytes, mode: int, content: bytes = b"", link: str = "") -> None:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode, entry.linkname, entry.size = kind, mode, link, len(content)
            archive.addfile(entry, io.BytesIO(content))

        for folder in ("bin", "etc", "etc/ssl", "lib", "lib64", "proc", "sys", "dev", "usr", "root"):
            add(folder, tarfile.DIRTYPE, 0o755)
        add("tmp", tarfile.DIRTYPE, 0o1777)
        add("bin/busybox", tarfile.REGTYPE, 0o755, BUSYBOX.read_bytes())
        for applet in APPLETS:
            add(f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
    return data.getvalue()


@contextlib.contextmanager
def _connected(url: str) -> Iterator[DockerEngine | None]:
    """The engine at `url`; None if none answers."""
    import docker

    try:
        client = docker.DockerClient(base_url=url, timeout=60)
        client.ping()
    except docker.errors.DockerException:
        yield None
        return
    with contextlib.closing(client):
        yield DockerEngine(url, client)


@contextlib.contextmanager
def _started() -> Iterator[DockerEngine]:
    """An engine of this session's own, with everything of it gone in the end."""
    import docker

    if os.geteuid() != 0:
        pytest.skip("needs a running Docker engine, or root to start one")
    if shutil.which("dockerd") is None or shutil.which("setpriv") is None:
        pytest.skip("needs a Docker engine: no dockerd on this machine (Debian: docker.io)")
    folder = Path(tempfile.mkdtemp(prefix="requant-docker-"))
    group = folder.name
    url = f"unix://{folder}/docker.sock"
    places = [
        f"--host={url}",
        f"--data-root={folder}/data",
        f"--exec-root={folder}/exec",
        f"--pidfile={folder}/docker.pid",
        f"--cgroup-parent=/{group}",
    ]
    log = folder / "log"
    with log.open("wb") as output:
        # The engine ends with this process, even if that is killed.
        command = ["setpriv", "--pdeathsig", "TERM", "dockerd", *places, *DAEMON]
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait_for(daemon, url, log)
        with _connected(url) as engine:
            yield engine
            for container in engine.client.containers.list(all=True, ignore_removed=True):
                # One that is removing itself at this moment needs no help.
                with contextlib.suppress(docker.errors.APIError):
                    container.remove(force=True, v=True)
    finally:
        _stop(daemon)
        _remove(folder, group)


def _wait_for(daemon: subprocess.Popen, url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        with _connected(url) as engine:
            if engine is not None:
                return
        if daemon.poll() is not None:
            pytest.skip(f"dockerd can't run here: {' '.join(log.read_text(errors='replace').split())[-500:]}")
        time.sleep(0.1)
    raise TimeoutError(f"{log}: dockerd did not answer in {START_SECONDS:g} s")


def _stop(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _remove(folder: Path, group: str) -> None:
    """Unmounts what dockerd leaves mounted, then removes its folders, those of its cgroups included."""
    mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in sorted(mounted, reverse=True):
        if Path(place).is_relative_to(folder):
            subprocess.run(["umount", "--lazy", place], check=False)
    shutil.rmtree(folder)
    for cgroup in [Path("/sys/fs/cgroup", group), *Path("/sys/fs/cgroup").glob(f"*/{group}")]:
        for inner in sorted(cgroup.glob("**/"), reverse=True):
            with contextlib.suppress(OSError):
                inner.rmdir()

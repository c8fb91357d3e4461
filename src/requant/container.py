"""An engine in a Docker container: what is asked of Docker, as plain data, and running it.

`container_request` grants what the target names and nothing else: the checkpoint is read-only, the port is the
loopback's, all capabilities are dropped and no process gains any. The container ends with the `with` block, whatever
ends that: an answer, an exception, Ctrl-C or SIGTERM. Nothing can end it if this process is killed outright, so it
is labelled with the process it belongs to, and the next start removes those whose process is gone.
"""

import contextlib
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from requant.assignment import taken
from requant.config import Target
from requant.docker_host import docker_host
from requant.engine_command import LOOPBACK, MOUNTED, engine_command
from requant.errors import RequantError, brief, plain
from requant.jobs import progress
from requant.process import Process
from requant.serving import (
    ENGINES,
    PLAIN,
    STOP_SECONDS,
    UNKNOWN,
    Server,
    checkpoint_quantization,
    chosen_port,
    engine_environment,
    name_for_requests,
    shown_command,
    unwinding_on_sigterm,
    version_script,
    wait_until_healthy,
)

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

SERVED = "requant.served"  # label: what the container serves
OWNER = "requant.owner"  # label: the process that it belongs to, see `owner`
ANSWER_SECONDS = 120  # for one answer of Docker


def container_request(
    target: Target,
    model: Path,
    name: str,
    port: int,
    *,
    quantization: str | None = None,
    threads: int = 1,
    linked: Collection[Path] = (),
) -> dict[str, Any]:
    """Arguments of the Docker SDK's `containers.create` for `target` to serve the checkpoint in `model`.

    Plain data that JSON can hold. port: of the loopback, and in the container too. quantization: as for
    `engine_command`. threads: of an engine on the CPU. Files of the checkpoint that are links into the hub's cache, or
    to the files `linked`, are mounted one by one. Raises RequantError if the target has no image, or if a link leads
    elsewhere.
    """
    if target.image is None:
        raise RequantError(f"image: missing; the target starts {target.engine} as a program, without a container")
    folder = Path(os.path.abspath(model))
    checkpoint = [(str(folder), MOUNTED), *links_out(folder, linked)]
    return _request(target, checkpoint, name, port, quantization, threads)


def _request(
    target: Target,
    checkpoint: list[tuple[str, str]],
    name: str,
    port: int | str,
    quantization: str | None,
    threads: int,
) -> dict[str, Any]:
    """`container_request` with the checkpoint as pairs (on this machine, in the container)."""
    container = target.container
    host = engine_host(target)
    program, *arguments = engine_command(target, MOUNTED, name, port, host, quantization)
    cache = {"HF_HUB_CACHE": "/tmp"} if target.engine == "transformers" else {}  # it fails on one that is absent
    request = {
        "image": target.image,
        "name": f"requant-{port}",  # Docker allows it once: of two that want a port, the second is refused
        "entrypoint": [program],
        "command": arguments,
        "environment": {**PLAIN, **cache, **engine_environment(target, threads)},
        "labels": {SERVED: name},
        "mounts": [_mount(source, place, True) for source, place in checkpoint]
        + [_mount(os.path.abspath(mount.source), mount.target, mount.read_only) for mount in container.mounts],
        "network_mode": container.network,
        "ipc_mode": container.ipc,
        "pids_limit": container.processes,
        "cap_drop": ["ALL"],
        "cap_add": container.capabilities,
        "security_opt": ["no-new-privileges"],
        "auto_remove": False,  # the log and the exit status are read first
    }
    if container.network == "bridge":
        request["ports"] = {f"{port}/tcp": {"HostIp": LOOPBACK, "HostPort": port}}
    if container.shm_size is not None:
        request["shm_size"] = container.shm_size
    if container.ulimits:
        request["ulimits"] = [
            {"Name": limit, "Soft": value, "Hard": value} for limit, value in container.ulimits.items()
        ]
    if container.memory_gb is not None:
        request["mem_limit"] = request["memswap_limit"] = int(container.memory_gb * 1e9)  # no swap beyond it
    if container.cpus is not None:
        request["nano_cpus"] = int(container.cpus * 1e9)
    if container.user is not None:
        request["user"] = container.user
    if target.device == "cuda":
        request["device_requests"] = [{"Count": target.devices, "Capabilities": [["gpu"]]}]
    return request


def engine_host(target: Target) -> str:
    """The address that the engine binds: the loopback of the machine, or all of a network that is the container's."""
    return LOOPBACK if target.container.network == "host" else "0.0.0.0"


def _mount(source: str, place: str, read_only: bool) -> dict[str, Any]:
    """A bind mount as Docker's API has it; unlike `volumes`, it makes no folder where the source is missing."""
    return {"Type": "bind", "Source": source, "Target": place, "ReadOnly": read_only}


def links_out(folder: Path, linked: Collection[Path] = ()) -> list[tuple[str, str]]:
    """(file, where links in the container lead to it) for the links in `folder` that lead out of it.

    Only those of the hub's cache may, to the blobs beside the snapshot, and those to the files `linked`. Whoever made a
    checkpoint may have made any link: RequantError names one that leads to anything else.
    """
    found, top = [], folder.resolve()
    blobs = _blobs(top)
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink()):
        inside, target, real = link.relative_to(folder), os.readlink(link), Path(os.path.realpath(link))
        place = Path(os.path.normpath(Path(MOUNTED, inside).parent / target))
        if place.is_relative_to(MOUNTED):
            continue  # to a file of the folder, or to one of these links
        said = Path(os.path.normpath((top / inside).parent / target))  # as it is written: the container goes by that
        if not real.is_file() or not (said in linked or said.parent == blobs == real.parent):
            raise RequantError(
                f"{link}: a link to {brief(target)}; expected a file in this folder, or a snapshot of the hub's cache: "
                "what a link leads to elsewhere is not shown to a container; put the file in its place"
            )
        found.append((str(real), str(place)))
    return found


def _blobs(folder: Path) -> Path | None:
    """The folder of files that a snapshot in the hub's cache is made of; None if `folder` is none."""
    snapshots = folder.parent
    is_one = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return snapshots.parent / "blobs" if is_one else None


@contextlib.contextmanager
def serve_in_container(
    model: str | Path,
    log: str | Path,
    target: Target,
    *,
    threads: int = 1,
    name: str | None = None,
    port: int = 0,
    linked: Collection[Path] = (),
) -> Iterator[Server]:
    """Serves the checkpoint in `model` in a container of the target's image; its output goes to `log`.

    Requests name the model `Server.model`. linked: files that its links may lead to. Raises RequantError in one line if
    another link leads out of it, Docker can't be asked, the image is not there, Docker refuses the container, the port
    is taken, and, with the log's first error, if the engine ends or does not answer its health check in the target's
    `startup_seconds`.
    """
    model, log = Path(model).resolve(), Path(log)
    name = name or model.name
    quantization = checkpoint_quantization(target, model)
    log.parent.mkdir(parents=True, exist_ok=True)
    with unwinding_on_sigterm(), connected() as client, log.open("wb") as output:
        remove_leftovers(client)
        image = _image(client, target, output)
        port = chosen_port(port, target)
        request = container_request(
            target, model, name, port, quantization=quantization, threads=threads, linked=linked
        )
        with _running(client, request, output) as (container, reader):
            started = time.monotonic()
            url = wait_until_healthy(
                lambda: f"http://{LOOPBACK}:{port}",
                lambda: _how_ended(container, reader, target),
                log,
                target.startup_seconds,
            )
            seconds = time.monotonic() - started
            shown = _request(target, [("{model}", MOUNTED)], name, "{port}", quantization, threads)
            yield Server(
                url=url,
                model=name_for_requests(target, MOUNTED, name),
                pid=container.attrs["State"]["Pid"],
                engine=ENGINES[target.engine],
                version=_version(container, target.engine),
                command=shown_command(target, name, quantization, engine_host(target)),
                environment=engine_environment(target, threads),
                startup_seconds=seconds,
                container={"request": shown, "image_id": image.id, "image_digests": image.attrs["RepoDigests"] or []},
                log=log,
                how_ended=lambda: _how_ended(container, reader, target),
            )


@contextlib.contextmanager
def connected() -> Iterator["DockerClient"]:
    """A client of the Docker engine of this machine. Raises RequantError if there is none that answers."""
    try:
        import docker
    except ImportError as error:
        raise RequantError(
            f"docker: {error}; expected Docker's Python package: install envs/requirements.lock"
        ) from error
    url = docker_host()
    try:
        client = docker.from_env(timeout=ANSWER_SECONDS)
    except docker.errors.DockerException as error:
        raise RequantError(_why_no_engine(url, str(error))) from error
    with contextlib.closing(client):
        yield client


def _why_no_engine(url: str, said: str) -> str:
    """The error of a Docker engine that can't be asked."""
    if "PermissionError" in said:
        return f"{url}: no permission to ask Docker; expected a user of the group `docker`, or rootless Docker's socket"
    if "FileNotFoundError" in said or "ConnectionRefused" in said:
        return (
            f"{url}: no Docker engine answers; expected one that runs: install or start Docker, set DOCKER_HOST, or "
            "choose a target without `image`"
        )
    return f"{url}: {plain(said)}; expected a Docker engine"


def owner() -> str:
    """A label for one container: the machine, number and start of this process, and a name no other label has."""
    process = Process.this()
    named = {"host": process.host, "pid": process.pid, "started": process.started}
    return json.dumps(named | {"label": uuid.uuid4().hex})


def remove_leftovers(client: "DockerClient") -> list[str]:
    """Removes the containers of processes of this machine that are gone; returns their names."""
    import docker

    removed = []
    for container in client.containers.list(all=True, filters={"label": OWNER}, ignore_removed=True):
        if _owner_is_gone(container.labels[OWNER]):
            with contextlib.suppress(docker.errors.APIError):  # another start is removing it too
                container.remove(force=True, v=True)
                progress(f"removed container {container.name}: the process that started it is gone")
                removed.append(container.name)
    return removed


def _owner_is_gone(label: str) -> bool:
    """Whether the process that `label` names is one of this machine that has ended."""
    try:
        named = json.loads(label)
        return Process(named["host"], int(named["pid"]), float(named["started"])).has_ended
    except (ValueError, KeyError, TypeError):
        return False


def _image(client: "DockerClient", target: Target, log: BinaryIO) -> Any:
    """The target's image, pulled if the target allows it and Docker has it not; the pull's progress goes to `log`."""
    import docker

    try:
        return client.images.get(target.image)
    except docker.errors.ImageNotFound:
        if target.container.pull == "never":
            raise RequantError(
                f"{target.image}: no such image in Docker, and the target's `container.pull` is never; expected it "
                f"there: `docker pull {target.image}`, or `pull: missing`"
            ) from None
    except docker.errors.APIError as error:
        raise RequantError(
            f"{brief(target.image)}: {plain(said_by(error))}; expected NAME:TAG or NAME@sha256:HASH"
        ) from error
    progress(f"pulling {target.image}")
    repository, tag = docker.utils.parse_repository_tag(target.image)
    try:
        seen: set[tuple] = set()
        for step in client.api.pull(repository, tag=tag or "latest", stream=True, decode=True):
            if "error" in step:
                raise RequantError(_not_pulled(target.image, step["error"]))
            line = (step.get("id"), step.get("status"))
            if line not in seen:  # a layer repeats its status with every megabyte
                seen.add(line)
                log.write(f"{' '.join(filter(None, line))}\n".encode())
                log.flush()
        return client.images.get(target.image)
    except docker.errors.APIError as error:
        raise RequantError(_not_pulled(target.image, said_by(error))) from error


def said_by(error: Exception) -> str:
    """What Docker says of a failure, without the request that it failed at."""
    return str(getattr(error, "explanation", None) or error)


def _not_pulled(image: str, said: str) -> str:
    return (
        f"{image}: no such image in Docker, and it can't be pulled: {plain(said)}; expected a registry that answers, "
        "or the image there: `docker load`"
    )


@contextlib.contextmanager
def _running(
    client: "DockerClient", request: dict[str, Any], log: BinaryIO
) -> Iterator[tuple["Container", threading.Thread]]:
    """(the started container, the thread that copies its output to `log`); stopped and removed in the end.

    Raises RequantError if Docker refuses it.
    """
    import docker
    import requests

    mine = owner()
    reader = None
    try:
        try:
            own = {"labels": request["labels"] | {OWNER: mine}} | _gpus_of_this_job(request)
            # No proxy of the user's own Docker client: it would be in the container's environment.
            container = client.containers.create(**request | own, use_config_proxy=False)
            container.start()
        except (docker.errors.APIError, requests.RequestException) as error:
            raise RequantError(_refused(request, said_by(error))) from error
        reader = threading.Thread(target=_copy_output, args=(container, log), daemon=True)
        reader.start()
        yield container, reader
    finally:
        with undisturbed():
            _remove(client, request["name"], mine, reader)


def _gpus_of_this_job(request: dict[str, Any]) -> dict[str, Any]:
    """The GPUs of `request` by name, where this job has some for itself: an engine takes no other's."""
    names = taken()
    if not names or "device_requests" not in request:
        return {}
    return {"device_requests": [{"DeviceIDs": names, "Capabilities": [["gpu"]]}]}


def _refused(request: dict[str, Any], said: str) -> str:
    """The error of a container that Docker does not make or start."""
    image = request["image"]
    if "could not select device driver" in said:
        return (
            f"{image}: Docker has no runtime for NVIDIA GPUs ({plain(said)}); expected the NVIDIA Container Toolkit: "
            "install it and run `nvidia-ctk runtime configure`"
        )
    if "port is already allocated" in said or "address already in use" in said or "is already in use by" in said:
        return f"{image}: the port of container {request['name']} is taken: {plain(said)}; expected a free one"
    return f"{image}: Docker refuses the container: {plain(said, 400)}; expected it to start"


def _copy_output(container: "Container", log: BinaryIO) -> None:
    """Copies what the container writes until it ends, Docker answers no more, or the disk takes no more."""
    import docker

    with contextlib.suppress(docker.errors.DockerException, OSError, ValueError):
        for part in container.logs(stream=True, follow=True):
            log.write(part)
            log.flush()


def _how_ended(container: "Container", reader: threading.Thread, target: Target) -> str | None:
    """How the container ended, its output being read to the end; None while it runs."""
    import docker
    import requests

    try:
        container.reload()
    except docker.errors.NotFound:
        return "was removed"
    except requests.RequestException as error:
        return f"can't be seen any more, Docker does not answer ({plain(error)}),"
    state = container.attrs["State"]
    if state["Running"]:
        return None
    reader.join(STOP_SECONDS)
    if state["OOMKilled"]:
        return f"was killed for want of memory (`container.memory_gb`: {target.container.memory_gb or 'no limit'})"
    return f"ended with status {state['ExitCode']}"


def _remove(client: "DockerClient", name: str, mine: str, reader: threading.Thread | None) -> None:
    """Stops and removes the container `name` if its owner is `mine`; a failure is said, not raised."""
    import docker
    import requests

    try:
        container = client.containers.get(name)
        if container.labels.get(OWNER) != mine:
            return
        container.stop(timeout=round(STOP_SECONDS))
        if reader is not None:
            reader.join(STOP_SECONDS)
        container.remove(force=True, v=True)
    except docker.errors.NotFound:
        pass
    except (docker.errors.DockerException, requests.RequestException) as error:
        progress(f"warning: container {name} is not removed: {plain(error)}; `docker rm --force {name}` does it")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block has ended, so that a second one does not cut tidying short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in held:
            signal.raise_signal(number)


def _version(container: "Container", engine: str) -> str:
    """The engine's version, as the image's Python says."""
    import docker

    try:
        status, said = container.exec_run(["python3", "-c", version_script(engine)], stderr=False)
    except docker.errors.APIError:
        return UNKNOWN
    return said.decode(errors="replace").strip() if status == 0 else UNKNOWN

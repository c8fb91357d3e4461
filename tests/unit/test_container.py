"""Serving in a container of a real Docker engine: what is asked of it, what is served, and that nothing stays.

The engine here has no bridge and no GPU: containers have the machine's network and bind the loopback, and what is
asked of Docker for GPUs and for published ports is tested as data. Where only starting and stopping is tested, a
shell script with busybox's web server stands in for the serving engine.
"""

import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import docker
import psutil
import pytest
from docker_engine import busybox_archive, host_environment, host_mounts
from openai import OpenAI

from requant import container, serving
from requant.config import Sandbox, Target
from requant.container import container_request
from requant.docker_host import docker_host
from requant.engines import serve_at
from requant.errors import RequantError
from requant.sandbox import Backend, Limits, run_untrusted, which_sandbox
from requant.served_copy import linked_files, mirror
from requant.serving import Server
from requant.targets import check_here

DEMO = Path(__file__).parents[2] / "demo" / "model"
PROMPTS = ("sort: 4 1 3 2 ->", "The oldest")
# Called as `transformers serve /model --host HOST --port PORT --device cpu`.
ENGINES = {
    "healthy": 'mkdir /tmp/www; echo ok > /tmp/www/health; echo serving; httpd -f -p "$4:$6" -h /tmp/www & '
    "trap 'kill $!; exit 0' TERM; wait",
    "stubborn": 'mkdir /tmp/www; echo ok > /tmp/www/health; trap "" TERM; httpd -f -p "$4:$6" -h /tmp/www & wait',
    "dies": "echo loading >&2; echo 'OSError: config.json has no model_type' >&2; exit 3",
    "loads": "echo 'loading shard 1 of 9'; echo 'loading shard 2 of 9'; exec sleep 600",
    "fills": "exec python -c \"b'x' * 10**9\"",
}


def gpu_target(**more) -> Target:
    """A target of eight GPUs that names all there is to name."""
    return Target.model_validate(
        {
            "engine": "sglang",
            "image": "example/sglang@sha256:" + "0" * 64,
            "device": "cuda",
            "gpu": "sm120",
            "devices": 8,
            "arguments": ["--moe-runner-backend", "b12x"],
            "environment": {"NCCL_P2P_LEVEL": "SYS"},
            "container": {
                "ipc": "host",
                "shm_size": "8g",
                "ulimits": {"memlock": -1, "stack": 67108864},
                "memory_gb": 200,
                "cpus": 12.5,
                "processes": 9000,
                "capabilities": ["SYS_NICE"],
                "user": "1000:1000",
                "mounts": [{"source": "/data/cache", "target": "/cache", "read_only": False}],
            }
            | more,
        }
    )


@pytest.fixture
def stand_in(tmp_path, docker_host, host_image, monkeypatch):
    """A target whose image has an engine of the given behaviour in the place of `transformers`."""
    monkeypatch.setattr(container, "STOP_SECONDS", 1.0)

    def make(behaviour: str, container: dict | None = None, **settings) -> Target:
        folder = tmp_path / "engine"
        folder.mkdir()
        program = folder / "transformers"
        program.write_text(f"#!/bin/sh\n{ENGINES[behaviour]}\n")
        program.chmod(0o755)
        mounts = [*host_mounts(), {"source": str(folder), "target": "/engine"}]
        environment = host_environment()
        return Target.model_validate(
            {
                "image": host_image,
                "environment": environment | {"PATH": f"/engine:{environment['PATH']}"},
                "startup_seconds": 30,
                "container": {"network": "host", "mounts": mounts, **(container or {})},
            }
            | settings
        )

    return make


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def registry(docker_host):
    """(host:port, digest) of a stand-in for a registry that has the image requant/engine:1; Docker asks it as any."""
    files = busybox_archive()
    layer = gzip.compress(files, mtime=0)
    settings = {"architecture": docker_host.client.version()["Arch"], "os": "linux", "config": {}}
    settings["rootfs"] = {"type": "layers", "diff_ids": [digest_of(files)]}
    config = json.dumps(settings).encode()
    kinds = {"config": "application/vnd.docker.container.image.v1+json"}
    kinds["layer"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    entries = {
        name: {"mediaType": kinds[name], "size": len(blob), "digest": digest_of(blob)}
        for name, blob in (("config", config), ("layer", layer))
    }
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": kind, "config": entries["config"], "layers": [entries["layer"]]}
    ).encode()
    digest = digest_of(manifest)
    answers = {"/v2/": b"{}"}
    answers |= {f"/v2/requant/engine/manifests/{name}": manifest for name in ("1", digest)}
    answers |= {f"/v2/requant/engine/blobs/{digest_of(blob)}": blob for blob in (config, layer)}

    class Registry(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = answers.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Type", kind if "/manifests/" in self.path else "application/octet-stream")
            self.send_header("Content-Length", str(len(body or b"")))
            if "/manifests/" in self.path:
                self.send_header("Docker-Content-Digest", digest)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        do_HEAD = do_GET

        def log_message(self, *parts):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        yield place, digest
        server.shutdown()
    for image in docker_host.client.images.list(name=f"{place}/requant/engine"):
        docker_host.client.images.remove(image.id, force=True)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def containers(engine) -> list[str]:
    """Names of all containers that requant made."""
    found = engine.client.containers.list(all=True, filters={"label": container.OWNER}, ignore_removed=True)
    return [one.name for one in found]


def refusal_of(target: Target, model: Path, log: Path, **more) -> str:
    """The one line of an engine that can't be started."""
    with pytest.raises(RequantError) as raised, serve_at(target, model, log, **more):
        pytest.fail("it serves")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_the_request_for_gpus_is_exactly_what_the_target_names():
    request = container_request(gpu_target(), Path("/data/release"), "mine", 30000, quantization="compressed-tensors")
    assert json.loads(json.dumps(request)) == request
    assert request == {
        "image": "example/sglang@sha256:" + "0" * 64,
        "name": "requant-30000",
        "entrypoint": ["python3"],
        "command": ["-m", "sglang.launch_server", "--model-path", "/model", "--served-model-name", "mine"]
        + ["--host", "0.0.0.0", "--port", "30000", "--tensor-parallel-size", "8"]
        + ["--quantization", "compressed-tensors", "--watchdog-timeout", "3600"]
        + ["--mem-fraction-static", "0.85", "--moe-runner-backend", "b12x"],
        "environment": {
            "SGLANG_WARMUP_TIMEOUT": "3600",
            "DO_NOT_TRACK": "1",
            "NO_COLOR": "1",
            "TYPER_STANDARD_TRACEBACK": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "NCCL_P2P_LEVEL": "SYS",
        },
        "labels": {"requant.served": "mine"},
        "mounts": [
            {"Type": "bind", "Source": "/data/release", "Target": "/model", "ReadOnly": True},
            {"Type": "bind", "Source": "/data/cache", "Target": "/cache", "ReadOnly": False},
        ],
        "network_mode": "bridge",
        "ports": {"30000/tcp": {"HostIp": "127.0.0.1", "HostPort": 30000}},
        "ipc_mode": "host",
        "shm_size": "8g",
        "ulimits": [{"Name": "memlock", "Soft": -1, "Hard": -1}, {"Name": "stack", "Soft": 67108864, "Hard": 67108864}],
        "mem_limit": 200 * 10**9,
        "memswap_limit": 200 * 10**9,
        "nano_cpus": 12_500_000_000,
        "pids_limit": 9000,
        "cap_drop": ["ALL"],
        "cap_add": ["SYS_NICE"],
        "security_opt": ["no-new-privileges"],
        "user": "1000:1000",
        "device_requests": [{"Count": 8, "Capabilities": [["gpu"]]}],
        "auto_remove": False,
    }


def test_what_a_target_does_not_name_is_not_asked_for():
    request = container_request(Target(image="example/cpu:1"), Path("/data/release"), "mine", 8000)
    granted = {"device_requests", "devices", "privileged", "user", "ulimits", "shm_size", "pid_mode", "volumes"}
    assert not granted & request.keys()
    assert request["cap_drop"] == ["ALL"] and request["cap_add"] == [] and request["ipc_mode"] == "private"
    assert [mount["Target"] for mount in request["mounts"]] == ["/model"] and request["mounts"][0]["ReadOnly"]


def test_on_the_machines_network_the_engine_binds_the_loopback_and_no_port_is_published():
    request = container_request(gpu_target(network="host"), Path("/data/release"), "mine", 8000)
    assert request["network_mode"] == "host" and "ports" not in request
    assert request["command"][request["command"].index("--host") + 1] == "127.0.0.1"


def test_docker_takes_the_request_for_published_ports_and_limits(docker_host, host_image):
    target = gpu_target(cpus=1.5, mounts=[{"source": "/usr", "target": "/usr"}]).model_copy(
        update={"image": host_image}
    )
    request = container_request(target, DEMO, "mine", 8000)
    made = docker_host.client.containers.create(**request)
    try:
        made.reload()
        found = made.attrs["HostConfig"]
    finally:
        made.remove(force=True)
    assert found["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}]}
    assert found["DeviceRequests"][0]["Count"] == 8 and found["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    assert [name.removeprefix("CAP_") for name in found["CapAdd"]] == ["SYS_NICE"]  # later versions write the prefix
    assert found["CapDrop"] == ["ALL"] and not found["Privileged"]
    assert (found["Memory"], found["NanoCpus"], found["PidsLimit"]) == (200 * 10**9, 1_500_000_000, 9000)
    assert found["ShmSize"] == 8 * 2**30 and found["IpcMode"] == "host"
    assert {limit["Name"]: limit["Hard"] for limit in found["Ulimits"]} == {"memlock": -1, "stack": 67108864}


def test_files_that_are_links_are_mounted_where_the_links_lead(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f", tmp_path / "models--a--b/blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "7d").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/7d")  # as in the hub's cache
    (snapshot / "model.safetensors").symlink_to(blobs / "7d")
    (snapshot / "same.json").symlink_to("config.json")
    mounts = container_request(Target(image="example/cpu:1"), snapshot, "mine", 8000)["mounts"]
    assert {mount["Target"]: mount["Source"] for mount in mounts} == {
        "/model": str(snapshot),
        "/blobs/7d": str(blobs / "7d"),
        str(blobs / "7d"): str(blobs / "7d"),
    }
    assert all(mount["ReadOnly"] for mount in mounts)


def plant(folder: Path, name: str, target: str | Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(target)


def test_what_links_lead_to_elsewhere_is_shown_to_no_container(tmp_path):
    """Whoever made the checkpoint may have made any link, one that looks like the hub's too."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "away/blobs").mkdir(parents=True)
    (tmp_path / "away/blobs/7d").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs/leak").symlink_to(secret)
    (repository / "blobs/7d").write_text("{}")
    (repository / "usr").symlink_to("blobs")
    planted = [
        ("plain", "config.json", secret),
        ("plain", "config.json", "../secret"),
        ("plain", "deep/er/config.json", "../../../secret"),
        ("plain", "all", tmp_path),
        ("plain", "config.json", "../away/blobs/7d"),
        ("plain", "gone.json", tmp_path / "gone"),
        ("plain", "null.safetensors", "/dev/null"),
        ("plain", "loop.json", "../loop"),
        ("models--a--b/snapshots/0f", "config.json", "../../blobs/leak"),
        ("models--a--b/snapshots/0f", "config.json", "../../../away/blobs/7d"),
        ("models--a--b/snapshots/0f", "python3", "../../usr/7d"),
        ("models--a--b/snapshots/0f", "blobs", "../../blobs"),
        ("models--a--b/no-snapshots/0f", "config.json", "../../blobs/7d"),
    ]
    for number, (folder, name, target) in enumerate(planted):
        place = tmp_path / folder.replace("plain", f"plain{number}").replace("0f", f"0f{number}")
        plant(place, "same.json", "inner.json")
        (place / "inner.json").write_text("{}")
        plant(place, name, target)
        with pytest.raises(RequantError) as error:
            container_request(Target(image="example/cpu:1"), place, "mine", 8000)
        assert str(error.value).startswith(f"{place / name}: a link to "), (folder, name, target)
        (place / name).unlink()
        (mount,) = container_request(Target(image="example/cpu:1"), place, "mine", 8000)["mounts"]
        assert mount["Source"] == str(place), "a link within the folder is the container's too"


def test_a_chain_of_links_within_the_folder_that_ends_elsewhere_is_refused(tmp_path):
    (tmp_path / "secret").write_text("secret")
    plant(tmp_path / "model", "a.json", "b.json")
    plant(tmp_path / "model", "b.json", "../secret")
    with pytest.raises(RequantError, match=r"/b\.json: a link to '\.\./secret'; expected a file in this folder"):
        container_request(Target(image="example/cpu:1"), tmp_path / "model", "mine", 8000)


def test_links_that_requant_made_lead_to_what_it_names(tmp_path):
    (tmp_path / "packed").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "packed" / name).write_text("{}")
    mirror(tmp_path / "packed", ["config.json", "model.safetensors"], tmp_path / "served")
    shard, target = tmp_path / "packed/model.safetensors", Target(image="example/cpu:1")
    linked = linked_files(tmp_path / "served")
    assert linked == [shard]
    mounts = container_request(target, tmp_path / "served", "mine", 8000, linked=linked)["mounts"]
    assert {mount["Target"]: mount["Source"] for mount in mounts} == {
        "/model": str(tmp_path / "served"),
        str(shard): str(shard),
    }
    with pytest.raises(RequantError, match=r"model\.safetensors: a link to "):
        container_request(target, tmp_path / "served", "mine", 8000)


def ask(server: Server, prompt: str) -> str:
    """The greedy answer of 12 tokens."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)
    answer = client.completions.create(model=server.model, prompt=prompt, max_tokens=12, temperature=0.0)
    return answer.choices[0].text


def test_the_demo_answers_from_a_container_as_from_a_program(tmp_path, docker_host, host_image):
    model = tmp_path / "demo"
    mirror(DEMO, [path.name for path in DEMO.iterdir() if path.is_file()], model)  # shards are links
    limits = {"memory_gb": 2, "cpus": 2, "mounts": host_mounts(), "network": "host", "processes": 500}
    target = Target.model_validate(
        {"image": host_image, "environment": host_environment(), "container": limits, "startup_seconds": 120}
    )
    with serve_at(Target(), model, tmp_path / "program.log") as server:
        expected = [ask(server, prompt) for prompt in PROMPTS]
    linked = linked_files(model)
    with serve_at(target, model, tmp_path / "container.log", name="tiny", linked=linked) as server:
        assert [ask(server, prompt) for prompt in PROMPTS] == expected
        assert all(expected)

        (made,) = docker_host.client.containers.list(filters={"label": "requant.served=tiny"})
        assert made.attrs["State"]["Pid"] == server.pid and psutil.pid_exists(server.pid)
        status = dict(re.findall(r"^(\w+):\s*(.*)$", made.exec_run(["cat", "/proc/1/status"]).output.decode(), re.M))
        assert status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) == 0 and int(status["CapBnd"], 16) == 0
        assert made.exec_run(["touch", "/model/more"]).exit_code != 0
        assert made.exec_run(["touch", "/model/config.json"]).exit_code != 0
        port = int(server.url.rsplit(":", 1)[1])
        listening = [link.laddr for link in psutil.net_connections("tcp") if link.status == "LISTEN"]
        assert [place.ip for place in listening if place.port == port] == ["127.0.0.1"]
    assert containers(docker_host) == [] and port_is_free(port)
    assert f"http://127.0.0.1:{port}" in (tmp_path / "container.log").read_text()

    assert server.engine == "transformers serve" and server.version == version("transformers")
    assert " ".join(server.command) == "transformers serve {model} --host 127.0.0.1 --port {port} --device cpu"
    assert server.container["image_id"].startswith("sha256:") and server.container["image_digests"] == []
    request = server.container["request"]
    assert request["mounts"][0] == {"Type": "bind", "Source": "{model}", "Target": "/model", "ReadOnly": True}
    assert [*request["entrypoint"], *request["command"]] == [
        "/model" if word == "{model}" else word for word in server.command
    ]
    assert str(port) not in json.dumps(request) and str(model) not in json.dumps(request)


def test_an_engine_that_ends_is_one_line_with_its_status_and_first_error(tmp_path, docker_host, stand_in, checkpoint):
    message = refusal_of(stand_in("dies"), checkpoint, tmp_path / "log")
    assert "status 3 before it served: OSError: config.json has no model_type; " in message
    assert str(tmp_path / "log") in message and containers(docker_host) == []


def test_an_engine_that_needs_more_memory_than_it_may_have_is_named(tmp_path, docker_host, stand_in, checkpoint):
    target = stand_in("fills", container={"memory_gb": 0.1})
    assert "killed for want of memory (`container.memory_gb`: 0.1)" in refusal_of(target, checkpoint, tmp_path / "log")
    assert containers(docker_host) == []


def test_an_engine_that_never_gets_healthy_is_stopped_and_its_last_line_shown(
    tmp_path, docker_host, stand_in, checkpoint
):
    message = refusal_of(stand_in("loads", startup_seconds=3), checkpoint, tmp_path / "log")
    assert "no answer to /health after 3 s: its log ends with loading shard 2 of 9; " in message
    assert "startup_seconds" in message and containers(docker_host) == []


@pytest.mark.parametrize("where", ["container", "program"])
def test_a_taken_port_is_one_line(tmp_path, docker_host, stand_in, checkpoint, where):
    target = stand_in("healthy") if where == "container" else Target()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal_of(target, checkpoint, tmp_path / "log", port=port)
    assert message.startswith(f"port {port} of 127.0.0.1: Address already in use; expected a free one")
    assert containers(docker_host) == []


def test_of_two_that_want_a_port_the_second_is_refused_and_the_first_goes_on(
    tmp_path, docker_host, stand_in, checkpoint, monkeypatch
):
    target = stand_in("healthy")
    with serve_at(target, checkpoint, tmp_path / "first.log") as server:
        port = int(server.url.rsplit(":", 1)[1])
        monkeypatch.setattr(container, "chosen_port", lambda port, target: port)  # it was free when it was looked at
        message = refusal_of(target, checkpoint, tmp_path / "second.log", port=port)
        assert f"the port of container requant-{port} is taken" in message
        assert containers(docker_host) == [f"requant-{port}"] and not port_is_free(port)
    assert containers(docker_host) == []


def test_an_image_that_is_not_there_is_not_pulled_if_the_target_says_never(tmp_path, docker_host, checkpoint):
    target = Target(image="requant-test/nothing:1", container={"pull": "never"})
    message = refusal_of(target, checkpoint, tmp_path / "log")
    assert "requant-test/nothing:1: no such image in Docker, and the target's `container.pull` is never" in message


def test_a_name_that_no_image_can_have_is_one_line(tmp_path, docker_host, checkpoint):
    message = refusal_of(Target(image="Not An Image"), checkpoint, tmp_path / "log")
    assert "Not An Image" in message and "invalid reference format" in message


def test_a_registry_that_does_not_answer_is_one_line(tmp_path, docker_host, checkpoint):
    target = Target(image="127.0.0.1:1/requant/nothing:1")  # a registry on a port where nothing listens
    message = refusal_of(target, checkpoint, tmp_path / "log")
    assert "127.0.0.1:1/requant/nothing:1: no such image in Docker, and it can't be pulled: " in message
    assert "connection refused" in message


@pytest.mark.parametrize("by", ["tag", "digest"])
def test_a_missing_image_is_pulled_and_its_digest_recorded(tmp_path, docker_host, stand_in, checkpoint, registry, by):
    place, digest = registry
    image = f"{place}/requant/engine{':1' if by == 'tag' else f'@{digest}'}"
    target = stand_in("healthy").model_copy(update={"image": image})
    with serve_at(target, checkpoint, tmp_path / "log") as server:
        assert server.container["image_digests"] == [f"{place}/requant/engine@{digest}"]
        assert server.container["request"]["image"] == image
    log = (tmp_path / "log").read_text()
    assert f"Status: Downloaded newer image for {image}" in log and log.endswith("serving\n")


def test_an_image_that_the_registry_has_not_is_one_line(tmp_path, docker_host, checkpoint, registry):
    message = refusal_of(Target(image=f"{registry[0]}/requant/engine:2"), checkpoint, tmp_path / "log")
    assert f"{registry[0]}/requant/engine:2: no such image in Docker, and it can't be pulled: " in message


def test_a_gpu_that_docker_can_not_give_is_one_line_and_no_container_stays(
    tmp_path, docker_host, host_image, checkpoint
):
    target = Target(
        engine="vllm", device="cuda", gpu="sm90", image=host_image, container={"network": "host", "pull": "never"}
    )
    message = refusal_of(target, checkpoint, tmp_path / "log")
    assert "Docker has no runtime for NVIDIA GPUs" in message and "NVIDIA Container Toolkit" in message
    assert containers(docker_host) == []


def test_a_mount_that_is_not_there_is_one_line(tmp_path, docker_host, host_image, checkpoint):
    mounts = [{"source": str(tmp_path / "gone"), "target": "/gone"}]
    target = Target(image=host_image, container={"network": "host", "mounts": mounts})
    assert "bind source path does not exist" in refusal_of(target, checkpoint, tmp_path / "log")
    assert not (tmp_path / "gone").exists()


def test_no_docker_engine_is_one_line(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    message = refusal_of(Target(image="example/cpu:1"), checkpoint, tmp_path / "log")
    assert message.startswith(f"unix://{tmp_path}/docker.sock: no Docker engine answers; expected one that runs")


def test_no_permission_to_ask_docker_is_one_line(tmp_path, checkpoint, monkeypatch):
    def refuse(**settings):  # root may ask any socket, so the SDK's error is raised here
        said = ("Connection aborted.", PermissionError(13, "Permission denied"))
        raise docker.errors.DockerException(f"Error while fetching server API version: {said}")

    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(docker, "from_env", refuse)
    message = refusal_of(Target(image="example/cpu:1"), checkpoint, tmp_path / "log")
    assert message.startswith("unix:///var/run/docker.sock: no permission to ask Docker; expected a user of the group")


ELSEWHERE = [
    "ssh://me@build.example",
    "tcp://192.0.2.7:2375",
    "tcp://localhost.example:2375",
    "tcp://localhost:2375@build.example",
    "tcp://127.0.0.1@build.example",
    "tcp://[::1]@build.example",
    "http://build.example",
    "build.example:2375",
    "fd://3",
    "tcp://[",
]


@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_docker_engine_elsewhere_is_one_line_for_whoever_asks_docker(host, tmp_path, checkpoint, monkeypatch):
    """Whoever serves, plans to serve, or runs what a model wrote."""
    monkeypatch.setenv("DOCKER_HOST", host)
    said = f"DOCKER_HOST: {host!r}: a Docker engine of another machine"
    target = Target(image="example/cpu:1")
    assert refusal_of(target, checkpoint, tmp_path / "log").startswith(said)
    for asked in (
        lambda: check_here("r", "t", target),
        lambda: which_sandbox(Sandbox(backend="docker")),
        lambda: which_sandbox(Sandbox(backend="docker", image="python:3.11-slim")),
        lambda: run_untrusted("", Limits(), Backend("docker", "1", None, "python:3.11-slim")),
    ):
        with pytest.raises(RequantError) as error:
            asked()
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["unix:///run/x.sock", "tcp://127.0.0.1:2375", "tcp://localhost", "tcp://[::1]:2375"])
def test_a_docker_engine_here_is_asked(host, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", host)
    assert docker_host() == host


def test_a_missing_python_package_is_one_line(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    assert "expected Docker's Python package" in refusal_of(Target(image="example/cpu:1"), checkpoint, tmp_path / "log")


@pytest.mark.parametrize("behaviour", ["healthy", "stubborn"])
def test_no_container_is_left_after_an_exception(tmp_path, docker_host, stand_in, checkpoint, behaviour):
    with pytest.raises(ZeroDivisionError), serve_at(stand_in(behaviour), checkpoint, tmp_path / "log") as server:
        assert len(containers(docker_host)) == 1
        raise ZeroDivisionError
    assert containers(docker_host) == [] and not psutil.pid_exists(server.pid)


@pytest.mark.parametrize(
    ("number", "behaviour"),
    [
        (signal.SIGTERM, "healthy"),
        (signal.SIGINT, "healthy"),
        (signal.SIGTERM, "stubborn"),
        (signal.SIGKILL, "healthy"),
    ],
)
def test_no_container_is_left_after_the_job_is_ended(tmp_path, docker_host, stand_in, checkpoint, number, behaviour):
    target = stand_in(behaviour)
    program = f"""
import signal, time
from pathlib import Path
from requant import container
from requant.config import Target
from requant.engines import serve_at
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
container.STOP_SECONDS = 2
target = Target.model_validate_json({target.model_dump_json()!r})
with serve_at(target, Path({str(checkpoint)!r}), Path({str(tmp_path / "log")!r})) as server:
    print(server.url, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(serving.__file__).parents[1])}
    job = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    port = int(job.stdout.readline().rsplit(":", 1)[1])
    assert containers(docker_host) == [f"requant-{port}"] and not port_is_free(port)
    job.send_signal(number)
    if behaviour == "stubborn":  # impatience, while the container is being stopped
        time.sleep(0.5)
        job.send_signal(number)
    try:
        job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode not in (0, None)
    if number == signal.SIGKILL:  # no process can tidy up after that; the next start does
        assert containers(docker_host) == [f"requant-{port}"]
        with serve_at(target, checkpoint, tmp_path / "next.log") as server:
            assert containers(docker_host) == [f"requant-{server.url.rsplit(':', 1)[1]}"]
    assert containers(docker_host) == [] and port_is_free(port)


def test_containers_of_living_processes_and_of_other_machines_are_left_alone(docker_host, host_image):
    gone = json.loads(container.owner()) | {"started": 1.0}  # a process of this number, but not this one
    labels = {
        "living": container.owner(),
        "gone": json.dumps(gone),
        "elsewhere": json.dumps(gone | {"host": "another.example"}),
        "unreadable": "{}",
    }
    made = {
        name: docker_host.client.containers.create(host_image, ["true"], labels={container.OWNER: label})
        for name, label in labels.items()
    }
    try:
        assert container.remove_leftovers(docker_host.client) == [made["gone"].name]
        assert sorted(containers(docker_host)) == sorted(one.name for name, one in made.items() if name != "gone")
    finally:
        for name in labels.keys() - {"gone"}:
            made[name].remove(force=True)

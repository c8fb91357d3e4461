"""The one command that starts an engine: flags of each, formats by their own names, and the same as a `docker run`."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from requant.config import Target
from requant.container import container_request
from requant.engine_command import docker_command, engine_command, is_pinned, quantization_of, shell
from requant.errors import RequantError
from requant.target_files import FOLDER, target_named

ROOT = Path(__file__).resolve().parents[2]
# How the public 508B release is served, its format but for the name.
SM120_FLAGS = (
    "--tensor-parallel-size 8 --quantization modelopt_fp4 --kv-cache-dtype bf16 --attention-backend flashinfer "
    "--moe-runner-backend b12x --cuda-graph-max-bs 32 --mem-fraction-static 0.85 --disable-custom-all-reduce"
)
SM120_ENVIRONMENT = (
    "SGLANG_ENABLE_SPEC_V2=True SGLANG_ENABLE_JIT_DEEPGEMM=0 SGLANG_ENABLE_DEEP_GEMM=0 NCCL_IB_DISABLE=1 "
    "NCCL_P2P_LEVEL=SYS NCCL_MIN_NCHANNELS=8"
)


def target(name: str, **keys) -> Target:
    return target_named(name, None, ROOT / FOLDER).model_copy(update=keys)


def flags(command: list[str]) -> dict[str, str | None]:
    """{flag: its value, None if it has none} of a command's words."""
    found, last = {}, None
    for word in command:
        if word.startswith("--"):
            last = word
            assert word not in found, f"{word} twice"
            found[word] = None
        elif last is not None and found[last] is None:
            found[last] = word
    return found


def test_the_sm120_command_has_the_public_releases_flags():
    """A checkpoint of ModelOpt is served by the very flags; one of compressed-tensors by its own name. The engine has
    longer for its first kernels."""
    own = {"--model-path": "/model", "--served-model-name": "big", "--host": "127.0.0.1", "--port": "30000"}
    own["--watchdog-timeout"] = "3600"
    for quantization in ("modelopt_fp4", "compressed-tensors"):
        command = engine_command(target("sm120-sglang"), "/model", "big", 30000, quantization=quantization)
        assert command[:3] == ["python3", "-m", "sglang.launch_server"]
        published = flags(SM120_FLAGS.split()) | {"--quantization": quantization}
        assert flags(command) == own | published
    assert target("sm120-sglang").environment == dict(pair.split("=") for pair in SM120_ENVIRONMENT.split())
    assert "--quantization" not in engine_command(target("sm120-sglang"), "/model", "big", 30000), "left to the engine"


def test_the_sm120_container_is_the_public_releases():
    request = container_request(target("sm120-sglang"), Path("/data/big"), "big", 30000, quantization="modelopt_fp4")
    words = docker_command(request)
    line = " ".join(words)
    for part in ("--ipc host", "--shm-size 8g", "--ulimit memlock=-1", "--ulimit stack=67108864", "--gpus 8"):
        assert f" {part} " in line
    assert line.startswith("docker run --rm ") and " --mount type=bind,source=/data/big,target=/model,readonly " in line
    assert [f"--env {pair} " in line for pair in SM120_ENVIRONMENT.split()] == [True] * 6
    assert words[words.index("--entrypoint") : words.index("-m")] == ["--entrypoint", "python3", request["image"]]
    assert request["image"] == "voipmonitor/sglang:cu130"


def test_vllm_and_sglang_write_the_same_settings_in_their_own_way():
    keys = {"kv_cache": "bf16", "context": 32768, "memory_fraction": 0.9, "devices": 4}
    common = {"device": "cuda", "gpu": "sm100"} | keys
    eager = Target(engine="vllm", arguments=["--enforce-eager"], **common)
    vllm = engine_command(eager, "/model", "m", 1, quantization="compressed-tensors")
    assert vllm[:3] == ["vllm", "serve", "/model"] and vllm[-1] == "--enforce-eager"
    assert flags(vllm) == {
        "--served-model-name": "m", "--host": "127.0.0.1", "--port": "1", "--tensor-parallel-size": "4",
        "--quantization": "compressed-tensors", "--kv-cache-dtype": "bfloat16", "--max-model-len": "32768",
        "--gpu-memory-utilization": "0.9", "--enforce-eager": None,
    }  # fmt: skip
    sglang = flags(engine_command(Target(engine="sglang", **common), "/model", "m", 1))
    assert (sglang["--kv-cache-dtype"], sglang["--context-length"]) == ("bf16", "32768")
    assert sglang["--watchdog-timeout"] == "3600", "of a target with GPUs: a first request compiles kernels"
    assert sglang["--mem-fraction-static"] == "0.9" and "--quantization" not in sglang


def test_transformers_spreads_a_model_over_several_gpus():
    program = ["transformers", "serve", "m", "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    assert engine_command(Target(), "m", "any", 0) == program
    gpus = {"device": "cuda", "gpu": "sm90"}
    assert engine_command(Target(**gpus), "m", "any", 0)[-1] == "cuda"
    assert engine_command(Target(**gpus, devices=8), "m", "any", 0)[-1] == "auto"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"config.json": {}}, None),
        ({"config.json": {"quantization_config": {"quant_method": "compressed-tensors"}}}, "compressed-tensors"),
        ({"config.json": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"config.json": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}}, "modelopt_fp4"),
        ({"config.json": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}}, "modelopt"),
        ({"config.json": {}, "hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4"}}}, "modelopt_fp4"),
        ({"config.json": {}, "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}, "modelopt"),
    ],
)
def test_a_checkpoint_says_its_quantization(files, found, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    assert quantization_of(tmp_path) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "not there; expected a Hugging"), ("{", "; expected JSON"), ("[]", "a list; expected a JSON object")],
)
def test_a_folder_without_a_config_is_told_by_its_file(text, said, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequantError) as raised:
        quantization_of(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/config.json: ") and said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_modelopts_flag_is_refused_for_a_checkpoint_of_compressed_tensors():
    asked = target("sm120-sglang", quantization="modelopt_fp4")
    with pytest.raises(RequantError) as raised:
        engine_command(asked, "/model", "m", 1, quantization="compressed-tensors")
    assert str(raised.value) == (
        "/model: its quantization is compressed-tensors, and the target's `quantization` is modelopt_fp4, which reads "
        "tensors of other names; expected no such key, for sglang to read each checkpoint by its own name"
    )
    assert "modelopt_fp4" in engine_command(asked, "/model", "m", 1, quantization="modelopt_fp4")


@pytest.mark.parametrize("network", ["host", "bridge"])
def test_a_docker_run_asks_for_what_the_request_asks(network):
    """Each part of the fullest request has its flag; a part without one is an error, not left out."""
    container = {
        "network": network, "ipc": "private", "shm_size": "1g", "ulimits": {"nofile": 9}, "memory_gb": 2.5, "cpus": 1.5,
        "processes": 77, "capabilities": ["IPC_LOCK"], "user": "65534:65534",
        "mounts": [{"source": "/data/cache", "target": "/cache", "read_only": False}],
    }  # fmt: skip
    asked = Target(image="own/image:1", container=container, environment={"PATH": "/two words"})
    request = container_request(asked, Path("/data/it is"), "m", 8001, threads=2)
    line = shell(docker_command(request))
    words = shlex.split(line.replace("\\\n", ""))
    assert words == docker_command(request), "a shell reads what was meant"
    wanted = ["--memory 2500000000", "--memory-swap 2500000000", "--cpus 1.5", "--pids-limit 77", "--user 65534:65534"]
    wanted += ["--cap-drop ALL", "--cap-add IPC_LOCK", "--security-opt no-new-privileges", "--ulimit nofile=9"]
    wanted += ["--env 'PATH=/two words'", "--mount 'type=bind,source=/data/it is,target=/model,readonly'"]
    wanted += ["--mount type=bind,source=/data/cache,target=/cache ", f"--network {network}"]
    assert [part for part in wanted if part not in line] == []
    assert ("--publish 127.0.0.1:8001:8001" in line) == (network == "bridge")
    with pytest.raises(KeyError, match="privileged"):
        docker_command(request | {"privileged": True})


def test_docker_makes_the_same_container_of_the_command_and_of_the_request(docker_host, host_image, tmp_path):
    """The Docker engine's own account of both: one made by the SDK, one by the program `docker`."""
    if shutil.which("docker") is None:
        pytest.skip("needs the program docker (Debian: docker.io)")
    (tmp_path / "model").mkdir()
    (tmp_path / "cache").mkdir()
    container = {"network": "host", "ipc": "host", "shm_size": "8m", "ulimits": {"nofile": 99, "memlock": -1}}
    container |= {
        "memory_gb": 1.5,
        "cpus": 1.5,
        "processes": 77,
        "capabilities": ["CAP_IPC_LOCK"],
        "user": "65534:65534",
    }
    container |= {"mounts": [{"source": str(tmp_path / "cache"), "target": "/cache", "read_only": False}]}
    asked = Target(image=host_image, container=container, environment={"PATH": "/two  words"})
    request = container_request(asked, tmp_path / "model", "m", 8017)
    words = ["docker", "create", *(word for word in docker_command(request)[2:] if word != "--rm")]
    found = []
    for create in (
        lambda: docker_host.client.containers.create(**request).id,
        lambda: subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip(),
    ):
        made = docker_host.client.containers.get(create())
        found.append({part: made.attrs[part] for part in ("Config", "HostConfig", "Path", "Args")})
        made.remove()
    # What the program writes of terminal, log and restarts, where the SDK leaves the same unsaid.
    told = {"AttachStdout", "AttachStderr", "Hostname", "ConsoleSize", "LogConfig", "RestartPolicy"}
    by_sdk, by_program = ({key: each for key, each in flat(part).items() if key not in told} for part in found)
    assert by_program == by_sdk


def flat(attributes: dict) -> dict:
    """What Docker says of a container under the last key of each, without what is empty, lists in order."""
    inner = {key: value for part in ("Config", "HostConfig") for key, value in attributes[part].items()}
    kept = {key: value for key, value in inner.items() if value not in (None, [], {}, "", 0, False)}
    kept = {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in kept.items()}
    for mount in kept["Mounts"]:
        mount.setdefault("ReadOnly", False)
    return kept | {"Path": attributes["Path"], "Args": attributes["Args"]}


def test_an_image_is_pinned_by_its_digest_alone():
    assert is_pinned(f"a/b:1@sha256:{'0' * 64}") and not is_pinned("a/b:1") and not is_pinned("a/b@sha256:0")

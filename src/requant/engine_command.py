"""The command that starts a target's engine: what the smoke test runs, `requant serve` shows and the card prints.

Functions of the target alone, but for `quantization_of`. Flags as in transformers 5 (`transformers serve`), vLLM 0.31
(`vllm serve`) and sglang 0.5 (`sglang.launch_server`).
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from requant.config import Target
from requant.errors import RequantError

MOUNTED = "/model"  # where a container has the checkpoint
LOOPBACK = "127.0.0.1"
DOCKER_FLAGS = {
    "ipc_mode": "--ipc",
    "shm_size": "--shm-size",
    "mem_limit": "--memory",
    "memswap_limit": "--memory-swap",
    "pids_limit": "--pids-limit",
    "cap_drop": "--cap-drop",
    "cap_add": "--cap-add",
    "security_opt": "--security-opt",
    "user": "--user",
}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")
# The format of the KV cache as each engine writes it.
KV_CACHE = {
    "vllm": {"bf16": "bfloat16", "fp8_e4m3": "fp8_e4m3"},
    "sglang": {"bf16": "bf16", "fp8_e4m3": "fp8_e4m3"},
}


def is_pinned(image: str) -> bool:
    """Whether `image` names its content, by digest; a tag may come to name another image."""
    return DIGEST.search(image) is not None


def engine_command(
    target: Target, model: str, name: str, port: int, host: str = LOOPBACK, quantization: str | None = None
) -> list[str]:
    """The engine of `target` serving the checkpoint at `model`, a path as the engine sees it, at `host`:`port`.

    name: what requests call the model; `transformers serve` has no such option and is asked for `model` itself.
    quantization: of the checkpoint, from `quantization_of`; None leaves it to the engine, which reads config.json.
    Raises RequantError if the target is for checkpoints of another quantization.
    """
    if quantization is not None:
        check_quantization(model, quantization, target)
    address = ["--host", host, "--port", str(port)]
    if target.engine == "transformers":
        # `auto` spreads the layers over all GPUs.
        device = target.device if target.devices == 1 else "auto"
        return ["transformers", "serve", model, *address, "--device", device, *target.arguments]
    sglang = target.engine == "sglang"
    command = ["python3", "-m", "sglang.launch_server", "--model-path", model] if sglang else ["vllm", "serve", model]
    command += ["--served-model-name", name, *address, "--tensor-parallel-size", str(target.devices)]
    if quantization is not None:
        command += ["--quantization", quantization]
    if target.kv_cache is not None:
        command += ["--kv-cache-dtype", KV_CACHE[target.engine][target.kv_cache]]
    if target.context is not None:
        command += ["--context-length" if sglang else "--max-model-len", str(target.context)]
    if sglang:  # which kills itself when a first request compiles kernels for longer than that, 300 s if not told
        command += ["--watchdog-timeout", str(target.startup_seconds)]
    command += ["--mem-fraction-static" if sglang else "--gpu-memory-utilization", f"{target.memory_fraction:g}"]
    return [*command, *target.arguments]


def quantization_of(folder: Path) -> str | None:
    """What vLLM and sglang call the quantization of the checkpoint in `folder`; None if it is not quantized.

    compressed-tensors and others have it in config.json; ModelOpt has hf_quant_config.json, and other names for its
    tensors. Raises RequantError naming the file that can't be read.
    """
    settings = _read(folder / "config.json").get("quantization_config") or {}
    if method := settings.get("quant_method"):
        return "modelopt_fp4" if method == "modelopt" and "FP4" in str(settings.get("quant_algo")) else str(method)
    if not (folder / "hf_quant_config.json").exists():
        return None
    algorithm = str((_read(folder / "hf_quant_config.json").get("quantization") or {}).get("quant_algo"))
    return "modelopt_fp4" if "FP4" in algorithm else "modelopt"


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequantError(f"{path}: not there; expected a Hugging Face checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise RequantError(f"{path}: {error}; expected JSON") from None
    if not isinstance(found, dict):
        raise RequantError(f"{path}: a {type(found).__name__}; expected a JSON object")
    return found


def check_quantization(where: str, found: str | None, target: Target) -> None:
    """Raises RequantError, beginning with `where`, if `target` is for checkpoints of another quantization."""
    if target.quantization is not None and found != target.quantization:
        raise RequantError(
            f"{where}: its quantization is {found or 'none'}, and the target's `quantization` is "
            f"{target.quantization}, which reads tensors of other names; expected no such key, for {target.engine} to "
            "read each checkpoint by its own name"
        )


def docker_command(request: dict[str, Any]) -> list[str]:
    """`docker run` for what `container.container_request` asks of Docker: the same container, for a shell.

    It removes itself when it ends. Raises KeyError for a part of a request that no flag stands for.
    """
    left = dict(request)
    command = ["docker", "run", "--rm", "--name", left.pop("name"), "--network", left.pop("network_mode")]
    for place, bound in left.pop("ports", {}).items():
        command += ["--publish", f"{bound['HostIp']}:{bound['HostPort']}:{place.removesuffix('/tcp')}"]
    for wanted in left.pop("device_requests", []):
        command += ["--gpus", str(wanted["Count"])]
    for limit in left.pop("ulimits", []):
        command += ["--ulimit", f"{limit['Name']}={limit['Soft']}"]
    for mount in left.pop("mounts"):
        writable = ",readonly" if mount["ReadOnly"] else ""
        command += ["--mount", f"type={mount['Type']},source={mount['Source']},target={mount['Target']}{writable}"]
    for variable, value in left.pop("environment").items():
        command += ["--env", f"{variable}={value}"]
    for label, value in left.pop("labels").items():
        command += ["--label", f"{label}={value}"]
    if (cpus := left.pop("nano_cpus", None)) is not None:
        command += ["--cpus", f"{cpus / 1e9:g}"]
    left.pop("auto_remove")  # `docker run` has --rm
    (program,), image, arguments = left.pop("entrypoint"), left.pop("image"), left.pop("command")
    for key, value in left.items():
        for each in value if isinstance(value, list) else [value]:
            command += [DOCKER_FLAGS[key], str(each)]
    return [*command, "--entrypoint", program, image, *arguments]


def shell(command: list[str]) -> str:
    """A command as it may be typed into a shell, a line for each flag."""
    lines: list[list[str]] = []
    for number, word in enumerate(command):
        if number == 0 or word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(map(" ".join, lines))

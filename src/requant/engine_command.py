"""The command that starts a target's engine: what the smoke test runs, `requant serve` shows and the card prints.

Pure functions of the target. Flags as in transformers 5 (`transformers serve`), vLLM 0.21 (`vllm serve`) and
sglang 0.5 (`sglang.launch_server`).
"""

import json
import shlex
from pathlib import Path

from requant.config import Target
from requant.errors import RequantError

MOUNTED = "/model"  # where a container has the checkpoint
LOOPBACK = "127.0.0.1"
# The format of the KV cache as each engine writes it.
KV_CACHE = {
    "vllm": {"bf16": "bfloat16", "fp8_e4m3": "fp8_e4m3"},
    "sglang": {"bf16": "bf16", "fp8_e4m3": "fp8_e4m3"},
}


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


def docker_command(target: Target, folder: str, name: str, port: int, quantization: str | None = None) -> list[str]:
    """A `docker run` that serves the checkpoint in `folder` of this machine as `target` says; for a shell.

    The same container as the deploy stage's, less its name and log. Raises RequantError if the target has no image.
    """
    if target.image is None:
        raise RequantError(f"image: missing; the target starts {target.engine} as a program, without a container")
    container, on_host = target.container, target.container.network == "host"
    command = ["docker", "run", "--rm", "--network", container.network]
    command += [] if on_host else ["--publish", f"{LOOPBACK}:{port}:{port}"]
    command += ["--gpus", str(target.devices)] if target.device == "cuda" else []
    command += ["--ipc", container.ipc]
    command += ["--shm-size", container.shm_size] if container.shm_size else []
    for limit, value in container.ulimits.items():
        command += ["--ulimit", f"{limit}={value}"]
    command += ["--memory", str(int(container.memory_gb * 1e9))] if container.memory_gb else []
    command += ["--cpus", f"{container.cpus:g}"] if container.cpus else []
    command += ["--cap-drop", "ALL", *(word for kept in container.capabilities for word in ("--cap-add", kept))]
    command += ["--security-opt", "no-new-privileges"]
    command += ["--user", container.user] if container.user else []
    command += ["--volume", f"{folder}:{MOUNTED}:ro"]
    for mount in container.mounts:
        command += ["--volume", f"{mount.source}:{mount.target}:{'ro' if mount.read_only else 'rw'}"]
    for variable, value in target.environment.items():
        command += ["--env", f"{variable}={value}"]
    program, *rest = engine_command(target, MOUNTED, name, port, LOOPBACK if on_host else "0.0.0.0", quantization)
    return [*command, "--entrypoint", program, target.image, *rest]


def shell(command: list[str]) -> str:
    """A command as it may be typed into a shell, a line for each flag."""
    lines: list[list[str]] = []
    for number, word in enumerate(command):
        if number == 0 or word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n  ".join(map(" ".join, lines))

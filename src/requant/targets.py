"""What a target can serve: formats and models that its engine refuses, and how much KV cache fits beside the weights.

Arithmetic on config.json, shapes and the config alone, without torch: it runs whenever a build is planned.
"""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant import arithmetic
from requant.architecture import EXPERT_TENSOR, block_of, head_width, is_drafting
from requant.config import Target
from requant.docker_host import SOCKET, docker_host
from requant.dtypes import main_dtype, released_dtype
from requant.engine_runs import last_run
from requant.errors import RequantError
from requant.linears import choose
from requant.schemes import Scheme
from requant.sizes import Shaped, released, tensor_bytes
from requant.view import ROUTER_TENSOR, routed_experts
from requant.wording import gb

CACHE_BYTES = {None: 2, "bf16": 2, "fp8_e4m3": 1}  # of one cached value
# The first versions of engines that know a family, where engines came to know it late; by `model_type`.
FIRST_VERSIONS = {
    "vllm": {"deepseek_v3": (0, 6, 6), "deepseek_v32": (0, 11, 0)},
    "sglang": {"deepseek_v3": (0, 4, 1), "deepseek_v32": (0, 5, 3)},
}
# (engine, GPU, KV cache, family) whose answers are garbled.
GARBLED = ("sglang", "sm120", "fp8_e4m3", "deepseek_v32")
TAG_VERSION = re.compile(r":v?(\d+)\.(\d+)(?:\.(\d+))?")
DOCKER_SOCKET = SOCKET.removeprefix("unix://")
DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)  # that share heads and experts out evenly
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # NVIDIA's driver; the same under WSL


def unsupported(scheme: Scheme, target: Target, model_type: str, experts: bool) -> str | None:
    """Why the engine of `target` refuses releases of `scheme`; None if it serves them.

    model_type: of the release's config.json; experts: whether it is a mixture of experts. What the engine was seen to
    do with that family goes before what is known of it in general. `transformers` serves all of them: what it can't
    compute is decoded to BF16 first. All engines serve BF16.
    """
    if target.engine == "transformers" or target.weights == "decoded":
        return None
    found = "compressed-tensors" if scheme.quantizes else None
    if target.quantization not in (None, found):
        return (
            f"`quantization: {target.quantization}` reads checkpoints of that format, a release is "
            f"{found or 'not quantized'}"
        )
    if (run := last_run(target.engine, model_type, scheme.name, target.gpu)) is not None:
        return run.problem
    if not scheme.quantizes:
        return None
    known = arithmetic.fact(target.engine, scheme, target.gpu, experts)
    if known is None:
        return f"nothing is known of {target.engine} with {scheme.name} on {target.gpu}"
    if known.does != arithmetic.REFUSED:
        return None
    said = f": {known.said}" if known.said else ""
    return f"{known.engine} {known.version} refuses {scheme.name} on {target.gpu} ({known.basis}{said})"


def check_scheme(release: str, scheme: Scheme, name: str, target: Target, config: dict[str, Any]) -> None:
    """Raises RequantError if `target`, called `name`, can't serve `release`, which is of `scheme`.

    config: its model's config.json.
    """
    if (reason := unsupported(scheme, target, config["model_type"], routed_experts(config) > 0)) is not None:
        raise RequantError(
            f"releases.{release}: scheme {scheme.name} can't be served at target {name!r}: {reason}; "
            "expected another scheme, or another deploy.target"
        )


def family_problem(model_type: str, target: Target) -> str | None:
    """Why `target` can't serve models of `model_type`: its engine is too old, or answers garbage.

    None if nothing says so. The engine's version is that of the image's tag.
    """
    if (target.engine, target.gpu, target.kv_cache, model_type) == GARBLED:
        return f"with `kv_cache: {target.kv_cache}` {model_type} answers with garbled text there"
    first = FIRST_VERSIONS.get(target.engine, {}).get(model_type)
    tag = TAG_VERSION.search(target.image or "")
    if first is None or tag is None or tuple(int(part or 0) for part in tag.groups()) >= first:
        return None
    return f"{target.engine} knows {model_type} from {'.'.join(map(str, first))} on, found image {target.image}"


def check_family(release: str, model_type: str, name: str, target: Target) -> None:
    """Raises RequantError if `target`, called `name`, can't serve the family of the release's model."""
    if (reason := family_problem(model_type, target)) is not None:
        raise RequantError(
            f"releases.{release}: its model can't be served at target {name!r}: {reason}; expected another "
            "deploy.target"
        )


def check_here(release: str, name: str, target: Target) -> None:
    """Raises RequantError if this machine can't start the engine of `target`, as far as a look at its files can tell.

    A Docker engine that is not at its usual socket is named by DOCKER_HOST, and has to be of this machine. transformers
    is of this environment.
    """
    missing = []
    if target.image is not None:
        docker_host()
        if not os.environ.get("DOCKER_HOST") and not os.path.exists(DOCKER_SOCKET):
            missing.append(f"a Docker engine ({DOCKER_SOCKET}, or DOCKER_HOST)")
    elif target.engine != "transformers" and not _is_installed(target.engine):
        missing.append(f"the program {target.engine}, or an `image` that has it")
    if target.device == "cuda" and not any(map(os.path.exists, GPU_DEVICES)):
        missing.append(f"a GPU ({target.devices} x {target.gpu or 'CUDA'})")
    if missing:
        raise RequantError(
            f"releases.{release}.deploy.target: {name!r} needs {' and '.join(missing)}: not on this machine. "
            f"Up to results/{release}/verify.json, evaluate.json and benchmark.json it can be built: ask for these, or "
            "choose another deploy.target"
        )


def _is_installed(engine: str) -> bool:
    """Whether vLLM's program is where programs are looked for, or sglang among the packages of this Python."""
    if engine == "sglang":
        return importlib.util.find_spec("sglang") is not None
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    return shutil.which(engine, path=os.pathsep.join(places)) is not None


@dataclass(frozen=True)
class CacheEntry:
    """What attention keeps of one token in one block: values that every device holds, and heads that are shared out.

    shared: values each device has whole (MLA's latents and an indexer's keys). heads, per_head: key and value heads,
    and values of each.
    """

    shared: int
    heads: int
    per_head: int

    def values(self, devices: int) -> int:
        """Values on each of `devices`, a head being whole on one of them or more."""
        return self.shared + -(-self.heads // devices) * self.per_head


def cache_entry(config: dict[str, Any]) -> CacheEntry:
    """The cache entry of a block of the model with this config.json.

    With MLA, the latent and the rotary part of the key (arXiv 2412.19437), and the keys of DeepSeek-V3.2's indexer
    where there is one; else a key and a value for each of the key-value heads.
    """
    if config.get("kv_lora_rank"):
        latent = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        return CacheEntry(latent + (config.get("index_head_dim") or 0), 0, 0)
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return CacheEntry(0, heads, 2 * head_width(config))


def cache_bytes_per_token(config: dict[str, Any], devices: int, kv_cache: str | None = None) -> int:
    """Bytes of KV cache of a token on each of `devices`, in the format `kv_cache` of a target, all blocks."""
    return config["num_hidden_layers"] * cache_entry(config).values(devices) * CACHE_BYTES[kv_cache]


def cached_tokens(target: Target, weights: int, per_token: int) -> int | None:
    """Tokens whose KV cache fits beside `weights` bytes on each device; below 0 if the weights don't fit.

    per_token: bytes of a token's cache on a device. None if the target doesn't say how much memory a device has.
    """
    if target.memory_gb is None:
        return None
    return int(target.memory_gb * 1e9 * target.memory_fraction - weights) // per_token


def holds_packed(target: Target) -> bool:
    """Whether the engine of `target` computes with packed weights; `transformers` unpacks them when it loads them."""
    return target.engine != "transformers" and target.weights != "decoded"


def wanted_context(target: Target, config: dict[str, Any], seqlen: int) -> int:
    """Tokens that a request should have: as the target says, else the model's context, else a sample's `seqlen`."""
    return target.context or config.get("max_position_embeddings") or seqlen


def shortage(target: Target, weights: int, config: dict[str, Any], wanted: int) -> str | None:
    """What of a model's weights and KV cache has no room at `target`, and what would fit; None if all has.

    weights: bytes in all; wanted: tokens of each of `target.concurrency` requests. None too if the target doesn't say
    how much memory a device has.
    """
    if target.memory_gb is None:
        return None
    room = int(target.memory_gb * 1e9 * target.memory_fraction)

    def tokens(devices: int) -> int:
        return (room + weights // -devices) // cache_bytes_per_token(config, devices, target.kv_cache)

    asked, found = wanted * target.concurrency, tokens(target.devices)
    if asked <= found:
        return None
    each, per_token = -(weights // -target.devices), cache_bytes_per_token(config, target.devices, target.kv_cache)
    enough = next((count for count in DEVICE_COUNTS if count > target.devices and tokens(count) >= asked), None)
    fitting = [
        *([f"context {found // target.concurrency:,}"] if found >= target.concurrency else []),
        *([f"concurrency {found // wanted}"] if found >= wanted and target.concurrency > 1 else []),
        *([f"{enough} devices"] if enough else []),
    ]
    return (
        f"weights take {gb(each)} of each device, {target.concurrency} x {wanted:,} tokens of KV cache "
        f"{gb(asked * per_token)}; {gb(room)} are there ({target.memory_gb:g} GB x {target.memory_fraction:g}); "
        f"would fit: {', or '.join(fitting) or 'a smaller scheme or model'}"
    )


def check_memory(release: str, name: str, target: Target, weights: int, config: dict[str, Any], wanted: int) -> None:
    """Raises RequantError with the numbers of `shortage` if weights and KV cache don't fit `target`, called `name`."""
    if (reason := shortage(target, weights, config, wanted)) is not None:
        raise RequantError(f"releases.{release}: does not fit target {name!r}: {reason}")


def weight_bytes(
    config: dict[str, Any],
    tensors: Mapping[str, Shaped],
    scheme: Scheme,
    keep: list[str],
    drop_drafting: bool,
    target: Target,
) -> int:
    """Bytes of a model's weights as the engine of `target` holds them, without headers and padding.

    tensors: of the source, by names as in transformers, no FP8 scales. config: the release's model's; experts that it
    doesn't count are pruned. Multi-token prediction is left out if `drop_drafting`.
    """
    blocks, experts = config["num_hidden_layers"], routed_experts(config)
    kept, widths = {}, {}
    main = _main_dtypes(tensors, blocks)
    for name, tensor in tensors.items():
        expert = EXPERT_TENSOR.fullmatch(name)
        if (expert and int(expert[1]) >= experts) or (drop_drafting and is_drafting(name, blocks)):
            continue
        shape = (experts, *tensor.shape[1:]) if ROUTER_TENSOR.search(name) else tensor.shape
        kept[name] = Shaped(released_dtype(name, tensor.dtype, main[block_of(name, blocks)]), shape)
        linear = name.removesuffix(".weight")
        if linear != name and len(tensor.shape) == 2 and block_of(name, blocks) is not None:
            widths[linear] = tensor.shape[1]
    linears = choose(widths, scheme, keep)[0] if holds_packed(target) else []
    return tensor_bytes(released(kept, linears, scheme))


def _main_dtypes(tensors: Mapping[str, Shaped], blocks: int) -> dict[int | None, str]:
    """The main dtype of each block, and that of all of them for what is in none."""
    inside: dict[int | None, list[Shaped]] = {None: []}
    for name, tensor in tensors.items():
        if (block := block_of(name, blocks)) is not None:
            inside.setdefault(block, []).append(tensor)
            inside[None].append(tensor)
    return {block: main_dtype(found) for block, found in inside.items()}

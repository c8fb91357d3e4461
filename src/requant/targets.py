"""What a target can serve: formats that its engine refuses, and how much KV cache fits beside the weights.

Arithmetic on config.json and the config alone, without torch: it runs whenever a build is planned.
"""

from dataclasses import dataclass
from typing import Any

from requant.architecture import head_width
from requant.config import Target
from requant.errors import RequantError
from requant.schemes import Scheme

CACHE_BYTES = 2  # of one cached value: BF16
# The first architecture with FP4 matrix products: vLLM and sglang refuse NVFP4 with 4-bit activations before it.
FIRST_FP4_ARCHITECTURE = 100
# Widths of compressed-tensors `pack-quantized` weights that vLLM and sglang have kernels for.
INTEGER_BITS = (4, 8)


def unsupported(scheme: Scheme, target: Target) -> str | None:
    """Why the engine of `target` refuses releases of `scheme`; None if it serves them.

    `transformers` serves all of them: what it can't compute is decoded to BF16 first. All engines serve BF16.
    """
    if target.engine == "transformers" or not scheme.quantizes:
        return None
    if scheme.is_nvfp4 and int(target.gpu.removeprefix("sm")) < FIRST_FP4_ARCHITECTURE:
        return (
            f"{target.engine} serves {scheme.name} (4-bit activations) on sm{FIRST_FP4_ARCHITECTURE} or later, "
            f"found gpu: {target.gpu}"
        )
    if not scheme.is_nvfp4 and scheme.weight_bits not in INTEGER_BITS:
        return f"{target.engine} serves integers of {' and '.join(map(str, INTEGER_BITS))} bits, found {scheme.name}"
    return None


def check_scheme(release: str, scheme: Scheme, name: str, target: Target) -> None:
    """Raises RequantError if `target`, called `name`, can't serve `release`, which is of `scheme`."""
    if (reason := unsupported(scheme, target)) is not None:
        raise RequantError(
            f"releases.{release}: scheme {scheme.name} can't be served at target {name!r}: {reason}; "
            "expected another scheme, or another deploy.target"
        )


def check_deployable(release: str, name: str, target: Target) -> None:
    """Raises RequantError if the deploy stage can't start the engine of `target`, called `name`."""
    if target.engine != "transformers":
        raise RequantError(
            f"releases.{release}.deploy.target: {name!r} has engine {target.engine}; the deploy stage starts "
            f"transformers only: ask for results/{release}/evaluate.json, verify.json or pack.json, or choose "
            "a target of engine transformers"
        )


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


def cache_bytes_per_token(config: dict[str, Any], devices: int) -> int:
    """Bytes of KV cache of a token on each of `devices`, BF16, all blocks."""
    return config["num_hidden_layers"] * cache_entry(config).values(devices) * CACHE_BYTES


def cached_tokens(target: Target, weights: int, per_token: int) -> int | None:
    """Tokens whose KV cache fits beside `weights` bytes on each device; below 0 if the weights don't fit.

    per_token: bytes of a token's cache on a device. None if the target doesn't say how much memory a device has.
    """
    if target.memory_gb is None:
        return None
    return int(target.memory_gb * 1e9 * target.memory_fraction - weights) // per_token

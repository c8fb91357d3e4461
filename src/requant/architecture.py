"""Model families: which tensors make a block, which are experts, and which projections engines fuse."""

import re
from typing import Any

from requant.errors import RequantError

FAMILIES = ("deepseek_v3", "deepseek_v32", "llama", "qwen3", "qwen3_moe")

BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT_TENSOR = re.compile(r"(?:.+\.)?mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")

# Projections of one input whose matrix products engines fuse: they must have one weight_global_scale.
# (vLLM and sglang: QKVParallelLinear, MergedColumnParallelLinear, fused_qkv_a_proj of MLA, fused MoE w13.)
FUSED = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"))

# Linears that stay in BF16 in every public release: they choose experts or keys, and cost next to nothing.
ALWAYS_KEPT = {r"\.mlp\.gate$": "router", r"\.indexer\.weights_proj$": "sparse-attention indexer"}


def family(config: dict[str, Any]) -> str:
    """The `model_type` of a config. RequantError, with the list of known ones, if requant can't build its blocks."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise RequantError(f"config.json: model_type: {model_type!r}; known families: {', '.join(FAMILIES)}")
    return model_type


def block_count(config: dict[str, Any]) -> int:
    """Number of decoder blocks; a multi-token-prediction layer stored behind them is not one."""
    count = config.get("num_hidden_layers")
    if not isinstance(count, int) or count < 1:
        raise RequantError(f"config.json: num_hidden_layers: {count!r}; expected a number of 1 or more")
    return count


def block_of(tensor: str, blocks: int) -> int | None:
    """The decoder block that a tensor belongs to; None for embeddings, norm, head and multi-token prediction."""
    match = BLOCK_TENSOR.fullmatch(tensor)
    return int(match[1]) if match and int(match[1]) < blocks else None


def is_drafting(tensor: str, blocks: int) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, stored behind the decoder blocks."""
    return BLOCK_TENSOR.fullmatch(tensor) is not None and block_of(tensor, blocks) is None


def expert_counts(tensors: list[str] | dict, blocks: int) -> dict[int, int]:
    """Routed experts of each MoE block, counted from tensor names."""
    experts: dict[int, set[int]] = {}
    for name in tensors:
        block = block_of(name, blocks)
        if block is not None and (match := EXPERT_TENSOR.fullmatch(name)):
            experts.setdefault(block, set()).add(int(match[1]))
    return {block: len(found) for block, found in sorted(experts.items())}


def fused_groups(weights: list[str]) -> list[list[str]]:
    """Groups of weight names (of one block) that engines fuse into one matrix product; single ones left out."""
    siblings: dict[tuple[str, int], list[str]] = {}
    for name in weights:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        for index, members in enumerate(FUSED):
            if leaf in members:
                siblings.setdefault((parent, index), []).append(name)
    return sorted(sorted(group) for group in siblings.values() if len(group) > 1)

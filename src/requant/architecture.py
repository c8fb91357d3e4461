"""Model families: which tensors make a block, which are experts, and which projections engines fuse."""

import re
from collections.abc import Iterable
from typing import Any

from requant.errors import RequantError, brief

# The families that requant builds, by `model_type`, with the model_type of the transformers code that runs them.
FAMILIES = {
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v32",
    "glm4_moe": "glm4_moe",
    "kimi_k2": "deepseek_v3",
    "llama": "llama",
    "mixtral": "mixtral",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}

# The class that a release of a family names, by the transformers model_type of its code: what engines load it by.
CAUSAL_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Families whose makers store layers for multi-token prediction behind the blocks, and the keys that count them.
DRAFTING = ("deepseek_v3", "deepseek_v32", "glm4_moe", "kimi_k2")
DRAFTING_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")

MOST_BLOCKS = 1000  # several times those of any model there is; each is a job
BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
EXPERT_TENSOR = re.compile(r"(?:.+\.)?mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
EXPERT = re.compile(r"((?:.+\.)?mlp\.experts)\.\d+\.(?:gate_proj|up_proj|down_proj)")  # a Linear of a routed expert

# Projections of one input whose matrix products engines fuse, by the names of these layers in sglang: they must have
# one weight_global_scale. (vLLM and sglang: QKVParallelLinear, MergedColumnParallelLinear, fused_qkv_a_proj of MLA,
# fused MoE w13.)
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

# Linears that stay in BF16: they choose experts or keys, and cost next to nothing. vLLM and sglang make one BF16
# product of the indexer's wk and weights_proj.
ALWAYS_KEPT = {r"\.mlp\.gate$": "router", r"\.indexer\.(wk|weights_proj)$": "sparse-attention indexer"}

# Linears that choose keys and give the block's output no gradient: they are rounded, not tuned.
NEVER_TUNED = re.compile(r"\.indexer\.")


def family(config: dict[str, Any]) -> str:
    """The `model_type` of the transformers code for a config.

    RequantError, with the list of known ones, if requant can't build its blocks.
    """
    model_type = config.get("model_type")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise RequantError(f"config.json: architectures: {brief(names)}; expected names of classes")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        classes = "".join(f" ({name})" for name in names)[:80]
        raise RequantError(
            f"config.json: model_type: {brief(model_type)}{classes} is unknown; known families: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def block_count(config: dict[str, Any]) -> int:
    """Number of decoder blocks; a multi-token-prediction layer stored behind them is not one."""
    count = config.get("num_hidden_layers")
    if type(count) is not int or not 1 <= count <= MOST_BLOCKS:
        raise RequantError(
            f"config.json: num_hidden_layers: {brief(count)}; expected a number of 1 or more, at most {MOST_BLOCKS}"
        )
    return count


def drafting_layers(config: dict[str, Any]) -> int:
    """Layers for multi-token prediction that config.json counts behind the blocks; 0 for a family that has none."""
    if config.get("model_type") not in DRAFTING:
        return 0
    count = next((config[key] for key in DRAFTING_KEYS if config.get(key) is not None), 0)
    return count if type(count) is int else 0


def without_drafting(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the model without multi-token prediction."""
    return config | {key: 0 for key in DRAFTING_KEYS if config.get(key)}


def head_width(config: dict[str, Any]) -> int:
    """Values of an attention head's key; as transformers has it where config.json gives no `head_dim`."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def attention_window(config: dict[str, Any]) -> int | None:
    """Tokens that an attention of the model sees, if it is limited; Qwen3 has the number also where it is not used."""
    if str(config.get("model_type")).startswith("qwen3") and not config.get("use_sliding_window"):
        return None
    return config.get("sliding_window")


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


def has_plain_experts(tensors: Iterable[str], blocks: int) -> bool:
    """Whether one of these tensors of a checkpoint is the unpacked weight of a routed expert in one of its blocks."""
    return any(EXPERT_TENSOR.fullmatch(name) and block_of(name, blocks) is not None for name in tensors)


def fused_groups(weights: list[str]) -> list[list[str]]:
    """Groups of weight names (of one block) that engines fuse into one matrix product; single ones left out."""
    siblings: dict[tuple[str, int], list[str]] = {}
    for name in weights:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        for index, members in enumerate(FUSED.values()):
            if leaf in members:
                siblings.setdefault((parent, index), []).append(name)
    return sorted(sorted(group) for group in siblings.values() if len(group) > 1)

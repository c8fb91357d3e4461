"""The tensors of a model's blocks as config.json gives them, family by family, without torch.

transformers' modules have the same (a test holds the two against each other); building them takes seconds, and this is
asked whenever a build is planned.
"""

from collections.abc import Mapping
from typing import Any

from requant.architecture import block_count, block_of, family, head_width
from requant.errors import RequantError, brief
from requant.records import TensorEntry
from requant.view import routed_experts

Shapes = dict[str, list[int]]

# What transformers takes where config.json lacks a key that a shape follows from.
OF_DEEPSEEK = {
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": OF_DEEPSEEK,
    "deepseek_v32": OF_DEEPSEEK | {"index_n_heads": 64, "index_head_dim": 128},
    "glm4_moe": {
        "num_key_value_heads": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "first_k_dense_replace": 1,
        "attention_bias": False,
        "use_qk_norm": False,
    },
    "llama": {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    },
}


def check_layout(where: str, config: dict[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """Raises RequantError, beginning with `where`, naming the first tensor of a block that is missing, is none that
    config.json gives, or has another shape than it gives.

    tensors: by their names inside requant, no factors of FP8 weights.
    """
    count = block_count(config)
    blocks: dict[int, Shapes] = {block: {} for block in range(count)}
    for name, entry in tensors.items():
        if (block := block_of(name, count)) is not None:
            blocks[block][name.removeprefix(f"model.layers.{block}.")] = entry.shape
    for block, found in blocks.items():
        if not found:
            raise RequantError(f"{where}: block {block} has no tensors; config.json counts {count} blocks")
        wanted = block_shapes(config, block)
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                shape, expected = (shapes.get(name, "no such tensor") for shapes in (found, wanted))
                raise RequantError(
                    f"{where}: model.layers.{block}.{name}: {brief(shape)} found; config.json gives {expected}"
                )


def block_shapes(config: dict[str, Any], block: int) -> Shapes:
    """Shape of each tensor of a block, by its name in the block."""
    code = family(config)
    config = DEFAULTS[code] | config
    hidden = config["hidden_size"]
    found = {f"{norm}.weight": [hidden] for norm in ("input_layernorm", "post_attention_layernorm")}
    attention = _latent_attention if code.startswith("deepseek") else _attention
    return found | _named("self_attn", attention(code, config)) | _named("mlp", _mlp(code, config, block))


def _named(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _linear(name: str, out: int, width: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": [out, width]} | ({f"{name}.bias": [out]} if bias else {})


def _attention(code: str, config: dict[str, Any]) -> Shapes:
    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], head_width(config)
    shared = (config["num_key_value_heads"] or heads) * width
    bias = bool(config.get("attention_bias")) and code != "mixtral"
    found = _linear("q_proj", heads * width, hidden, bias)
    found |= _linear("k_proj", shared, hidden, bias) | _linear("v_proj", shared, hidden, bias)
    found |= _linear("o_proj", hidden, heads * width, bias and code != "glm4_moe")
    if code.startswith("qwen3") or config.get("use_qk_norm") and code == "glm4_moe":
        found |= {"q_norm.weight": [width], "k_norm.weight": [width]}
    return found


def _latent_attention(code: str, config: dict[str, Any]) -> Shapes:
    hidden, heads, bias = config["hidden_size"], config["num_attention_heads"], bool(config["attention_bias"])
    queries, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    if queries is None:
        found = _linear("q_proj", heads * (nope + rope), hidden)
    else:
        found = _linear("q_a_proj", queries, hidden, bias) | {"q_a_layernorm.weight": [queries]}
        found |= _linear("q_b_proj", heads * (nope + rope), queries)
    found |= _linear("kv_a_proj_with_mqa", latent + rope, hidden, bias) | {"kv_a_layernorm.weight": [latent]}
    found |= _linear("kv_b_proj", heads * (nope + value), latent) | _linear("o_proj", hidden, heads * value, bias)
    if code == "deepseek_v32":
        indexers, width = config["index_n_heads"], config["index_head_dim"]
        found |= _linear("indexer.wq_b", indexers * width, queries) | _linear("indexer.wk", width, hidden)
        found |= {"indexer.k_norm.weight": [width], "indexer.k_norm.bias": [width]}
        found |= _linear("indexer.weights_proj", indexers, hidden)
    return found


def _mlp(code: str, config: dict[str, Any], block: int) -> Shapes:
    hidden, experts = config["hidden_size"], routed_experts(config)
    if not _has_experts(code, config, block):
        return _gated(hidden, config["intermediate_size"], bool(config.get("mlp_bias")) and code == "llama")
    inner = config["intermediate_size"] if code == "mixtral" else config["moe_intermediate_size"]
    found = {"gate.weight": [experts, hidden]}
    for expert in range(experts):
        found |= _named(f"experts.{expert}", _gated(hidden, inner))
    if code in ("deepseek_v3", "deepseek_v32", "glm4_moe"):
        found["gate.e_score_correction_bias"] = [experts]
        found |= _named("shared_experts", _gated(hidden, inner * config["n_shared_experts"]))
    return found


def _gated(hidden: int, inner: int, bias: bool = False) -> Shapes:
    found = _linear("gate_proj", inner, hidden, bias) | _linear("up_proj", inner, hidden, bias)
    return found | _linear("down_proj", hidden, inner, bias)


def _has_experts(code: str, config: dict[str, Any], block: int) -> bool:
    if code == "mixtral":
        return True
    if code == "qwen3_moe":
        steps = config["decoder_sparse_step"] or 1
        return (
            bool(config["num_experts"]) and (block + 1) % steps == 0 and block not in (config["mlp_only_layers"] or ())
        )
    if code in ("llama", "qwen3"):
        return False
    if code == "deepseek_v32" and config.get("mlp_layer_types"):
        return config["mlp_layer_types"][block] == "sparse"
    return block >= (config["first_k_dense_replace"] or 0)

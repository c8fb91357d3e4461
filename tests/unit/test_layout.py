"""The layout of blocks by config.json alone is that of transformers' modules; what is stored otherwise is named."""

import pytest
import tiny
from transformers import CONFIG_MAPPING

from requant import fp8
from requant.architecture import FAMILIES
from requant.errors import RequantError
from requant.layout import DEFAULTS, block_shapes, check_layout
from requant.locks import tensors_of
from requant.naming import entries
from requant.records import TensorEntry
from requant.structure import from_config

VARIANTS = {
    "deepseek_v3": [
        {"q_lora_rank": None},
        {"attention_bias": True, "n_shared_experts": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 9},
    ],
    "deepseek_v32": [
        {"attention_bias": True, "index_n_heads": 2, "index_head_dim": 64},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    ],
    "glm4_moe": [{"attention_bias": False, "use_qk_norm": False}, {"n_shared_experts": 3, "head_dim": 64}],
    "kimi_k2": [{}],
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": None, "head_dim": None}],
    "mixtral": [{"num_local_experts": 3, "head_dim": 16}],
    "qwen3": [{"attention_bias": True}, {"head_dim": 64}],
    "qwen3_moe": [
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2]},
        {"num_experts": 0},
        {"attention_bias": True},
    ],
}
CASES = [(name, changes) for name in FAMILIES for changes in ({}, *VARIANTS[name])]


@pytest.mark.parametrize(("model_type", "changes"), CASES, ids=lambda value: str(value))
def test_the_layout_is_that_of_transformers(model_type, changes):
    config = tiny.FAMILIES[model_type] | {"model_type": model_type} | changes
    kinds = from_config(config).kinds
    found = {block: kind.tensors for kind in kinds for block in kind.blocks}
    for block, tensors in found.items():
        assert block_shapes(config, block) == {name: list(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("code", sorted(set(FAMILIES.values())))
def test_keys_that_are_left_out_are_those_of_transformers(code):
    """Also where a shape follows from no key of config.json but the few that each has to have."""
    written = CONFIG_MAPPING[code]()
    for key, value in DEFAULTS[code].items():
        found = getattr(written, key)
        expected = written.num_attention_heads if (code, key) == ("llama", "num_key_value_heads") else value
        assert found == expected, key


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    tiny.write_checkpoint(folder, "qwen3_moe", num_hidden_layers=2)
    config = tiny.FAMILIES["qwen3_moe"] | {"model_type": "qwen3_moe", "num_hidden_layers": 2}
    return config, entries(fp8.without_scales(tensors_of(str(folder))), config)


def matrix(*shape: int) -> TensorEntry:
    return TensorEntry(dtype="BF16", shape=list(shape), shard="x.safetensors", offset=0)


LAYER = "model.layers.1."
WRONG = {
    "another step of sparse blocks": ({"decoder_sparse_step": 2}, {}, "model.layers.0.mlp.down_proj.weight: 'no such"),
    "more experts": ({"num_experts": 9}, {}, "model.layers.0.mlp.experts.8.down_proj.weight: 'no such tensor' found"),
    "biases": ({"attention_bias": True}, {}, "model.layers.0.self_attn.k_proj.bias: 'no such tensor' found"),
    "another width of heads": ({"head_dim": 16}, {}, "self_attn.k_norm.weight: [32] found; config.json gives [16]"),
    "fewer heads": ({"num_key_value_heads": 1}, {}, "k_proj.weight: [64, 128] found; config.json gives [32, 128]"),
    "a tensor too many": (
        {},
        {f"{LAYER}self_attn.sinks": matrix(4)},
        f"{LAYER}self_attn.sinks: [4] found; config.json gives no such tensor",
    ),
    "an expert of another width": (
        {},
        {f"{LAYER}mlp.experts.3.up_proj.weight": matrix(64, 128)},
        f"{LAYER}mlp.experts.3.up_proj.weight: [64, 128] found; config.json gives [128, 128]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_block_that_config_json_does_not_give_is_named(stored, case):
    config, tensors = stored
    check_layout("here", config, tensors)
    changes, more, message = WRONG[case]
    with pytest.raises(RequantError) as caught:
        check_layout("here", config | changes, tensors | more)
    assert str(caught.value).startswith("here: model.layers.") and message in str(caught.value)


def test_a_tensor_that_is_missing_is_named(stored):
    config, tensors = stored
    less = {name: entry for name, entry in tensors.items() if name != f"{LAYER}input_layernorm.weight"}
    with pytest.raises(
        RequantError, match=r"layers\.1\.input_layernorm\.weight: 'no such tensor' found; .* gives \[128\]"
    ):
        check_layout("here", config, less)

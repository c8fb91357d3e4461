"""One name inside requant for each tensor, whatever files call it and however they store experts."""

import gzip
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from requant.architecture import FAMILIES, block_of, expert_counts, family, is_drafting
from requant.blocks import empty_block, empty_model, model_config
from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.locks import tensors_of
from requant.naming import engine_names, entries, module_name, places, released_name
from requant.records import TensorEntry

DATA = Path(__file__).parents[3] / "shared" / "data"


def names_of(folder: str) -> list[str]:
    """The tensor names of a real checkpoint's index."""
    path = DATA / folder / "model.safetensors.index.json"
    if not path.parent.exists():
        pytest.skip(f"{path.parent} is not here")
    text = path.read_text() if path.exists() else gzip.decompress(path.with_suffix(".json.gz").read_bytes())
    return list(json.loads(text)["weight_map"])


def config_of(path: str) -> dict:
    return json.loads((DATA / path / "config.json").read_text())


REAL = [
    ("mixtral-8x22b-index", "mixtral-8x22b-index"),
    ("qwen3-30b-a3b-index", "model-configs/Qwen--Qwen3-30B-A3B"),
    ("deepseek-v3-layout", "model-configs/deepseek-ai--DeepSeek-V3"),
]


@pytest.mark.parametrize(("folder", "config"), REAL)
def test_every_name_of_a_real_checkpoint_is_found_in_exactly_one_block(folder, config):
    stored, config = names_of(folder), config_of(config)
    found = places(stored, config)
    assert sorted(place.stored for place in found.values()) == sorted(stored)
    assert all(released_name(name, config) == place.stored for name, place in found.items()), "released as it was"
    model, blocks = empty_model(config), config["num_hidden_layers"]
    named: dict[int | None, set[str]] = {}
    for name in found:
        if not is_drafting(name, blocks) and not name.endswith("_scale_inv"):
            named.setdefault(block_of(name, blocks), set()).add(name)
    assert named.pop(None) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert sorted(named) == list(range(blocks))
    for block in (0, blocks // 2, blocks - 1):
        built = empty_block(type(model.model.layers[block]), model.config, block).state_dict()
        assert named[block] == {f"model.layers.{block}.{name}" for name in built}
    experts = expert_counts(found, blocks)
    assert set(experts.values()) == {config.get("n_routed_experts") or config.get("num_experts") or 8}
    assert len(experts) == blocks - config.get("first_k_dense_replace", 0)


@pytest.mark.parametrize(
    "config",
    ["moonshotai--Kimi-K2-Instruct", "deepseek-ai--DeepSeek-V3.2", "mistralai--Mixtral-8x7B-v0.1"],
)
def test_real_configs_of_other_families_give_blocks(config):
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    config = config_of(f"model-configs/{config}")
    built = model_config(config)
    assert built.model_type == FAMILIES[config["model_type"]]
    last = config["num_hidden_layers"] - 1
    model = empty_model(config | {"num_hidden_layers": 1})
    names = empty_block(type(model.model.layers[0]), built, last).state_dict()
    assert len([name for name in names if name.endswith(".down_proj.weight")]) >= 8
    indexer = {name for name in names if ".indexer." in name}
    assert len(indexer) == (5 if config["model_type"] == "deepseek_v32" else 0)


def test_an_unknown_family_is_refused_with_the_known_ones():
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    with pytest.raises(RequantError, match=r"'gpt_oss' \(GptOssForCausalLM\) is unknown; known .* glm4_moe, kimi_k2"):
        family(config)


def test_mixtrals_names_there_and_back():
    config = {"model_type": "mixtral"}
    pairs = {
        "block_sparse_moe.gate.weight": "mlp.gate.weight",
        "block_sparse_moe.experts.7.w1.weight": "mlp.experts.7.gate_proj.weight",
        "block_sparse_moe.experts.7.w2.weight_packed": "mlp.experts.7.down_proj.weight_packed",
        "block_sparse_moe.experts.7.w3": "mlp.experts.7.up_proj",
        "self_attn.q_proj.weight": "self_attn.q_proj.weight",
    }
    for stored, name in pairs.items():
        stored, name = f"model.layers.5.{stored}", f"model.layers.5.{name}"
        assert module_name(stored, config) == name
        assert released_name(name, config) == stored
        assert module_name(stored, {"model_type": "qwen3_moe"}) == stored == released_name(stored, {})


def test_engines_find_a_kept_expert_of_mixtral_by_either_name():
    name, mixtral = "model.layers.1.mlp.experts.7.up_proj", {"model_type": "mixtral"}
    module = "model.layers.1.block_sparse_moe.experts.7"
    assert engine_names(name, mixtral) == {f"{module}.w3", f"{module}.up_proj"}
    assert engine_names(name, {"model_type": "qwen3_moe"}) == {name}


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("self_attn.q_proj", "self_attn.qkv_proj"),
        ("self_attn.q_a_proj", "self_attn.fused_qkv_a_proj_with_mqa"),
        ("mlp.shared_experts.up_proj", "mlp.shared_experts.gate_up_proj"),
        ("mlp.down_proj", None),
        ("mlp.gate", None),
    ],
)
def test_engines_find_a_kept_layer_by_the_name_of_what_they_make_of_it(name, fused):
    block = "model.layers.1"
    expected = {f"{block}.{each}" for each in (name, fused) if each}
    assert engine_names(f"{block}.{name}", {"model_type": "deepseek_v3"}) == expected


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v32"])
def test_stacked_experts_are_read_as_those_that_are_stored_one_by_one(family, tmp_path):
    """The same weights, saved by transformers in both ways: names, values, shapes and bytes in the file."""
    apart, stacked = (
        Checkpoint(tiny.write_checkpoint(tmp_path / str(way), family, num_hidden_layers=2, stacked=way))
        for way in (False, True)
    )
    assert len(stacked.stored) < len(apart.stored) and stacked.index.keys() == apart.index.keys()
    names = sorted(apart.index)
    ours, theirs = stacked.read(names), apart.read(names)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    described = entries(tensors_of(str(stacked.directory)), stacked.config)
    for name, entry in described.items():
        assert entry.shape == list(theirs[name].shape)
        raw = (stacked.directory / entry.shard).read_bytes()[entry.offset :][: 2 * theirs[name].numel()]
        if theirs[name].dtype == torch.bfloat16:
            assert raw == theirs[name].view(torch.uint8).numpy().tobytes(), name


def test_a_stacked_tensor_of_another_layout_is_refused():
    config = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 64}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    turned = {name: TensorEntry(dtype="BF16", shape=[4, 64, 96], shard="a.safetensors", offset=100)}
    with pytest.raises(RequantError, match=r"shape \[4, 64, 96\] found; expected \[4, 2 x intermediate, 64\]"):
        entries(turned, config)
    with pytest.raises(RequantError, match="experts: None found"):
        places([name], {"model_type": "qwen3_moe"})


def test_a_tensor_that_is_stored_in_two_ways_is_refused():
    config = {"model_type": "qwen3_moe", "num_experts": 2}
    stored = ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.1.down_proj.weight"]
    with pytest.raises(
        RequantError, match=r"experts.1.down_proj.weight, and so is model.layers.0.mlp.experts.down_proj"
    ):
        places(stored, config)


def test_the_layer_for_multi_token_prediction_belongs_to_no_block(tmp_path):
    source = Checkpoint(tiny.write_checkpoint(tmp_path / "mtp", "kimi_k2", num_hidden_layers=2, mtp=True))
    stored = load_file(source.directory / "mtp.safetensors")
    drafting = {name for name in source.index if is_drafting(name, 2)}
    assert drafting == set(stored) and all(block_of(name, 2) is None for name in drafting)

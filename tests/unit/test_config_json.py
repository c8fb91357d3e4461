"""config.json of a release says what holds for it; a source's that contradicts what is computed is refused."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from requant.architecture import FAMILIES
from requant.blocks import model_config
from requant.checkpoint import Checkpoint
from requant.config_json import check_declared, release_config
from requant.copying import copy_block
from requant.errors import RequantError
from requant.locks import tensors_of
from requant.packing import pack, pack_first
from requant.preflight import check_model
from requant.verify import verify

DATA = Path(__file__).parents[3] / "shared" / "data" / "model-configs"
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}
CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def config_of(family: str, **changes) -> dict:
    return {"model_type": family, "num_hidden_layers": 2} | changes


def written(family: str, stored=OUTSIDE, rotary=ROTARY, **changes) -> dict:
    config = config_of(family, **changes)
    check_declared("m", config)
    return release_config(config, stored, rotary)


def test_every_family_has_its_class():
    assert CLASSES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", CLASSES)
def test_the_class_is_the_familys_whatever_the_source_leaves_out(family):
    own = CLASSES[family]
    old = own.replace("Llama", "LLaMA").replace("Deepseek", "DeepSeek")
    for names in (None, [], [own], [old]):
        found = written(family, architectures=names)
        assert found["architectures"] == [own] and found["model_type"] == FAMILIES[family]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForTokenClassification"),
        ("llama", "LlamaForQuestionAnswering"),
        ("llama", "LlamaModel"),
        ("llama", "LlamaForCausalLMEagle"),
        ("llama", "LlavaForConditionalGeneration"),
        ("qwen3", "Qwen3ForSequenceClassification"),
        ("qwen3", "LlamaForCausalLM"),
        ("mixtral", "MixtralForRewardModel"),
        ("deepseek_v3", "DeepseekV32ForCausalLM"),
        ("deepseek_v32", "DeepseekV3ForCausalLM"),
        ("kimi_k2", "KimiVLForConditionalGeneration"),
    ],
)
def test_another_head_or_family_is_refused_in_one_line(family, name):
    own = CLASSES[family]
    with pytest.raises(RequantError, match=rf"^m: config.json: architectures: '{name}'; expected \['{own}'\]"):
        check_declared("m", config_of(family, architectures=[own, name]))


def test_a_release_is_in_bf16_under_both_names_and_keeps_what_nobody_here_knows():
    source = {"torch_dtype": "float32", "dtype": "float16", "quantization_config": {}, "compression_config": {}}
    found = written("llama", **source, auto_map={"AutoConfig": "x.Y"}, ep_size=4, my_engines_key=[1])
    assert found["dtype"] == found["torch_dtype"] == "bfloat16"
    assert not {"quantization_config", "compression_config", "auto_map"} & found.keys()
    assert found["ep_size"] == 4 and found["my_engines_key"] == [1]


@pytest.mark.parametrize("said", [True, False, None])
def test_the_head_is_tied_where_none_is_stored(said):
    assert written("llama", tie_word_embeddings=said)["tie_word_embeddings"] is False
    assert written("llama", OUTSIDE[:2], tie_word_embeddings=said)["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe"])
def test_extra_layers_are_those_that_are_written(family):
    layer = ["model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight", "model.layers.3.enorm.weight"]
    for said in ({}, {"num_nextn_predict_layers": 1}, {"num_mtp_layers": 2}):
        assert written(family, **said)["num_nextn_predict_layers"] == 0
        found = written(family, [*OUTSIDE, *layer[:2]], **said)
        assert found["num_nextn_predict_layers"] == 1 and found.get("num_mtp_layers", 1) == 1
        assert written(family, [*OUTSIDE, *layer], **said)["num_nextn_predict_layers"] == 2


def test_a_family_without_extra_layers_gets_no_such_key_and_none_is_counted():
    assert "num_nextn_predict_layers" not in written("qwen3")
    assert written("qwen3", num_nextn_predict_layers=1)["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "kimi_k2"])
@pytest.mark.parametrize("said", [{}, {"scoring_func": None, "topk_method": None, "moe_layer_freq": None}])
def test_deepseeks_router_is_spelled_out(family, said):
    found = written(family, **said)
    assert (found["scoring_func"], found["topk_method"], found["moe_layer_freq"]) == ("sigmoid", "noaux_tc", 1)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("deepseek_v3", "scoring_func", "softmax"),
        ("kimi_k2", "scoring_func", "softmax"),
        ("deepseek_v32", "topk_method", "greedy"),
        ("deepseek_v3", "topk_method", "group_limited_greedy"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("glm4_moe", "scoring_func", "softmax"),
        ("mixtral", "scoring_func", "sigmoid"),
        ("qwen3_moe", "scoring_func", "sigmoid"),
    ],
)
def test_a_router_that_is_not_the_computed_one_is_refused(family, key, value):
    with pytest.raises(RequantError, match=rf"^m: config.json: {key}: {value!r}; expected .*transformers' code"):
        check_declared("m", config_of(family, **{key: value}))


def test_rotary_parameters_stand_where_earlier_code_looks_for_them():
    plain = written("llama", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}, rotary={"rope_theta": 5e5})
    assert plain["rope_theta"] == 5e5 and "rope_scaling" not in plain
    yarn = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 40.0, "partial_rotary_factor": 0.5}
    found = written("glm4_moe", rope_parameters=yarn, rotary=yarn)
    assert found["rope_scaling"] == {"rope_type": "yarn", "factor": 40.0} and found["partial_rotary_factor"] == 0.5
    kept = written("llama", rope_theta=7.0, rope_scaling={"type": "yarn", "factor": 2}, rotary=yarn)
    assert kept["rope_theta"] == 7.0 and kept["rope_scaling"] == {"type": "yarn", "factor": 2}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta 10000.0 and rope_parameters.rope_th"),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.rope_type 'yarn' and rope_scaling.rope_type 'linear'; expected one value",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}, "rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_parameters.factor 4 and rope_scaling.factor 2",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling: 'yarn'; expected keys and values"),
        (
            {"num_experts": 8, "num_local_experts": 16},
            "experts: num_local_experts 16, num_experts 8; expected one number",
        ),
        ({"num_nextn_predict_layers": 1, "num_mtp_layers": 0}, "multi-token prediction: num_nextn_predict_layers 1, "),
    ],
)
def test_one_thing_said_twice_and_otherwise_is_refused(changes, line):
    with pytest.raises(RequantError) as raised:
        check_declared("m", config_of("llama", **changes))
    assert str(raised.value).startswith("m: config.json: ") and line in str(raised.value)


def test_the_same_said_twice_is_no_contradiction():
    both = {"rope_theta": 10000, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 2}}
    check_declared("m", config_of("llama", **both, rope_scaling={"type": "yarn", "factor": 2.0}))


def test_experts_are_counted_under_the_makers_name():
    assert written("qwen3_moe", num_local_experts=8)["num_experts"] == 8
    assert written("mixtral", num_experts=8)["num_local_experts"] == 8


@pytest.mark.parametrize("path", sorted(DATA.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_published_configs_say_nothing_that_is_not_computed(path):
    config = json.loads(path.read_text())
    if config["model_type"] not in FAMILIES:
        return
    check_declared("m", config)
    found = release_config(config, OUTSIDE, model_config(config).rope_parameters)
    changed = {key for key in config if found.get(key, config[key]) != config[key]}
    assert changed <= {"model_type", "num_nextn_predict_layers"}
    assert found["rope_theta"] == config["rope_theta"] and found.get("rope_scaling") == config.get("rope_scaling")


# Releases


def released(folder: Path, source: Path, **options) -> tuple[dict, dict]:
    """(config.json, tensors) of the release of `source` in BF16, verified."""
    tensors_of.cache_clear()
    for block in range(Checkpoint(source).config["num_hidden_layers"]):
        copy_block(source, "r", block, "BF16", folder / f"blocks/{block}.safetensors", folder / f"blocks/{block}.json")
    pack(source, "r", "m", "BF16", folder / "blocks", folder / "model", folder / "pack.json", **options)
    verify(source, folder / "model", "r", None, 8, folder / "verify.json")
    tensors = {}
    for shard in sorted((folder / "model").glob("*.safetensors")):
        tensors |= load_file(shard)
    return json.loads((folder / "model/config.json").read_text()), tensors


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_release_is_what_its_config_says(tmp_path, family):
    """Every family as transformers saves it: what its class reads back is what was computed."""
    source = tiny.write_checkpoint(tmp_path / "m", family, num_hidden_layers=2)
    config, tensors = released(tmp_path, source)
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in tensors)
    assert all(f"model.layers.{layer}." not in name for name in tensors for layer in (2, 3))
    assert config.get("num_nextn_predict_layers", 0) == 0
    assert config["rope_theta"] == 1e6 if family == "mixtral" else config["rope_theta"] == 1e4
    assert ("scoring_func" in config) == (FAMILIES[family] in ("deepseek_v3", "deepseek_v32"))
    read = AutoConfig.from_pretrained(tmp_path / "model")
    ours = model_config(Checkpoint(source).config)
    assert type(read) is type(ours) and read.dtype == torch.bfloat16
    theirs, mine = read.to_dict(), ours.to_dict()
    told = {"architectures", "dtype", "tie_word_embeddings", "num_nextn_predict_layers", "num_mtp_layers"}
    told |= {"scoring_func", "topk_method", "moe_layer_freq", "transformers_version", "_name_or_path"}
    assert {key: value for key, value in mine.items() if theirs.get(key) != value and key not in told} == {}


@pytest.mark.parametrize(("mtp", "layers"), [("keep", 1), ("drop", 0)])
def test_a_layer_that_is_left_out_is_not_counted(tmp_path, mtp, layers):
    source = tiny.write_checkpoint(tmp_path / "m", "glm4_moe", num_hidden_layers=2, mtp=True)
    config, tensors = released(tmp_path, source, mtp=mtp)
    assert config["num_nextn_predict_layers"] == layers
    assert any(name.startswith("model.layers.2.") for name in tensors) == bool(layers)
    pack_first(source, "BF16", tmp_path / "blocks", 1, tmp_path / "cut")
    cut = json.loads((tmp_path / "cut/config.json").read_text())
    assert (cut["num_hidden_layers"], cut["num_nextn_predict_layers"]) == (1, 0)


def test_a_stored_head_is_the_one_that_counts_though_config_json_ties_it(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "qwen3", num_hidden_layers=2)
    tiny.edit_config(source, tie_word_embeddings=True)
    config, tensors = released(tmp_path, source)
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in tensors


def test_what_a_plan_refuses_it_refuses_with_the_models_name(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    tiny.edit_config(source, architectures=["LlamaForSequenceClassification"])
    tensors_of.cache_clear()
    with pytest.raises(RequantError, match=rf"^{source}: config.json: architectures: 'LlamaForSeq"):
        check_model(str(source), Checkpoint(source).config, tensors_of(str(source)))

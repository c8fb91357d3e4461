"""What planning lets through of a config.json, transformers builds a model of: no job is the first to look."""

import copy

import pytest
import tiny

from requant.architecture import FAMILIES
from requant.blocks import empty_model, model_config
from requant.errors import RequantError
from requant.key_types import _table as shipped
from requant.key_types import check_types, of_classes
from requant.preflight import check_known

ODD = (None, True, 0, -1, 1, 7, 1.5, "x", [], [1], ["x"], {"a": 1})


def config_of(model_type: str) -> dict:
    written = model_config(tiny.FAMILIES[model_type] | {"model_type": model_type, "vocab_size": 320}).to_dict()
    written |= {"model_type": model_type, "architectures": None, "dtype": "bfloat16"}
    return {key: value for key, value in written.items() if key not in ("transformers_version", "head_dim")}


def test_the_shipped_table_is_of_the_classes_here():
    assert shipped() == of_classes(), "write it anew by `python -m requant.key_types`"


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
def test_a_model_is_built_of_what_is_let_through(model_type):
    """Of each key with each odd value by itself."""
    config = config_of(model_type)
    check_known("m", config)
    refused = 0
    for key in sorted(config.keys() | shipped()["families"][FAMILIES[model_type]].keys()):
        for value in ODD:
            changed = config | {key: copy.deepcopy(value)}
            try:
                check_known("m", changed)
            except RequantError as error:
                said = str(error)
                assert said.startswith("m: config.json: ") and ("expected" in said or "known families" in said)
                refused += 1
                continue
            empty_model(copy.deepcopy(changed))
    assert refused > 150


def test_a_whole_number_is_a_number():
    config = config_of("deepseek_v3") | {"routed_scaling_factor": 2, "initializer_range": 1}
    check_known("m", config)
    assert model_config(config).routed_scaling_factor == 2.0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"mlp_only_layers": "x"}, "mlp_only_layers: 'x'; expected a list of whole numbers or null"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob: 'false'; expected true or false"),
        ({"dtype": "float99"}, "dtype: 'float99'; expected one of bfloat16, "),
        ({"torch_dtype": "half"}, "torch_dtype: 'half'; expected one of"),
        ({"layer_types": ["full_attention"]}, "layer_types: ['full_attention']; expected one for each of 3 blocks"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5; expected 1, as its code rotates all values"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0; expected a number from 1 to"),
    ],
)
def test_the_key_is_named_with_what_was_found_and_expected(changes, line):
    config = config_of("qwen3_moe")
    assert config["num_hidden_layers"] == 3
    with pytest.raises(RequantError) as caught:
        check_known("m", config | changes)
    assert str(caught.value).startswith(f"m: config.json: {line}")


def test_blocks_that_are_counted_by_kinds_are_as_many():
    config = config_of("deepseek_v32")
    with pytest.raises(RequantError, match="m: config.json: mlp_layer_types: .'dense'.; expected one for each of"):
        check_types("m", config | {"mlp_layer_types": ["dense"]})

"""What is refused before any job starts: each fault is one line, and what can work is let through."""

import copy
import os
import re
import shutil
from collections import namedtuple

import pytest
import tiny
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from requant.blocks import empty_model
from requant.config import Calibration, Release
from requant.disk import (
    chain_files,
    check_room,
    files_to_come,
    heldout_bytes,
    hidden_bytes,
    reference_files,
    tokens_bytes,
)
from requant.errors import RequantError
from requant.preflight import (
    ACTIVATIONS,
    OF_TUNED_EXPERTS,
    ROPE_KEYS,
    check_activation,
    check_arithmetic,
    check_context,
    check_group,
    check_linears,
    check_numbers,
    check_routing,
    check_source,
)

DENSE = {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 128, "num_key_value_heads": 2}
DENSE |= {"intermediate_size": 3072, "num_hidden_layers": 10, "max_position_embeddings": 4096}
MLA = {"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128}
MLA |= {"qk_rope_head_dim": 64, "num_hidden_layers": 61, "num_key_value_heads": 128, "moe_intermediate_size": 2048}


# Groups and context


def test_a_group_that_divides_no_width_is_refused_with_the_widths():
    narrow = DENSE | {"hidden_size": 96, "head_dim": 12, "intermediate_size": 160}
    check_group("r", Release(model="m", scheme="NVFP4"), narrow)
    check_group("r", Release(model="m", scheme="BF16"), narrow | {"hidden_size": 97})
    with pytest.raises(RequantError) as raised:
        check_group("r", Release(model="m", scheme="W4A16"), narrow)
    assert str(raised.value) == (
        "releases.r: scheme W4A16 has groups of 128 weights, which divide no width of model 'm' (hidden_size 96, "
        "intermediate_size 160, num_attention_heads x head_dim 96): nothing would be quantized; expected another scheme"
    )
    check_group("r", Release(model="m", scheme="W4A16"), narrow | {"intermediate_size": 256})


def test_a_width_that_no_block_has_is_no_reason_to_let_a_group_through():
    moe = DENSE | {"hidden_size": 96, "head_dim": 12, "intermediate_size": 256, "moe_intermediate_size": 32}
    with pytest.raises(RequantError, match="moe_intermediate_size 32"):
        check_group("r", Release(model="m", scheme="W4A16"), moe)
    check_group("r", Release(model="m", scheme="W4A16"), moe | {"first_k_dense_replace": 1})
    check_group("r", Release(model="m", scheme="W4A16"), MLA)


def test_samples_longer_than_an_attentions_window_are_refused():
    for family, changes in (("mixtral", {}), ("qwen3", {"use_sliding_window": True})):
        config = DENSE | {"model_type": family, "sliding_window": 64} | changes
        check_context("c", Calibration(seqlen=64), "m", config)
        with pytest.raises(
            RequantError, match=r"calibrations\.c\.seqlen: 65; expected 64 or less, the attention's window"
        ):
            check_context("c", Calibration(seqlen=65), "m", config)
    unused = {"model_type": "qwen3_moe", "sliding_window": 64, "use_sliding_window": False}
    check_context("c", Calibration(seqlen=65), "m", DENSE | unused)
    check_context("c", Calibration(seqlen=65), "m", DENSE | {"model_type": "mixtral", "sliding_window": None})


def test_activations_and_rotary_embeddings_are_those_that_transformers_knows():
    assert {*ACTIVATIONS, "prelu", "xielu"} == set(ACT2FN.keys()), "two have weights of their own"
    assert set(ROPE_KEYS) == {"default", *ROPE_INIT_FUNCTIONS}
    assert {type(ACT2FN[name]).__name__[:4] for name in OF_TUNED_EXPERTS} == {"SiLU"}


ROPES = [
    None,
    {},
    {"rope_type": "default"},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 1.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1.0] * 16, "factor": 2.0},
]
WRONG = {
    "hidden_act": [
        ("nonsense", "'nonsense'; expected one of transformers'"),
        (None, "None; expected"),
        (3, "3; expected"),
    ],
    "rms_norm_eps": [("1e-6", "'1e-6'; expected a number"), (None, "None"), (-1, "-1"), (True, "True")],
    "pad_token_id": [(320, "320; expected one of the vocabulary, less than 320"), (-321, "-321"), ("0", "'0'")],
    "eos_token_id": [(999, "999; expected ids of the vocabulary, less than 320"), ([1, -1], "[1, -1]"), ("x", "'x'")],
    "bos_token_id": [(320, "320; expected ids"), (-1, "-1")],
    "sliding_window": [(0, "0; expected a number of 1 or more, or null"), ("64", "'64'"), (64.5, "64.5")],
    "rope_theta": [("1e4", "'1e4'; expected a number above 0"), (0, "0; expected"), (None, "None; expected")],
    "rope_scaling": [
        ("linear", "'linear'; expected keys and values"),
        (
            {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
            "rope_type: 'su'; expected one of default, linear",
        ),
        ({"rope_type": "mrope", "mrope_section": [1]}, "rope_type: 'mrope'"),
        ({"rope_type": ["yarn"]}, "rope_type: ['yarn']"),
        ({"rope_type": "linear"}, "factor: None; expected a number above 0"),
        ({"rope_type": "yarn", "factor": "4"}, "factor: '4'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor: None"),
        ({"rope_type": "longrope", "short_factor": [1.0, "a"], "long_factor": [1.0]}, "short_factor: 'a'"),
        ({"rope_type": "default", "rope_theta": "x"}, "rope_theta: 'x'; expected a number above 0"),
        ({"factor": 2.0}, "expected the rope_type that it is for: as it is, it has no effect"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}, "beta_fast: 'x'; expected a number above 0"),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "y"}, "original_max_position_em"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.0] * 16}, "3 factors; expected 16"),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "low_freq_factor: 4.0; expected less than high_freq_factor, 4.0",
        ),
    ],
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_what_transformers_builds_is_let_through(key):
    config = tiny.FAMILIES["llama"] | {"model_type": "llama"}
    for rope in ROPES:
        check_arithmetic("here", config | {key: rope})
        empty_model(config | {key: copy.deepcopy(rope)})
    for changes in ({"pad_token_id": -1}, {"pad_token_id": 319}, {"pad_token_id": None}, {"hidden_act": "gelu"}):
        check_arithmetic("here", config | changes)
        empty_model(config | changes)


@pytest.mark.parametrize("key", WRONG)
def test_a_config_of_which_no_model_can_be_built_is_refused(key):
    config = tiny.FAMILIES["llama"] | {"model_type": "llama"}
    for value, message in WRONG[key]:
        with pytest.raises(RequantError) as caught:
            check_arithmetic("here", config | {key: value})
        line = str(caught.value)
        assert line.startswith(f"here: config.json: {key}: ") and message in line


def test_experts_of_another_activation_are_refused_where_they_would_be_tuned():
    release = Release(model="m", scheme="NVFP4")
    check_activation("r", release, {"hidden_act": "silu"})
    check_activation("r", release, {})
    with pytest.raises(RequantError, match=r"releases\.r\.tuning\.engine: 'fused': experts of model 'm' .* 'gelu'"):
        check_activation("r", release, {"hidden_act": "gelu"})
    for other in ({"engine": "auto_round"}, {"iters": 0}):
        check_activation("r", Release(model="m", scheme="NVFP4", tuning=other), {"hidden_act": "gelu"})
    check_activation("r", Release(model="m", scheme="BF16"), {"hidden_act": "gelu"})


def test_what_stays_along_is_told_and_patterns_are_looked_at():
    linears = {f"model.layers.0.self_attn.{leaf}_proj": 128 for leaf in "qkvo"}
    release = Release(model="m", scheme="W4A16", keep=["q_proj"])
    (line,) = check_linears("r", release, linears)
    assert line == "releases.r: 2 more Linears in BF16: fused by engines with q_proj: config: keep q_proj"
    assert check_linears("r", Release(model="m", scheme="BF16", keep=["nothing"]), linears) == []
    with pytest.raises(RequantError, match=r"releases\.r\.keep: 'x_proj' matches no Linear"):
        check_linears("r", Release(model="m", scheme="W4A16", keep=["x_proj"]), linears)
    with pytest.raises(RequantError, match=r"releases\.r: no Linear of 'm' would be quantized \(config: keep proj\)"):
        check_linears("r", Release(model="m", scheme="W4A16", keep=["proj"]), linears)


def test_samples_longer_than_the_context_are_refused():
    check_context("c", Calibration(seqlen=4096), "m", DENSE)
    with pytest.raises(RequantError) as raised:
        check_context("c", Calibration(seqlen=4097), "m", DENSE)
    assert str(raised.value) == (
        "calibrations.c.seqlen: 4097; expected 4096 or less, the context of model 'm' "
        "(config.json: max_position_embeddings)"
    )


@pytest.mark.parametrize("value", [None, 0, "many"])
def test_a_config_json_without_a_number_is_named(value):
    with pytest.raises(RequantError, match=f"models.m: config.json: num_attention_heads: {value!r}; expected a number"):
        check_numbers("models.m", DENSE | {"vocab_size": 320, "num_attention_heads": value})
    check_numbers("models.m", DENSE | {"vocab_size": 320})


def test_more_experts_a_token_than_there_are_is_an_error():
    config = DENSE | {"model_type": "qwen3_moe", "vocab_size": 320, "num_experts": 8, "num_experts_per_tok": 9}
    with pytest.raises(RequantError, match=r"num_experts_per_tok: 9; expected 8 or less \(num_experts\)"):
        check_routing("models.m", config)


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("deepseek_v3", {"n_group": 3}, "n_group: 3; expected a number that shares 8 experts"),
        ("deepseek_v3", {"n_group": 8}, "n_group: 8; expected a number that shares 8 experts"),
        ("deepseek_v3", {"n_group": 0}, "n_group: 0; expected a number of 1 or more"),
        ("kimi_k2", {"n_group": None}, "n_group: None; expected a number of 1 or more"),
        ("deepseek_v32", {"topk_group": 0}, "topk_group: 0; expected a number of 1 or more"),
        (
            "glm4_moe",
            {"topk_group": 1, "n_group": 4, "num_experts_per_tok": 3},
            "num_experts_per_tok: 3; expected 2",
        ),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok: 0; expected a number of 1 or more"),
        ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok: 9; expected 8 or less"),
    ],
)
def test_a_router_that_cannot_choose_is_refused(family, changes, line):
    config = tiny.FAMILIES[family] | {"model_type": family}
    check_routing("m", config)
    with pytest.raises(RequantError, match=f"^m: config.json: {re.escape(line)}"):
        check_routing("m", config | changes)


def test_a_block_without_tensors_and_a_missing_tokenizer_are_named():
    check_source("m", [None, 0, 1], 2, ["config.json", "tokenizer.json"])
    with pytest.raises(RequantError, match="models.m: block 1 has no tensors; config.json counts 3 blocks"):
        check_source("m", [None, 0, 2], 3, ["tokenizer.json"])
    with pytest.raises(RequantError, match="models.m: no tokenizer; expected tokenizer.json, tokenizer.model, vo"):
        check_source("m", [0], 1, ["config.json"])


# Disk


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


CALIBRATION = Calibration(nsamples=64, seqlen=32, heldout={"nsamples": 8})


def chain() -> dict[str, int]:
    return reference_files("m", "m", "c", CALIBRATION, DENSE) | chain_files("r", CALIBRATION, DENSE)


def test_a_chain_has_a_file_a_block_and_the_embeddings_and_those_of_held_out_tokens(here):
    files = chain()
    assert len(files) == 1 + 2 * 11 + 10
    a_token = 32 * 1024 * 2
    assert 64 * a_token < files["results/r/chain/9.safetensors"] == hidden_bytes(CALIBRATION, 1024) < 64 * a_token + 200
    assert files["results/reference/m/c/embedded.safetensors"] == hidden_bytes(CALIBRATION, 1024)
    assert 8 * a_token < files["results/reference/m/c/heldout_hidden_9.safetensors"] < 8 * a_token + 200
    assert tokens_bytes(CALIBRATION) - 72 * 32 * 5 < 500


def test_hidden_states_that_go_when_they_were_read_are_three_at_a_time(here):
    kept = {"kept": False}
    files = reference_files("m", "m", "c", CALIBRATION, DENSE, **kept) | chain_files("r", CALIBRATION, DENSE, **kept)
    assert list(files.values()).count(hidden_bytes(CALIBRATION, 1024)) == 3
    assert sum("heldout" in path for path in files) == 11
    assert chain_files("r", CALIBRATION, DENSE, chained=False) == {}


def test_only_files_that_are_not_there_are_still_to_come(here):
    everything = files_to_come("r", chain(), 10, 4000, 4)
    assert sum(everything.values()) == sum(chain().values()) + 10 * 100
    done = here / "results/r/chain/0.safetensors"
    done.parent.mkdir(parents=True)
    done.touch()
    assert everything.keys() - files_to_come("r", chain(), 10, 4000, 4).keys() == {"results/r/chain/0.safetensors"}


def test_deleted_chains_of_a_finished_release_are_not_to_come(here):
    (here / "results/r").mkdir(parents=True)
    (here / "results/r/pack.json").touch()
    assert files_to_come("r", chain(), 10, 4000, 4) != {}
    (here / "results/r/evaluate.json").touch()
    assert files_to_come("r", chain(), 10, 4000, 4) == {}


def test_too_little_disk_is_one_line_with_both_figures(here, monkeypatch):
    files = chain()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, sum(files.values())))
    check_room(files)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, sum(files.values()) - 1))
    with pytest.raises(RequantError) as raised:
        check_room(files)
    assert str(raised.value) == (
        f"{here}: 0.1 GB free; what is still to be written there takes 0.1 GB at least "
        "(`snakemake --cores 1 plan` has it by kind)"
    )
    check_room({})


def test_each_disk_counts_its_own_files(here, monkeypatch):
    """A folder of results on another disk, by a link or a mount."""
    (here / "results/reference").mkdir(parents=True)
    real = os.stat

    def stat(path, **keys):
        found = real(path, **keys)
        return namedtuple("result", "st_dev st_mode")(2 if "reference" in str(path) else 1, found.st_mode)

    usage = namedtuple("usage", "total used free")
    own = hidden_bytes(CALIBRATION, 1024)
    shared = own + heldout_bytes(CALIBRATION, 1024)
    free = {True: 11 * shared, False: 10 * own + tokens_bytes(CALIBRATION)}
    monkeypatch.setattr("requant.disk.os.stat", stat)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free["reference" in str(path)]))
    check_room(chain())
    free[True] -= 1
    with pytest.raises(RequantError, match="results/reference: "):
        check_room(chain())

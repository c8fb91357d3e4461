"""How many experts are kept, and what can't be: arithmetic on config.json and the config."""

import json
from pathlib import Path

import pytest
import tiny

from requant.config import Prune
from requant.errors import RequantError
from requant.pruning import check_counts, kept_experts
from requant.view import pruned_config, routed_experts

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "model-configs"
GROUPS = {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "num_hidden_layers": 2}
PLAIN = {"num_experts": 10, "num_experts_per_tok": 3, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "prune", "kept"),
    [
        (GROUPS, {"ratio": 0.25}, 12),
        (GROUPS, {"ratio": 0.5}, 8),
        (GROUPS, {"ratio": 0.2}, 12),
        (GROUPS, {"experts": 12}, 12),
        (PLAIN, {"ratio": 0.25}, 7),
        (PLAIN, {"ratio": 0.24}, 8),
        (PLAIN, {"experts": 3}, 3),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, {"ratio": 0.5}, 4),
    ],
)
def test_a_ratio_is_rounded_to_whole_experts_a_group(config, prune, kept):
    assert kept_experts("m", Prune(**prune), config) == kept


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 192), (0.5, 128)])
def test_the_public_releases_keep_their_number_of_experts(ratio, kept):
    path = SHARED / "deepseek-ai--DeepSeek-V3.2" / "config.json"
    if not path.exists():
        pytest.skip(f"needs {path}")
    config = json.loads(path.read_text())
    assert kept_experts("m", Prune(ratio=ratio), config) == kept
    pruned = pruned_config(config, kept)
    changed = {key for key in pruned if pruned[key] != config[key]}
    assert changed == {"n_routed_experts", "num_nextn_predict_layers"} and pruned["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    ("config", "prune", "message"),
    [
        ({}, {"ratio": 0.5}, "models.m.prune: the source has no routed experts (config.json)"),
        (GROUPS | {"n_group": 5}, {"ratio": 0.5}, "models.m.prune: 16 experts in 5 groups (config.json)"),
        (GROUPS, {"ratio": 0.1}, "models.m.prune.ratio: 0.1: drops none of 16 experts"),
        (GROUPS, {"experts": 16}, "models.m.prune.experts: 16: drops none of 16 experts"),
        (GROUPS, {"experts": 10}, "models.m.prune.experts: 10: the router has 4 groups (n_group)"),
        (
            GROUPS,
            {"ratio": 0.75},
            "models.m.prune.ratio: 0.75: experts kept in each of 4 groups: 1; a group's score is",
        ),
        (
            GROUPS | {"topk_group": 1},
            {"ratio": 0.25},
            "models.m.prune.ratio: 0.25: experts kept in each of 4 groups: 3; the router chooses 4 a token of 1 groups",
        ),
        (PLAIN, {"ratio": 0.8}, "models.m.prune.ratio: 0.8: experts kept: 2; the router chooses 3 a token"),
    ],
)
def test_what_cannot_be_pruned_so_is_one_line(config, prune, message):
    with pytest.raises(RequantError) as error:
        kept_experts("m", Prune(**prune), config)
    assert str(error.value).startswith(message) and "expected" in str(error.value) and "\n" not in str(error.value)


def test_blocks_with_different_numbers_of_experts_are_refused():
    names = [
        f"model.layers.{block}.mlp.experts.{expert}.{leaf}_proj.weight"
        for block, count in ((0, 10), (1, 9))
        for expert in range(count)
        for leaf in ("gate", "up", "down")
    ]
    check_counts("m", [name for name in names if ".0.mlp" in name], PLAIN)
    with pytest.raises(RequantError, match=r"^models.m.prune: block 1 has 9 experts; config.json counts 10: expected"):
        check_counts("m", names, PLAIN)


@pytest.mark.parametrize("family", [family for family, config in tiny.FAMILIES.items() if routed_experts(config)])
def test_the_count_of_every_family_is_changed(family):
    config = tiny.FAMILIES[family] | {"num_nextn_predict_layers": 1}
    pruned = pruned_config(config, 6)
    assert routed_experts(pruned) == 6 and pruned["num_nextn_predict_layers"] == 0
    assert sum(pruned[key] != config[key] for key in config) == 2

"""Which Linears stay in BF16, closed over what engines fuse; patterns that mean nothing are told with the nearest."""

import pytest
import tiny

from requant.architecture import has_plain_experts
from requant.errors import RequantError
from requant.linears import check_closed, check_patterns, choose, fused_layers, taken_along
from requant.schemes import SCHEMES
from requant.shapes import linear_widths
from requant.structure import from_config

GQA = ("q_proj", "k_proj", "v_proj", "o_proj")
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
W4A16 = SCHEMES["W4A16"]


def linears(attention=GQA, blocks=2, experts=4, width=128) -> dict[str, int]:
    names = [f"model.layers.{block}.self_attn.{leaf}" for block in range(blocks) for leaf in attention]
    for block in range(blocks):
        mlp = f"model.layers.{block}.mlp"
        names += [f"{mlp}.experts.{expert}.{leaf}" for expert in range(experts) for leaf in MLP] or [
            f"{mlp}.{leaf}" for leaf in MLP
        ]
        names += [f"{mlp}.shared_experts.{leaf}" for leaf in MLP] if experts else []
    return dict.fromkeys(names, width)


def kept_by(keep, found=None) -> dict[str, str]:
    """{Linear without `model.layers.`: reason}"""
    found = found or linears()
    quantized, kept = choose(found, W4A16, keep)
    assert quantized == sorted(found.keys() - kept.keys())
    check_closed(quantized, found)
    return {name.removeprefix("model.layers."): reason for name, reason in kept.items()}


@pytest.mark.parametrize("leaf", GQA[:3])
def test_one_of_a_fused_projection_takes_the_others_along(leaf):
    kept = kept_by([rf"0\.self_attn\.{leaf}$"])
    reason = rf"config: keep 0\.self_attn\.{leaf}$"
    assert kept == {
        f"0.self_attn.{name}": reason if name == leaf else f"fused by engines with {leaf}: {reason}" for name in GQA[:3]
    }


@pytest.mark.parametrize(
    ("pattern", "stay"),
    [
        (r"layers\.1\.self_attn\.q_a_proj", ["1.self_attn.q_a_proj", "1.self_attn.kv_a_proj_with_mqa"]),
        (r"layers\.1\.self_attn\.q_b_proj", ["1.self_attn.q_b_proj"]),
        (r"layers\.1\.self_attn\.kv_b_proj", ["1.self_attn.kv_b_proj"]),
        (
            r"layers\.1\.mlp\.shared_experts\.up_proj",
            ["1.mlp.shared_experts.gate_proj", "1.mlp.shared_experts.up_proj"],
        ),
        (r"layers\.1\.mlp\.shared_experts\.down_proj", ["1.mlp.shared_experts.down_proj"]),
    ],
)
def test_what_is_not_fused_stays_alone(pattern, stay):
    assert sorted(kept_by([pattern], linears(MLA))) == sorted(stay)


@pytest.mark.parametrize(
    "pattern", [r"layers\.1\.mlp\.experts\.3\.", r"1\.mlp\.experts\.\d+\.down_proj", r"1\.mlp\.experts\.0\.up_proj$"]
)
def test_experts_of_a_block_have_one_format(pattern):
    kept = kept_by([pattern])
    assert sorted(kept) == sorted(f"1.mlp.experts.{expert}.{leaf}" for expert in range(4) for leaf in MLP)
    assert any(reason == f"config: keep {pattern}" for reason in kept.values())


def test_a_width_that_fits_no_group_takes_along_what_is_fused():
    found = linears() | {f"model.layers.{block}.mlp.experts.{n}.down_proj": 192 for block in (0, 1) for n in range(4)}
    kept = kept_by([], found)
    assert len(kept) == 24
    why = "width 192 is no multiple of the group of 128"
    assert kept["0.mlp.experts.2.down_proj"] == why
    assert kept["0.mlp.experts.2.up_proj"] == f"fused by engines with down_proj: {why}"
    assert taken_along(choose(found, W4A16, [])[1]) == [
        f"16 more Linears in BF16: fused by engines with down_proj: {why}"
    ]
    dense = linears(experts=0) | {"model.layers.0.self_attn.v_proj": 100}
    assert set(kept_by([], dense)) == {f"0.self_attn.{leaf}" for leaf in GQA[:3]}


def test_nothing_is_taken_along_where_all_is_asked_for():
    assert taken_along(choose(linears(), W4A16, ["self_attn", r"layers\.0\.mlp"])[1]) == []
    assert choose(linears(), SCHEMES["BF16"], [])[0] == []


def test_a_pattern_of_llm_compressors_matches_from_the_beginning():
    assert {name for name in kept_by(["re:.*self_attn.*"])} == {f"{n}.self_attn.{leaf}" for n in (0, 1) for leaf in GQA}
    assert kept_by(["re:self_attn"]) == {}
    with pytest.raises(RequantError, match="'re:self_attn' matches no Linear"):
        check_patterns("r", ["re:self_attn"], linears())


@pytest.mark.parametrize("pattern", ["re:.*mlp.gate$", "mlp.gate$", r"re:.*block_sparse_moe\.gate$"])
def test_routers_may_be_named_they_stay_anyhow(pattern):
    check_patterns("r", ["lm_head", pattern], linears())
    assert kept_by([pattern]) == {}
    with pytest.raises(RequantError, match="matches no Linear"):
        check_patterns("r", [pattern], linears(experts=0))


def test_experts_may_be_spelled_as_mixtrals_checkpoints_do():
    check_patterns("r", [r"experts\.0\.w1$", "re:.*block_sparse_moe.*"], linears())
    theirs = kept_by([r"1\.block_sparse_moe\.experts\.0\.w1$"])
    ours = kept_by([r"1\.mlp\.experts\.0\.gate_proj$"])
    assert theirs.keys() == ours.keys() and len(ours) == 4 * len(MLP), "all experts of the block"


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("kv_b_projj$", "model.layers.N.self_attn.kv_b_proj"),
        ("re:.*self_atn.o_proj", "model.layers.N.self_attn.o_proj"),
        (r"mlp\.expert\.\d+\.down_proj", "model.layers.N.mlp.experts.N.down_proj"),
        (r"layers\.7\.self_attn\.o_proj", "model.layers.N.self_attn.o_proj"),
        ("block_sparse_moe.expert.0.w1", "model.layers.N.mlp.experts.N."),
        ("shared_expert.up_proj", "model.layers.N.mlp.shared_experts.up_proj"),
    ],
)
def test_a_pattern_that_means_nothing_is_told_with_the_nearest_names(pattern, nearest):
    check_patterns("r", ["lm_head", "re:.*lm_head", "embed_tokens", "self_attn"], linears(MLA))
    with pytest.raises(RequantError) as caught:
        check_patterns("r", ["self_attn", pattern], linears(MLA))
    line = str(caught.value)
    assert line.startswith("releases.r.keep: ") and "matches no Linear of the model; nearest: " in line
    assert nearest in line.partition("nearest: ")[2].split(", ")[0]


@pytest.mark.parametrize("model_type", tiny.FAMILIES)
@pytest.mark.parametrize("scheme", ["NVFP4", "W4A16"])
def test_every_family_is_closed_whatever_one_linear_is_kept(model_type, scheme):
    sizes = {"moe_intermediate_size": 192} if scheme == "W4A16" else {}
    found = linear_widths(from_config(tiny.FAMILIES[model_type] | sizes | {"model_type": model_type}).kinds)
    for name in [name for name in found if "experts.3" in name or ".experts." not in name]:
        quantized, kept = choose(found, SCHEMES[scheme], [f"^{name}$".replace(".", r"\.")])
        assert name in kept
        for layer in fused_layers(found):
            assert len(set(layer) & set(quantized)) in (0, len(layer))


def test_what_is_not_closed_is_named():
    found = linears()
    check_closed(found, found)
    with pytest.raises(
        RequantError, match=r"k_proj: is quantized, and model\.layers\.0\.self_attn\.q_proj, which engines"
    ):
        check_closed(found.keys() - {"model.layers.0.self_attn.q_proj"}, found)
    with pytest.raises(RequantError, match=r"and model\.layers\.1\.mlp\.experts\.3\.down_proj, which engines"):
        check_closed(found.keys() - {"model.layers.1.mlp.experts.3.down_proj"}, found)


def test_plain_experts_are_those_of_blocks():
    expert = "mlp.experts.0.up_proj.weight"
    assert has_plain_experts([f"model.layers.1.{expert}"], 2)
    assert not has_plain_experts([f"model.layers.2.{expert}"], 2), "of multi-token prediction"
    assert not has_plain_experts([f"model.layers.1.{expert}_packed", "model.layers.1.mlp.up_proj.weight"], 2)

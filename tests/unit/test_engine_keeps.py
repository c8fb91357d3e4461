"""What an engine takes in BF16 stays so in a release for it, and is told; packed, it is refused where it is served."""

import pytest
from test_linears import MLA, linears

from requant.config import Release, Target
from requant.engine_keeps import KEEPS, for_engine, packed_problem, why_kept
from requant.linears import choose, taken_along
from requant.schemes import SCHEMES

SGLANG, VLLM = (
    Target(engine=engine, device="cuda", gpu="sm100", image=f"{engine}:v1.0.0") for engine in ("sglang", "vllm")
)
BY_NAME = {"sglang": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}, "vllm": {"kv_b_proj"}}


def release(**settings) -> Release:
    return Release(model="m", scheme="W4A16", **settings)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v32", "kimi_k2"])
@pytest.mark.parametrize("target", [SGLANG, VLLM], ids=lambda target: target.engine)
def test_projections_of_mla_stay_for_the_engine_of_the_target(family, target):
    keep = for_engine(release(keep=["o_proj"]), family, target).keep
    assert keep[0] == "o_proj" and len(keep) == 2
    quantized, kept = choose(linears(MLA), SCHEMES["W4A16"], keep[1:])
    assert {name.rpartition(".")[2] for name in kept} == BY_NAME[target.engine]
    assert all(f"self_attn.{leaf}" not in "".join(quantized) for leaf in BY_NAME[target.engine])
    (said,) = taken_along(kept)
    assert said.startswith(f"{len(kept)} more Linears in BF16: ") and "by name" in said or "in pieces" in said
    assert set(kept.values()) == {why_kept(keep[1])}


def test_nothing_stays_where_nothing_is_needed():
    for family, target, settings in [
        ("qwen3_moe", SGLANG, {}),
        ("deepseek_v3", Target(), {}),
        ("deepseek_v3", SGLANG.model_copy(update={"weights": "decoded"}), {}),
        ("deepseek_v3", SGLANG, {"scheme": "BF16"}),
        ("deepseek_v3", SGLANG, {"keep": [KEEPS[0].pattern]}),
    ]:
        asked = release().model_copy(update=settings)
        assert for_engine(asked, family, target) == asked


def test_a_packed_projection_is_named_with_the_engine_and_its_version():
    packed = ["model.layers.0.self_attn.o_proj", "model.layers.0.self_attn.kv_b_proj"]
    assert packed_problem(packed[:1], "deepseek_v3", SGLANG) is None
    problem = packed_problem(packed, "deepseek_v3", SGLANG)
    assert problem == f"{packed[1]} is packed: {KEEPS[0].why} (0.5.16)"
    assert (
        packed_problem(packed, "glm4_moe", SGLANG) is None and packed_problem(packed, "deepseek_v3", Target()) is None
    )


def test_a_config_that_asks_for_it_gives_its_own_reason():
    assert why_kept("kv_b") == "config: keep kv_b"

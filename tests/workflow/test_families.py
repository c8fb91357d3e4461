"""A tiny checkpoint of each family, as its maker would store it, quantized and evaluated; most up to their cards."""

import pytest
import tiny
import yaml
from building import BRIEF, TASK, Build
from safetensors.torch import load_file

from requant.checkpoint import Checkpoint
from requant.packed import PackedCheckpoint
from requant.records import BlockRecord, DeployRecord, EvaluateRecord, PackRecord, SourceRecord, VerifyRecord, read_json

# Name: model_type, how it is stored, schemes.
MODELS = {
    "v32": ("deepseek_v32", {"mtp": True, "num_hidden_layers": 2}, ("w3a16", "nvfp4")),
    "kimi": ("kimi_k2", {"mtp": True, "first_k_dense_replace": 0}, ("nvfp4",)),
    "glm": ("glm4_moe", {"stacked": True, "first_k_dense_replace": 0}, ("w3a16",)),
    "mixtral": ("mixtral", {}, ("w3a16",)),
    "qwen": ("qwen3", {"tie_word_embeddings": True}, ("nvfp4",)),
}
SCHEMES = {"nvfp4": "NVFP4", "w3a16": "W3A16"}
RELEASES = [f"{model}-{scheme}" for model, (_, _, schemes) in MODELS.items() for scheme in schemes]
SERVED = ["v32-w3a16", "kimi-nvfp4", "glm-w3a16", "mixtral-w3a16"]  # to their cards; dense ones are in test_build.py


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Build:
    """The releases to evaluate.json and verify.json, and some of them through the whole graph."""
    directory = tmp_path_factory.mktemp("families")
    for name, (model_type, changes, _) in MODELS.items():
        changes = {"num_hidden_layers": 1, "shard_size": "1MB"} | changes
        tiny.write_checkpoint(directory / "models" / name, model_type, seed=7, **changes)
    tiny.write_text(directory / "text.txt", 100, 1)
    (directory / "tasks").mkdir()
    (directory / "tasks/tiny.yaml").write_text(TASK)
    (directory / "tasks/rows.jsonl").write_text('{"question": "the cat sat on", "answer": "the mat"}\n' * 2)
    release = {
        "calibration": "small",
        "benchmark": "tiny",
        "tuning": {"iters": 2, "batch_size": 4},
        "deploy": {"prompts": 2, "prompt_tokens": 8, "max_tokens": 4, "throughput": BRIEF},
    }
    releases = {
        name: release | {"model": name.split("-")[0], "scheme": SCHEMES[name.split("-")[1]]} for name in RELEASES
    }
    releases["kimi-nvfp4"]["mtp"] = "drop"
    config = {
        "models": {name: {"path": f"models/{name}"} for name in MODELS},
        "calibrations": {
            "small": {"sources": [{"path": "text.txt"}], "nsamples": 8, "seqlen": 32, "heldout": {"nsamples": 4}}
        },
        "benchmarks": {"tiny": {"tasks": ["tiny"], "include_path": "tasks", "batch_size": 4}},
        "releases": releases,
        "build": SERVED,
    }
    (directory / "mine.yaml").write_text(yaml.safe_dump(config))
    build = Build(directory)
    checks = [f"results/{name}/{stage}.json" for name in RELEASES for stage in ("verify", "evaluate")]
    build.run("model_card.md", *checks)
    return build


@pytest.mark.parametrize("release", RELEASES)
def test_every_family_is_quantized_verified_and_evaluated(families, release):
    results = families.directory / "results"
    folder, model = results / release, release.split("-")[0]
    pack = read_json(folder / "pack.json", PackRecord)
    source = read_json(results / f"source/{model}/source.json", SourceRecord)
    verify = read_json(folder / "verify.json", VerifyRecord)
    evaluate = read_json(folder / "evaluate.json", EvaluateRecord)
    assert pack.quantized_parameters > 0.4 * pack.activated_parameters
    assert pack.routed_experts == source.routed_experts == (0 if model == "qwen" else 8)
    dropped = verify.source_tensors - verify.unchanged - len(verify.tensors)
    assert (dropped > 0) == (pack.multi_token_prediction == "dropped") == (release == "kimi-nvfp4")
    assert evaluate.source.kl_divergence == 0 < evaluate.quantized.kl_divergence < 5
    for block in range(pack.blocks):
        record = read_json(folder / f"blocks/{block}.json", BlockRecord)
        assert record.iterations == 2 and record.loss_best <= record.loss_initial
        assert bool(record.never_tuned) == (model == "v32")


@pytest.mark.parametrize("release", SERVED)
def test_releases_are_served_and_have_cards(families, release):
    folder = families.directory / "results" / release
    deploy = read_json(folder / "deploy.json", DeployRecord)
    assert deploy.agreement >= deploy.agreement_limit > deploy.control_agreement
    card = (folder / "model/README.md").read_text()
    assert release in (families.directory / "model_card.md").read_text()
    assert ("multi-token prediction are left out" in card) == (release == "kimi-nvfp4")
    assert ("rounded, not tuned" in card) == (release == "v32-w3a16")


def test_a_release_of_mixtral_has_mixtrals_names(families):
    folder = families.directory / "results/mixtral-w3a16"
    released = PackedCheckpoint(folder / "model")
    source = Checkpoint(families.directory / "models/mixtral")
    packed = {name.removesuffix("_packed") for name in released.stored if name.endswith("weight_packed")}
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in packed < set(source.stored)
    assert set(load_file(folder / "blocks/0.safetensors")) < set(released.stored)


def test_a_block_that_is_split_over_shards_waits_for_all_of_them(families):
    """The graph knows every shard that holds a tensor of a block."""
    source = Checkpoint(families.directory / "models/v32")
    shards = {shard for name, shard in source.stored.items() if name.startswith("model.layers.1.")}
    assert len(shards) > 1
    detailed = families.run("--detailed-summary", "results/v32-nvfp4/blocks/1.safetensors").stdout
    (line,) = [line for line in detailed.splitlines() if line.startswith("results/v32-nvfp4/blocks/1.safetensors\t")]
    assert all(f"models/v32/{shard}" in line for shard in shards)


def test_an_unknown_family_is_refused_when_planned_in_one_line(tmp_path):
    tiny.write_checkpoint(tmp_path / "models/other", "qwen3", num_hidden_layers=1)
    tiny.edit_config(tmp_path / "models/other", model_type="gpt_oss", architectures=["GptOssForCausalLM"])
    (tmp_path / "mine.yaml").write_text(
        "models: {other: {path: models/other}}\nreleases: {r: {model: other, scheme: NVFP4}}\nbuild: [r]\n"
    )
    done = Build(tmp_path).run("-n", check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model_type: 'gpt_oss' (GptOssForCausalLM) is unknown; known families: deepseek_v3, deepseek_v32" in line

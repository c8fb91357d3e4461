"""Every preset of config/, scaled down by one overlay for all: tiny checkpoints of its families as their makers store
them, few texts and questions, served by this machine. Built to the cards."""

import shutil
from pathlib import Path

import benchmark_data
import pytest
import tiny
import yaml
from building import BRIEF, ROOT, TASK, Build
from safetensors.torch import load_file

from requant.checkpoint import Checkpoint
from requant.packed import PackedCheckpoint
from requant.provenance import read_provenance
from requant.records import (
    BlockRecord,
    DeployRecord,
    EvaluateRecord,
    PackRecord,
    ServedBenchmarkRecord,
    SourceRecord,
    VerifyRecord,
    read_json,
)

PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "config").glob("*.yaml"))}
PRUNED = [stem for stem, preset in PRESETS.items() if any("prune" in model for model in preset["models"].values())]
WHOLE = sorted(PRESETS.keys() - set(PRUNED))
# Its family and how it is stored, by the name of a model in the presets.
MODELS = {
    "deepseek-v3.2": ("deepseek_v32", {"num_hidden_layers": 2, "n_group": 2, "topk_group": 1}),
    "glm-4.5": ("glm4_moe", {"stacked": True, "first_k_dense_replace": 0}),
    "kimi-k2": ("kimi_k2", {"mtp": True, "first_k_dense_replace": 0}),
    "mixtral-8x7b": ("mixtral", {}),
    "qwen3-235b-a22b": ("qwen3_moe", {}),
    "qwen3-32b": ("qwen3", {"tie_word_embeddings": True}),
}
IN_FP8 = "deepseek-v3.2"
UNPRUNED = "deepseek-v3.2-nvfp4"  # a release that no preset has, with multi-token prediction
RELEASES = {release: stem for stem, preset in PRESETS.items() for release in preset["build"]}
CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def scaled_down(presets: list[str], tasks: dict[str, str]) -> dict:
    """What makes presets small enough for a test, whatever is in them. tasks: where served benchmarks have files."""
    found = {key: {} for key in ("models", "calibrations", "benchmarks", "targets", "releases")}
    for preset in map(PRESETS.get, presets):
        for name, model in preset["models"].items():
            if "from" not in model:
                found["models"][name] = {"path": f"models/{name}", "hub": None, "revision": None}
        for name in preset["calibrations"]:
            few = {"sources": [{"path": "text.txt"}], "nsamples": 8, "seqlen": 32, "heldout": {"nsamples": 4}}
            found["calibrations"][name] = few
        for name, benchmark in preset["benchmarks"].items():
            asked = {
                task: {"data": tasks[task], "limit": 1, "max_tokens": 4, "num_fewshot": 0}
                for task in benchmark.get("served", {})
            }
            found["benchmarks"][name] = {
                "tasks": ["tiny"], "include_path": "tasks", "num_fewshot": None, "batch_size": 4, "served": asked
            }  # fmt: skip
        for name in preset["targets"]:
            here = {"engine": "transformers", "device": "cpu", "gpu": None, "devices": 1, "memory_gb": None}
            found["targets"][name] = here | {"like": "cpu-transformers", "context": None}
        for name in preset["releases"]:
            asked = {"prompts": 2, "prompt_tokens": 8, "max_tokens": 4, "throughput": BRIEF, "load_test_blocks": 0}
            found["releases"][name] = {"tuning": {"iters": 2, "batch_size": 4}, "deploy": asked}
    return found | {"device": "cpu", "build": [release for stem in presets for release in PRESETS[stem]["build"]]}


def configured(directory: Path, presets: list[str], overlay: dict) -> Build:
    """A build in `directory` of these presets: their files as they are, and the overlay."""
    path = directory / f"{'-'.join(presets)}.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return Build(directory, (*(str(ROOT / f"config/{stem}.yaml") for stem in presets), str(path)))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> Build:
    """All releases of all presets with their cards, and one more of the largest model, verified and evaluated.

    The build is that of the pruned ones; whole.md is the card of the others.
    """
    directory = tmp_path_factory.mktemp("presets")
    for name, (model_type, changes) in MODELS.items():
        folder = directory / "models" / name
        written = directory / "bf16" if name == IN_FP8 else folder
        changes = {"num_hidden_layers": 1, "shard_size": "1MB"} | changes
        tiny.write_checkpoint(written, model_type, seed=7, **changes)
        if name == IN_FP8:
            tiny.write_fp8(written, folder)
        (folder / "chat_template.jinja").write_text(CHAT)
    tiny.write_text(directory / "text.txt", 100, 1)
    (directory / "tasks").mkdir()
    (directory / "tasks/tiny.yaml").write_text(TASK)
    (directory / "tasks/rows.jsonl").write_text('{"question": "the cat sat on", "answer": "the mat"}\n' * 2)
    asked = {task for stem in PRESETS for it in PRESETS[stem]["benchmarks"].values() for task in it.get("served", {})}
    tasks = {task: str(benchmark_data.lay_out(task, directory / "data" / task, 1)) for task in sorted(asked)}
    configured(directory, WHOLE, scaled_down(WHOLE, tasks)).run("model_card.md")
    shutil.copyfile(directory / "model_card.md", directory / "whole.md")
    overlay = scaled_down(PRUNED, tasks)
    overlay["releases"][UNPRUNED] = overlay["releases"][PRESETS[PRUNED[0]]["build"][0]] | {
        "model": IN_FP8, "scheme": "NVFP4", "calibration": "general", "benchmark": "public"
    }  # fmt: skip
    checks = [f"results/{UNPRUNED}/{stage}.json" for stage in ("verify", "evaluate")]
    build = configured(directory, PRUNED, overlay)
    build.run("model_card.md", *checks)
    return build


def test_the_models_of_all_presets_are_here():
    named = {name for preset in PRESETS.values() for name, model in preset["models"].items() if "from" not in model}
    assert named == MODELS.keys() and len(PRUNED) == 2


@pytest.mark.parametrize("release", [*RELEASES, UNPRUNED])
def test_every_family_is_quantized_verified_and_evaluated(scaled, release):
    results = scaled.directory / "results"
    folder = results / release
    pack = read_json(folder / "pack.json", PackRecord)
    verify = read_json(folder / "verify.json", VerifyRecord)
    evaluate = read_json(folder / "evaluate.json", EvaluateRecord)
    settings = PRESETS[RELEASES.get(release, PRUNED[0])]["models"]
    pruned = settings.get(pack.model, {}).get("prune")
    source = read_json(
        results / f"source/{settings[pack.model]['from'] if pruned else pack.model}/source.json", SourceRecord
    )
    assert pack.quantized_parameters > 0.4 * pack.activated_parameters
    assert source.routed_experts == (0 if pack.model == "qwen3-32b" else 8)
    assert pack.routed_experts == source.routed_experts * (1 - (pruned["ratio"] if pruned else 0))
    assert (pack.multi_token_prediction == "dropped") == bool(pruned)
    assert (pack.multi_token_prediction == "kept") == (release in (UNPRUNED, "kimi-k2-nvfp4"))
    assert evaluate.source.kl_divergence == 0 < evaluate.quantized.kl_divergence < 5
    assert verify.source_tensors == verify.unchanged + len(verify.tensors)
    for block in range(pack.blocks):
        record = read_json(folder / f"blocks/{block}.json", BlockRecord)
        assert record.iterations == 2
        assert bool(record.never_tuned) == ("deepseek" in release)


@pytest.mark.parametrize("release", RELEASES)
def test_every_preset_is_built_to_its_card(scaled, release):
    folder, stem = scaled.directory / "results" / release, RELEASES[release]
    deploy = read_json(folder / "deploy.json", DeployRecord)
    assert deploy.agreement >= deploy.agreement_limit > deploy.control_agreement
    card = (folder / "model/README.md").read_text()
    assert release in (scaled.directory / ("model_card.md" if stem in PRUNED else "whole.md")).read_text()
    assert ("multi-token prediction are left out" in card) == (stem in PRUNED)
    assert ("rounded, not tuned" in card) == (stem in PRUNED)
    (benchmark,) = PRESETS[stem]["benchmarks"].values()
    for task in benchmark.get("served", {}):
        record = read_json(folder / f"served_benchmarks/{task}.json", ServedBenchmarkRecord)
        assert record.release == release and record.measured.limit == 1
        assert f"{task}" in card
    said = read_provenance(folder / "model/provenance.json").request.config
    assert ("sandbox" in said) == ("humaneval" in benchmark.get("served", {}))


def test_a_release_of_mixtral_has_mixtrals_names(scaled):
    folder = scaled.directory / "results/mixtral-8x7b-w4a16"
    released = PackedCheckpoint(folder / "model")
    source = Checkpoint(scaled.directory / "models/mixtral-8x7b")
    packed = {name.removesuffix("_packed") for name in released.stored if name.endswith("weight_packed")}
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in packed < set(source.stored)
    assert set(load_file(folder / "blocks/0.safetensors")) < set(released.stored)


def test_a_block_that_is_split_over_shards_waits_for_all_of_them(scaled):
    """The graph knows every shard that holds a tensor of a block."""
    source = Checkpoint(scaled.directory / f"models/{IN_FP8}")
    shards = {shard for name, shard in source.stored.items() if name.startswith("model.layers.1.")}
    assert len(shards) > 1
    path = f"results/{UNPRUNED}/blocks/1.safetensors"
    detailed = scaled.run("--detailed-summary", path).stdout
    (line,) = [line for line in detailed.splitlines() if line.startswith(f"{path}\t")]
    assert all(f"models/{IN_FP8}/{shard}" in line for shard in shards)


def test_an_unknown_family_is_refused_when_planned_in_one_line(tmp_path):
    tiny.write_checkpoint(tmp_path / "models/other", "qwen3", num_hidden_layers=1)
    tiny.edit_config(tmp_path / "models/other", model_type="gpt_oss", architectures=["GptOssForCausalLM"])
    (tmp_path / "mine.yaml").write_text(
        "models: {other: {path: models/other}}\nreleases: {r: {model: other, scheme: NVFP4}}\nbuild: [r]\n"
    )
    done = Build(tmp_path).run("-n", check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "model_type: 'gpt_oss' (GptOssForCausalLM) is unknown; known families: deepseek_v3, deepseek_v32" in line

"""A build from an FP8 source gives the bytes of the build from the same model in BF16."""

import json
import shutil

import pytest
import tiny
import torch
from building import Build, lay_out

from requant.chain import embed, run_reference_block
from requant.checkpoint import INDEX, Checkpoint
from requant.config import Tuning
from requant.packing import pack
from requant.quantize import BlockJob, quantize_block
from requant.records import EvaluateRecord, PackRecord, VerifyRecord, read_json

BLOCKS = 2
SIZES = {"hidden_size": 192, "moe_intermediate_size": 192, "num_hidden_layers": BLOCKS}
TUNING = {"iters": 2, "batch_size": 4, "threads": 1}


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """A locked FP8 model of ragged widths with a multi-token-prediction layer, built up to verify and evaluate."""
    build = lay_out(tmp_path_factory.mktemp("fp8"), ())
    models = build.directory / "models"
    tiny.write_fp8(
        tiny.write_checkpoint(models / "random", "deepseek_v3", seed=7, shard_size="1MB", **SIZES),
        models / "ds",
        models / "bf16",
    )
    release = {"model": "ds", "scheme": "NVFP4", "calibration": "small", "tuning": TUNING}
    build.configure(
        lambda data: data.update(models={"ds": {"path": "models/ds"}}, releases={"ds": release}, build=["ds"])
    )
    build.run("lock", "--config", "model=ds")
    build.run("results/ds/verify.json", "results/ds/evaluate.json", "results/source/ds/source.json")
    return build


def shards_of_block_0(names: dict[str, str]) -> set[str]:
    return {f"models/ds/{shard}" for name, shard in names.items() if name.startswith("model.layers.0.")}


def test_a_block_waits_for_the_shards_of_its_weights_and_of_their_factors(build):
    source = Checkpoint(build.directory / "models/ds")
    wanted = shards_of_block_0(source.stored)
    assert wanted > shards_of_block_0(source.index), "one has nothing but factors of this block"
    done = build.run("results/ds/blocks/0.json", "-n", "--force", "--quiet", "host")
    inputs = next(line for line in done.stdout.splitlines() if line.strip().startswith("input:"))
    assert wanted <= {name.strip() for name in inputs.partition(":")[2].split(",")}


def test_the_release_has_the_bytes_of_one_made_from_bf16(build, tmp_path):
    torch.set_num_threads(1)
    source, results = build.directory / "models/bf16", build.directory / "results"
    tokens = results / "calibration/ds/small/tokens.safetensors"
    hidden, tuned = tmp_path / "embedded.safetensors", tmp_path / "embedded.safetensors"
    (tmp_path / "blocks").mkdir()
    embed(source, tokens, hidden)
    for block in range(BLOCKS):
        output, shipped = tmp_path / f"hidden_{block}.safetensors", tmp_path / f"chain_{block}.safetensors"
        run_reference_block(
            source, tokens, hidden, block, output, tmp_path / "routing.json", tmp_path / "saliency.csv", "ds", "small"
        )
        job = BlockJob(source, "ds", "ds", block, "NVFP4", Tuning(**TUNING), [], tokens, tuned, output)
        files = tmp_path / f"blocks/{block}.safetensors", tmp_path / f"blocks/{block}.json"
        quantize_block(job, *files, shipped)
        assert output.read_bytes() == (results / f"reference/ds/small/hidden_{block}.safetensors").read_bytes()
        assert files[0].read_bytes() == (results / f"ds/blocks/{block}.safetensors").read_bytes()
        hidden, tuned = output, shipped
    record = pack(source, "ds", "ds", "NVFP4", tmp_path / "blocks", tmp_path / "model", tmp_path / "pack.json")
    ours = read_json(results / "ds/pack.json", PackRecord)
    assert ours.files == record.files, "shards, index, config and tokenizer"
    differing = {"files", "seconds", "source_bytes"}
    assert ours.model_dump(exclude=differing) == record.model_dump(exclude=differing)


def test_nothing_of_fp8_is_left_in_the_release(build):
    folder = build.directory / "results/ds/model"
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["num_nextn_predict_layers"] == 1
    assert f"model.layers.{BLOCKS}.self_attn.o_proj" in config["quantization_config"]["ignore"]
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert not [name for name in names if name.endswith("_scale_inv")]
    drafting = Checkpoint(folder)
    assert drafting.stored[f"model.layers.{BLOCKS}.mlp.down_proj.weight"] == "model-00003-of-00003.safetensors"


def test_every_tensor_is_accounted_for_once(build):
    results, source = build.directory / "results", Checkpoint(build.directory / "models/ds")
    verify = read_json(results / "ds/verify.json", VerifyRecord)
    assert len(verify.tensors) + verify.unchanged == verify.source_tensors == len(source.index) < len(source.stored)
    assert all(check.cosine > 0.98 for check in verify.tensors.values())
    evaluate = read_json(results / "ds/evaluate.json", EvaluateRecord)
    assert evaluate.source.kl_divergence == 0 < evaluate.quantized.kl_divergence < 5
    record = json.loads((results / "source/ds/source.json").read_text())
    assert record["dtypes"]["F8_E4M3"] > 0.5 * record["parameters"]


def test_a_source_that_is_quantized_already_is_refused_when_it_is_planned(build, tmp_path):
    shutil.copytree(build.directory, tmp_path / "copy", ignore=shutil.ignore_patterns("results", "locks"))
    copy = Build(tmp_path / "copy")
    path = copy.directory / "models/ds/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["quant_method"] = "awq"
    path.write_text(json.dumps(config))
    done = copy.run("-n", check=False)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        "error: models/ds: config.json: quantization_config.quant_method: 'awq'; expected 'fp8', or a checkpoint that "
        "is not quantized"
    ]

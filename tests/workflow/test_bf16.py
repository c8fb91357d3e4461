"""A release in BF16 of an FP8 source goes through the whole graph to its card; to be packed it needs no calibration."""

import pytest
import tiny
import torch
from building import Build, lay_out

from requant.checkpoint import Checkpoint
from requant.packed import PackedCheckpoint
from requant.provenance import read_provenance
from requant.records import (
    BenchmarkRecord,
    CopiedBlock,
    DeployRecord,
    EvaluateRecord,
    PackRecord,
    PlanRecord,
    VerifyRecord,
    read_json,
)

RELEASE, BLOCKS = "ds-bf16", 2


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """The directory of a tiny FP8 model with a multi-token-prediction layer, and the card of its only release."""
    build = lay_out(tmp_path_factory.mktemp("bf16"), ("ds",))
    models = build.directory / "models"
    plain = tiny.write_checkpoint(models / "random", "deepseek_v3", seed=7, shard_size="1MB", num_hidden_layers=BLOCKS)
    tiny.write_fp8(plain, models / "fp8", models / "decoded")

    def only_bf16(data):
        release = data["releases"]["ds-nvfp4"] | {"scheme": "BF16", "keep": ["o_proj"]}
        data.update(models={"ds": {"path": "models/fp8"}}, releases={RELEASE: release}, build=[RELEASE])

    build.configure(only_bf16)
    return build


@pytest.fixture(scope="module")
def plans(build) -> tuple[PlanRecord, dict[str, int], dict[str, int]]:
    """The release's plan, and the jobs of two dry runs, before anything is built: to pack it, and to its card."""
    build.run("plan")
    record = read_json(build.directory / f"results/{RELEASE}/plan.json", PlanRecord)
    return record, build.planned(f"results/{RELEASE}/pack.json"), build.planned()


@pytest.fixture(scope="module")
def made(build, plans) -> Build:
    """The same with its card."""
    build.run("model_card.md")
    return build


def record_of(made: Build, stage: str, kind):
    return read_json(made.directory / f"results/{RELEASE}/{stage}.json", kind)


def test_packing_needs_neither_tokens_nor_reference_chain(plans):
    _, to_pack, to_card = plans
    assert {"copy_block": BLOCKS, "pack": 1}.items() <= to_pack.items()
    assert set(to_pack) == {"copy_block", "pack", "source", "source_file"}
    assert not {"quantize", "plot_release", "plot_build"} & set(to_card)


def test_the_plan_is_what_came(made, plans):
    planned, _, to_card = plans
    pack = record_of(made, "pack", PackRecord)
    assert planned.schemes["BF16"].file_bytes == planned.disk.shards == pack.bytes
    assert planned.schemes["BF16"].bits_per_quantized_weight is None
    assert planned.jobs == to_card | {"all": 1}
    assert (planned.disk.chain, planned.disk.served, planned.gpu_bytes) == (0, 0, None)
    copied = [record_of(made, f"blocks/{block}", CopiedBlock) for block in range(BLOCKS)]
    assert 0.6 < planned.cpu_bytes["copy_block"] / max(record.peak_memory_bytes for record in copied) < 1.7
    done = made.run("plan")
    stages = {stage.stage: stage for stage in record_of(made, "plan", PlanRecord).stages}
    assert stages["copy_block"].seconds == pytest.approx(sum(record.seconds for record in copied))
    assert "nothing quantized, chosen" in done.stderr and "stay in BF16" not in done.stderr


def test_the_release_is_the_decoded_source(made):
    released = PackedCheckpoint(made.directory / f"results/{RELEASE}/model")
    decoded = Checkpoint(made.directory / "models/decoded")
    names = sorted(decoded.index)
    ours, theirs = released.read(names), decoded.read(names)
    assert sorted(released.index) == names and "quantization_config" not in released.config
    assert all(torch.equal(ours[name], theirs[name].to(ours[name].dtype)) for name in names)
    verify = record_of(made, "verify", VerifyRecord)
    assert verify.unchanged == verify.source_tensors == len(names) and not verify.tensors
    assert "rounded once to BF16" in verify.unchanged_means


def test_nothing_is_lost_and_it_is_served_as_it_is(made):
    evaluate = record_of(made, "evaluate", EvaluateRecord)
    assert evaluate.rounded is None and evaluate.activations == "BF16"
    assert evaluate.quantized.kl_divergence == 0 and evaluate.quantized.top1_agreement == 1
    assert evaluate.quantized.perplexity == evaluate.source.perplexity > 1
    assert evaluate.block_mse == [{"quantized": 0.0}] * BLOCKS
    deploy = record_of(made, "deploy", DeployRecord)
    assert deploy.why_decoded is None and deploy.weights == "the packed checkpoint as it is"
    assert deploy.agreement >= deploy.agreement_limit > deploy.control_agreement
    benchmark = record_of(made, "benchmark", BenchmarkRecord)
    assert benchmark.arithmetic == "BF16 weights and activations"
    assert [score.value for score in benchmark.scores] == [score.value for score in benchmark.source_scores]


def test_its_cards_need_no_pictures_of_losses(made):
    folder = made.directory / f"results/{RELEASE}"
    card, readme = (made.directory / "model_card.md").read_text(), (folder / "model/README.md").read_text()
    assert "1 release in BF16 of" in card and "Loss by depth" not in card and "![Loss" not in card
    assert "in BF16 what the source has in FP8" in readme and "where the source, stored in FP8, takes" in readme
    assert not (folder / "chain").exists() and list((folder / "model").glob("*.png")) == []
    made_by = read_provenance(folder / "model/provenance.json")
    assert made_by.provenance.tuning == made_by.provenance.seeds == [] and made_by.provenance.scheme == "BF16"
    assert len(made_by.predicate.runDetails.byproducts) == BLOCKS


def test_tuning_and_keep_mean_nothing_to_it(made):
    made.configure(lambda data: data["releases"][RELEASE].update(tuning={"iters": 9, "device": "cuda"}, keep=["kv_b"]))
    assert made.planned() == {}
    made.configure(lambda data: data["releases"][RELEASE].update(mtp="drop"))
    assert {"pack", "verify"} <= set(made.planned()) and "copy_block" not in made.planned()

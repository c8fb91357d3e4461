"""A pruned model through the whole graph: one source, one lock, one set of tokens, a chain and a release of its own."""

import json

import pytest
import tiny
import yaml
from building import BRIEF, TASK, Build
from safetensors.torch import load_file

from requant.checkpoint import Checkpoint
from requant.packed import PackedCheckpoint
from requant.reap import Watch
from requant.records import (
    DeployRecord,
    EvaluateRecord,
    KeepList,
    PackRecord,
    PlanRecord,
    PruneEvaluateRecord,
    VerifyRecord,
    read_json,
)
from requant.routing import observe
from requant.saliency import read_table
from requant.streamed import StreamedModel
from requant.wording import ranges, with_error

BLOCKS = 2  # one dense, one with 8 experts in 2 groups


def lay_out(directory, blocks: int = BLOCKS, **prune) -> Build:
    changes = {"num_hidden_layers": blocks, "n_group": 2, "topk_group": 1, "mtp": True, "shard_size": "1MB"}
    tiny.write_checkpoint(directory / "models/ds", "deepseek_v3", seed=7, **changes)
    tiny.write_text(directory / "text.txt", 100, 1)
    (directory / "tasks").mkdir()
    (directory / "tasks/tiny.yaml").write_text(TASK)
    (directory / "tasks/rows.jsonl").write_text('{"question": "the cat sat on", "answer": "the mat"}\n' * 2)
    tokens = {"sources": [{"path": "text.txt"}], "nsamples": 8, "seqlen": 32, "heldout": {"nsamples": 4}}
    config = {
        "models": {
            "ds": {"path": "models/ds", "base_model": "tests/tiny", "license": "mit"},
            "ds-50": {"from": "ds", "prune": {"ratio": 0.5, "calibration": "small"} | prune},
        },
        "calibrations": {"small": tokens, "other": tokens | {"seed": 1}},
        "benchmarks": {"tiny": {"tasks": ["tiny"], "include_path": "tasks", "batch_size": 4}},
        "releases": {
            "ds-50-nvfp4": {
                "model": "ds-50",
                "scheme": "NVFP4",
                "calibration": "small",
                "benchmark": "tiny",
                "tuning": {"iters": 2, "batch_size": 4},
                "deploy": {"prompts": 2, "prompt_tokens": 8, "max_tokens": 4, "throughput": BRIEF},
            }
        },
        "build": ["ds-50-nvfp4"],
    }
    (directory / "mine.yaml").write_text(yaml.safe_dump(config))
    return Build(directory)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Build:
    """A build to the card, planned and counted before it ran."""
    build = lay_out(tmp_path_factory.mktemp("pruned"), compare=["random"])
    build.run("lock", "--config", "model=ds")
    build.run("plan")
    counted = build.planned() | {"all": 1}
    plan = read_json(build.directory / "results/ds-50-nvfp4/plan.json", PlanRecord)
    assert plan.jobs == counted
    build.run()
    return build


def record(build: Build, name: str, kind):
    return read_json(build.directory / f"results/{name}.json", kind)


def test_the_release_has_the_experts_that_were_kept_and_no_others(pruned):
    folder = pruned.directory / "results/ds-50-nvfp4/model"
    packed, config = PackedCheckpoint(folder), json.loads((folder / "config.json").read_text())
    keep = record(pruned, "ds-50/prune/keep", KeepList)
    assert (keep.experts_before, keep.experts, keep.groups) == (8, 4, 2) and list(keep.blocks) == [1]
    assert [sum(expert // 4 == group for expert in keep.blocks[1]) for group in (0, 1)] == [2, 2]
    assert config["n_routed_experts"] == 4 and config["num_nextn_predict_layers"] == 0
    assert packed.index.keys() == Checkpoint(pruned.directory / "models/ds", keep).index.keys()
    whole = Checkpoint(pruned.directory / "models/ds")
    router = "model.layers.1.mlp.gate.weight"
    assert (packed.read([router])[router] == whole.read([router])[router][keep.blocks[1]]).all()
    made = record(pruned, "ds-50-nvfp4/pack", PackRecord)
    assert (made.routed_experts, made.multi_token_prediction) == (4, "dropped")
    assert record(pruned, "ds-50-nvfp4/verify", VerifyRecord).source_tensors == len(packed.index)
    assert record(pruned, "ds-50-nvfp4/deploy", DeployRecord).verdict == "passed"
    assert (pruned.directory / "model_card.md").exists()


def test_source_and_tokens_are_those_of_the_model_that_was_pruned(pruned):
    results = pruned.directory / "results"
    assert [path.name for path in (results / "source").iterdir()] == ["ds"]
    assert [path.name for path in (results / "calibration").iterdir()] == ["ds"]
    assert sorted(path.name for path in (results / "reference").iterdir()) == ["ds", "ds-50", "ds-50.random"]
    embedded = [results / f"reference/{model}/small/embedded.safetensors" for model in ("ds", "ds-50")]
    assert embedded[0].read_bytes() == embedded[1].read_bytes()


def test_the_plan_from_the_lock_had_the_bytes_of_the_build(pruned):
    plan = record(pruned, "ds-50-nvfp4/plan", PlanRecord)
    made = record(pruned, "ds-50-nvfp4/pack", PackRecord)
    assert plan.basis == "lock" and (plan.pruned_from, plan.experts_before) == ("ds", 8)
    assert plan.schemes["NVFP4"].file_bytes == made.bytes and plan.source_bytes == made.source_bytes
    assert (plan.parameters, plan.activated_parameters) == (made.parameters, made.activated_parameters)
    assert (plan.routed_experts, plan.drafting_parameters) == (4, 0)
    results = pruned.directory / "results"
    assert plan.disk.chain == sum(path.stat().st_size for path in (results / "ds-50-nvfp4/chain").iterdir())
    states = [
        path for model in ("ds", "ds-50") for path in (results / f"reference/{model}/small").glob("*.safetensors")
    ]
    assert plan.disk.reference == sum(path.stat().st_size for path in states)
    assert plan.disk.tokens == (results / "calibration/ds/small/tokens.safetensors").stat().st_size


def test_a_finished_build_has_nothing_to_do(pruned):
    assert pruned.planned() == {}


def test_another_ratio_observes_nothing_again_and_another_calibration_does(pruned):
    before = yaml.safe_load((pruned.directory / "mine.yaml").read_text())
    try:
        pruned.configure(lambda data: data["models"]["ds-50"]["prune"].update(ratio=0.25))
        jobs = pruned.planned()
        assert (jobs["keep"], jobs["reference"], jobs["quantize"]) == (2, BLOCKS, BLOCKS), "no chain but its own"
        assert not {"source_file", "source", "calibrate", "embed"} & jobs.keys()
        assert pruned.planned("results/reference/ds/small/hidden_1.safetensors") == {}
        pruned.configure(lambda data: data["models"]["ds-50"]["prune"].update(ratio=0.5, calibration="other"))
        jobs = pruned.planned()
        assert (jobs["calibrate"], jobs["embed"], jobs["keep"]) == (1, 1, 2)
        assert jobs["reference"] == 2 * BLOCKS, "the source's on the other tokens, and then its own"
    finally:
        pruned.configure(lambda data: data.update(before))
    assert pruned.planned() == {}


def test_what_cannot_be_pruned_is_one_line_before_a_job_starts(tmp_path):
    build = lay_out(tmp_path, ratio=0.9)

    def refused(*arguments: str) -> str:
        done = build.run(*arguments, "-n", check=False)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode and "Traceback" not in done.stderr and "common.smk" not in done.stderr
        return line

    assert refused().startswith("error: models.ds-50.prune.ratio: 0.9: experts kept: 0; the router chooses 2 a token")
    assert refused("lock", "--config", "model=ds-50").startswith(
        "error: --config model=ds-50: not in `models`, or pruned from one; expected one of "
    )


def test_the_card_tells_what_went_and_holds_the_model_against_others(pruned):
    text = (pruned.directory / "results/ds-50-nvfp4/model/README.md").read_text()
    keep = record(pruned, "ds-50/prune/keep", KeepList)
    assert (
        "**4 of 8 routed experts** of `ds` are kept in each of its 1 MoE block, 2 of 4 in each of the router's" in text
    )
    dropped = sorted(set(range(8)) - set(keep.blocks[1]))
    assert f"| 1 | {ranges(dropped)} |" in text
    assert (pruned.directory / "results/ds-50-nvfp4/model/saliency.png").stat().st_size > 5000
    assert "| | `ds` | `ds-50` | `ds-50.random` |" in text
    for model in ("ds-50", "ds-50.random"):
        measured = record(pruned, f"{model}/prune/evaluate", PruneEvaluateRecord)
        assert measured.pruned.kl_divergence > 0 == measured.original.kl_divergence
        assert with_error(measured.pruned.kl_divergence, measured.pruned.kl_divergence_stderr) in text
    released = record(pruned, "ds-50-nvfp4/evaluate", EvaluateRecord)
    assert released.source.kl_divergence == 0 < released.quantized.kl_divergence
    assert (
        released.original.perplexity == record(pruned, "ds-50/prune/evaluate", PruneEvaluateRecord).original.perplexity
    )
    assert released.against_original.kl_divergence != released.quantized.kl_divergence


def test_in_sequence_a_block_is_observed_on_what_the_pruned_blocks_before_it_give(tmp_path):
    build = lay_out(tmp_path, blocks=3, observe="sequential")
    build.run("results/ds-50/prune/evaluate.json")
    keep = record(build, "ds-50/prune/keep", KeepList)
    steps = [record(build, f"ds-50/prune/keep_{block}", KeepList) for block in (0, 1)]
    assert steps[0].blocks == {} and steps[1].blocks == {1: keep.blocks[1]} and list(keep.blocks) == [1, 2]

    source = tmp_path / "models/ds"
    tokens = load_file(tmp_path / "results/calibration/ds/small/tokens.safetensors")["calibration"]
    original, pruned = StreamedModel(Checkpoint(source)), StreamedModel(Checkpoint(source, keep))
    before = original.run(original.block(0), original.embed(tokens))
    after_pruned, after_whole = (model.run(model.block(1), before) for model in (pruned, original))
    tables = []
    for hidden in (after_pruned, after_whole):
        watch = Watch()
        observe(original, original.block(2), hidden, None, watch=watch)
        tables.append(watch.table(2))
    found = read_table(tmp_path / "results/ds-50/prune/saliency_2.csv")
    assert found["saliency"].tolist() == pytest.approx(tables[0]["saliency"].tolist(), rel=1e-6)
    assert found["saliency"].tolist() != pytest.approx(tables[1]["saliency"].tolist(), rel=1e-3)


@pytest.mark.parametrize("observe_mode", ["oneshot", "sequential"])
def test_a_plan_counts_the_jobs_of_comparisons(tmp_path, observe_mode):
    build = lay_out(tmp_path, observe=observe_mode, compare=["random", "frequency"])
    for calibration in ("small", "other") if observe_mode == "oneshot" else ("other",):
        build.configure(lambda data, name=calibration: data["releases"]["ds-50-nvfp4"].update(calibration=name))
        build.run("plan")
        assert record(build, "ds-50-nvfp4/plan", PlanRecord).jobs == build.planned() | {"all": 1}


def test_a_pruned_model_of_the_hub_is_planned_from_its_sources_lock(tmp_path):
    build = lay_out(tmp_path)
    build.run("lock", "--config", "model=ds")
    path, revision = tmp_path / "locks/ds.json", "0" * 40
    lock = json.loads(path.read_text()) | {"revision": revision}
    path.write_text(json.dumps(lock))
    (tmp_path / "models/ds").rename(tmp_path / "elsewhere")
    build.configure(lambda data: data["models"].update(ds={"hub": "org/name", "revision": revision}))
    jobs = build.planned()
    assert (jobs["download"], jobs["source"], jobs["keep"]) == (len(lock["files"]), 1, 1), "no file twice"
    build.run("plan")
    plan = record(build, "ds-50-nvfp4/plan", PlanRecord)
    assert plan.jobs == jobs | {"all": 1} and plan.basis == "lock" and plan.routed_experts == 4
    assert plan.download_bytes == sum(entry["size"] for entry in lock["files"].values())

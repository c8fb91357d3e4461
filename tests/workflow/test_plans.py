"""Plans beside real builds: what was predicted is what is there; what can't work is refused by a dry run."""

import json
import re

import pytest
from building import Build, lay_out, write_keys

from requant.records import BlockRecord, DeployRecord, EvaluateRecord, PackRecord, PlanRecord, RoutingRecord, read_json

RELEASES = ("ds-nvfp4", "ds-w3a16", "qw-w3a16", "ll-nvfp4")


def plans(build: Build, *releases: str) -> dict[str, PlanRecord]:
    return {name: read_json(build.directory / f"results/{name}/plan.json", PlanRecord) for name in releases}


def refused(build: Build, *arguments: str) -> str:
    """The one line of a dry run that is refused."""
    done = build.run(*arguments, "-n", check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def planned_after(built) -> dict[str, PlanRecord]:
    """Plans of the releases that `built` has finished."""
    built.run("plan")
    return plans(built, *RELEASES)


@pytest.mark.parametrize("release", RELEASES)
def test_a_finished_build_has_the_bytes_of_its_plan(built, planned_after, release):
    results, plan = built.directory / "results", planned_after[release]
    pack = read_json(results / release / "pack.json", PackRecord)
    size = plan.schemes[plan.scheme]
    assert size.file_bytes == pack.bytes and plan.source_bytes == pack.source_bytes
    assert (plan.parameters, plan.activated_parameters) == (pack.parameters, pack.activated_parameters)
    assert size.quantized_parameters == pack.quantized_parameters
    assert size.bits_per_quantized_weight == pack.bits_per_quantized_weight
    assert (plan.routed_experts, plan.moe_blocks) == (pack.routed_experts, pack.moe_blocks)
    folder = results / "reference" / plan.model / ("padded" if release.startswith("qw") else "small")
    tokens = results / "calibration" / plan.model / folder.name / "tokens.safetensors"
    assert plan.disk.reference == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert plan.disk.chain == sum(path.stat().st_size for path in (results / release / "chain").iterdir())
    assert plan.disk.tokens == tokens.stat().st_size
    assert plan.disk.shards == sum(path.stat().st_size for path in (results / release / "model").glob("*.safetensors"))
    decoded = read_json(results / release / "deploy.json", DeployRecord).why_decoded is not None
    assert (plan.disk.served > 0) == decoded
    outside = sorted((results / release / "model").glob("*.safetensors"))[-1].stat().st_size
    copied = plan.disk.load_test - outside
    assert 0 < copied < plan.disk.served if decoded else copied == 0


def test_memory_of_jobs_is_near_what_was_measured(built, planned_after):
    """Models this small test little more than the bases; docs/plan.md has larger ones."""
    results = built.directory / "results"
    for release, plan in planned_after.items():
        blocks = [read_json(path, BlockRecord) for path in (results / release / "blocks").glob("*.json")]
        reference = [
            read_json(path, RoutingRecord) for path in results.glob(f"reference/{plan.model}/*/routing_*.json")
        ]
        evaluate = read_json(results / release / "evaluate.json", EvaluateRecord)
        for rule, records in (("quantize", blocks), ("reference", reference), ("evaluate", [evaluate])):
            measured = max(record.peak_memory_bytes for record in records)
            assert 0.6 < plan.cpu_bytes[rule] / measured < 1.7, (release, rule, measured)


def test_hours_of_a_finished_build_are_those_that_were_measured(built, planned_after):
    """A block's is the mean of all such jobs, of other releases too."""
    tuned = [read_json(path, BlockRecord).seconds for path in built.directory.glob("results/*/blocks/*.json")]
    for release, plan in planned_after.items():
        assert all(stage.basis.startswith("measured") for stage in plan.stages)
        spent = {stage.stage: stage.seconds for stage in plan.stages}
        evaluate = read_json(built.directory / f"results/{release}/evaluate.json", EvaluateRecord)
        blocks = len(list((built.directory / f"results/{release}/blocks").glob("*.json")))
        assert spent["evaluate"] == evaluate.seconds
        assert blocks * min(tuned) <= spent["quantize"] <= blocks * max(tuned)


def test_jobs_are_those_of_a_dry_run_and_a_plan_builds_nothing(tmp_path):
    build = lay_out(tmp_path, ("ds", "ll"))
    printed = build.run("plan")
    found = {path.name for path in (tmp_path / "results").glob("**/*") if path.is_file()}
    assert found == {"plan.json"}
    jobs = int(re.search(r"jobs of the whole build: (\d+);", printed.stderr)[1])
    assert jobs == sum(build.planned().values()) + 1, "and the job `all`"
    write_keys(tmp_path)
    build.configure(lambda data: data.update(build=["ds-w3a16"], publish={"signing_key": "key.pem"}))
    hub = {"tiny": {"dataset": "tests/tiny", "task": "default", "metric": "exact_match"}}
    build.configure(lambda data: data["benchmarks"]["tiny"].update(hub=hub))
    planned = build.planned()
    build.run("plan")
    assert planned["sign"] == planned["eval_results"] == 1
    assert plans(build, "ds-w3a16")["ds-w3a16"].jobs == planned | {"all": 1}


def test_a_model_of_which_only_config_json_is_there_is_planned_but_not_built(tmp_path):
    build = lay_out(tmp_path, ("ds",))
    folder = tmp_path / "models/ds"
    whole = build.run("plan") and plans(build, "ds-nvfp4", "ds-w3a16")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    build.run("plan")
    for release, plan in plans(build, "ds-nvfp4", "ds-w3a16").items():
        assert plan.basis == "config" and not plan.source_files_known
        assert plan.schemes == whole[release].schemes and plan.disk.chain == whole[release].disk.chain
    assert refused(build).startswith("error: models/ds: 0 safetensors files and no model.safetensors.index.json")
    (folder / "config.json").unlink()
    done = build.run("plan", check=False)
    assert "error: models/ds/config.json: not there; expected a Hugging Face checkpoint directory" in done.stderr


def test_what_cannot_work_is_refused_before_a_job_starts(tmp_path):
    build = lay_out(tmp_path, ("ll",))
    release = {"scheme": "NVFP4", "model": "ll", "calibration": "small", "benchmark": "tiny"}

    def change(release_keys=None, **data):
        build.configure(lambda found: found.update(releases={"r": release | (release_keys or {})}, build=["r"], **data))

    here = {"engine": "sglang", "device": "cuda", "gpu": "sm90"}
    change({"deploy": {"target": "here"}}, targets={"here": here})
    assert "releases.r: scheme NVFP4 can't be served at target 'here': sglang 0.5.16 refuses NVFP4" in refused(build)
    change({"deploy": {"target": "here"}}, targets={"here": here | {"gpu": "sm120"}})
    here["gpu"] = "sm120"
    short = "releases.r: does not fit target 'here': weights take "
    change({"deploy": {"target": "here"}}, targets={"here": here | {"memory_gb": 1e-3, "context": 1_000_000}})
    said = refused(build)
    assert short in said and " MB of each device, 1 x 1,000,000 tokens of KV cache " in said
    change({"deploy": {"target": "here"}}, targets={"here": {"like": "sm120-sglang", "memory_gb": 1e-3}})
    assert short in refused(build)
    change({"deploy": {"target": "here"}}, targets={"here": {"like": "sm121-sglang"}})
    assert "config: targets.here.like: 'sm121-sglang'; expected one of cpu-docker, cpu-tr" in refused(build)
    change({"deploy": {"target": "here"}}, targets={"here": {"like": "sm120-sglang", "image": None}})
    absent = "releases.r.deploy.target: 'here' needs the program sglang, or an `image` that has it"
    assert f"warning: {absent}" in build.run("-n").stderr, "what needs no GPU is planned"
    stopped = build.run(check=False)
    assert stopped.returncode and f"error: {absent}" in stopped.stdout + stopped.stderr
    assert absent not in build.run("results/r/evaluate.json", "-n").stderr
    build.run("plan")
    assert plans(build, "r")["r"].target.problem is None
    change()
    path = tmp_path / "models/ll/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": 47}))
    assert "calibrations.small.seqlen: 48; expected 47 or less, the context of model 'll'" in refused(build)
    path.write_text(json.dumps(config | {"hidden_size": 120, "intermediate_size": 200, "head_dim": 30}))
    assert "models/ll: model.embed_tokens.weight: [320, 128] found; config.json gives [320, 120]" in refused(build)
    path.write_text(json.dumps(config))
    build.configure(lambda data: data["calibrations"]["small"].update(nsamples=2**40, seqlen=1024))
    too_little = r"GB free; what is still to be written there takes [\d.]+ GB at least"
    assert re.search(f"warning: .*{too_little}", build.run("-n").stderr), "planning goes on where there is no room"
    stopped = build.run(check=False)
    assert stopped.returncode and re.search(f"error: .*{too_little}", stopped.stdout + stopped.stderr)
    assert "Execute" not in stopped.stdout + stopped.stderr

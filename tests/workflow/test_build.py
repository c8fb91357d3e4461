"""Whole builds: what a user gets, that it is rebuilt only where stale, and that a killed build goes on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from building import ROOT, Build, environment, lay_out
from huggingface_hub import parse_eval_result_entries
from safetensors.torch import load_file

from requant.checkpoint import Checkpoint
from requant.config import parse
from requant.hashing import file_entry
from requant.packed import PackedCheckpoint
from requant.provenance import read_provenance
from requant.records import (
    BenchmarkRecord,
    BlockRecord,
    DeployRecord,
    EvaluateRecord,
    LoadTestRecord,
    PackRecord,
    VerifyRecord,
    read_json,
)
from requant.verify import compare, public_decoding

RELEASES = ("ds-nvfp4", "ds-w3a16", "qw-w3a16", "ll-nvfp4")


def digests(folder, names=None) -> dict[str, str]:
    """sha256 of the files in `folder`, of all or of `names`."""
    paths = sorted(filter(Path.is_file, folder.iterdir())) if names is None else [folder / name for name in names]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("release", RELEASES)
def test_every_stage_leaves_its_record(built, release):
    folder = built.directory / "results" / release
    pack = read_json(folder / "pack.json", PackRecord)
    verify = read_json(folder / "verify.json", VerifyRecord)
    evaluate = read_json(folder / "evaluate.json", EvaluateRecord)
    deploy = read_json(folder / "deploy.json", DeployRecord)
    assert pack.quantized_parameters > 0.4 * pack.parameters
    assert verify.codes_rederived == len(verify.tensors)
    assert evaluate.source.kl_divergence == 0 < evaluate.quantized.kl_divergence < 5
    assert deploy.agreement >= deploy.agreement_limit > deploy.control_agreement
    loaded = read_json(folder / "load_test.json", LoadTestRecord)
    assert (loaded.blocks, loaded.moe_blocks) == {"ds": (2, 1), "qw": (1, 1), "ll": (1, 0)}[release.split("-")[0]]
    assert loaded.agreement >= loaded.agreement_limit
    assert (loaded.why_decoded is None) == release.endswith("w3a16"), "the engine reads packed integers, not NVFP4"
    assert (deploy.why_decoded is None) == (release == "ds-w3a16"), "nor a block whose experts are plain"
    for block in range(pack.blocks):
        record = read_json(folder / f"blocks/{block}.json", BlockRecord)
        assert record.iterations == 2 and record.loss_best <= record.loss_initial


def test_what_engines_fuse_stays_with_what_is_kept(built):
    """One expert of a block, and one of three projections: the others are kept too, and the reason is told."""
    folder = built.directory / "results/qw-w3a16"
    kept = read_json(folder / "blocks/2.json", BlockRecord).kept | read_json(folder / "blocks/1.json", BlockRecord).kept
    experts = [
        f"model.layers.2.mlp.experts.{expert}.{leaf}_proj" for expert in range(8) for leaf in ("gate", "up", "down")
    ]
    projections = [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkv"]
    assert set(kept) == {*experts, *projections}
    by_experts = r"fused by engines with down_proj, gate_proj, up_proj: config: keep layers\.2\.mlp\.experts\.3\."
    by_query = r"fused by engines with q_proj: config: keep layers\.1\.self_attn\.q_proj"
    assert kept[experts[0]] == by_experts and kept[projections[1]] == by_query
    ignored = json.loads((folder / "model/config.json").read_text())["quantization_config"]["ignore"]
    assert {*experts, *projections, "lm_head"} <= set(ignored)
    card = (folder / "model/README.md").read_text()
    assert by_experts in card and by_query in card
    assert "a block keeps its experts in BF16" in card


@pytest.mark.parametrize("release", RELEASES)
def test_the_release_decodes_in_a_public_decoder_to_the_verified_weights(built, release):
    folder = built.directory / "results" / release
    packed = PackedCheckpoint(folder / "model")
    source = Checkpoint(built.directory / "models" / release.split("-")[0])
    checks = read_json(folder / "verify.json", VerifyRecord).tensors
    assert set(packed.quantized) == set(checks)
    for name in packed.quantized[::3]:
        public = public_decoding(packed.parts(name), packed.scheme).float().numpy()
        cosine, relative_mae, _ = compare(source.read([name])[name].float().numpy(), public)
        assert cosine == pytest.approx(checks[name].cosine, abs=1e-4)
        assert relative_mae == pytest.approx(checks[name].relative_mae, rel=0.02)


def test_the_card_tells_of_every_release(built):
    card = (built.directory / "model_card.md").read_text()
    for release in RELEASES:
        assert release in card
        evaluate = read_json(built.directory / f"results/{release}/evaluate.json", EvaluateRecord)
        assert f"{evaluate.quantized.perplexity:.4g}"[:4] in card
        assert (built.directory / f"results/{release}/model/README.md").exists()


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_comes_with_a_provenance_that_names_every_file_and_input(built, release):
    folder, name = built.directory / f"results/{release}", release.split("-")[0]
    found = read_provenance(folder / "model/provenance.json")
    files = digests(folder / "model", read_json(folder / "pack.json", PackRecord).files)
    assert {file.name: file.digest["sha256"] for file in found.subject} == files
    blocks = {file.name: file.digest["sha256"] for file in found.predicate.runDetails.byproducts}
    made = sorted((folder / "blocks").glob("*.safetensors"))
    assert blocks == {f"blocks/{path.name}": file_entry(path).sha256 for path in made}
    for given, path in {
        f"source/{name}/config.json": f"models/{name}/config.json",
        f"text/{found.provenance.calibration.name}/a": "text/a.txt",
        "task/tiny/tiny.yaml": "tasks/tiny.yaml",
        "task/tiny/rows.jsonl": "tasks/rows.jsonl",
    }.items():
        assert found.dependencies[given] == {"sha256": file_entry(built.directory / path).sha256}
    assert found.dependencies["envs/requirements.lock"]["sha256"] == file_entry(ROOT / "envs/requirements.lock").sha256
    assert parse(found.request.config).build == [release] == [found.request.release]
    text = (folder / "model/provenance.json").read_text()
    assert str(built.directory) not in text and str(ROOT) not in text


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_whole_by_its_sums_and_holds_no_times(built, release):
    folder = built.directory / f"results/{release}/model"
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(check, cwd=folder, check=True)
    named = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert named == files - {"SHA256SUMS", "model.sig"}
    assert {"README.md", "provenance.json", "sbom.cdx.json", "loss.png", "hidden_states.png"} <= named
    readme = (folder / "README.md").read_text()
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/requant.yaml").read_text()))
    scored = read_json(folder.parent / "benchmark.json", BenchmarkRecord).scores
    assert entry.dataset_id == "tests/tiny" and entry.value == scored[0].value
    assert "Wall time" not in readme and "Time to start" not in readme and "mine.yaml" not in readme


def test_a_release_is_signed_and_its_key_is_nowhere_but_in_its_file(built):
    folder = built.directory / "results/ll-nvfp4/model"
    readme = (folder / "README.md").read_text()
    command = next(line for line in readme.splitlines() if line.startswith("model_signing verify"))
    words = command.replace("publisher.pem", str(built.directory / "public.pem")).split()
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    secret = (built.directory / "key.pem").read_bytes().splitlines()[1]
    holding = [path for path in built.directory.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert holding == [built.directory / "key.pem"]
    assert not [path for path in folder.rglob("*") if path.is_file() and b"key.pem" in path.read_bytes()]


@pytest.fixture
def copy(built, tmp_path) -> Build:
    """The finished build, with times kept, to be changed."""
    shutil.copytree(built.directory, tmp_path / "copy", symlinks=True)
    return Build(tmp_path / "copy")


def test_a_key_that_others_can_read_stops_the_build_before_a_job(copy):
    (copy.directory / "key.pem").chmod(0o644)
    (copy.directory / "results/ll-nvfp4/model/model.sig").unlink()
    done = copy.run("model_card.md", check=False)
    assert done.returncode != 0 and not (copy.directory / "results/ll-nvfp4/model/model.sig").exists()
    assert "error: publish.signing_key: key.pem: mode 644: others can read it; expected 600" in done.stderr


def test_a_second_run_has_nothing_to_do(built):
    assert "Nothing to be done" in built.run("model_card.md").stderr


def test_releases_of_a_model_share_its_reference_chain(built):
    benchmarks = sorted(
        path.parent.name for path in (built.directory / "results/benchmarks/reference").glob("*/*/0.tsv")
    )
    assert benchmarks == ["padded", "small", "small"], "ds once for both its releases, qw and ll once each"


def test_no_job_needed_two_gigabytes(built):
    """By the jobs' own measure and by Snakemake's, which counts the engine that deploy starts too."""
    results = built.directory / "results"
    for path in [*results.glob("*/blocks/*.json"), *results.glob("*/evaluate.json"), *results.glob("*/benchmark.json")]:
        assert 10**8 < json.loads(path.read_text())["peak_memory_bytes"] < 2e9, path
    for release in RELEASES:
        header, values = (results / f"benchmarks/deploy/{release}.tsv").read_text().strip().split("\n")[:2]
        assert 100 < float(dict(zip(header.split("\t"), values.split("\t"), strict=True))["max_rss"]) < 2000


def test_the_report_holds_cards_and_pictures(built):
    built.run("--report", "report.html", "model_card.md")
    report = (built.directory / "report.html").read_text()
    assert "loss by depth" in report and "model_card.md" in report


def test_a_flipped_byte_stops_the_build_with_the_shards_name(tmp_path):
    build = lay_out(tmp_path, ("ll",))
    build.run("lock", "--config", "model=ll")
    assert (tmp_path / "locks/ll.json").exists()
    shard = tmp_path / "models/ll/model.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 16
    shard.write_bytes(raw)
    done = build.run("results/source/ll/source.json", check=False)
    assert done.returncode != 0
    assert f"{shard.name}: sha256" in done.stderr and "the lock of ll expects" in done.stderr
    assert not (tmp_path / "results/source/ll/source.json").exists()


def test_too_little_text_stops_the_build_with_the_numbers(tmp_path):
    build = lay_out(tmp_path, ("ll",))
    build.configure(lambda data: data["calibrations"]["small"].update(nsamples=4000))
    done = build.run("results/calibration/ll/small/tokens.safetensors", check=False)
    assert done.returncode != 0
    assert "text/a.txt" in done.stderr and "expects 144000 tokens" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(biuld=[]), "config: biuld: unknown key"),
        (lambda data: data["releases"]["ll-nvfp4"].update(scheme="INT5"), "config: releases.ll-nvfp4.scheme: 'INT5'"),
        (lambda data: data["models"]["ll"].update(path="nowhere"), "nowhere/config.json: not there"),
    ],
)
def test_a_wrong_config_is_one_clear_line_and_runs_nothing(tmp_path, change, message):
    build = lay_out(tmp_path, ("ll",))
    build.configure(change)
    done = build.run("model_card.md", check=False)
    assert done.returncode != 0 and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_killed_build_goes_on_with_the_same_command_and_gives_the_same_bytes(built, tmp_path):
    """SIGKILL of the build while a block is tuned: its job ends too. Then the same command again, nothing else."""
    build = lay_out(tmp_path, ("ll",), iters=2)
    shutil.copytree(built.directory / "models/ll", tmp_path / "models/ll", dirs_exist_ok=True)
    target = "results/ll-nvfp4/pack.json"
    process = subprocess.Popen(
        build.command(target),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = tmp_path / "logs/quantize/ll-nvfp4/1.log"
    end = time.monotonic() + 600
    while not (log.exists() and "iterations" in log.read_text()):
        assert process.poll() is None and time.monotonic() < end, "the build never came to block 1"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while group_lives(process.pid):
        assert time.monotonic() < end, "a job went on without its build"
        time.sleep(0.05)
    assert list((tmp_path / ".snakemake/locks").iterdir()), "a killed build leaves its lock"
    first = (tmp_path / "results/ll-nvfp4/blocks/0.safetensors").stat().st_mtime_ns

    build.run(target)
    assert (tmp_path / "results/ll-nvfp4/blocks/0.safetensors").stat().st_mtime_ns == first, (
        "block 0 was not tuned again"
    )
    undisturbed, resumed = (folder / "results/ll-nvfp4/model" for folder in (built.directory, tmp_path))
    mine = digests(resumed)
    assert mine == {name: digest for name, digest in digests(undisturbed).items() if name in mine}
    assert len([name for name in mine if name.endswith(".safetensors")]) == 4


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_planning_the_demo_shows_every_job(tmp_path):
    build = Build(tmp_path)
    (tmp_path / "mine.yaml").write_text("{}\n")
    jobs = build.planned("model_card.md")
    blocks = json.loads((ROOT / "demo/model/config.json").read_text())["num_hidden_layers"]
    assert jobs["reference"] == 3 * blocks and jobs["quantize"] == 4 * blocks, "the model, and two pruned from it"
    assert (
        jobs["load_test"]
        == jobs["verify"]
        == jobs["evaluate"]
        == jobs["deploy"]
        == jobs["benchmark"]
        == jobs["pack"]
        == 4
    )
    assert jobs["calibrate"] == jobs["source"] == jobs["card"] == 1, "pruned models share tokens and source"
    assert jobs["keep"] == jobs["prune_evaluate"] == 2 * 3, "reap, and what it is held against"
    assert jobs["benchmark_source"] == 1 + jobs["keep"]


def test_five_lines_plan_a_release_with_defaults(tmp_path):
    build = lay_out(tmp_path, ("qw",))
    (tmp_path / "mine.yaml").write_text(
        "models: {mine: {path: models/qw}}\nreleases: {mine-nvfp4: {model: mine, scheme: NVFP4}}\nbuild: [mine-nvfp4]\n"
    )
    jobs = build.planned("model_card.md")
    assert jobs["quantize"] == 3 and jobs["demo_text"] == 4, "texts to calibrate on and texts of the benchmark"


def test_five_lines_and_smaller_numbers_build_a_card_from_the_embedded_text(tmp_path):
    build = lay_out(tmp_path, ("ll",))
    (tmp_path / "mine.yaml").write_text(
        "models: {mine: {path: models/ll/}}\n"
        "releases: {mine-w4: {model: mine, scheme: W4A16, tuning: {iters: 0}, deploy: {prompts: 2, throughput: "
        "{concurrency: [1], repeats: 1}}}}\n"
        "build: [mine-w4]\n"
        "calibrations: {default: {nsamples: 8, seqlen: 64, heldout: {nsamples: 4}}}\n"
        "benchmarks: {default: {limit: 8}}\n"
    )
    build.run("model_card.md")
    card = (tmp_path / "model_card.md").read_text()
    assert "mine-w4" in card and "plain rounding" in card


def test_shards_of_the_release_are_hard_links(built):
    folder = built.directory / "results/ds-nvfp4"
    assert (folder / "model/model-00001-of-00004.safetensors").samefile(folder / "blocks/0.safetensors")
    tensors = load_file(folder / "model/model-00002-of-00004.safetensors")
    assert tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale"].dtype == torch.float8_e4m3fn

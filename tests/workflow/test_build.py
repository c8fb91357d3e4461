"""Whole builds: what a user gets, that it is rebuilt only where stale, and that a killed build goes on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from building import ROOT, Build, environment, lay_out
from safetensors.torch import load_file

from requant.checkpoint import Checkpoint
from requant.packed import PackedCheckpoint
from requant.records import BlockRecord, DeployRecord, EvaluateRecord, PackRecord, VerifyRecord, read_json
from requant.verify import compare, public_decoding

RELEASES = ("ds-nvfp4", "ds-w3a16", "qw-w3a16", "ll-nvfp4")


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("release", RELEASES)
def test_every_stage_leaves_its_record(built, release):
    folder = built.directory / "results" / release
    pack = read_json(folder / "pack.json", PackRecord)
    verify = read_json(folder / "verify.json", VerifyRecord)
    evaluate = read_json(folder / "evaluate.json", EvaluateRecord)
    deploy = read_json(folder / "deploy.json", DeployRecord)
    assert pack.quantized_parameters > 0.5 * pack.parameters
    assert verify.codes_rederived == len(verify.tensors)
    assert evaluate.source.kl_divergence == 0 < evaluate.quantized.kl_divergence < 5
    assert deploy.agreement >= deploy.agreement_limit > deploy.control_agreement
    assert (deploy.why_decoded is None) == release.endswith("w3a16"), "the engine reads packed integers, not NVFP4"
    for block in range(pack.blocks):
        record = read_json(folder / f"blocks/{block}.json", BlockRecord)
        assert record.iterations == 2 and record.loss_best <= record.loss_initial


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


@pytest.fixture
def copy(built, tmp_path) -> Build:
    """The finished build, with times kept, to be changed."""
    shutil.copytree(built.directory, tmp_path / "copy", symlinks=True)
    return Build(tmp_path / "copy")


def test_a_verify_limit_reruns_verify_and_cards_only(copy):
    copy.configure(lambda data: data["releases"]["ll-nvfp4"].update(verify={"cosine": 0.9}))
    assert copy.planned("model_card.md") == {
        "verify": 1,
        "plot_build": 1,
        "plot_experts": 1,
        "release_card": 1,
        "card": 1,
    }


def test_more_iterations_rerun_one_release_and_no_reference_chain(copy):
    copy.configure(lambda data: data["releases"]["ds-w3a16"]["tuning"].update(iters=3))
    jobs = copy.planned("model_card.md")
    assert jobs["quantize"] == 3 and jobs["pack"] == jobs["verify"] == jobs["evaluate"] == jobs["deploy"] == 1
    assert not {"calibrate", "embed", "reference", "source", "benchmark_source"} & jobs.keys()


def test_comments_and_the_order_of_keys_change_nothing(copy):
    path = copy.directory / "mine.yaml"
    path.write_text("# a comment\n" + path.read_text())
    assert copy.planned("model_card.md") == {}


def test_a_changed_module_reruns_what_it_computes(copy, tmp_path):
    """The module behind a script, not the script itself."""
    checkout = tmp_path / "checkout"
    for name in ("Snakefile", "config.yaml"):
        checkout.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, checkout / name)
    for name in ("src", "rules", "scripts", "report", "profiles", "demo"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--rerun-triggers", "mtime", "--snakefile", str(checkout / "Snakefile")]
    copy.run("model_card.md", *options, "--touch")
    assert copy.planned("model_card.md", *options) == {}
    module = checkout / "src/requant/evaluate.py"
    module.write_text(module.read_text() + "\n")
    jobs = copy.planned("model_card.md", *options)
    assert jobs["evaluate"] == len(RELEASES)
    assert not {"quantize", "pack", "verify", "reference", "calibrate"} & jobs.keys()


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
    assert jobs["verify"] == jobs["evaluate"] == jobs["deploy"] == jobs["benchmark"] == jobs["pack"] == 4
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
        "releases: {mine-w4: {model: mine, scheme: W4A16, tuning: {iters: 0}}}\n"
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

"""A model from the hub through a build: locked, planned without network, downloaded, quantized."""

import os
import subprocess
from pathlib import Path

import pytest
import tiny
from building import Build, lay_out
from hub_server import Fault, Hub, sha256

from requant.locks import make_lock
from requant.records import CheckedFile, Lock, PackRecord, SourceRecord, read_json

NAME = "org/tiny"
TARGET = "results/hub-w4/pack.json"
NO_NETWORK = """\
import socket
def refused(*arguments, **options):
    raise AssertionError(f"the network was asked for: {arguments}")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny.write_checkpoint(folder, "qwen3_moe", seed=3, shard_size="400KB")
    tiny.add_beside(folder)
    return folder


@pytest.fixture
def hub(checkpoint) -> Hub:
    hub = Hub()
    hub.add(NAME, checkpoint)
    hub.endpoint = hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def build(hub, tmp_path, monkeypatch) -> Build:
    """A build of one release of the hub's model, at its commit."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    build = lay_out(tmp_path, ("ll",))
    release = {"model": "tiny", "scheme": "W4A16", "calibration": "small", "tuning": {"iters": 0}, "benchmark": "tiny"}
    build.configure(
        lambda data: data.update(
            models={"tiny": {"hub": NAME, "revision": hub.branches[NAME, "main"]}},
            releases={"hub-w4": release},
            build=["hub-w4"],
        )
    )
    return build


def lock(build: Build) -> Lock:
    build.run("lock", "--config", "model=tiny")
    return read_json(build.directory / "locks/tiny.json", Lock)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]


def test_a_hub_model_is_locked_planned_offline_and_built_two_files_at_once(build, hub, checkpoint, monkeypatch):
    locked = lock(build)
    assert locked.files == make_lock("tiny", checkpoint).files
    with monkeypatch.context() as denied:
        site = build.directory / "denied"
        site.mkdir()
        (site / "sitecustomize.py").write_text(NO_NETWORK)
        denied.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        denied.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        asked = len(hub.requests)
        first = build.planned("results/hub-w4/blocks/0.safetensors")
        jobs = build.planned(TARGET)
        assert len(hub.requests) == asked
    assert jobs["download"] == len(locked.files) and "source_file" not in jobs
    assert first["download"] < jobs["download"], "a block waits for its own shards only"
    assert jobs["quantize"] == jobs["reference"] == 3
    hub.faults.append(Fault("slow", ".safetensors", 0.5, times=99))
    hub.most_at_once = 0
    build.run("results/hub-w4/blocks/0.safetensors")
    checkpoint_folder = build.directory / "results/source/tiny/checkpoint"
    arrived = [path for path in checkpoint_folder.rglob("*") if path.is_symlink()]
    assert len(arrived) == first["download"]
    build.run(TARGET)
    assert hub.most_at_once == 2
    for name, entry in locked.files.items():
        link = build.directory / "results/source/tiny/checkpoint" / name
        assert link.is_symlink() and build.directory / "cache/hub" in Path(os.readlink(link)).parents
        assert sha256(link) == entry.sha256
    assert "Nothing to be done" in build.run(TARGET).stderr
    build.run("results/source/tiny/source.json")
    source = read_json(build.directory / "results/source/tiny/source.json", SourceRecord)
    assert source.revision == hub.branches[NAME, "main"] and source.routed_experts == 8
    assert source.files_left_behind == ["README.md", "figures/", "tool_parser.py"]
    pack = read_json(build.directory / TARGET, PackRecord)
    for name, text in tiny.BESIDE.items():
        assert pack.files[name].sha256 == locked.files[name].sha256
        assert (build.directory / "results/hub-w4/model" / name).read_text() == text


def test_a_wrong_file_of_the_users_stops_the_build_until_it_is_removed(build, hub):
    """In a directory of the user's. What is purged there later comes again, alone."""
    locked = lock(build)
    shard = max(locked.files, key=lambda name: locked.files[name].size)
    build.configure(lambda data: data["models"]["tiny"].update(directory="weights"))
    target = f"results/source/tiny/checkpoint/{shard}"
    (build.directory / "weights").mkdir()
    wrong = build.directory / "weights" / shard
    wrong.write_bytes(b"x" * locked.files[shard].size)
    said = errors(build.run(target, check=False))
    assert (
        len(said) == 1
        and f"expects {locked.files[shard].sha256}; to have it downloaded anew, remove {wrong}" in said[0]
    )
    assert wrong.exists()
    wrong.unlink()
    build.run(target)
    record = read_json(build.directory / f"results/source/tiny/files/{shard}.json", CheckedFile)
    assert record.sha256 == locked.files[shard].sha256 == sha256(wrong)
    wrong.unlink()
    assert build.planned(target) == {"download": 1}


def test_what_is_not_pinned_or_does_not_fit_is_refused_before_any_job(build, hub):
    """One line each, and no file made."""
    commit = hub.branches[NAME, "main"]
    command = "run `snakemake --cores 1 lock --config model=tiny`, with the --configfile of this build"
    assert errors(build.run("-n", check=False)) == [
        f"error: locks/tiny.json: not there; a model from the hub is planned from its lock: {command}"
    ]
    build.configure(lambda data: data["models"]["tiny"].update(revision="main"))
    assert errors(build.run("-n", check=False)) == [
        "error: models.tiny.revision: 'main' may move; expected a commit, 40 hex digits: for the one it is now, "
        + command
    ]
    said = errors(build.run("lock", "--config", "model=tiny", check=False))
    assert len(said) == 1 and f"write `revision: {commit}` into the config" in said[0]
    build.configure(lambda data: data["models"]["tiny"].update(revision=commit))
    locked = lock(build)
    locked.files[min(locked.files)].size = 10**18
    (build.directory / "locks/tiny.json").write_text(locked.model_dump_json())
    said = errors(build.run(TARGET, check=False))
    assert len(said) == 1 and "bytes are still to be downloaded to" in said[0]
    assert not (build.directory / "results").exists()
    assert "warning: models.tiny: 100000000000" in build.run(TARGET, "-n").stderr

"""`snakemake publish` after a build: it says what it would do, does it once when told to, and refuses the unfinished.

The hub is a stand-in (tests/hub_server.py); the client is the real one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import Build
from hub_server import Hub

from requant.records import PublishRecord, read_json

TOKEN = "hf_secret0123456789"
RELEASES = ("ds-nvfp4", "ds-w3a16", "qw-w3a16", "ll-nvfp4")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    hub = Hub(storage=tmp_path / "hub", tokens={TOKEN: "write"})
    monkeypatch.setenv("HF_ENDPOINT", hub.start())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.stop()


@pytest.fixture
def finished(built, tmp_path) -> Build:
    """The finished build, times kept, whose releases have repositories."""
    shutil.copytree(built.directory, tmp_path / "copy", symlinks=True)
    build = Build(tmp_path / "copy")
    repositories = {name: f"org/{name}" for name in RELEASES}
    build.configure(lambda data: data["publish"].update(repositories=repositories))
    return build


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(build: Build, *arguments: str) -> str:
    """The one line of a `publish` that is refused."""
    done = build.run("publish", *arguments, check=False)
    said = done.stdout + done.stderr
    lines = [line.split("error: ", 1)[1] for line in said.splitlines() if "error: " in line]
    assert done.returncode != 0 and len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def test_a_release_is_announced_then_uploaded_and_passes_all_checks_of_who_downloads_it(finished, hub, tmp_path):
    folder = finished.directory / "results/ll-nvfp4/model"
    before = files(folder)
    said = finished.run("publish").stderr
    for release in RELEASES:
        assert f"{release} -> {os.environ['HF_ENDPOINT']}/org/{release}, branch main, private: " in said
    assert "nothing was uploaded; to upload: snakemake --cores 1 publish --config upload=true" in said
    assert hub.requests == [] and not list(finished.directory.glob("results/*/publish.json"))

    finished.run("publish", "--config", "upload=true", "release=ll-nvfp4")
    assert files(folder) == before and len(hub.commits) == 1 and hub.private == {"org/ll-nvfp4"}
    record = read_json(finished.directory / "results/ll-nvfp4/publish.json", PublishRecord)
    assert record.files.keys() == before.keys() and ".eval_results/requant.yaml" in before
    again = finished.run("publish", "--config", "upload=true", "release=ll-nvfp4").stderr
    assert "nothing was uploaded" in again and len(hub.commits) == 1
    holding = [path for path in finished.directory.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holding == [] and TOKEN not in said + again
    assert finished.planned() == {}, "no part of a build, and nothing is stale for it"

    download = "import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1], local_dir='got')"
    subprocess.run([sys.executable, "-c", download, "org/ll-nvfp4"], cwd=tmp_path, check=True, capture_output=True)
    got = tmp_path / "got"
    own = (".gitattributes", ".cache/")  # the hub's, and its client's
    assert {name: data for name, data in files(got).items() if not name.startswith(own)} == before
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=got, check=True)
    readme = (got / "README.md").read_text()
    command = next(line for line in readme.splitlines() if line.startswith("model_signing verify"))
    words = command.replace("publisher.pem", str(finished.directory / "public.pem")).split()
    aside = ["--ignore-paths", ".gitattributes", "--ignore-paths", ".cache"]
    done = subprocess.run([sys.executable, "-m", *words, *aside], cwd=got, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_not_finished_is_refused_and_not_built(finished, hub):
    deploy = finished.directory / "results/ds-w3a16/deploy.json"
    kept = deploy.read_bytes()
    deploy.unlink()
    assert refused(finished, "--config", "upload=true").startswith("results/ds-w3a16/deploy.json: not there; a release")
    assert not deploy.exists() and hub.requests == []
    deploy.write_bytes(kept)
    finished.configure(lambda data: data["releases"]["qw-w3a16"]["deploy"].update(prompts=3))
    line = refused(finished, "--config", "release=qw-w3a16")
    assert "built by another config than today's (releases.qw-w3a16.deploy.prompts)" in line
    assert refused(finished, "--config", "upload=7").startswith("--config upload=7: expected true or false")
    finished.configure(lambda data: data["publish"]["repositories"].pop("ds-nvfp4"))
    assert refused(finished).startswith("publish.repositories.ds-nvfp4: missing; expected where the release goes")
    assert refused(finished, "--config", "release=none").startswith("--config release=none: not in `releases`; there: ")

"""Builds whose files are elsewhere: a model and results in a bucket, nodes with clocks of their own, no hard links."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bucket_server import BUCKET, KEY, SECRET, serving
from building import Build, environment, lay_out

from requant.locks import make_lock
from requant.records import Lock, PackRecord, read_json

RELEASE = "ll-bf16"
PACKED = f"results/{RELEASE}/pack.json"
BLOCKS = [f"results/{RELEASE}/blocks/{block}.safetensors" for block in (0, 1)]

# A stand-in for nodes that date the files they write by their own clocks, on a file system without hard links. What
# Snakemake itself touches has the time of this machine, as on a shared file system.
NODES = """\
import errno, os, sys
script = next((word for word in sys.orig_argv if ".snakemake/scripts/" in word), None)
if script:
    ahead = {"copy_block": 30, "pack": -30, "source_file": 30, "source": -30}.get(script.split(".")[-2], 30)
    replace = os.replace
    def dated(source, target):
        replace(source, target)
        if not os.path.islink(target):
            found = os.stat(target)
            os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns + ahead * 10**9))
    def refused(source, target, **_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)
    os.replace, os.link = dated, refused
"""


def bf16(directory: Path, model: dict) -> Build:
    """A build of one release in BF16: it takes no tuning."""
    build = lay_out(directory, ("ll",))

    def change(data):
        release = {"model": "ll", "scheme": "BF16", "calibration": "small", "benchmark": "tiny"}
        data.update(models={"ll": model}, releases={RELEASE: release}, build=[RELEASE])

    build.configure(change)
    return build


def requant(build: Build, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import sys; from requant.main import main; sys.exit(main())", *arguments]
    return subprocess.run(command, cwd=build.directory, env=environment(), capture_output=True, text=True, check=True)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if "error: " in line]


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_model_from_a_bucket_is_built_and_the_build_goes_on_elsewhere(tmp_path, monkeypatch):
    """Locked, planned, fetched, one block made; stored, restored in another directory, and the next block made there.
    The credentials are in no file and on no terminal."""
    build = bf16(tmp_path / "here", {"bucket": f"s3://{BUCKET}/ll", "base_model": "tests/tiny-llama"})
    with serving(monkeypatch) as server:
        server.upload(build.directory / "models/ll", "ll")
        build.run("lock", "--config", "model=ll")
        locked = read_json(build.directory / "locks/ll.json", Lock)
        assert locked == make_lock("ll", build.directory / "models/ll")
        shutil.rmtree(build.directory / "models")
        server.requests.clear()
        assert build.planned(PACKED) == {"download": len(locked.files), "copy_block": 3, "source": 1, "pack": 1}
        assert server.requests == [], "planned from the lock alone"
        spoken = [build.run(BLOCKS[0])]
        fetched = [path for method, path, _ in server.requests if method == "GET"]
        assert sorted(fetched) == [f"/{BUCKET}/ll/config.json", f"/{BUCKET}/ll/model.safetensors"]

        spoken.append(requant(build, "store", f"s3://{BUCKET}/builds/one"))
        block = (build.directory / BLOCKS[0]).read_bytes()
        other = Build(tmp_path / "there")
        other.directory.mkdir()
        for name in ("mine.yaml", "text", "tasks"):
            place = build.directory / name
            (shutil.copytree if place.is_dir() else shutil.copy)(place, other.directory / name)
        shutil.rmtree(build.directory / "results")
        spoken.append(requant(other, "restore", f"s3://{BUCKET}/builds/one"))
        assert (other.directory / BLOCKS[0]).read_bytes() == block
        assert other.planned(*BLOCKS) == {"copy_block": 1}, "no more than what was not made yet"
        spoken.append(other.run(*BLOCKS))
    assert files_with(SECRET, tmp_path) == files_with(KEY, tmp_path) == []
    assert not any(secret in done.stdout + done.stderr for done in spoken for secret in (KEY, SECRET))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("--default-storage-provider", "s3", "--default-storage-prefix", f"s3://{BUCKET}/run"),
            "error: --default-storage-provider: 's3' found; expected none: ",
        ),
        (
            ("--shared-fs-usage", "sources", "persistence"),
            "error: --shared-fs-usage: no 'input-output' found; expected",
        ),
    ],
)
def test_results_that_snakemake_would_keep_elsewhere_are_refused(tmp_path, options, line):
    """The dry run, too, which takes any --shared-fs-usage; nothing is written."""
    build = lay_out(tmp_path, ("ll",))
    said = errors(build.run("-n", *options, check=False))
    assert len(said) == 1 and said[0].startswith(line) and "docs/storage.md" in said[0]
    assert not (tmp_path / "results").exists()


def test_nodes_with_other_clocks_and_no_hard_links_make_nothing_stale(tmp_path, monkeypatch):
    """No checksum of Snakemake's helps: it has them for small files only, and a block is none."""
    build = bf16(tmp_path / "here", {"path": "models/ll"})
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NODES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    build.run(PACKED)
    model, shard = build.directory / "results" / RELEASE / "model", "model-00004-of-00004.safetensors"
    packed = read_json(build.directory / PACKED, PackRecord)
    assert not packed.hard_linked
    dated = build.directory / PACKED
    assert (model / shard).stat().st_mtime < dated.stat().st_mtime - 20, "as the node dated it"
    assert build.planned(PACKED, "--max-checksum-file-size", "0") == {}
    for path in model.glob("*.safetensors"):
        os.utime(path, (dated.stat().st_mtime + 30,) * 2)
    assert build.planned(PACKED, "--max-checksum-file-size", "0") == {}
    (model / shard).write_bytes(b"x" * packed.files[shard].size)
    os.utime(model / shard, (dated.stat().st_mtime + 60,) * 2)
    said = errors(build.run(PACKED, check=False))
    assert len(said) == 1 and f"{shard}: changed by hand" in said[0]

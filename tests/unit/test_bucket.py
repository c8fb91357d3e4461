"""Models and builds in a bucket, by boto3 against moto's server: what breaks is taken up, or told in one line.

Waits between attempts are left out.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import boto3
import pytest
import tiny
from bucket_server import BUCKET, KEY, SECRET, BucketServer, Fault, serving

from requant import bucket, buildlock, inside, main, stored
from requant.bucket import BucketModel
from requant.bucketlock import make_bucket_lock
from requant.download import bytes_to_come, obtain
from requant.errors import RequantError, brief
from requant.locks import make_lock
from requant.planning import check_bucket_model
from requant.records import Lock
from requant.stored import MANIFEST, restore, store

URL = f"s3://{BUCKET}/models/tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Several shards with an index."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("source") / "tiny", "qwen3_moe", seed=3, shard_size="400KB")


@pytest.fixture
def server(monkeypatch) -> BucketServer:
    monkeypatch.setattr(bucket, "WAITS", (0, 0))
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture
def held(server, checkpoint) -> BucketServer:
    """A server with the checkpoint."""
    server.upload(checkpoint, "models/tiny")
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def lock(checkpoint) -> Lock:
    return make_lock("mine", checkpoint)


def largest(lock: Lock) -> str:
    return max(lock.files, key=lambda name: lock.files[name].size)


def line(action, *arguments) -> str:
    """The one line that an action ends in; it holds no credentials."""
    with pytest.raises(RequantError) as error:
        action(*arguments)
    said = str(error.value)
    assert "\n" not in said and KEY not in said and SECRET not in said and error.value.__cause__ is None
    return said


# Locks


def test_the_lock_of_a_bucket_is_that_of_the_directory_and_a_cut_answer_is_taken_up(held, checkpoint, lock, capsys):
    shard = largest(lock)
    held.faults += [Fault(shard, cut=70_000, times=2), Fault("config.json", status=503, times=5)]
    assert make_bucket_lock("mine", URL) == lock
    ranges = [found for _, path, found in held.requests if path.endswith(shard)]
    last = lock.files[shard].size - 1
    assert ranges == [f"bytes={start}-{last}" for start in (0, 70_000, 140_000)]
    assert KEY not in capsys.readouterr().err


def test_one_file_without_an_index_is_locked_too(server, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "dense", "llama", shard_size="1GB")
    server.upload(folder, "dense")
    assert make_bucket_lock("mine", f"s3://{BUCKET}/dense/") == make_lock("mine", folder)


def test_files_beside_the_weights_and_a_layer_that_the_index_forgot_are_locked_and_fetched(server, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "glm", "glm4_moe", num_hidden_layers=2, mtp=True)
    tiny.add_beside(folder)
    tiny.forget_mtp(folder)
    server.upload(folder, "glm")
    url = f"s3://{BUCKET}/glm"
    found = make_bucket_lock("mine", url)
    wanted = make_lock("mine", folder)
    assert found.model_copy(update={"left_behind": wanted.left_behind}) == wanted
    assert "mtp.safetensors" in found.files and tiny.BESIDE.keys() <= found.files.keys()
    assert set(found.left_behind) == {"README.md", "tool_parser.py"}, "a bucket's other folders are not listed"
    model = BucketModel(url, str(tmp_path / "here"))
    for name, text in tiny.BESIDE.items():
        obtain(model, name, found)
        assert model.place(name).read_text() == text
        obtain(model, name, found)


def test_what_is_no_checkpoint_is_named(held, lock):
    shard = largest(lock)
    assert line(make_bucket_lock, "mine", f"s3://{BUCKET}/none") == (
        f"s3://{BUCKET}/none/config.json: not there; expected a checkpoint"
    )
    boto3.client("s3").delete_object(Bucket=BUCKET, Key=f"models/tiny/{shard}")
    assert line(make_bucket_lock, "mine", URL) == f"{URL}/{shard}: not there; model.safetensors.index.json names it"
    assert line(make_bucket_lock, "mine", "s3://no-such-bucket/x") == "s3://no-such-bucket/x/: no such bucket"


# Files


def test_a_file_comes_in_parts_by_several_processes_and_is_held_against_the_lock(held, checkpoint, lock, tmp_path):
    shard, model = largest(lock), BucketModel(URL, str(tmp_path / "here"))
    total = sum(entry.size for entry in lock.files.values())
    held.faults += [Fault(shard, cut=100_000, times=2), Fault(shard, status=503, times=99)]
    said = line(obtain, model, shard, lock)
    assert said.startswith(f"{URL}/{shard}: 503 ") and "run the same command again when the bucket's server" in said
    came = model.partial(shard).stat().st_size
    assert came == 200_000
    assert bytes_to_come(model, lock) == total - came and not model.place(shard).exists()
    held.faults.clear()
    held.requests.clear()
    assert obtain(model, shard, lock).sha256 == lock.files[shard].sha256
    assert [found for _, _, found in held.requests] == [f"bytes={came}-{lock.files[shard].size - 1}"]
    assert model.place(shard).read_bytes() == (checkpoint / shard).read_bytes()
    held.requests.clear()
    obtain(model, shard, lock)
    assert held.requests == []


def test_a_file_that_has_changed_in_the_bucket_is_not_taken(held, lock, tmp_path):
    shard, model, s3 = largest(lock), BucketModel(URL, str(tmp_path)), boto3.client("s3")
    key, size = f"models/tiny/{shard}", lock.files[shard].size
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(size))
    said = line(obtain, model, shard, lock)
    assert f"expects {lock.files[shard].sha256}; it was sent so when asked for again, too" in said
    s3.put_object(Bucket=BUCKET, Key=key, Body=bytes(size + 1))
    assert line(obtain, model, shard, lock) == f"{URL}/{shard}: {size + 1} bytes found; expected {size}"
    s3.delete_object(Bucket=BUCKET, Key=key)
    assert line(obtain, model, shard, lock) == f"{URL}/{shard}: not there"
    assert not model.place(shard).exists()


def test_credentials_that_lack_or_do_not_serve_are_told_without_them(held, lock, tmp_path, monkeypatch):
    name, model = "config.json", BucketModel(URL, str(tmp_path))
    held.faults.append(Fault(name, status=403))
    assert line(obtain, model, name, lock).startswith(f"{URL}/{name}: refused (403 Fault); expected credentials that")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    bucket.client.cache_clear()
    assert line(obtain, model, name, lock).startswith(f"{URL}/{name}: no credentials; expected credentials that boto3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    bucket.client.cache_clear()
    assert "no answer (EndpointConnectionError), 3 times in a row" in line(obtain, model, name, lock)


def test_planning_names_the_command_that_makes_a_lock(lock):
    check_bucket_model("mine", lock)
    assert line(check_bucket_model, "mine", None) == (
        "locks/mine.json: not there; a model in a bucket is planned from its lock: run "
        "`snakemake --cores 1 lock --config model=mine`, with the --configfile of this build"
    )


# Builds


@pytest.fixture
def build(tmp_path, monkeypatch) -> Path:
    """A directory as a build leaves it: a shard that is a block's second name, a link, files that are there for a
    moment only, and an output of a job that was cut."""
    build = tmp_path / "build"
    for folder in ("results/r/blocks", "results/r/model", "results/source/m", ".snakemake/incomplete", "logs"):
        (build / folder).mkdir(parents=True)
    (build / "results/r/blocks/0.safetensors").write_bytes(os.urandom(50_000))
    os.link(build / "results/r/blocks/0.safetensors", build / "results/r/model/model-00001.safetensors")
    for name in ("results/r/blocks/0.json", "results/r/model/config.json", "results/r/pack.json", "model_card.md"):
        (build / name).write_text("alike")
    (build / "results/source/m/link").symlink_to(build / "results/r/pack.json")
    for name in ("results/r/.x.1.partial", "results/r/load_test.failed", "results/r/.nfs01", "mine.yaml"):
        (build / name).write_text("here only")
    (build / "results/r/cut.json").write_text("half")
    (build / ".snakemake/incomplete/cmVzdWx0cy9yL2N1dC5qc29u").touch()
    for number, path in enumerate(sorted(build.rglob("*.*"))):
        os.utime(path, ns=(10**18 + number, 10**18 + number), follow_symlinks=False)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(build)
    return build


def snapshot(folder: Path) -> dict[str, tuple]:
    names = [path for top in ("results", "model_card.md") for path in [folder / top, *(folder / top).rglob("*")]]
    files = [path for path in names if path.is_file() or path.is_symlink()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.lstat().st_mtime_ns) for path in files}


def quiet(_: str) -> None:
    """Says nothing."""


def test_a_build_comes_back_elsewhere_as_it_was(server, build, tmp_path, monkeypatch):
    (build / "results/r/large").write_bytes(os.urandom(9 << 20))  # boto3 sends it in parts
    left = {"results/r/.x.1.partial", "results/r/load_test.failed", "results/r/.nfs01", "results/r/cut.json"}
    wanted = {name: found for name, found in snapshot(build).items() if name not in left}
    assert main.main(["store", f"s3://{BUCKET}/b"]) == 0
    assert len(server.keys("b/objects/")) == 3, "each content once"
    assert sum(method == "PUT" and "objects" in path for method, path, _ in server.requests) == 4, "one in two parts"
    other = tmp_path / "other"
    monkeypatch.chdir(other)
    assert main.main(["restore", f"s3://{BUCKET}/b"]) == 0
    assert snapshot(other) == wanted and "cut.json" not in str(snapshot(other))
    block, shard, link = (
        other / f"results/{name}"
        for name in ("r/blocks/0.safetensors", "r/model/model-00001.safetensors", "source/m/link")
    )
    assert block.samefile(shard) and not (other / "results/r/pack.json").samefile(other / "model_card.md")
    assert link.resolve() == other / "results/r/pack.json"


def test_a_store_and_a_restore_that_were_cut_go_on(server, build, tmp_path, monkeypatch):
    url = f"s3://{BUCKET}/b"
    store(Path(), url, ["results/*"], quiet)
    before = boto3.client("s3").get_object(Bucket=BUCKET, Key=f"b/{MANIFEST}")["Body"].read()
    server.faults.append(Fault("/b/objects/", status=503, times=9, method="PUT"))
    assert "503" in line(store, Path(), url, [], quiet)
    assert boto3.client("s3").get_object(Bucket=BUCKET, Key=f"b/{MANIFEST}")["Body"].read() == before
    server.faults.clear()
    store(Path(), url, [], quiet)
    server.requests.clear()
    store(Path(), url, [], quiet)
    assert [path for method, path, _ in server.requests if method == "PUT"] == [f"/{BUCKET}/b/{MANIFEST}"]
    monkeypatch.chdir(tmp_path / "other")
    block = hashlib.sha256((build / "results/r/blocks/0.safetensors").read_bytes()).hexdigest()
    server.faults += [Fault(block, cut=20_000), Fault(block, status=503, times=99)]
    assert "503" in line(restore, Path(), url, quiet)
    server.faults.clear()
    server.requests.clear()
    restore(Path(), url, quiet)
    assert "bytes=20000-49999" in [found for _, _, found in server.requests]
    assert not Path(".snakemake/restore").exists()


def test_what_is_in_the_way_or_was_changed_in_the_bucket_is_named(server, build, tmp_path, monkeypatch):
    url, other = f"s3://{BUCKET}/b", tmp_path / "other"
    store(Path(), url, [], quiet)
    monkeypatch.chdir(other)
    (other / "results/r").mkdir(parents=True)
    (other / "results/r/pack.json").write_text("mine")
    said = line(restore, Path(), url, quiet)
    assert said == "results/r/pack.json: another file is here; expected none, or the one that was stored"
    assert [path.name for path in other.rglob("*.json") if ".snakemake" not in path.parts] == ["pack.json"]
    shutil.rmtree(other / "results")
    key = max(server.keys("b/objects/"), key=lambda key: boto3.client("s3").head_object(Bucket=BUCKET, Key=key)["ETag"])
    size = boto3.client("s3").head_object(Bucket=BUCKET, Key=key)["ContentLength"]
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=bytes(size))
    assert f"s3://{BUCKET}/{key}: sha256 " in line(restore, Path(), url, quiet)
    s3 = boto3.client("s3")
    for text, what in (
        (b"{}", "expected what `requant store` wrote"),
        (
            b'{"files": {}, "links": {"results/../../x": {"target": "y", "inside": false, "mtime_ns": 0}}}',
            "'res",
        ),
    ):
        s3.upload_fileobj(io.BytesIO(text), BUCKET, f"b/{MANIFEST}")
        assert line(restore, Path(), url, quiet).startswith(f"{url}/{MANIFEST}: {what}")
    assert "not there; expected what" in line(restore, Path(), f"s3://{BUCKET}/none", quiet)
    assert main.main(["restore", "bucket/x"]) == 2


# What a stranger's manifest asks for


def text_of(data: bytes, **keys) -> dict:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "mtime_ns": 0} | keys


def leads(target: str, inside: bool = False) -> dict:
    return {"target": target, "inside": inside, "mtime_ns": 0}


EVIL = text_of(b"evil")
CHECKPOINT = "results/source/m/checkpoint"


@pytest.fixture
def offered(server, tmp_path, monkeypatch):
    """Puts a manifest of these files and links into the bucket, with an object; this directory is empty.

    `OUT` in a target stands for a folder outside, which has a file `kept`.
    """
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def put(files: dict, links: dict) -> str:
        s3 = boto3.client("s3")
        s3.put_object(Bucket=BUCKET, Key=f"e/objects/{EVIL['sha256']}", Body=b"evil")
        text = json.dumps({"files": files, "links": links}).replace("OUT", str(outside))
        s3.put_object(Bucket=BUCKET, Key=f"e/{MANIFEST}", Body=text.encode())
        return f"s3://{BUCKET}/e"

    yield put
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"kept": "kept"}, "nothing is written there"


LEADING_OUT = [
    ({"results/a/kept": EVIL}, {"results/a": leads("OUT")}, "'results/a/kept': below 'results/a', a file or a"),
    ({}, {"results/a": leads("OUT")}, "'results/a': a link to 'OUT'; expected it in results/source/MODEL/checkp"),
    ({}, {"results": leads("OUT")}, "'results': a link to 'OUT'; expected it in results/source/MODEL/checkpoint"),
    ({}, {"logs/x.log": leads("OUT/kept")}, "'logs/x.log': a link to 'OUT/kept'; expected it in"),
    ({}, {f"{CHECKPOINT}/a/b": leads("OUT/kept")}, f"'{CHECKPOINT}/a/b': a link to 'OUT/kept'; expected it in"),
    ({}, {f"{CHECKPOINT}/a": leads("../../../../outside/kept")}, "expected an absolute path"),
    ({}, {"results/source/m/a": leads("results/../../outside", True)}, "expected it in results/source, to a path"),
    ({}, {"results/source/m/a": leads("/etc", True)}, "expected it in results/source, to a path in"),
    ({}, {"logs/a": leads("results/r", True)}, "'logs/a': a link to 'results/r'; expected it in results/source"),
    (
        {},
        {f"{CHECKPOINT}/a": leads("OUT"), "results/source/m/b": leads(f"{CHECKPOINT}/a/kept", True)},
        "a link through",
    ),
    (
        {f"{CHECKPOINT}/a": EVIL},
        {f"{CHECKPOINT}/a": leads("OUT/kept")},
        f"'{CHECKPOINT}/a': a file and a link; expected one",
    ),
    ({"results/a": EVIL, "results/a/b": EVIL}, {}, "'results/a/b': below 'results/a', a file or a link"),
    ({"results/../../outside/kept": EVIL}, {}, "expected a path in results"),
    ({"results//a": EVIL}, {}, "'results//a'; expected a path in results"),
    ({"results/./a": EVIL}, {}, "'results/./a'; expected a path in results"),
    ({"results/a\u0000b": EVIL}, {}, "expected a path in results"),
    ({"/etc/x": EVIL}, {}, "'/etc/x'; expected a path in results"),
    ({".snakemake/scripts/x.py": EVIL}, {}, "expected a path in results"),
    ({"results/a": EVIL | {"same_as": "/etc/passwd"}}, {}, "same_as '/etc/passwd'; expected a file of the same"),
    ({"results/a": EVIL | {"same_as": "results/a"}}, {}, "same_as 'results/a'; expected a file of the same"),
]


def test_a_manifest_that_leads_out_is_refused_before_anything_is_written(offered, tmp_path):
    for files, links, said in LEADING_OUT:
        found = line(restore, Path(), offered(files, links), quiet)
        assert found.startswith(f"s3://{BUCKET}/e/{MANIFEST}: ")
        said = re.sub("'OUT([^']*)'", lambda link: brief(f"{tmp_path}/outside{link[1]}"), said)
        assert said in found, (files, links)
        assert list(Path().iterdir()) == []


@pytest.mark.parametrize("made", ["results/a", "results/a/deep", ".snakemake/metadata", "results/source/m"])
def test_a_link_that_is_here_already_is_not_gone_through(offered, tmp_path, made):
    """As an earlier manifest, or somebody else with access, may have left it."""
    Path(made).parent.mkdir(parents=True)
    Path(made).symlink_to(tmp_path / "outside")
    name = f"{made}/kept"
    links = {f"{made}/checkpoint/kept": leads("OUT/kept")} if "source" in made else {}
    said = line(restore, Path(), offered({} if links else {name: EVIL}, links), quiet)
    assert said == f"{made}: a link or a file; expected a folder, or nothing"


def test_a_link_that_comes_while_files_are_written_is_not_gone_through(offered, tmp_path, monkeypatch):
    """(A stand-in for somebody quick: the folder is exchanged when the file has been fetched.)"""
    whole = stored.move

    def exchanged(source, handle, name):
        Path("results/a").rename("results/b")
        Path("results/a").symlink_to(tmp_path / "outside")
        whole(source, handle, name)

    monkeypatch.setattr(stored, "move", exchanged)
    assert line(restore, Path(), offered({"results/a/kept": EVIL}, {}), quiet).startswith("results/a: a link or a file")
    assert Path("results/b/kept").read_bytes() == b"evil", "where the folder went"


def test_folders_of_any_name_come_back(offered):
    paths = [f"results/{folder}/files/x{{y}}.json" for folder in ("files", "results", "source", ".a", "[a]*", "{x}")]
    restore(Path(), offered(dict.fromkeys(paths, EVIL) | {"results/b": EVIL | {"same_as": paths[0]}}, {}), quiet)
    assert [Path(path).read_bytes() for path in paths] == [b"evil"] * 6 and Path("results/b").samefile(paths[0])


def test_a_second_name_may_come_before_the_first(offered):
    restore(Path(), offered({"results/a": EVIL | {"same_as": "results/z"}, "results/z": EVIL}, {}), quiet)
    assert Path("results/a").samefile("results/z")


def test_results_on_another_disk_are_restored_there(offered, tmp_path, monkeypatch):
    """The user's own link; the file system of the one refuses a rename from the other, as disks do."""
    (tmp_path / "disk").mkdir()
    Path("results").symlink_to(tmp_path / "disk")
    replace = os.replace

    def refused(source, target, **handles):
        if "src_dir_fd" not in handles:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace(source, target, **handles)

    monkeypatch.setattr(inside.os, "replace", refused)
    restore(Path(), offered({"results/a/b": EVIL}, {}), quiet)
    assert (tmp_path / "disk/a/b").read_bytes() == b"evil"
    assert [path.name for path in (tmp_path / "disk/a").iterdir()] == ["b"]


def test_a_file_in_the_place_of_a_link_stays(offered):
    place = Path(f"{CHECKPOINT}/a")
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    said = line(restore, Path(), offered({"results/a": EVIL}, {str(place): leads("OUT/kept")}), quiet)
    assert said == f"{place}: no link; expected none, or the link that was stored" and place.read_text() == "mine"
    assert not Path("results/a").exists()


def test_a_link_that_no_build_makes_is_not_stored(server, build, tmp_path):
    (tmp_path / "big").mkdir()
    (build / "results/reference").symlink_to(tmp_path / "big")
    (build / "results/source/m/checkpoint").mkdir()
    (build / "results/source/m/checkpoint/x").symlink_to(tmp_path / "big/x")
    told = []
    found = store(Path(), f"s3://{BUCKET}/b", [], told.append)
    assert found.links.keys() == {"results/source/m/link", "results/source/m/checkpoint/x"}
    warnings = [line for line in told if line.startswith("warning")]
    assert len(warnings) == 1 and "results/reference: a link that no build makes" in warnings[0]


def test_nothing_is_restored_beside_a_living_build(offered, monkeypatch):
    monkeypatch.setattr(buildlock, "PATIENCE", 0.1)
    with buildlock.alone(Path()):
        said = line(restore, Path(), offered({"results/a": EVIL}, {}), quiet)
    assert said.startswith("another build is running here") and not Path("results").exists()

"""Locks and files from the hub, with the real client against a server that misbehaves: each fault ends in recovery,
or in one line.

The client runs in a process of its own, as in a build: it reads HF_ENDPOINT when it is imported. Waits between
attempts are left out, and what has come is kept every 16 KB where the library does it every 10 MB.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from hub_server import Fault, Hub, sha256

from requant.errors import RequantError
from requant.locks import make_lock
from requant.planning import check_hub_model
from requant.records import Lock, read_json, write_json

NAME = "org/tiny"
TOKEN = "hf_secret0123456789"
CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import constants
from requant import hub
from requant.download import HubModel, check_download_room, link, obtain
from requant.hublock import make_hub_lock
from requant.jobs import job
from requant.records import Lock, read_json, write_json

hub.WAITS = (0, 0)
constants.DOWNLOAD_CHUNK_SIZE = 16_384
what, *rest = sys.argv[1:]
with job("job.log"):
    if what == "lock":
        write_json("lock.json", make_hub_lock("mine", rest[0], rest[1] or None))
    else:
        name, commit, directory, file = rest
        model, lock = HubModel(name, commit, directory or None), read_json("lock.json", Lock)
        if what == "room":
            check_download_room("mine", model, lock)
        else:
            obtain(model, file, lock)
            link(model.place(file), Path("links") / file)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hub") / "moe", "deepseek_v3")


@pytest.fixture(scope="module")
def pinned(checkpoint) -> Lock:
    """The lock of the directory that the server serves."""
    return make_lock("mine", checkpoint)


class Client:
    """A working directory, and the hub that is asked from it."""

    def __init__(self, directory: Path, checkpoint: Path):
        self.directory = directory
        self.hub = Hub()
        self.commit = self.hub.add(NAME, checkpoint)
        self.endpoint = self.hub.start()
        self.cache = directory / "cache/hub/models--org--tiny"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.directory / "cache"), **environment}
        command = [sys.executable, "-c", CLIENT, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.directory, env=kept | own, **pipes)

    def run(self, *arguments: str, **environment: str) -> list[str]:
        """What a person sees, line by line; empty for a quiet success, else with one error line at the end."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=600)
        lines = (out + err).splitlines()
        log = (self.directory / "job.log").read_text()
        for secret in (TOKEN, "signed-secret"):
            assert secret not in log and secret not in out + err
        errors = [line for line in lines if " error: " in line]
        assert len(errors) == (process.returncode != 0) and "Traceback" not in err, lines
        return lines

    def lock(self, revision: str | None = None, name: str = NAME, **environment: str) -> list[str]:
        return self.run("lock", name, self.commit if revision is None else revision, **environment)

    def file(self, name: str, directory: str = "", **environment: str) -> list[str]:
        return self.run("file", NAME, self.commit, directory, name, **environment)


@pytest.fixture
def client(tmp_path, checkpoint) -> Client:
    client = Client(tmp_path, checkpoint)
    yield client
    client.hub.stop()


@pytest.fixture
def locked(client, pinned) -> Client:
    """With its lock written."""
    write_json(client.directory / "lock.json", pinned)
    return client


def shard_of(lock: Lock) -> str:
    """The largest shard."""
    return max((name for name in lock.files if name.endswith(".safetensors")), key=lambda name: lock.files[name].size)


# Locks


def test_the_lock_of_a_hub_commit_is_that_of_its_files(client, pinned):
    client.lock()
    lock = read_json(client.directory / "lock.json", Lock)
    assert lock.revision == client.commit
    assert lock.model_copy(update={"revision": pinned.revision}) == pinned


def test_files_beside_the_weights_and_a_layer_that_the_index_forgot_are_locked_and_fetched(client, tmp_path):
    """To the cache, and to a directory: a template is in a folder there too."""
    folder = tiny.write_checkpoint(tmp_path / "glm", "glm4_moe", num_hidden_layers=2, mtp=True)
    tiny.add_beside(folder)
    tiny.forget_mtp(folder)
    commit = client.hub.add("org/glm", folder)
    client.run("lock", "org/glm", commit)
    lock = read_json(client.directory / "lock.json", Lock)
    wanted = make_lock("mine", folder)
    assert lock.model_copy(update={"revision": wanted.revision}) == wanted
    assert "mtp.safetensors" in lock.files and tiny.BESIDE.keys() <= lock.files.keys()
    assert lock.left_behind == ["README.md", "figures/", "tool_parser.py"]
    for name in ("additional_chat_templates/tool_use.jinja", "LICENSE"):
        for directory in ("", "weights"):
            client.run("file", "org/glm", commit, directory, name)
            assert (client.directory / "links" / name).read_text() == tiny.BESIDE[name]
        assert (client.directory / "weights" / name).read_text() == tiny.BESIDE[name]


def test_a_lock_downloads_no_weights_and_keeps_nothing(client, pinned):
    client.lock()
    parts = [request for request in client.hub.requests if request.path.endswith(".safetensors")]
    shards = {entry.shard for entry in pinned.tensors.values()}
    assert len(shards) > 3 and {request.path.rsplit("/", 1)[1] for request in parts} == shards
    assert all(request.range and int(request.range.rsplit("-", 1)[1]) <= 100_000 for request in parts)
    assert sorted(path.name for path in client.directory.iterdir() if path.name != "cache") == ["job.log", "lock.json"]
    assert not client.cache.exists()


def test_one_file_without_an_index_and_a_long_header(client, tmp_path):
    """The header is longer than the part that is asked for first."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "long"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    many = {f"model.layers.0.a_name_long_enough_to_fill_the_header_{i:06d}": torch.zeros(2) for i in range(1200)}
    save_file(many, folder / "model.safetensors")
    commit = client.hub.add("org/long", folder)
    client.run("lock", "org/long", commit)
    lock = read_json(tmp_path / "lock.json", Lock)
    assert lock.tensors == make_lock("mine", folder).tensors and len(lock.tensors) == 1200
    assert lock.files == make_lock("mine", folder).files


@pytest.mark.parametrize("revision", ["main", ""])
def test_a_revision_that_moves_is_refused_and_its_commit_named(client, revision):
    said = client.lock(revision)
    assert (
        said[-1]
        .split(" error: ")[1]
        .startswith(
            f"models.mine.revision: {revision or None!r} may move; now it is the commit {client.commit}: "
            f"write `revision: {client.commit}` into the config (see "
        )
    )
    assert not (client.directory / "lock.json").exists()


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("org/none", "0" * 40, "org/none at 0000000000000000000000000000000000000000: no such repository at http"),
        (NAME, "f" * 40, "org/tiny at ffffffffffffffffffffffffffffffffffffffff: no such revision at http"),
    ],
)
def test_what_is_not_on_the_hub_is_named(client, name, revision, message):
    assert message in client.lock(revision, name)[-1]


def test_a_missing_shard_and_a_repository_without_weights_are_named(client, checkpoint, tmp_path, pinned):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / shard_of(pinned)).unlink()
    commit = client.hub.add("org/other", folder)
    assert (
        f"org/other: {shard_of(pinned)} is not there; model.safetensors.index.json names it"
        in client.lock(commit, "org/other")[-1]
    )
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink(missing_ok=True)
    assert "org/other: 0 safetensors files and no model.safetensors.index.json" in client.lock(commit, "org/other")[-1]
    (folder / "config.json").unlink()
    assert "config.json: not there" in client.lock(commit, "org/other")[-1]


def test_a_lock_survives_cuts_and_errors_of_the_server(client, pinned):
    shard = shard_of(pinned)
    client.hub.faults += [
        Fault("status", "/api", 503),
        Fault("cut", "config.json", 40),
        Fault("status", "tokenizer_config.json", 503),
        Fault("cut", shard, 100),
        Fault("status", min(pinned.files, key=lambda name: ("safetensors" not in name, name)), 502),
    ]
    client.lock()
    assert read_json(client.directory / "lock.json", Lock).files == pinned.files
    assert all(fault.times == 0 for fault in client.hub.faults)


def test_a_server_without_ranges_sends_no_weights(client, pinned):
    shard = shard_of(pinned)
    client.hub.faults.append(Fault("whole", shard, times=9))
    assert "status 200 found; expected 206, a part of the file" in client.lock()[-1]


# Downloads


@pytest.mark.parametrize("directory", ["", "mine"])
def test_a_file_comes_whole_to_cache_or_directory_and_is_linked(locked, pinned, checkpoint, directory):
    for name in (shard_of(pinned), "config.json"):
        locked.file(name, directory)
        link = locked.directory / "links" / name
        place = locked.directory / "mine" / name if directory else locked.cache / "snapshots" / locked.commit / name
        assert link.is_symlink() and os.readlink(link) == str(place)
        assert link.read_bytes() == (checkpoint / name).read_bytes()
        asked = len(locked.hub.requests)
        locked.file(name, directory)
        assert len(locked.hub.requests) == asked, "what is there and right is not asked for again"


def test_the_cache_is_as_the_library_keeps_it(locked, pinned):
    """huggingface_hub finds the files, and no fault in its cache."""
    shard = shard_of(pinned)
    locked.file(shard)
    locked.file("config.json")
    code = (
        "import huggingface_hub as h, sys\n"
        "found = h.scan_cache_dir()\n"
        "assert not found.warnings, found.warnings\n"
        "assert {f.file_name for r in found.repos for v in r.revisions for f in v.files} == set(sys.argv[2:])\n"
        "for name in sys.argv[2:]: h.hf_hub_download('org/tiny', name, revision=sys.argv[1], local_files_only=True)\n"
    )
    environment = os.environ | {"HF_HOME": str(locked.directory / "cache")}
    subprocess.run([sys.executable, "-c", code, locked.commit, shard, "config.json"], env=environment, check=True)


def test_what_the_library_downloaded_is_taken_as_it_is(locked, pinned):
    shard = shard_of(pinned)
    code = "import huggingface_hub as h, sys; h.hf_hub_download('org/tiny', sys.argv[2], revision=sys.argv[1])"
    own = {"HF_HOME": str(locked.directory / "cache"), "HF_ENDPOINT": locked.endpoint, "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", code, locked.commit, shard], env=os.environ | own, check=True)
    sent = locked.hub.bytes_sent
    locked.file(shard)
    assert locked.hub.bytes_sent == sent


def test_another_commit_with_the_same_file_downloads_it_once(locked, pinned, checkpoint):
    shard = shard_of(pinned)
    locked.file(shard)
    locked.commit, before = "1" * 40, locked.hub.bytes_sent
    locked.hub.repositories[NAME, locked.commit] = checkpoint
    locked.file(shard)
    assert locked.hub.bytes_sent == before
    assert (locked.cache / "snapshots" / locked.commit / shard).exists()


@pytest.mark.parametrize("directory", ["", "mine"])
def test_a_cut_download_goes_on_where_it_ended(locked, pinned, directory):
    shard, size = shard_of(pinned), pinned.files[shard_of(pinned)].size
    locked.hub.faults += [Fault("cut", shard, 9 * 16_384), Fault("cut", shard, 2 * 16_384)]
    locked.file(shard, directory)
    assert [request.range for request in locked.hub.gets(shard)] == [None, "bytes=147456-", "bytes=180224-"]
    assert locked.hub.bytes_sent == size
    assert sha256(locked.directory / "links" / shard) == pinned.files[shard].sha256


def test_a_killed_download_goes_on_in_the_next_process(locked, pinned):
    shard = shard_of(pinned)
    locked.hub.faults.append(Fault("slow", shard, 0.2))
    process = locked.start("file", NAME, locked.commit, "mine", shard)
    partial = locked.directory / "mine/.cache/requant" / locked.commit / shard
    end = time.monotonic() + 300
    while locked.hub.bytes_sent < 150_000:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    kept = partial.stat().st_size
    assert kept >= 65_536
    assert not (locked.directory / "mine" / shard).exists(), "half a file has no name that anyone would read"
    locked.file(shard, "mine")
    assert sha256(locked.directory / "mine" / shard) == pinned.files[shard].sha256
    assert locked.hub.gets(shard)[-1].range == f"bytes={kept}-"


def test_a_server_that_ignores_ranges_is_begun_anew(locked, pinned):
    shard = shard_of(pinned)
    locked.hub.faults += [Fault("cut", shard, 5000), Fault("whole", shard)]
    locked.file(shard, "mine")
    assert sha256(locked.directory / "mine" / shard) == pinned.files[shard].sha256


def test_errors_of_the_server_pass(locked, pinned):
    shard = shard_of(pinned)
    locked.hub.faults += [Fault("status", shard, 503), Fault("status", shard, 429), Fault("status", shard, 500)]
    locked.hub.faults[1:1] = [Fault("cut", shard, 10)]  # a byte that comes starts the count anew
    said = locked.file(shard, "mine")
    assert any("503 Service Unavailable from the hub; next attempt in" in line for line in said)
    assert sha256(locked.directory / "mine" / shard) == pinned.files[shard].sha256


def test_errors_of_the_server_that_stay_end_in_a_line(locked, pinned):
    shard = shard_of(pinned)
    locked.hub.faults.append(Fault("status", shard, 503, times=99))
    said = locked.file(shard, "mine")[-1]
    assert f"error: org/tiny/{shard}: 503 Service Unavailable from the hub, 3 times in a row; run the same" in said
    locked.hub.faults.clear()
    locked.file(shard, "mine")
    assert sha256(locked.directory / "mine" / shard) == pinned.files[shard].sha256


def test_a_hub_that_is_away_ends_in_a_line(locked):
    locked.endpoint = "http://127.0.0.1:9"
    assert (
        "error: org/tiny/config.json: no answer from http://127.0.0.1:9 (ConnectError"
        in locked.file("config.json", "mine")[-1]
    )


@pytest.mark.parametrize("directory", ["", "mine"])
def test_a_byte_flipped_on_the_way_is_found_and_fetched_once_more(locked, pinned, directory):
    shard = shard_of(pinned)
    locked.hub.faults.append(Fault("flip", shard, 70_000))
    said = locked.file(shard, directory)
    assert any(f"org/tiny/{shard}: sha256 " in line and line.endswith("; fetched once more") for line in said)
    assert sha256(locked.directory / "links" / shard) == pinned.files[shard].sha256


@pytest.mark.parametrize("directory", ["", "mine"])
def test_a_file_that_the_hub_has_otherwise_never_gets_its_name(locked, pinned, checkpoint, directory):
    shard = shard_of(pinned)
    changed = bytearray((checkpoint / shard).read_bytes())
    changed[70_000] ^= 1
    locked.hub.faults.append(Fault("flip", shard, 70_000, times=99))
    said = locked.file(shard, directory)[-1]
    assert (
        f"error: org/tiny/{shard}: sha256 {hashlib.sha256(changed).hexdigest()} found; the lock of mine expects" in said
    )
    assert f"expects {pinned.files[shard].sha256}; it was sent so when asked for again, too" in said
    assert not (locked.directory / "links").exists()
    assert not [path for path in locked.directory.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


@pytest.mark.parametrize("kind", ["flip", "cut"])
@pytest.mark.parametrize("directory", ["", "mine"])
def test_a_wrong_file_of_the_users_is_named_and_kept_until_it_is_removed(locked, pinned, directory, kind):
    shard = shard_of(pinned)
    locked.file(shard, directory)
    path = (locked.directory / "links" / shard).resolve()
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw if kind == "flip" else raw[:-9])
    asked = len(locked.hub.requests)
    said = locked.file(shard, directory)[-1]
    found = f"sha256 {hashlib.sha256(raw).hexdigest()} found" if kind == "flip" else f"{len(raw) - 9} bytes found"
    assert shard in said and found in said and f"remove {path} (see" in said
    assert path.exists() and len(locked.hub.requests) == asked
    path.unlink()
    locked.file(shard, directory)
    assert sha256(locked.directory / "links" / shard) == pinned.files[shard].sha256


def test_a_truncated_file_ends_in_a_line_and_a_later_whole_one_is_taken(locked, pinned):
    shard = shard_of(pinned)
    locked.hub.faults.append(Fault("truncate", shard, 500, times=99))
    said = locked.file(shard, "mine")[-1]
    assert f"error: org/tiny/{shard}: " in said and "times in a row" in said
    locked.hub.faults.clear()
    locked.file(shard, "mine")
    assert sha256(locked.directory / "mine" / shard) == pinned.files[shard].sha256


def test_slow_bytes_are_waited_for(locked, pinned):
    """Longer in all than the client waits for any one answer."""
    shard = shard_of(pinned)
    locked.hub.faults.append(Fault("slow", shard, 0.7))
    start = time.monotonic()
    locked.file(shard, "mine", HF_HUB_DOWNLOAD_TIMEOUT="3")
    assert time.monotonic() - start > 3 and len(locked.hub.gets(shard)) == 1


def test_a_file_that_is_gone_from_the_hub_is_named(locked, pinned):
    locked.hub.faults.append(Fault("status", "config.json", 404, "EntryNotFound", times=99))
    assert "error: org/tiny/config.json: no such file at http" in locked.file("config.json", "mine")[-1]


@pytest.mark.parametrize("directory", ["", "mine"])
def test_a_gated_repository_asks_for_a_token_and_takes_one(locked, pinned, directory):
    shard = shard_of(pinned)
    locked.hub.gated[NAME] = TOKEN
    for token in ({}, {"HF_TOKEN": "hf_another"}):
        said = locked.file(shard, directory, **token)[-1]
        assert "gated: its terms have to be accepted on its page" in said and "set HF_TOKEN or run `hf auth" in said
        assert "hf_another" not in said
    locked.file(shard, directory, HF_TOKEN=TOKEN)
    locked.file("config.json", directory, HF_TOKEN=TOKEN)
    sent = [request for request in locked.hub.requests if request.authorization == f"Bearer {TOKEN}"]
    assert sent and all(request.host.startswith("127.0.0.1") for request in sent), "the CDN gets no token"


def test_a_gated_repository_can_not_be_locked_without_a_token(client):
    client.hub.gated[NAME] = TOKEN
    assert "gated: its terms have to be accepted" in client.lock()[-1]
    client.lock(HF_TOKEN=TOKEN)


def test_offline_mode_is_kept(locked, pinned):
    said = locked.file("config.json", "mine", HF_HUB_OFFLINE="1")[-1]
    assert "error: org/tiny/config.json: not here, and HF_HUB_OFFLINE forbids to ask the hub; expected it unset" in said
    assert "HF_HUB_OFFLINE forbids" in locked.lock(HF_HUB_OFFLINE="1")[-1]
    assert locked.hub.requests == []
    locked.file("config.json", "mine")
    assert "error" not in locked.file("config.json", "mine", HF_HUB_OFFLINE="1")[-1:]


def test_too_full_a_disk_is_said_with_both_numbers(locked, pinned):
    locked.run("room", NAME, locked.commit, "mine", "")
    pinned = pinned.model_copy(deep=True)
    pinned.files["config.json"].size = 10**18
    write_json(locked.directory / "lock.json", pinned)
    total = sum(entry.size for entry in pinned.files.values())
    for directory, place in (("mine", locked.directory / "mine"), ("", locked.cache)):
        said = locked.run("room", NAME, locked.commit, directory, "")[-1]
        assert f"error: models.mine: {total} bytes are still to be downloaded to {place}; " in said
        assert "are free there" in said and "models.mine.directory" in said
    (locked.directory / "mine").mkdir()
    (locked.directory / "mine/config.json").touch()
    locked.run("room", NAME, locked.commit, "mine", "")


# What the planning says


def test_planning_names_the_command_that_makes_a_lock(pinned):
    commit = "a" * 40
    lock = pinned.model_copy(update={"revision": commit})
    check_hub_model("mine", commit, lock)
    command = "run `snakemake --cores 1 lock --config model=mine`, with the --configfile of this build"
    for revision, found, message in (
        (
            "main",
            lock,
            "models.mine.revision: 'main' may move; expected a commit, 40 hex digits: for the one it is now, ",
        ),
        (None, None, "models.mine.revision: None may move; expected a commit, 40 hex digits: for the one it is now, "),
        (commit, None, "locks/mine.json: not there; a model from the hub is planned from its lock: "),
        ("b" * 40, lock, f"locks/mine.json: revision {commit} found; models.mine.revision is {'b' * 40}: "),
    ):
        with pytest.raises(RequantError) as raised:
            check_hub_model("mine", revision, found)
        assert str(raised.value) == message + command

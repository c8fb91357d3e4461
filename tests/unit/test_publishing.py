"""Uploads, with the real client against a stand-in for the hub: whole or not at all, once, and only what has passed.

The client runs in a process of its own, as in a build: it reads HF_ENDPOINT when it is imported. Waits between
attempts are left out.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from card_records import NVFP4, change, load, make_records, put, statement_of
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hub_server import Fault, Hub

from requant.checksums import write_sums
from requant.config import parse
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.provenance import write_provenance
from requant.publishing import Subject, announcement, masked, passed, releases_asked, shown, upload_asked
from requant.records import PackRecord, PublishRecord, read_json
from requant.signature import sign

RESULTS = f"results/{NVFP4}"
NAME = "org/tiny-nvfp4"
TOKEN = "hf_secret0123456789"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BESIDE = ["README.md", "provenance.json", "sbom.cdx.json", "loss.png", ".eval_results/requant.yaml"]
TRANSPORTS = {"xet": {}, "lfs": {"HF_HUB_DISABLE_XET": "1"}}
CLIENT = """
import json
import time
from types import SimpleNamespace
import huggingface_hub.utils._http as http
from requant import hub
from requant.jobs import job, progress
from requant.publishing import Subject, check_token, passed, publish

hub.WAITS = (0, 0)
http.time = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100))
with job("job.log"):
    subject = Subject(**json.load(open("subject.json")))
    files = passed(subject)
    check_token()
    progress(publish(subject, files).commit)
"""


def content(seed: int, size: int) -> bytes:
    """Bytes that no compression makes smaller."""
    return random.Random(seed).randbytes(size)


def finish(root: Path) -> Subject:
    """Makes of the records in `root` a release as a build leaves it."""
    folder = root / RESULTS / "model"
    (folder / ".eval_results").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(SHARDS):
        (folder / name).write_bytes(content(number, 300_000))
    (folder / "config.json").write_text('{"model_type": "tiny"}\n')
    (folder / "tokenizer.json").write_bytes(b"the same again and again " * 20_000)
    packed = {name: file_entry(folder / name) for name in (*SHARDS, "config.json", "tokenizer.json")}
    change(root, f"{RESULTS}/pack.json", put("files", {name: entry.model_dump() for name, entry in packed.items()}))
    manifest = read_json(root / RESULTS / "pack.json", PackRecord)
    for stage in ("verify", "evaluate", "deploy"):
        change(root, f"{RESULTS}/{stage}.json", put("packed", manifest.digest))
    made = statement_of(load(root))
    write_provenance(folder / "provenance.json", made)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a card\n")
    (folder / "sbom.cdx.json").write_text("{}\n")
    (folder / "loss.png").write_bytes(content(9, 20_000))
    (folder / ".eval_results/requant.yaml").write_text("- value: 1\n")
    write_sums(folder, packed, BESIDE)
    return Subject(NVFP4, NAME, "main", True, made.request.config, BESIDE, signed=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> tuple[Path, Subject]:
    root = tmp_path_factory.mktemp("finished")
    make_records(root)
    return root, finish(root)


class Publisher:
    """A working directory with a finished release, and the hub that it is uploaded to."""

    def __init__(self, directory: Path, template: tuple[Path, Subject], transport: str):
        self.directory, self.transport = directory, transport
        shutil.copytree(template[0], directory, dirs_exist_ok=True)
        self.folder = directory / RESULTS / "model"
        self.say(template[1])
        self.hub = Hub(storage=directory / "hub", tokens={TOKEN: "write"})
        self.endpoint = self.hub.start()

    def say(self, subject: Subject) -> None:
        """What the client is to publish."""
        self.subject = subject
        (self.directory / "subject.json").write_text(json.dumps(asdict(subject)))

    def edit(self, **changes) -> None:
        self.say(Subject(**asdict(self.subject) | changes))

    def start(self, **environment: str) -> subprocess.Popen:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.directory / "home"), "HF_TOKEN": TOKEN}
        given = kept | own | TRANSPORTS[self.transport] | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", CLIENT], cwd=self.directory, env=given, **pipes)

    def run(self, **environment: str) -> list[str]:
        """What a person sees, line by line; with one error line at the end if it failed."""
        process = self.start(**environment)
        out, err = process.communicate(timeout=120)
        self.look_for_secrets(out + err)
        lines = (out + err).splitlines()
        errors = [line for line in lines if " error: " in line]
        assert len(errors) == (process.returncode != 0) and "Traceback" not in err, lines
        return lines

    def look_for_secrets(self, said: str) -> None:
        """Neither the token nor a signed address is in what was said, or in a file of this directory."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        for secret in (TOKEN, "signed-secret", "xet-secret"):
            assert secret not in said
            assert [path for path in files if secret.encode() in path.read_bytes()] == []

    @property
    def record(self) -> PublishRecord:
        return read_json(self.directory / RESULTS / "publish.json", PublishRecord)

    def there(self) -> dict[str, bytes]:
        """The files of the branch."""
        folder = self.hub.repositories[NAME, self.hub.branches[NAME, self.subject.branch]]
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def here(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        }

    def whole(self) -> bool:
        """Whether the hub has the release and nothing else."""
        found = self.there()
        found.pop(".gitattributes")
        return found == self.here()


@pytest.fixture(params=TRANSPORTS)
def publisher(request, tmp_path, template) -> Publisher:
    publisher = Publisher(tmp_path, template, request.param)
    yield publisher
    publisher.hub.stop()


@pytest.fixture
def by_lfs(tmp_path, template) -> Publisher:
    """For what does not depend on how large files travel."""
    publisher = Publisher(tmp_path, template, "lfs")
    yield publisher
    publisher.hub.stop()


def last(lines: list[str]) -> str:
    return lines[-1].split(" error: ", 1)[1]


# The upload


def test_a_release_arrives_whole_private_in_one_commit_and_leaves_its_folder_as_it_was(publisher):
    before = publisher.here()
    lines = publisher.run()
    assert publisher.here() == before and publisher.whole()
    (commit,) = publisher.hub.commits
    assert commit[2][".eval_results/requant.yaml"] == "file" and commit[2][SHARDS[0]] == "lfsFile"
    assert commit[2][""]["summary"] == f"{NVFP4}: NVFP4 checkpoint, verified, evaluated and served by requant"
    assert publisher.hub.private == {NAME}
    record = publisher.record
    assert record.commit == publisher.hub.branches[NAME, "main"] and record.commit in lines[-1]
    assert record.files.keys() == before.keys() and record.private
    assert bool(publisher.hub.xorbs) == (publisher.transport == "xet")
    assert record.bytes == sum(map(len, before.values()))
    sizes = [len(before[name]) for name in (*SHARDS, "loss.png")]
    least = sum(sizes) + (len(before["tokenizer.json"]) if publisher.transport == "lfs" else 0)
    assert least <= publisher.hub.bytes_received < least + 20_000, "each once; xorbs have headers, and text shrinks"


def test_publishing_again_uploads_nothing_and_says_so(publisher):
    publisher.run()
    record, received = publisher.record, publisher.hub.bytes_received
    lines = publisher.run()
    assert any(f"{NAME} has it already, at {record.commit}: nothing was uploaded" in line for line in lines)
    assert publisher.hub.bytes_received == received and len(publisher.hub.commits) == 1
    assert publisher.record == record


def kill_once(publisher: Publisher, here: Callable[[Hub], bool]) -> None:
    """Kills the client once the hub is so."""
    process = publisher.start()
    while not here(publisher.hub):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(1.5)  # the stand-in ends what hangs


def hangs(hub: Hub) -> bool:
    """Whether the request that is to hang has come."""
    return all(fault.times == 0 for fault in hub.faults)


@pytest.mark.parametrize("part_size", [None, 100_000])
def test_after_a_kill_amid_a_large_file_only_that_file_is_sent_again(by_lfs, part_size):
    hub, here = by_lfs.hub, by_lfs.here()
    hub.part_size = part_size
    killed = hashlib.sha256(here[SHARDS[1]]).hexdigest() + ("/2" if part_size else "")
    hub.faults.append(Fault("hang", killed, 50_000))
    came = 320_000 + 50_000 + (100_000 if part_size else 0)
    whole = {hashlib.sha256(here[name]).hexdigest() for name in (SHARDS[0], "loss.png")}
    kill_once(by_lfs, lambda hub: hub.bytes_received == came and hub.objects.keys() == whole)
    assert not hub.commits and by_lfs.there().keys() == {".gitattributes"}, "the branch is as it was"
    assert (hub.bytes_received, hub.objects.keys()) == (came, whole)
    by_lfs.run()
    assert by_lfs.whole() and len(hub.commits) == 1
    assert hub.bytes_received - came == len(here[SHARDS[1]]) + len(here["tokenizer.json"])


def test_after_a_kill_before_the_commit_no_large_file_is_sent_again(publisher):
    hub = publisher.hub
    hub.faults.append(Fault("hang", "/commit/main", 100))
    kill_once(publisher, hangs)
    received = hub.bytes_received
    assert received > 620_000 and not hub.commits
    publisher.run()
    assert publisher.whole() and len(hub.commits) == 1
    assert hub.bytes_received == received


def test_a_failure_that_passes_is_waited_for_and_a_lost_answer_makes_no_second_commit(publisher):
    ahead = "/cas/v1/shards" if publisher.transport == "xet" else "/objects/batch"
    publisher.hub.faults += [
        Fault("status", "/api/repos/create", 503),
        Fault("status", "/preupload/main", 500, times=2),
        Fault("status", ahead, 502),
        Fault("cut", hashlib.sha256(publisher.here()[SHARDS[0]]).hexdigest(), 100_000),
        Fault("lost", "/commit/main"),
    ]
    lines = publisher.run()
    left = [fault.kind for fault in publisher.hub.faults if fault.times]
    assert left == (["cut"] if publisher.transport == "xet" else []), "xorbs have other names"
    assert publisher.whole() and len(publisher.hub.commits) == 1 and publisher.record.commit in lines[-1]


def test_the_next_release_replaces_the_last_and_sends_what_is_new_alone(by_lfs):
    by_lfs.run()
    received = by_lfs.hub.bytes_received
    (by_lfs.folder / SHARDS[1]).unlink()
    change(by_lfs.directory, f"{RESULTS}/pack.json", lambda data: data["files"].pop(SHARDS[1]))
    fewer = read_json(by_lfs.directory / RESULTS / "pack.json", PackRecord)
    for stage in ("verify", "evaluate", "deploy"):
        change(by_lfs.directory, f"{RESULTS}/{stage}.json", put("packed", fewer.digest))
    (by_lfs.folder / "README.md").write_text("---\nlicense: mit\n---\n# another card\n")
    write_sums(by_lfs.folder, fewer.files, BESIDE)
    by_lfs.run()
    assert by_lfs.whole() and by_lfs.hub.bytes_received == received
    operations = by_lfs.hub.commits[1][2]
    assert operations.pop("")["parentCommit"]
    assert operations == {SHARDS[1]: "deletedFile", "README.md": "file", "SHA256SUMS": "file"}


def test_a_branch_and_a_public_repository_are_made_where_the_config_says_so(by_lfs):
    by_lfs.edit(branch="v2/next", private=False)
    by_lfs.run()
    assert by_lfs.whole() and by_lfs.record.branch == "v2/next" and not by_lfs.record.private
    assert by_lfs.hub.branches[NAME, "main"] != by_lfs.record.commit and not by_lfs.hub.private


# What a hub refuses


def refuse(number: int, path: str, code: str = ""):
    return lambda publisher: publisher.hub.faults.append(Fault("status", path, number, code, times=99))


def visible(publisher: Publisher) -> None:
    publisher.hub.put(NAME, "main", {}, [])


def others(publisher: Publisher) -> None:
    publisher.hub.private.add(NAME)
    publisher.hub.put(NAME, "main", {"notes.md": b"mine"}, [])


def damaged(publisher: Publisher) -> None:
    publisher.hub.faults.append(Fault("flip", hashlib.sha256(publisher.here()[SHARDS[0]]).hexdigest(), 7))


LOGIN = "set HF_TOKEN or run `hf auth login`"
REFUSED = {
    "unknown token": (lambda p: p.hub.tokens.clear(), f"the token: 401 Unauthorized: {LOGIN}"),
    "reading token": (lambda p: p.hub.tokens.update({TOKEN: "read"}), "the token of 'someone' may only read; expected"),
    "not an owner": (
        lambda p: p.edit(repository="else/x"),
        "else/x: 403 Forbidden: the token may not make repositories of",
    ),
    "name taken": (refuse(409, "/repos/create"), f"{NAME}: taken: the hub has a repository of this name"),
    "no right": (refuse(403, "/commit/main"), f"{NAME}: 403 Forbidden: {LOGIN}"),
    "gone": (refuse(404, "/preupload/main", "RepoNotFound"), f"{NAME}: no such repository at http"),
    "too large": (refuse(413, "/commit/main"), f"{NAME}: 413 "),
    "overtaken": (refuse(412, "/commit/main"), f"{NAME}: someone else committed to main meanwhile; look"),
    "failing": (
        refuse(500, "/objects/batch"),
        f"{NAME}: 500 Internal Server Error from the hub, 3 times in a row; run",
    ),
    "no storage": (refuse(400, "/objects/batch"), f"{NAME}: 400 Bad Request from the hub"),
    "public": (visible, f"{NAME}: public on the hub, and publish.private says private: change one of them"),
    "others' files": (others, f"{NAME}: 'notes.md' is there, which no release of requant brought: remove it"),
    "damaged": (damaged, f"{SHARDS[0]}: 300000 bytes, sha256 "),
}


@pytest.mark.parametrize("refusal", REFUSED)
def test_what_the_hub_refuses_ends_in_one_line_without_a_secret_and_without_a_record(by_lfs, refusal):
    """The stand-in's refusals have the token in their reason, a header and their body."""
    arrange, line = REFUSED[refusal]
    arrange(by_lfs)
    assert line in last(by_lfs.run())
    assert not (by_lfs.directory / RESULTS / "publish.json").exists()
    assert len(by_lfs.hub.commits) == (refusal == "damaged")


def test_a_token_of_xet_that_is_refused_ends_in_one_line(tmp_path, template):
    publisher = Publisher(tmp_path, template, "xet")
    refuse(403, "/cas/v1/shards")(publisher)
    assert f"{NAME}: " in (line := last(publisher.run())) and "run the same command again" in line
    assert not publisher.hub.commits
    publisher.hub.stop()


def test_without_a_token_or_a_network_nothing_is_tried(by_lfs):
    assert "no token: set HF_TOKEN, or run `hf auth login`" in last(by_lfs.run(HF_TOKEN=""))
    assert not by_lfs.hub.requests
    assert "the token has characters that no token has" in last(by_lfs.run(HF_TOKEN="hf_secret\u00e9"))
    assert not by_lfs.hub.requests
    line = last(by_lfs.run(HF_ENDPOINT="http://127.0.0.1:9"))
    assert "the token: no answer from http://127.0.0.1:9 (ConnectError: " in line
    (by_lfs.directory / "home").mkdir(exist_ok=True)
    (by_lfs.directory / "home/token").write_text(TOKEN)
    by_lfs.hub.faults.append(Fault("status", "/repos/create", 403))
    process = by_lfs.start(HF_TOKEN="")
    process.communicate()
    asked = [request.authorization for request in by_lfs.hub.requests if request.path == "/api/whoami-v2"]
    assert asked == [f"Bearer {TOKEN}"], "the file of huggingface_hub"


def test_masked_leaves_no_token_and_no_signature():
    said = "401 for Bearer abcdef or hf_abcdefghijkl at https://host/x?X-Signature=1&b=2 and 'https://h/y?z'"
    assert masked(said) == "401 for Bearer [token] or [token] at https://host/x?[signed] and 'https://h/y?[signed]'"


# What may go out


@pytest.fixture
def finished(tmp_path, template, monkeypatch) -> tuple[Path, Subject]:
    """A folder with a finished release, in which the test runs."""
    shutil.copytree(template[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path, template[1]


def record(stage: str, *keys_and_value):
    return lambda root: change(root, f"{RESULTS}/{stage}.json", put(*keys_and_value))


def file(name: str, act):
    return lambda root: act(root / RESULTS / name)


def newer(path: Path) -> None:
    later = time.time() + 5
    os.utime(path, (later, later))


UNFIT = [
    (file("verify.json", Path.unlink), "verify.json: not there; a release is published after verify: `snakemake"),
    (file("evaluate.json", Path.unlink), "evaluate.json: not there; a release is published after evaluate"),
    (file("deploy.json", Path.unlink), "deploy.json: not there; a release is published after deploy"),
    (file("pack.json", Path.unlink), "pack.json: not there"),
    (record("deploy", "packed", None), "deploy.json: does not say which files it is of; expected"),
    (record("verify", "packed", "0" * 64), "verify.json: is of other files than pack.json; expected the record"),
    (record("pack", "files", SHARDS[0], "sha256", "0" * 64), "verify.json: is of other files than pack.json"),
    (record("verify", "lowest_cosine", 0.9), "verify.json: lowest cosine 0.9 found; expected 0.985 or more; a release"),
    (record("verify", "highest_relative_mae", 0.2), "verify.json: highest relative MAE 0.2 found; expected 0.14 or"),
    (record("deploy", "verdict", "failed"), "deploy.json: verdict: Input should be 'passed'"),
    (record("evaluate", "xxh3_64", "0"), "evaluate.json: changed since it was written"),
    (file("model/notes.txt", lambda path: path.write_text("x")), "model/notes.txt: not made by this build; expected"),
    (file("model/.cache", lambda path: path.mkdir() or (path / "x").touch()), "model/.cache/x: not made by this build"),
    (file("model/link", lambda path: path.symlink_to("README.md")), "model/link: not made by this build"),
    (file("model/loss.png", Path.unlink), "model/loss.png: not there; expected a file of the release"),
    (file("model/SHA256SUMS", Path.unlink), "model/SHA256SUMS: not there; it is made last"),
    (file("model/README.md", lambda path: path.write_text("x")), "model/README.md: sha256 2d71.* found; SHA256SUMS"),
    (file(f"model/{SHARDS[0]}", lambda path: path.write_bytes(content(5, 300_000))), "sha256 .* found; SHA256SUMS has"),
    (file("deploy.json", newer), "deploy.json: newer than .*README.md, which tells of it; make the card anew"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "line"), UNFIT, ids=[line[:40] for _, line in UNFIT])
def test_a_release_that_is_not_what_was_checked_is_refused_in_one_line(finished, spoil, line):
    root, subject = finished
    passed(subject)
    spoil(root)
    with pytest.raises(RequantError, match=line) as caught:
        passed(subject)
    assert "\n" not in str(caught.value)


def test_a_release_of_another_config_is_refused_with_the_key(finished):
    _, subject = finished
    config = json.loads(json.dumps(subject.config))
    config["releases"][NVFP4]["tuning"]["iters"] = 7
    other = Subject(**asdict(subject) | {"config": config})
    with pytest.raises(RequantError, match=rf"another config than today's \(releases.{NVFP4}.tuning.iters\)"):
        passed(other)
    fewer = Subject(**asdict(subject) | {"beside": BESIDE[:-1]})
    with pytest.raises(RequantError, match=r"SHA256SUMS: of an earlier build: .eval_results/requant.yaml is not in bo"):
        passed(fewer)


def test_a_signature_has_to_be_of_these_files(finished):
    root, subject = finished
    signed = Subject(**asdict(subject) | {"signed": True})
    folder = root / RESULTS / "model"
    with pytest.raises(RequantError, match="model.sig: not there; expected a file of the release"):
        passed(signed)
    key = ec.generate_private_key(ec.SECP256R1())
    kind = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (root / "key.pem").write_bytes(key.private_bytes(*kind))
    (root / "key.pem").chmod(0o600)
    sign(folder, root / "key.pem")
    assert "model.sig" in passed(signed)
    with pytest.raises(RequantError, match="model.sig: not made by this build"):
        passed(subject)
    (folder / "README.md").write_text("a later card")
    write_sums(folder, read_json(root / RESULTS / "pack.json", PackRecord).files, [*BESIDE, "model.sig"])
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "model.sig" not in line))
    with pytest.raises(RequantError, match="model.sig: of another README.md than the one here; delete it"):
        passed(signed)
    (folder / "model.sig").write_text("{}")
    with pytest.raises(RequantError, match="model.sig: no signature of a model"):
        passed(signed)


def test_the_announcement_has_repository_visibility_files_bytes_and_message(finished):
    _, subject = finished
    files = passed(subject)
    lines = announcement(subject, files).splitlines()
    bytes_of_all = shown(sum(entry.size for entry in files.values()))
    assert lines[0] == f"{NVFP4} -> https://huggingface.co/{NAME}, branch main, private: 10 files, {bytes_of_all}"
    assert lines[1] == f"  commit message: {NVFP4}: NVFP4 checkpoint, verified, evaluated and served by requant"
    assert "    300 kB  model-00001-of-00002.safetensors" in lines and len(lines) == 12


# The config


def config(**publish):
    releases = {name: {"model": "m", "scheme": "W4A16"} for name in ("r", "s")}
    return parse({"models": {"m": {"path": "m"}}, "releases": releases, "build": ["r", "s"], "publish": publish})


@pytest.mark.parametrize(
    "name", ["tiny", "org/", "org/a--b", "org/a..b", "org/-a", "org/a.", "org/a.git", "o r/a", "o/" + "a" * 97]
)
def test_a_repository_that_the_hub_can_not_have_is_an_error_of_the_config(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    with pytest.raises(RequantError, match=r"config: publish.repositories.r: .*; expected ORG/NAME of the hub"):
        config(repositories={"r": name})
    if "/" in name:
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


def test_each_release_has_a_repository_of_its_own():
    with pytest.raises(RequantError, match="publish.repositories.x: not in `releases`; there: r, s"):
        config(repositories={"x": "org/x"})
    with pytest.raises(RequantError, match="repositories: 'org/x' is given for two releases"):
        config(repositories={"r": "org/x", "s": "org/x"})
    assert config().publish.private and config().publish.branch == "main"


def test_what_is_asked_for_is_the_build_or_one_release():
    both = {"r": "org/r", "s": "org/s"}
    assert releases_asked(config(repositories=both), None) == both
    assert releases_asked(config(repositories={"s": "org/s"}), "s") == {"s": "org/s"}
    with pytest.raises(RequantError, match="publish.repositories.r: missing; expected where the release goes"):
        releases_asked(config(repositories={"s": "org/s"}), None)
    with pytest.raises(RequantError, match="--config release=x: not in `releases`; there: r, s"):
        releases_asked(config(), "x")
    assert not any(map(upload_asked, (None, False, "false", "False")))
    assert all(map(upload_asked, (True, "true", "True")))
    for other in (1, "yes", ""):
        with pytest.raises(RequantError, match=f"--config upload={other}: expected true or false"):
            upload_asked(other)

"""A release on the hub: what was verified, evaluated and served, whole, in one commit, and seen to be there.

huggingface_hub 2.4.0 has no `upload_large_folder` any more, and its `upload_folder` commits a large folder in several
parts. So large files go ahead by `preupload_lfs_files`, a few at a time, and one commit then names them all: who
reads the branch sees the release before or the release after, never a part. What has come of large files stays on
the hub under their hashes, so that a second run sends what is missing. Nothing is written into the release's folder.

The token is huggingface_hub's to find. Neither it nor a signed address gets into a message: what the hub and its
library say is shown by status, or with both masked.
"""

import base64
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from requant.checksums import SIGNATURE, SUMS
from requant.config import Config
from requant.disk import check_writable
from requant.errors import RequantError, brief, plain
from requant.hashing import file_entry
from requant.hub import file_url, get, nothing_comes, patiently
from requant.hublock import repository as listed_on_hub
from requant.jobs import progress
from requant.provenance import read_provenance
from requant.records import (
    BenchmarkRecord,
    DeployRecord,
    EvaluateRecord,
    FileEntry,
    PackRecord,
    PublishRecord,
    VerifyRecord,
    read_json,
    write_json,
)
from requant.wording import size

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

COMPUTES = False  # it sends what is there

RESULTS = Path("results")
HOW_TO_UPLOAD = "snakemake --cores 1 publish --config upload=true"
HUBS_OWN = (".gitattributes",)  # files of a repository that the hub writes
AT_ONCE = 4  # large files on their way together
PASSED = {"verify": VerifyRecord, "evaluate": EvaluateRecord, "deploy": DeployRecord}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Subject:
    """A release to be published. config: the one that builds it alone, as it is now; beside: names of the files that
    go with those of pack.json, SHA256SUMS and signature not counted; signed: whether the config names a key."""

    release: str
    repository: str
    branch: str
    private: bool
    config: dict[str, Any]
    beside: list[str]
    signed: bool

    @property
    def folder(self) -> Path:
        return RESULTS / self.release / "model"

    @property
    def record(self) -> Path:
        return RESULTS / self.release / "publish.json"

    @property
    def build(self) -> str:
        """The command that makes the release, and all its records, as the config has it."""
        return f"`snakemake --cores all {self.folder / (SIGNATURE if self.signed else SUMS)}`"


# What is asked for


def releases_asked(config: Config, release: object) -> dict[str, str]:
    """{release: repository} of `--config release=`, or of the whole build where that is None.

    Raises RequantError if there is no such release, or a release has no repository.
    """
    if release is not None and str(release) not in config.releases:
        known = ", ".join(sorted(config.releases))
        raise RequantError(f"--config release={plain(release, 80)}: not in `releases`; there: {known}")
    names = config.build if release is None else [str(release)]
    for name in names:
        if name not in config.publish.repositories:
            raise RequantError(
                f"publish.repositories.{name}: missing; expected where the release goes: ORG/NAME on the hub"
            )
    return {name: config.publish.repositories[name] for name in names}


def upload_asked(upload: object) -> bool:
    """Whether `--config upload=` asks for more than a dry run. RequantError if it is neither true nor false."""
    words = {"true": True, "false": False, "none": False}  # Snakemake reads True and False alone as such
    if (word := str(upload).lower()) in words:
        return words[word]
    raise RequantError(f"--config upload={plain(upload, 80)}: expected true or false")


# Whether a release may go out


def passed(subject: Subject) -> dict[str, FileEntry]:
    """The files of a release that has been verified, evaluated and served as it is here and as the config has it.

    Reads every file. Raises RequantError naming the first record or file that is missing, stale or strange.
    """
    folder = RESULTS / subject.release
    manifest = _record(subject, "pack", PackRecord)
    for stage, kind in PASSED.items():
        found = _record(subject, stage, kind)
        path = folder / f"{stage}.json"
        if found.packed != manifest.digest:
            of = "does not say which files it is of" if found.packed is None else "is of other files than pack.json"
            raise RequantError(f"{path}: {of}; expected the record of this checkpoint: delete it, then {subject.build}")
        if (problem := failed(found)) is not None:
            raise RequantError(f"{path}: {problem}; a release that has not passed is not published")
    _record(subject, "benchmark", BenchmarkRecord)
    files = _listed(subject, manifest)
    _check_config(subject)
    _check_card(subject)
    return files


def failed(record: VerifyRecord | EvaluateRecord | DeployRecord) -> str | None:
    """Why a record is none of a release that passed; None if it is.

    An evaluation has no limit of its own: it has passed when it has been made.
    """
    if isinstance(record, DeployRecord):
        return None if record.verdict == "passed" else f"verdict {record.verdict!r} found; expected 'passed'"
    if isinstance(record, VerifyRecord) and record.limits:
        if not record.lowest_cosine >= record.limits["cosine"]:
            return f"lowest cosine {record.lowest_cosine} found; expected {record.limits['cosine']} or more"
        if not record.highest_relative_mae <= record.limits["relative_mae"]:
            found, most = record.highest_relative_mae, record.limits["relative_mae"]
            return f"highest relative MAE {found} found; expected {most} or less"
    return None


def _record(subject: Subject, stage: str, kind: type[Result]) -> Result:
    path = RESULTS / subject.release / f"{stage}.json"
    if not path.exists():
        raise RequantError(f"{path}: not there; a release is published after {stage}: {subject.build}")
    return read_json(path, kind)


def _listed(subject: Subject, manifest: PackRecord) -> dict[str, FileEntry]:
    """Every file of the folder, held against SHA256SUMS, pack.json and the signature."""
    folder, sums = subject.folder, subject.folder / SUMS
    if not sums.is_file():
        raise RequantError(f"{sums}: not there; it is made last: {subject.build}")
    expected = sums_of(sums.read_text(encoding="utf-8"))
    made = {*manifest.files, *subject.beside}
    if other := sorted(made ^ expected.keys()):
        raise RequantError(f"{sums}: of an earlier build: {other[0]} is not in both; {subject.build}")
    names = {*expected, SUMS, *([SIGNATURE] if subject.signed else [])}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    if strange := sorted(found - names):
        raise RequantError(
            f"{folder / strange[0]}: not made by this build; expected the release's files alone: move it away"
        )
    if missing := sorted(names - found):
        raise RequantError(f"{folder / missing[0]}: not there; expected a file of the release: {subject.build}")
    files = {name: file_entry(folder / name) for name in sorted(names)}
    for name, digest in expected.items():
        packed = manifest.files[name].sha256 if name in manifest.files else digest
        if not files[name].sha256 == digest == packed:
            where = SUMS if files[name].sha256 != digest else "pack.json"
            raise RequantError(
                f"{folder / name}: sha256 {files[name].sha256[:16]}... found; {where} has other bytes: put it back as "
                f"it was, or delete it, then {subject.build}"
            )
    if subject.signed:
        _check_signature(folder / SIGNATURE, {name: entry for name, entry in files.items() if name != SIGNATURE})
    return files


def sums_of(text: str) -> dict[str, str]:
    """{name: sha256} of the lines of a SHA256SUMS; other lines are passed over."""
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (.+)$", text, re.MULTILINE)}


def _check_signature(path: Path, files: Mapping[str, FileEntry]) -> None:
    """Holds the files that a signature names against those that are here; who signed is the reader's to check."""
    try:
        envelope = json.loads(path.read_text(encoding="utf-8"))["dsseEnvelope"]
        signed = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        digests = {resource["name"]: resource["digest"] for resource in signed}
    except (ValueError, KeyError, TypeError):
        raise RequantError(f"{path}: no signature of a model; delete it to have it made anew") from None
    if other := sorted(
        name for name in {*digests, *files} if digests.get(name) != getattr(files.get(name), "sha256", None)
    ):
        raise RequantError(f"{path}: of another {other[0]} than the one here; delete it to have it made anew")


def _check_config(subject: Subject) -> None:
    """Holds the config that the release was built by against that of today."""
    path = subject.folder / "provenance.json"
    built = read_provenance(path).request.config
    if key := differing_key(built, json.loads(json.dumps(subject.config))):
        raise RequantError(f"{path}: built by another config than today's ({key}); {subject.build}")


def differing_key(one: Any, other: Any, key: str = "") -> str | None:
    """The first key, dotted, whose values in two configs differ; None if none does."""
    if isinstance(one, dict) and isinstance(other, dict):
        inside = (differing_key(one.get(name), other.get(name), f"{key}.{name}") for name in {**one, **other})
        return next(filter(None, inside), None)
    return None if one == other else key.removeprefix(".") or "the whole"


def _check_card(subject: Subject) -> None:
    """A card that is older than a record of its numbers tells of others."""
    card = subject.folder / "README.md"
    for stage in ("pack", *PASSED, "benchmark"):
        path = RESULTS / subject.release / f"{stage}.json"
        if path.stat().st_mtime_ns > card.stat().st_mtime_ns:
            again = f"`snakemake --cores all --forcerun release_card -- {subject.folder / SUMS}`"
            raise RequantError(f"{path}: newer than {card}, which tells of it; make the card anew: {again}")


# What is said of it


def message_of(subject: Subject) -> str:
    """The message of the commit."""
    scheme = subject.config["releases"][subject.release]["scheme"]
    return f"{subject.release}: {scheme} checkpoint, verified, evaluated and served by requant"


def announcement(subject: Subject, files: Mapping[str, FileEntry]) -> str:
    """What an upload would send where, a line for each file."""
    from huggingface_hub import constants

    kind = "private" if subject.private else "public"
    lines = [
        f"{subject.release} -> {constants.ENDPOINT}/{subject.repository}, branch {subject.branch}, {kind}: "
        f"{len(files)} files, {shown(total(files))}",
        f"  commit message: {message_of(subject)}",
        *(f"  {shown(entry.size):>8}  {name}" for name, entry in files.items()),
    ]
    return "\n".join(lines)


def shown(count: int) -> str:
    """Bytes as cards have them, for a terminal."""
    return size(count).replace("\u00a0", " ")


def total(files: Mapping[str, FileEntry]) -> int:
    """Bytes of all files."""
    return sum(entry.size for entry in files.values())


# The upload


def check_token() -> str:
    """The name that the hub knows the token by. RequantError if there is none, or it may not write."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise RequantError("no token: set HF_TOKEN, or run `hf auth login`; expected one that may write")
    if not re.fullmatch(r"[!-~]+", token):
        raise RequantError("the token has characters that no token has; set HF_TOKEN anew, or run `hf auth login`")
    with _discreet():
        known = _asked(lambda: HfApi().whoami(), "the token")
    role = known.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise RequantError(f"the token of {brief(known.get('name'))} may only read; expected one that may write")
    return str(known.get("name"))


def publish(subject: Subject, files: Mapping[str, FileEntry]) -> PublishRecord:
    """Brings `files` of the release to its repository, sees that it has these and no others, and writes the record.

    A file that is there already is not sent again. Raises RequantError with one line if the hub refuses, if the
    repository has files of other origin, or is private where the config says public, or the other way round.
    """
    from huggingface_hub import constants

    start = time.monotonic()
    check_writable(RESULTS / subject.release)
    sent = Sending(subject, files)
    with _discreet():
        committed = _asked(sent.bring, subject.repository, kept=lambda: sent.done)
        there = _asked(lambda: listed_on_hub(subject.repository, committed), subject.repository)
    if problem := next(iter(differences(subject.folder, files, there)), None):
        raise RequantError(f"{subject.repository} at {committed}: {problem}; what the hub has is not the release")
    if not sent.commits:
        progress(f"{subject.release}: {subject.repository} has it already, at {committed}: nothing was uploaded")
        if subject.record.exists() and read_json(subject.record, PublishRecord).commit == committed:
            return read_json(subject.record, PublishRecord)
    record = PublishRecord(
        release=subject.release,
        endpoint=constants.ENDPOINT,
        repository=subject.repository,
        branch=subject.branch,
        commit=committed,
        private=subject.private,
        files=dict(files),
        bytes=total(files),
        published=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
    )
    write_json(subject.record, record)
    return record


@dataclass
class Sending:
    """An upload that can be begun anew at any point: what the hub has is asked for, and only the rest is sent."""

    subject: Subject
    files: Mapping[str, FileEntry]
    commits: int = 0
    done: int = 0  # bytes of files that have come

    def bring(self) -> str:
        """The commit whose files are those of the release, which is made unless the branch is at it.

        Raises what huggingface_hub raises; RequantError if the repository is not one to be published to.
        """
        from huggingface_hub import CommitOperationDelete, HfApi

        subject, api = self.subject, HfApi()
        there = self._repository(api)
        self._check_visibility(there)
        replaced = self._replaced(there)
        wanted = [name for name, _ in unlike(subject.folder, self.files, there)]
        if not wanted and not replaced:
            return there.sha
        additions = self._ahead(api, wanted)
        self.commits += 1
        return self._commit(api, [*additions, *(CommitOperationDelete(name) for name in replaced)], there.sha)

    def _repository(self, api: "HfApi") -> "ModelInfo":
        """What the hub says of the branch; repository and branch are made if they are not there."""
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        subject = self.subject
        try:
            return api.model_info(subject.repository, revision=subject.branch, files_metadata=True, timeout=30)
        except RevisionNotFoundError:
            self._check_visibility(api.model_info(subject.repository, timeout=30))
            api.create_branch(subject.repository, branch=subject.branch, exist_ok=True)
        except RepositoryNotFoundError:
            progress(f"{subject.release}: making {subject.repository}, {'private' if subject.private else 'public'}")
            try:
                api.create_repo(subject.repository, private=subject.private)
            except HfHubHTTPError as error:
                raise self._not_made(error) from None
            if subject.branch != "main":
                api.create_branch(subject.repository, branch=subject.branch, exist_ok=True)
        return api.model_info(subject.repository, revision=subject.branch, files_metadata=True, timeout=30)

    def _not_made(self, error: "HfHubHTTPError") -> Exception:
        """What is said of a repository that the hub does not make: `error` itself, if that may pass."""
        name, owner = self.subject.repository, self.subject.repository.split("/")[0]
        if error.response.status_code == 409:
            return RequantError(f"{name}: taken: the hub has a repository of this name that the token can't read")
        if error.response.status_code in (401, 403):
            return RequantError(f"{name}: 403 Forbidden: the token may not make repositories of {owner}")
        return error

    def _check_visibility(self, there: "ModelInfo") -> None:
        if there.private is not None and bool(there.private) != self.subject.private:
            is_now, wanted = ("private", "public") if there.private else ("public", "private")
            raise RequantError(
                f"{self.subject.repository}: {is_now} on the hub, and publish.private says {wanted}: change one of "
                "them; requant changes neither"
            )

    def _replaced(self, there: "ModelInfo") -> list[str]:
        """Files of the repository that are of an earlier release, by its SHA256SUMS, and not of this one.

        RequantError if there are others: they would be taken for the release's.
        """
        names = {sibling.rfilename: sibling for sibling in there.siblings or []}
        others = sorted(names.keys() - self.files.keys() - set(HUBS_OWN))
        if not others:
            return []
        earlier = {SIGNATURE}
        if SUMS in names:
            earlier |= sums_of(fetched(self.subject.repository, there.sha, names[SUMS])).keys()
        if strange := [name for name in others if name not in earlier]:
            raise RequantError(
                f"{self.subject.repository}: {brief(strange[0])} is there, which no release of requant brought: remove "
                "it there, or publish to another repository"
            )
        return others

    def _ahead(self, api: "HfApi", names: Sequence[str]) -> list["CommitOperationAdd"]:
        """The additions of a commit, large files uploaded."""
        from huggingface_hub import CommitOperationAdd

        additions = []
        for start in range(0, len(names), AT_ONCE):
            some = [CommitOperationAdd(name, self.subject.folder / name) for name in names[start : start + AT_ONCE]]
            api.preupload_lfs_files(
                self.subject.repository, some, revision=self.subject.branch, num_threads=AT_ONCE, free_memory=False
            )
            additions += some
            self.done = max(self.done, sum(self.files[add.path_in_repo].size for add in additions))
            count = f"{len(additions)} of {len(names)} files"
            progress(f"{self.subject.release}: {count} ready, {shown(self.done)}")
        return additions

    def _commit(self, api: "HfApi", operations: list, parent: str) -> str:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            made = api.create_commit(
                self.subject.repository,
                operations,
                commit_message=message_of(self.subject),
                revision=self.subject.branch,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            if error.response.status_code == 412:
                raise RequantError(
                    f"{self.subject.repository}: someone else committed to {self.subject.branch} meanwhile; look what "
                    "is there, then run the same command again"
                ) from None
            raise
        return made.oid


def unlike(folder: Path, files: Mapping[str, FileEntry], there: "ModelInfo") -> Iterator[tuple[str, str]]:
    """(name, what the hub has) of each file of the release that the hub has not, or not as it is here.

    Large files are told by their sha256, others by their git hash.
    """
    siblings = {sibling.rfilename: sibling for sibling in there.siblings or []}
    for name, entry in files.items():
        sibling = siblings.get(name)
        if sibling is None:
            yield name, "not there"
        elif sibling.lfs is not None:
            if (sibling.lfs.size, sibling.lfs.sha256) != (entry.size, entry.sha256):
                yield name, f"{sibling.lfs.size} bytes, sha256 {sibling.lfs.sha256[:16]}..."
        elif sibling.blob_id != git_hash(folder / name):
            yield name, f"{sibling.size} bytes, git hash {str(sibling.blob_id)[:16]}..."


def differences(folder: Path, files: Mapping[str, FileEntry], there: "ModelInfo") -> Iterator[str]:
    """A line on each file that the hub lacks, has otherwise, or has besides those of the release."""
    for name, found in unlike(folder, files, there):
        yield f"{name}: {found}; expected {files[name].size} bytes, sha256 {files[name].sha256[:16]}..."
    for sibling in there.siblings or []:
        if sibling.rfilename not in files and sibling.rfilename not in HUBS_OWN:
            yield f"{brief(sibling.rfilename)}: there; expected the release's files alone"


def git_hash(path: Path) -> str:
    """The name that git gives a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fetched(repository: str, commit: str, sibling: "RepoSibling") -> str:
    """The text of a small file of a repository."""
    content = io.BytesIO()
    get(file_url(repository, commit, sibling.rfilename), content, sibling.size)
    return content.getvalue().decode(errors="replace")


# What the hub and its library say


def _asked(action: Callable[[], Result], what: str, kept: Callable[[], int] = nothing_comes) -> Result:
    """As `hub.patiently`; whatever else is raised becomes one line too, without tokens and signed addresses."""

    def bare() -> Result:
        try:
            return action()
        except RuntimeError as error:  # huggingface_hub's `Error while uploading 'file' to the Hub.`
            if isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise

    try:
        return patiently(bare, what, kept)
    except RequantError as error:
        raise RequantError(masked(str(error))) from None
    except Exception as error:
        raise RequantError(
            f"{what}: {type(error).__name__}: {plain(masked(str(error)))}; run the same command again"
        ) from None


def masked(text: str) -> str:
    """`text` without the token, anything that looks like one, and what is signed in addresses."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "[token]")
    text = re.sub(r"hf_\w{8,}|(?<=Bearer )\S+", "[token]", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?[signed]", text)


@contextmanager
def _discreet() -> Iterator[None]:
    """Keeps the libraries' own logs, which have signed addresses and what servers say, and their progress bars out."""
    os.environ["HF_XET_LOG_DEST"] = os.devnull  # read when hf_xet is first used; else in HF_HOME/xet/logs
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)

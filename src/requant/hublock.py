"""The lock of a hub repository: weights are described by the hub and by their headers, not downloaded.

It says what `locks.make_lock` says of a directory with the same files; only `revision` is the commit.
"""

import io
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from requant.carried import as_listed, carried, left_behind
from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.hub import COMMIT, file_url, first_bytes, get, patiently
from requant.locks import index_agrees
from requant.records import FileEntry, Lock, TensorEntry
from requant.safetensors_io import HEADER_LIMIT, header_of
from requant.shards import INDEX, only_shard, with_drafting
from requant.tokenizer import check_convertible

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

FIRST_BYTES = 100_000  # holds nearly every header
REQUESTS = 8  # headers asked for at once


def make_hub_lock(model: str, hub: str, revision: str | None) -> Lock:
    """The lock of `hub` (org/name) at the commit `revision`. Downloads its small files and the headers of its shards.

    Raises RequantError if `revision` is no commit, and then names the one to write down; if the repository is not
    to be had; or if it holds no checkpoint.
    """
    listed = repository(hub, revision)
    if revision is None or not COMMIT.fullmatch(revision):
        raise RequantError(
            f"models.{model}.revision: {revision!r} may move; now it is the commit {listed.sha}: "
            f"write `revision: {listed.sha}` into the config"
        )
    if listed.sha != revision:
        raise RequantError(f"{hub}: the hub answers with commit {listed.sha} where {revision} was asked for")
    siblings = {sibling.rfilename: sibling for sibling in listed.siblings or []}
    with tempfile.TemporaryDirectory() as folder:
        small = [name for name in ("config.json", INDEX, *carried(siblings)) if name in siblings]
        files = {name: _downloaded(hub, revision, siblings[name], Path(folder)) for name in small}
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        check_convertible(checkpoint)

        def described(name: str) -> dict[str, TensorEntry]:
            files[name] = _described(hub, siblings, name)
            return header(hub, revision, name, files[name].size)

        if INDEX in siblings:
            named = checkpoint.stored_index()
            shards = sorted(set(named.values()))
            with ThreadPoolExecutor(REQUESTS) as pool:
                headers = dict(zip(shards, pool.map(described, shards), strict=True))
        else:
            shard = only_shard(hub, siblings)
            headers = {shard: described(shard)}
            named = dict.fromkeys(headers[shard], shard)

    def names_in(shard: str) -> list[str]:
        headers[shard] = described(shard)
        return list(headers[shard])

    stored = with_drafting(config, named, siblings, names_in)
    shards = set(stored.values())
    tensors = {name: entry for shard in sorted(shards) for name, entry in headers[shard].items()}
    index_agrees(f"{hub} at {revision}", stored, tensors)
    files = {name: entry for name, entry in files.items() if name in shards or not name.endswith(".safetensors")}
    return Lock(
        model=model,
        revision=revision,
        files=dict(sorted(files.items())),
        tensors=tensors,
        config=config,
        left_behind=left_behind(as_listed(siblings), files),
    )


def repository(hub: str, revision: str | None) -> "ModelInfo":
    """What the hub says of a repository at a revision: commit (`sha`) and files with their sizes (`siblings`)."""
    from huggingface_hub import HfApi

    what = f"{hub} at {revision}" if revision else hub
    return patiently(lambda: HfApi().model_info(hub, revision=revision, files_metadata=True, timeout=30), what)


def header(hub: str, commit: str, name: str, size: int) -> dict[str, TensorEntry]:
    """The tensors of a shard of `size` bytes, from its first bytes alone.

    Raises RequantError if it is no safetensors file, or if its header and its size disagree.
    """
    url, what = file_url(hub, commit, name), f"{hub}/{name}"
    start = patiently(lambda: first_bytes(url, min(FIRST_BYTES, size)), what)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if len(start) < 8 + length <= min(size, HEADER_LIMIT):
        start = patiently(lambda: first_bytes(url, 8 + length), what)
    return header_of(io.BytesIO(start), size, Path(what))


def _downloaded(hub: str, commit: str, sibling: "RepoSibling", folder: Path) -> FileEntry:
    """Size and hash of a small file, which is left in `folder`."""
    name = sibling.rfilename
    path = folder / name
    path.parent.mkdir(exist_ok=True)

    def fetch() -> None:
        with path.open("wb") as file:
            get(file_url(hub, commit, name), file, sibling.size)

    patiently(fetch, f"{hub}/{name}")
    return file_entry(path)


def _described(hub: str, siblings: dict[str, "RepoSibling"], name: str) -> FileEntry:
    """Size and hash of a shard, as the hub gives them."""
    if name not in siblings:
        raise RequantError(f"{hub}: {name} is not there; {INDEX} names it")
    if (stored := siblings[name].lfs) is None:
        raise RequantError(f"{hub}/{name}: stored without LFS, so the hub gives no sha256; expected weights in LFS")
    return FileEntry(size=stored.size, sha256=stored.sha256)

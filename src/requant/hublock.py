"""The lock of a hub repository: weights are described by the hub and by their headers, not downloaded.

It says what `locks.make_lock` says of a directory with the same files; only `revision` is the commit.
"""

import io
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from requant.checkpoint import INDEX, TOKENIZER_FILES, Checkpoint
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.hub import COMMIT, file_url, first_bytes, get, patiently
from requant.locks import index_agrees
from requant.records import FileEntry, Lock, TensorEntry
from requant.safetensors_io import HEADER_LIMIT, header_of

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
        small = [name for name in ("config.json", INDEX, *TOKENIZER_FILES) if name in siblings]
        files = {name: _downloaded(hub, revision, siblings[name], Path(folder)) for name in small}
        checkpoint = Checkpoint(folder)
        config = checkpoint.config
        index = checkpoint.stored_index() if INDEX in siblings else None
        shards = checkpoint.shards if index is not None else [only_shard(hub, list(siblings))]
    for name in shards:
        files[name] = _described(hub, siblings, name)
    with ThreadPoolExecutor(REQUESTS) as pool:
        headers = pool.map(lambda name: header(hub, revision, name, files[name].size), shards)
        tensors = {name: entry for part in headers for name, entry in part.items()}
    if index is not None:
        index_agrees(f"{hub} at {revision}", index, tensors)
    return Lock(model=model, revision=revision, files=dict(sorted(files.items())), tensors=tensors, config=config)


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
    path = folder / sibling.rfilename

    def fetch() -> None:
        with path.open("wb") as file:
            get(file_url(hub, commit, path.name), file, sibling.size)

    patiently(fetch, f"{hub}/{path.name}")
    return file_entry(path)


def _described(hub: str, siblings: dict[str, "RepoSibling"], name: str) -> FileEntry:
    """Size and hash of a shard, as the hub gives them."""
    if name not in siblings:
        raise RequantError(f"{hub}: {name} is not there; {INDEX} names it")
    if (stored := siblings[name].lfs) is None:
        raise RequantError(f"{hub}/{name}: stored without LFS, so the hub gives no sha256; expected weights in LFS")
    return FileEntry(size=stored.size, sha256=stored.sha256)


def only_shard(where: str, names: list[str]) -> str:
    """The shard among `names`, where there is no index. Raises RequantError naming `where` if there is not one."""
    shards = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if len(shards) != 1:
        raise RequantError(f"{where}: {len(shards)} safetensors files and no {INDEX}; expected an index, or one file")
    return shards[0]

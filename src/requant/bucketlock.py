"""The lock of a model in a bucket: what `locks.make_lock` says of a directory with the same files.

A bucket has no SHA-256 of a large file, so every byte is read once; no weights are kept.
"""

import hashlib
import io
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from requant.bucket import Folder, patiently, pieces, sizes
from requant.carried import TEMPLATES, carried, left_behind
from requant.checkpoint import Checkpoint
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.jobs import progress
from requant.locks import index_agrees, revision_of
from requant.records import FileEntry, Lock, TensorEntry
from requant.safetensors_io import HEADER_LIMIT, header_of
from requant.shards import INDEX, only_shard, with_drafting
from requant.tokenizer import check_convertible

READERS = 8  # shards read at once


def make_bucket_lock(model: str, url: str) -> Lock:
    """The lock of the checkpoint at `url`. Raises RequantError if it can't be read, or is no checkpoint."""
    folder = Folder.of(url)
    stored = sizes(folder)
    stored |= {f"{TEMPLATES}/{name}": size for name, size in sizes(folder.below(TEMPLATES)).items()}
    if "config.json" not in stored:
        raise RequantError(f"{folder.url('config.json')}: not there; expected a checkpoint")
    with tempfile.TemporaryDirectory() as aside:
        small = [name for name in ("config.json", INDEX, *carried(stored)) if name in stored]
        for name in small:
            patiently(lambda name=name: _save(folder, name, stored[name], Path(aside) / name), folder.url(name))
        files = {name: file_entry(Path(aside) / name) for name in small}
        checkpoint = Checkpoint(aside)
        config = checkpoint.config
        check_convertible(checkpoint)
        if INDEX in stored:
            named = checkpoint.stored_index()
        else:
            shard = only_shard(url, stored)
            named = dict.fromkeys(_header(folder, shard, stored[shard]), shard)
    index = with_drafting(config, named, stored, lambda shard: _header(folder, shard, stored[shard]))
    shards = sorted(set(index.values()))
    if missing := [name for name in shards if name not in stored]:
        raise RequantError(f"{folder.url(missing[0])}: not there; {INDEX} names it")
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda name: _read(folder, name, stored[name]), shards))
    tensors = {name: entry for _, found in read for name, entry in found.items()}
    files |= {name: entry for name, (entry, _) in zip(shards, read, strict=True)}
    index_agrees(url, index, tensors)
    return Lock(
        model=model,
        revision=revision_of(files),
        files=dict(sorted(files.items())),
        tensors=tensors,
        config=config,
        left_behind=left_behind(stored, files),
    )


def _save(folder: Folder, name: str, size: int, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(pieces(folder, name, 0, size)) if size else b"")


def _header(folder: Folder, name: str, size: int) -> dict[str, TensorEntry]:
    """The tensors of a shard, of which no more than the header is read."""
    head = bytearray()

    def read() -> None:
        for piece in pieces(folder, name, len(head), size) if len(head) < size else ():
            head.extend(piece)
            if len(head) >= _header_bytes(head):
                return

    patiently(read, folder.url(name), kept=lambda: len(head))
    return header_of(io.BytesIO(bytes(head)), size, Path(folder.bucket, folder.key(name)))


def _read(folder: Folder, name: str, size: int) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """Size and hash of a shard, and its tensors. Only its header is kept, and what is read is not read again."""
    digest, head, done = hashlib.sha256(), bytearray(), 0

    def read() -> None:
        nonlocal done
        for piece in pieces(folder, name, done, size) if done < size else ():
            digest.update(piece)
            done += len(piece)
            if len(head) < _header_bytes(head):
                head.extend(piece)

    patiently(read, folder.url(name), kept=lambda: done)
    progress(f"{folder.url(name)}: {size} bytes read")
    tensors = header_of(io.BytesIO(bytes(head)), size, Path(folder.bucket, folder.key(name)))
    return FileEntry(size=size, sha256=digest.hexdigest()), tensors


def _header_bytes(head: bytes | bytearray) -> int:
    """How many bytes of a shard hold its header, as far as its first ones tell."""
    return min(8 + struct.unpack("<Q", head[:8])[0], HEADER_LIMIT) if len(head) >= 8 else 8

"""Locks: what a model is, pinned. Made from a directory by reading headers and hashing; checked shard by shard."""

import gc
import hashlib
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

from requant import fp8
from requant.architecture import block_count, block_of, expert_counts, family
from requant.carried import is_source_name
from requant.checkpoint import INDEX, Checkpoint
from requant.config_json import causal_class
from requant.dtypes import READ
from requant.errors import RequantError, brief
from requant.hashing import file_entry
from requant.naming import entries, left_out
from requant.records import CheckedFile, FileEntry, Lock, SourceRecord, TensorEntry, read_json
from requant.safetensors_io import DTYPE_BYTES, LARGEST_RANK, read_header, tensor_digests
from requant.untrusted import is_tensor_name

SHA256 = re.compile(r"[0-9a-f]{64}")
REVISION = re.compile(r"sha256:[0-9a-f]{64}|[0-9a-f]{40}")
LARGEST = 2**63  # no size, offset or extent is as large


@cache
def tensors_of(directory: str) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `directory` by its name in the files, from the headers of its shards.

    Raises RequantError if a shard is missing or cut short, or if index and headers disagree.
    """
    checkpoint = Checkpoint(directory)
    tensors: dict[str, TensorEntry] = {}
    for shard in checkpoint.shards:
        path = checkpoint.directory / shard
        if not path.exists():
            raise RequantError(f"{path}: not there; {INDEX} names it")
        tensors |= read_header(path)
    index_agrees(checkpoint.directory, checkpoint.stored, tensors)
    return tensors


def index_agrees(where: str | Path, index: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    """Raises RequantError if `index` (tensor: shard) and the `tensors` found in the headers disagree."""
    for name, shard in index.items():
        if name not in tensors or tensors[name].shard != shard:
            found = tensors[name].shard if name in tensors else "no shard"
            raise RequantError(f"{where}: {name}: found in {found}; {INDEX} says {shard}")
    if extra := sorted(tensors.keys() - index.keys()):
        raise RequantError(f"{where}: {extra[0]} is in a shard; {INDEX} does not name it")


def make_lock(model: str, directory: str | Path) -> Lock:
    """The lock of the checkpoint in `directory`: every file hashed, every tensor located."""
    checkpoint = Checkpoint(directory)
    files = {name: file_entry(checkpoint.directory / name) for name in checkpoint.files}
    return Lock(
        model=model,
        revision=revision_of(files),
        files=files,
        tensors=tensors_of(str(directory)),
        config=checkpoint.config,
        left_behind=checkpoint.left_behind(),
    )


def revision_of(files: dict[str, FileEntry]) -> str:
    """A name for exactly these files: sha256 over their names and hashes."""
    lines = "".join(f"{entry.sha256}  {name}\n" for name, entry in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def check_file(directory: str | Path, name: str, lock: Lock | None) -> FileEntry:
    """Hashes one file of a checkpoint and compares it, and its tensors if it is a shard, with the lock.

    Raises RequantError naming the file, what was found and what the lock expects. Without a lock the hash is only
    taken, and a shard's header checked for itself.
    """
    path = Path(directory) / name
    if not path.exists():
        raise RequantError(f"{path}: not there; expected by {'the lock' if lock else INDEX}")
    found = file_entry(path)
    if lock is None:
        if name.endswith(".safetensors"):
            read_header(path)
        return found
    if name not in lock.files:
        raise RequantError(f"{path}: not in the lock of {lock.model}; make the lock anew if the source has changed")
    wanted = lock.files[name]
    if found.size != wanted.size:
        raise RequantError(f"{path}: {found.size} bytes found; the lock of {lock.model} expects {wanted.size}")
    if found.sha256 != wanted.sha256:
        raise RequantError(f"{path}: sha256 {found.sha256} found; the lock of {lock.model} expects {wanted.sha256}")
    if name.endswith(".safetensors"):
        tensors = read_header(path)
        expected = {tensor: entry for tensor, entry in lock.tensors.items() if entry.shard == name}
        if tensors != expected:
            differing = next(key for key in sorted(tensors | expected) if tensors.get(key) != expected.get(key))
            raise RequantError(
                f"{path}: {differing}: {tensors.get(differing)} found; the lock expects {expected.get(differing)}"
            )
    if name == "config.json" and Checkpoint(directory).stored_config != lock.config:
        raise RequantError(f"{path}: the lock of {lock.model} has other settings; take the lock from version control")
    return found


def checked_file(directory: str | Path, name: str, lock: Lock | None) -> CheckedFile:
    """The record of a file that `check_file` lets pass, with the digest of each of its tensors."""
    start = time.monotonic()
    entry, path = check_file(directory, name, lock), Path(directory) / name
    tensors = tensor_digests(path) if name.endswith(".safetensors") else {}
    return CheckedFile(**entry.model_dump(), tensors=tensors, seconds=time.monotonic() - start)


def source_record(
    model: str, directory: str | Path, lock: Lock | None, checked: dict[str, CheckedFile]
) -> SourceRecord:
    """Describes a checked source; parameters and experts are counted from its tensors.

    Raises RequantError for an unknown family, tensors that requant doesn't read, or blocks that config.json counts but
    no tensor has.
    """
    files = {name: FileEntry(size=entry.size, sha256=entry.sha256) for name, entry in checked.items()}
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    stored = lock.tensors if lock else tensors_of(str(directory))
    family(config)
    check_stored(directory, config, stored)
    tensors = entries(fp8.without_scales(stored), config)
    blocks = block_count(config)
    held = {block_of(name, blocks) for name in tensors} - {None}
    if missing := sorted(set(range(blocks)) - held):
        raise RequantError(f"{directory}: block {missing[0]} has no tensors; config.json counts {blocks} blocks")
    experts = expert_counts(list(tensors), blocks)
    if len(set(experts.values())) > 1:
        raise RequantError(f"{directory}: MoE blocks with {sorted(set(experts.values()))} experts; expected one number")
    dtypes: dict[str, int] = {}
    for entry in tensors.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + elements(entry)
    return SourceRecord(
        model=model,
        path=str(directory),
        revision=lock.revision if lock else revision_of(files),
        files=files,
        parameters=sum(dtypes.values()),
        tensors=len(tensors),
        blocks=blocks,
        architecture=causal_class(config),
        dtypes=dtypes,
        routed_experts=next(iter(experts.values()), 0),
        shared_experts=shared_experts(config, list(tensors)),
        experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
        moe_blocks=len(experts),
        dense_blocks=blocks - len(experts),
        tensors_left_out=left_out(fp8.without_scales(stored)),
        files_left_behind=sorted({*(lock.left_behind if lock else []), *checkpoint.left_behind(lock and lock.files)}),
        seconds=sum(entry.seconds for entry in checked.values()),
    )


def check_stored(directory: str | Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Raises RequantError unless every tensor of the model is in a dtype that is read, FP8 with factors that fit
    config.json.

    `tensors`: by the names in the files, factors of FP8 weights included.
    """
    try:
        fp8.check_scales(tensors, fp8.block_size(config))
    except RequantError as error:
        raise RequantError(f"{directory}: {error}") from None
    weights = fp8.without_scales(tensors)
    for name in sorted(weights.keys() - left_out(weights).keys()):
        if weights[name].dtype not in READ:
            raise RequantError(
                f"{directory}: {name} is stored in {weights[name].dtype}; expected BF16, F16, F32, or {fp8.DTYPE} with "
                "its factors"
            )


def elements(entry: TensorEntry) -> int:
    """Number of elements of a tensor."""
    count = 1
    for extent in entry.shape:
        count *= extent
    return count


def shared_experts(config: dict, tensors: list[str]) -> int:
    """Shared experts of a MoE block: as many as its shared tensors' config says, 0 if there are no such tensors."""
    return config.get("n_shared_experts", 1) if any(".shared_experts." in name for name in tensors) else 0


REMEDY = "take it from version control, or make it anew by the job `lock`"


def check_lock(path: str | Path, lock: Lock) -> None:
    """Raises RequantError naming an entry that no lock has: a path for a name, a hash of another format, a tensor in a
    file that is not locked or beyond its end.
    """
    if not REVISION.fullmatch(lock.revision):
        raise RequantError(
            f"{path}: revision: {brief(lock.revision)}; expected a commit of 40 hex digits, or sha256:...; {REMEDY}"
        )
    for name, entry in lock.files.items():
        if not is_source_name(name):
            raise RequantError(f"{path}: files: {brief(name)}; expected a file name without a path; {REMEDY}")
        if not SHA256.fullmatch(entry.sha256):
            raise RequantError(f"{path}: {name}: sha256 {brief(entry.sha256)}; expected 64 hex digits; {REMEDY}")
        if not 0 <= entry.size < LARGEST:
            raise RequantError(f"{path}: {name}: size {brief(entry.size)}; expected a number of bytes; {REMEDY}")
    for name, entry in lock.tensors.items():
        if wrong := _wrong_in(name, entry, lock.files):
            raise RequantError(f"{path}: tensors: {brief(name)}: {wrong}; {REMEDY}")


def _wrong_in(name: str, entry: TensorEntry, files: dict[str, FileEntry]) -> str | None:
    """What is wrong with a tensor of a lock, and what was expected; None if nothing is."""
    if not is_tensor_name(name):
        return "expected a tensor's name, printable and not too long"
    if entry.shard not in files:
        return f"shard {brief(entry.shard)}; expected one of `files`"
    if entry.dtype not in DTYPE_BYTES:
        return f"dtype {brief(entry.dtype)}; expected one of {', '.join(DTYPE_BYTES)}"
    if len(entry.shape) > LARGEST_RANK or not all(0 <= extent < LARGEST for extent in entry.shape):
        return f"shape {brief(entry.shape)}; expected numbers of 0 or more"
    end, size = entry.offset + elements(entry) * DTYPE_BYTES[entry.dtype], files[entry.shard].size
    if not 0 <= entry.offset <= end <= size:
        return f"bytes {brief(entry.offset)}..{brief(end)}; expected some of the {size} of {entry.shard}"
    return None


def load_lock(path: str | Path) -> Lock:
    """The lock in `path`. RequantError if it is missing, of another shape, of other files than it says, or says what
    can't be (`check_lock`).

    Python's collector of cycles rests meanwhile: it would walk the growing mass of entries again and again.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        lock = read_json(path, Lock, REMEDY)
        check_lock(path, lock)
    finally:
        if collecting:
            gc.enable()
    if lock.revision.startswith("sha256:") and lock.revision != (wanted := revision_of(lock.files)):
        raise RequantError(f"{path}: revision: {lock.revision} found; its files give {wanted}; {REMEDY}")
    return lock

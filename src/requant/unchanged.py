"""Whether files still are what a record says: sizes and times first, and only where these leave a doubt the bytes.

Hashes that were needed once are kept with the size, time and inode of their file, so that they are not made again.
"""

import contextlib
import json
import os
from functools import cache
from pathlib import Path

from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import CalibrationRecord, CheckedFile, FileEntry, PackRecord, read_json
from requant.whole import written_whole

COMPUTES = False  # what is found here decides whether a job runs, not what it writes
HASHES = Path(".snakemake/requant.hashes.json")
MOST_OLD = 1000  # lines on files that have changed since
SUMS = "SHA256SUMS"


def is_as_checked(path: str, record: str) -> bool:
    """Whether a file of a source is the one of its `record`, results/source/{model}/files/{file}.json."""
    if not (Path(path).exists() and Path(record).exists()):
        return False
    return _is_still(Path(path), read_json(record, CheckedFile), os.stat(record).st_mtime_ns)


def is_as_read(path: str, record: str) -> bool:
    """Whether a text is the one that the tokens of `record`, a calibration.json, were made of."""
    if not (Path(path).exists() and Path(record).exists()):
        return False
    found = read_json(record, CalibrationRecord)
    sources = [*found.calibration_set.sources, *found.heldout_set.sources]
    hashes = {source.sha256 for source in sources if source.path == path}
    return hashes == {hash_of(path)} if os.stat(path).st_mtime_ns > os.stat(record).st_mtime_ns else bool(hashes)


def is_as_packed(release: str, block: int) -> bool:
    """Whether a block file of a release is the shard that it was packed as, by the manifest."""
    folder = Path("results") / release
    path = folder / f"blocks/{block}.safetensors"
    shard = next(
        (entry for name, entry in _manifest(release).items() if name.startswith(f"model-{block + 1:05d}-")), None
    )
    return shard is not None and path.exists() and _is_still(path, shard, os.stat(folder / "pack.json").st_mtime_ns)


def gone(release: str, blocks: int, outputs: list[str]) -> list[str]:
    """Files of a release that was packed, or was once, that are not there any more, by the name of an output that
    makes each again: blocks and their records, `outputs` of the stages behind, and files of the manifest.

    The release's chain is not among them: it may be deleted.
    """
    folder = Path("results") / release
    manifest = str(folder / "pack.json")
    if not any(Path(path).exists() for path in [manifest, *outputs]):
        return []
    kept = [f"{folder}/blocks/{block}.{kind}" for block in range(blocks) for kind in ("safetensors", "json")]
    packed = _manifest(release)
    listed = [manifest] if any(not (folder / "model" / name).exists() for name in packed) else []
    return [path for path in [*kept, manifest, *outputs] if not Path(path).exists()] + listed


def check_release(release: str, finished: dict[str, int]) -> None:
    """Raises RequantError if a file of a packed release was changed by hand: one that differs from its manifest, or an
    output in `finished` that is newer than its job left it (by time in ns) and differs from SHA256SUMS.

    Only a file of another size, or one that is newer than what it is compared with, is read.
    """
    folder = Path("results") / release
    for name, entry in _manifest(release).items():
        written = os.stat(folder / "pack.json").st_mtime_ns
        path = folder / "model" / name
        if path.exists() and not _is_still(path, entry, written):
            raise RequantError(_changed(path, entry.sha256, folder / "pack.json"))
    for name, digest in _sums(folder / "model" / SUMS).items():
        path = folder / "model" / name
        left = finished.get(str(path))
        if left is not None and path.exists() and path.stat().st_mtime_ns > left and hash_of(path) != digest:
            raise RequantError(_changed(path, digest, folder / "model" / SUMS))


def hash_of(path: str | Path) -> str:
    """The sha256 of a file; read only if its size, time or inode is not that of its last hash here."""
    found = os.stat(path)
    identity = [found.st_size, found.st_mtime_ns, found.st_ino]
    *known, digest = _hashes().get(str(path), [None])
    if known != identity:
        digest = file_entry(path).sha256
        _remember({str(path): [*identity, digest]})
    return digest


def _remember(found: dict[str, list]) -> None:
    """Adds hashes to the cache, as a line of their own: two processes may do so, and one that is killed loses none."""
    _hashes().update(found)
    with contextlib.suppress(OSError):  # without a cache it is hashed again
        HASHES.parent.mkdir(parents=True, exist_ok=True)
        with HASHES.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(found)}")  # behind a line that was cut short


@cache
def _hashes() -> dict[str, list]:
    """{path: [size, time in ns, inode, sha256]} by the last line on each; written anew where most lines are old."""
    found: dict[str, list] = {}
    try:
        lines = HASHES.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        with contextlib.suppress(ValueError):
            entries = json.loads(line)
            if isinstance(entries, dict):
                found |= {path: entry for path, entry in entries.items() if isinstance(entry, list) and len(entry) == 4}
    if len(lines) > 2 * len(found) + MOST_OLD:
        with contextlib.suppress(OSError, RequantError), written_whole(HASHES) as partial:
            partial.write_text(json.dumps(found), encoding="utf-8")
    return found


def _is_still(path: Path, entry: FileEntry, since: int) -> bool:
    found = path.stat()
    return found.st_size == entry.size and (found.st_mtime_ns <= since or hash_of(path) == entry.sha256)


@cache
def _manifest(release: str) -> dict[str, FileEntry]:
    path = Path("results") / release / "pack.json"
    return read_json(path, PackRecord).files if path.exists() else {}


def _sums(path: Path) -> dict[str, str]:
    """{file name: sha256} of a SHA256SUMS as sha256sum writes it; of none if it is not there."""
    if not path.exists():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    return {name.removeprefix("*"): digest for digest, name in lines}


def _changed(path: Path, expected: str, record: Path) -> str:
    """The line on a file that was changed by hand."""
    twin = next((block for block in (record.parent / "blocks").glob("*.safetensors") if block.samefile(path)), None)
    also = "" if twin is None else f"; it is one file with {twin}, which was changed with it"
    what = "it, and the build makes it again" if twin is None else "both, and the build makes them again"
    return (
        f"{path}: changed by hand: sha256 {hash_of(path)} found, {record} has {expected}{also}: "
        f"put it back as it was, or delete {what}"
    )

"""What a job reads is what was checked: files of the source, and those of a release, by the hashes in their records.

Small files are hashed when a job starts. Tensors are held against their digests while they are read
(`safetensors_io`): nothing is read twice, and a block's job pays for what it reads alone.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from requant.carried import TEMPLATES, is_source_name
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import CheckedFile, FileEntry, PackRecord, read_json
from requant.safetensors_io import expect

COMPUTES = False  # it reads what a job was given, and lets it go on or not

RECORD = re.compile(rf"results/source/[^/]+/files/(?P<file>({TEMPLATES}/)?[^/]+)\.json")
WHOLE_SOURCE = re.compile(r"results/source/[^/]+/source\.json")
MANIFEST = re.compile(r"results/[^/]+/pack\.json")


def check_inputs(inputs: Iterable[str], source: str | None = None) -> None:
    """Holds a job's inputs against the records among them: those of a source's files, and the manifest of a release.

    source: the folder of the source's files, whatever its name is. Other inputs that are called as one of them, or as
    a record, are let be. Raises RequantError naming the first file that is not as its record says.
    """
    paths = [Path(os.path.relpath(path)) for path in inputs]
    names = {} if source is None else _names_in(Path(os.path.relpath(source)), paths)
    others = [path for path in paths if path not in names]
    records = _source_records(others)
    for path, name in names.items():
        if name in records:
            _check_source(path, records[name])
    for path in others:
        if MANIFEST.fullmatch(str(path)):
            _check_release(path)


def _source_records(paths: list[Path]) -> dict[str, Path]:
    """The records results/source/{model}/files/{file}.json, by file; that of a whole source stands for all of them."""
    folders = [path.parent / "files" for path in paths if WHOLE_SOURCE.fullmatch(str(path))]
    found = [*paths, *(path for folder in folders for path in folder.rglob("*.json"))]
    return {record["file"]: path for path in found if (record := RECORD.fullmatch(str(path)))}


def _names_in(source: Path, paths: Iterable[Path]) -> dict[Path, str]:
    """Of the `paths` those of files of the source in that folder, with their names."""
    names = {path: path.relative_to(source).as_posix() for path in paths if path.is_relative_to(source)}
    return {path: name for path, name in names.items() if is_source_name(name)}


def _check_source(path: Path, record: Path) -> None:
    checked = read_json(record, CheckedFile)
    if path.suffix == ".safetensors":
        expect(path, checked.tensors)
    else:
        _check(path, checked, f"when it was checked ({record}); restore it")


def _check_release(manifest: Path) -> None:
    for name, entry in read_json(manifest, PackRecord).files.items():
        if not name.endswith(".safetensors"):
            _check(manifest.parent / "model" / name, entry, f"when it was packed; delete {manifest} to rebuild")


def _check(path: Path, entry: FileEntry, when: str) -> None:
    found = file_entry(path) if path.is_file() else None
    if found is None or (found.size, found.sha256) != (entry.size, entry.sha256):
        what = f"sha256 {found.sha256[:16]}..." if found else "not there"
        raise RequantError(f"{path}: {what}; {entry.sha256[:16]}... {when}")

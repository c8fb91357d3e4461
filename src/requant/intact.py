"""What a job reads is what was checked: files of the source, and those of a release, by the hashes in their records.

Small files are hashed when a job starts. Tensors are held against their digests while they are read
(`safetensors_io`): nothing is read twice, and a block's job pays for what it reads alone.
"""

from collections.abc import Iterable
from pathlib import Path

from requant.carried import TEMPLATES, in_templates, name_of_record
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import CheckedFile, FileEntry, PackRecord, read_json
from requant.safetensors_io import expect

COMPUTES = False  # it reads what a job was given, and lets it go on or not


def check_inputs(inputs: Iterable[str]) -> None:
    """Holds a job's inputs against the records among them: those of a source's files, and the manifest of a release.

    Raises RequantError naming the first file that is not as its record says.
    """
    paths = [Path(path) for path in inputs]
    records = _source_records(paths)
    for path in paths:
        name = next((name for name in (in_templates(path), path.name) if name in records), None)
        if name is not None and path not in records.values():
            _check_source(path, records[name])
    for path in paths:
        if path.name == "pack.json":
            _check_release(path)


def _source_records(paths: list[Path]) -> dict[str, Path]:
    """The records results/source/{model}/files/{file}.json, by file; that of a whole source stands for all of them."""
    folders = [path.parent / "files" for path in paths if path.name == "source.json"]
    found = {name_of_record(path, folder): path for folder in folders for path in folder.rglob("*.json")}
    for path in paths:
        folder = path.parent.parent if path.parent.name == TEMPLATES else path.parent
        if folder.name == "files" and folder.parents[1].name == "source":
            found[name_of_record(path, folder)] = path
    return found


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

"""Fetch the files that the locks name into folders, and note what flake.nix pins of them: `make wheelhouses`.

    wheelhouse.py FOLDER                fills FOLDER/base, FOLDER/cuda, FOLDER/test where the locks of
                                        wheelhouse.json are not the present ones, and writes it anew
    wheelhouse.py FOLDER --locks LOCKS  fills FOLDER from these locks: what flake.nix runs

The files are taken as they are: nothing is built from source here, so a folder has the same hash wherever it is
filled. The pip of build.lock chooses them, for Python 3.11; pip's own settings say where it looks.
"""

import argparse
import base64
import hashlib
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

ENVS = Path(__file__).resolve().parent
RECORD = ENVS / "wheelhouse.json"

# A change of one list fetches its own folder anew, not the gigabytes of CUDA. torch-cpu.lock has one file, whose
# hash is in the lock: flake.nix reads it there.
WHEELHOUSES = {
    "base": ("build.lock", "requirements.lock"),
    "cuda": ("torch-cuda.lock",),
    "test": ("test.lock",),
}
CHUNK = 1 << 24  # bytes read at once


def download(folder: Path, locks: list[Path]) -> None:
    """Fill `folder` with the files of `locks`, each checked by pip against its hash. Files that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tools:
        venv.create(tools, with_pip=True, symlinks=True)
        pip = [f"{tools}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        checked = ["--require-hashes", "--no-deps"]
        subprocess.run([*pip, "install", *checked, "--requirement", str(ENVS / "build.lock")], check=True)
        wanted = [option for lock in locks for option in ("--requirement", str(lock))]
        command = [*pip, "download", *checked, "--no-build-isolation", "--dest", str(folder), *wanted]
        subprocess.run(command, check=True)


def _archived(folder: Path) -> Iterator[bytes]:
    """The bytes of a folder of plain files as Nix archives them (NAR; Dolstra, The purely functional software
    deployment model, 2006, figure 5.2)."""

    def text(*values: str) -> bytes:
        return b"".join(_padded(value.encode()) for value in values)

    yield text("nix-archive-1", "(", "type", "directory")
    for path in sorted(folder.iterdir(), key=lambda path: path.name.encode()):
        size = path.stat().st_size
        yield text("entry", "(", "name", path.name, "node", "(", "type", "regular", "contents")
        yield size.to_bytes(8, "little")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
        yield bytes(-size % 8)
        yield text(")", ")")
    yield text(")")


def _padded(value: bytes) -> bytes:
    return len(value).to_bytes(8, "little") + value + bytes(-len(value) % 8)


def nar_hash(folder: Path) -> str:
    """`sha256-...` of a folder of plain files, as `nix hash path` gives it."""
    digest = hashlib.sha256()
    for part in _archived(folder):
        digest.update(part)
    return f"sha256-{base64.b64encode(digest.digest()).decode()}"


def lock_hashes(name: str) -> dict[str, str]:
    """{lock: SHA-256} of the locks that the wheelhouse `name` is filled from."""
    return {lock: hashlib.sha256((ENVS / lock).read_bytes()).hexdigest() for lock in WHEELHOUSES[name]}


def described(folder: Path, name: str) -> dict:
    """What wheelhouse.json holds of a folder: its hash, and the locks that it was filled from."""
    sizes = [path.stat().st_size for path in folder.iterdir()]
    return {"hash": nar_hash(folder), "locks": lock_hashes(name), "files": len(sizes), "bytes": sum(sizes)}


def fill_changed(folder: Path) -> None:
    """Fill from empty each wheelhouse whose locks are not those of wheelhouse.json, and write that anew."""
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name, locks in WHEELHOUSES.items():
        if record.get(name, {}).get("locks") == lock_hashes(name):
            print(f"{name}: of the same locks as before")
            continue
        if (folder / name).exists():
            raise SystemExit(f"{folder / name} exists: name a new folder, so that no file of another lock is in it")
        download(folder / name, [ENVS / lock for lock in locks])
        record[name] = described(folder / name, name)
        print(f"{name}: {record[name]['files']} files, {record[name]['bytes']} bytes, {record[name]['hash']}")
    partial = RECORD.with_name(f".{RECORD.name}.new")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(RECORD)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--locks", type=Path, nargs="+")
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(f"envs/wheelhouse.py: Python {sys.version.split()[0]}: flake.nix takes the files for 3.11")
    if arguments.locks:
        download(arguments.folder, arguments.locks)
    else:
        fill_changed(arguments.folder)


if __name__ == "__main__":
    main()

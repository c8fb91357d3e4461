"""What tests of bad input share: one clear line is all that comes of it, and nothing changed on disk."""

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from requant.errors import RequantError

LONGEST = 700  # characters of a line


def listing(folder: Path) -> dict[str, str]:
    """Every path below `folder` with what it is: the hash of a file, the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = "directory" if path.is_dir() else "other"
        found[str(path.relative_to(folder))] = what
    return found


@contextlib.contextmanager
def refused(folder: Path, *parts: str) -> Iterator[None]:
    """The block raises RequantError with one line that has all of `parts`, and leaves `folder` as it is."""
    before = listing(folder)
    with pytest.raises(RequantError) as raised:
        yield
    line = str(raised.value)
    assert line.isprintable() and len(line) <= LONGEST, line
    for part in parts:
        assert part in line, line
    assert listing(folder) == before


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Rewrites a JSON file after `change` has edited its data, or given other data."""
    data = json.loads(path.read_text())
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed))


def edit_header(shard: Path, change: Callable[[dict], object]) -> None:
    """Rewrites the header of a shard, with its true length, after `change` has edited it or given another."""
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    write_header(shard, json.dumps(header if changed is None else changed).encode(), raw[8 + length :])


def write_header(shard: Path, header: bytes, values: bytes = b"", length: int | None = None) -> None:
    """Writes a shard of that header; `length` is what it claims, by default the true one."""
    shard.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + values)

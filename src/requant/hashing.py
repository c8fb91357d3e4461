"""SHA-256 of files, as locks, manifests and provenance have it."""

import hashlib
from pathlib import Path

from requant.records import FileEntry
from requant.untrusted import open_file


def file_entry(path: str | Path) -> FileEntry:
    """Size and sha256 of a file, read in one pass."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(size=file.tell(), sha256=digest)

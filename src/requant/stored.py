"""A build's results in a bucket, and back in another directory, so that Snakemake goes on there.

Every content is one object under the name of its SHA-256; `build.json`, written last, says which file has which content
and time. So a store that was cut leaves the one before whole, what is there already is not sent again, and a file that
came back is the one that was stored. Times and Snakemake's records come along: without them, all would be made again.
"""

import base64
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field

from requant import gate
from requant.bucket import Folder, names_below, patiently, pieces, put, sizes
from requant.buildlock import alone
from requant.errors import RequantError, brief
from requant.inside import copy, folder_of, move
from requant.inside import put as put_inside
from requant.records import Record
from requant.unchanged import hash_of
from requant.untrusted import json_object

COMPUTES = False  # where results are kept, not what is in them
MANIFEST = "build.json"
OBJECTS = "objects"
KEPT = ("results", "logs", "locks", "model_card.md", ".snakemake/metadata")
# Where a build has links: to files that it fetched into its own directory, or found elsewhere.
LINKS_INSIDE, LINKS_OUT = re.compile("results/source/.+"), re.compile("results/source/[^/]+/checkpoint/[^/]+")
PARTIAL = ".snakemake/restore"

Say = Callable[[str], None]
Time = Annotated[int, Field(ge=0, lt=2**62)]


class StoredFile(Record):
    """A file: size, SHA-256, time of its last change, and the name of an earlier file that it shares its bytes with."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    mtime_ns: Time
    same_as: str | None = None


class StoredLink(Record):
    """A symbolic link; one into the build's own directory is told from there."""

    target: str
    inside: bool
    mtime_ns: Time


class StoredBuild(Record):
    """build.json: all that was stored of a build, by paths in its directory."""

    files: dict[str, StoredFile]
    links: dict[str, StoredLink]


def store(directory: Path, url: str, without: Sequence[str], say: Say) -> StoredBuild:
    """Puts the results of the build in `directory` to `url`, but for paths that match a pattern of `without`.

    Outputs of jobs that are under way, and files that are being written, are left out.
    """
    folder = Folder.of(url)
    paths = [path for path in _kept(directory) if not any(fnmatch(path, pattern) for pattern in without)]
    if not paths:
        raise RequantError(f"{directory}: nothing to store; expected a directory of a build, with results/")
    found, strange = _described(directory, paths)
    for path in strange:
        say(f"warning: {path}: a link that no build makes: it is left out, and so is what it leads to")
    there = names_below(folder, OBJECTS)
    contents = {entry.sha256: (path, entry.size) for path, entry in found.files.items()}
    missing = {digest: at for digest, at in contents.items() if digest not in there}
    all_bytes, to_send = (sum(size for _, size in some.values()) for some in (contents, missing))
    say(f"{len(found.files)} files, {all_bytes} bytes; to be sent: {to_send} bytes")
    for digest, (path, _) in missing.items():
        _send(directory / path, folder, f"{OBJECTS}/{digest}", found.files[path])
    text = found.model_dump_json().encode()
    patiently(lambda: put(folder, MANIFEST, io.BytesIO(text)), folder.url(MANIFEST))
    return found


def restore(directory: Path, url: str, say: Say) -> StoredBuild:
    """Brings what is stored at `url` into `directory`; what is there already has to be the same.

    Nothing is written outside of it, whatever the manifest says and whatever links are there. Raises RequantError
    before anything is written if a file of another content is in the way, if the manifest is none of `store`'s, and if
    a build lives here.
    """
    folder = Folder.of(url)
    found = _manifest(folder)
    with alone(directory):
        here = {path for path, entry in found.files.items() if _is_here(directory, path, entry)}
        absent = {path: entry for path, entry in found.files.items() if path not in here}
        for path in found.links:
            _check_link(directory, path)
        contents = {entry.sha256: entry.size for entry in absent.values()}
        say(f"{len(found.files)} files, {len(absent)} of them not here; to be fetched: {sum(contents.values())} bytes")
        for path, entry in sorted(found.files.items(), key=lambda each: each[1].same_as is not None):
            if path in absent:
                if entry.same_as is not None:
                    _link_or_copy(directory, entry.same_as, path)
                else:
                    _fetch(directory, folder, path, entry)
            _date(directory, path, entry.mtime_ns)
        shutil.rmtree(directory / PARTIAL, ignore_errors=True)
        for path, link in found.links.items():
            _link(directory, path, link, say)
    return found


def _kept(directory: Path) -> Iterator[str]:
    """Paths of what is stored of a build."""
    under_way = _under_way(directory / ".snakemake/incomplete")
    for kept in KEPT:
        top = directory / kept
        for path in sorted([top, *top.rglob("*")] if top.is_dir() else [top]):
            name = path.relative_to(directory)
            if (path.is_symlink() or path.is_file()) and not _passes(name) and str(name) not in under_way:
                yield str(name)


def _passes(name: Path) -> bool:
    """Whether a file is there for a moment only: in the course of being written or deleted, or for this build alone."""
    written = name.name.startswith(".") and name.suffix in (".partial", ".lock")
    return written or name.name.startswith(".nfs") or name.name == gate.FAILURE or ".cache" in name.parts


def _under_way(marks: Path) -> set[str]:
    """Outputs of jobs that have begun and not ended, by the marks that Snakemake leaves: paths in base64, long ones in
    parts that begin with @."""
    found = [path.relative_to(marks).parts for path in marks.rglob("*") if path.is_file()]
    encoded = ["".join(part.removeprefix("@") for part in parts) for parts in found]
    return {base64.urlsafe_b64decode(text).decode() for text in encoded}


def _described(directory: Path, paths: Iterable[str]) -> tuple[StoredBuild, list[str]]:
    """What is stored of the `paths`, and links that no build makes."""
    files, links, first = {}, {}, {}
    for name in paths:
        path = directory / name
        try:
            found = path.lstat()
            if path.is_symlink():
                target, top = Path(os.readlink(path)), directory.resolve()
                inside = target.is_relative_to(top)
                shown = target.relative_to(top).as_posix() if inside else str(target)
                links[name] = StoredLink(target=shown, inside=inside, mtime_ns=found.st_mtime_ns)
                continue
            digest = hash_of(path)
        except FileNotFoundError:
            continue  # it went while this looked
        twin = first.setdefault(found.st_ino, name) if found.st_nlink > 1 else name
        same_as = twin if twin != name else None
        files[name] = StoredFile(size=found.st_size, sha256=digest, mtime_ns=found.st_mtime_ns, same_as=same_as)
    strange = [name for name, link in links.items() if _wrong_link(name, link, links) is not None]
    return StoredBuild(files=files, links={name: links[name] for name in links.keys() - strange}), sorted(strange)


def _send(path: Path, folder: Folder, name: str, entry: StoredFile) -> None:
    def send() -> None:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if (found.st_size, found.st_mtime_ns) != (entry.size, entry.mtime_ns):
                raise RequantError(f"{path}: changed while it was stored; run the same command again")
            put(folder, name, file)

    patiently(send, folder.url(name))


def _manifest(folder: Folder) -> StoredBuild:
    where = folder.url(MANIFEST)
    size = sizes(folder).get(MANIFEST)
    if size is None:
        raise RequantError(f"{where}: not there; expected what `requant store` wrote")
    text = patiently(lambda: b"".join(pieces(folder, MANIFEST, 0, size)), where)
    try:
        found = StoredBuild.model_validate(json_object(text, where))
    except (RequantError, ValueError):
        raise RequantError(f"{where}: expected what `requant store` wrote") from None
    if (wrong := _wrong(found)) is not None:
        raise RequantError(f"{where}: {wrong}")
    return found


def _wrong(found: StoredBuild) -> str | None:
    """What of a manifest no `store` has written, and what was expected; None if nothing is."""
    named = {*found.files, *found.links}
    for path in named:
        if not _is_path(path):
            return f"{brief(path)}; expected a path in {', '.join(KEPT)}"
        if above := [str(top) for top in PurePosixPath(path).parents if str(top) in named]:
            return f"{brief(path)}: below {brief(above[0])}, a file or a link; expected a folder"
    for path, entry in found.files.items():
        first = found.files.get(entry.same_as) if entry.same_as else entry
        if first is None or first.sha256 != entry.sha256 or (entry.same_as and first.same_as):
            return f"{brief(path)}: same_as {brief(entry.same_as)}; expected a file of the same sha256"
    for path, link in found.links.items():
        if path in found.files:
            return f"{brief(path)}: a file and a link; expected one of them"
        if (wrong := _wrong_link(path, link, found.links)) is not None:
            return f"{brief(path)}: {wrong}"
    return None


def _wrong_link(path: str, link: StoredLink, links: Collection[str]) -> str | None:
    """Why no build has this link: nothing else that it writes may go through one, nor out of its directory."""
    if not link.inside:
        if not LINKS_OUT.fullmatch(path):
            return f"a link to {brief(link.target)}; expected it in results/source/MODEL/checkpoint"
        whole = PurePosixPath(link.target).is_absolute() and link.target.isprintable()
        return None if whole else f"a link to {brief(link.target)}; expected an absolute path"
    if not LINKS_INSIDE.fullmatch(path) or not _is_path(link.target):
        return f"a link to {brief(link.target)}; expected it in results/source, to a path in {', '.join(KEPT)}"
    through = [str(part) for part in (PurePosixPath(link.target), *PurePosixPath(link.target).parents)]
    return f"a link through {brief(through[0])}; expected a file" if {*through} & {*links} else None


def _is_path(path: str) -> bool:
    """Whether `path` is one that a file of a stored build may have."""
    parts = PurePosixPath(path).parts
    plain = path.isprintable() and path == str(PurePosixPath(path)) and ".." not in parts
    return plain and any(_is_below(path, kept) for kept in KEPT)


def _is_below(path: str, top: str) -> bool:
    return PurePosixPath(path).is_relative_to(top)


def _is_here(directory: Path, path: str, entry: StoredFile) -> bool:
    try:
        with folder_of(directory, path) as (handle, name):
            found = os.stat(name, dir_fd=handle, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode):
        raise RequantError(f"{directory / path}: no plain file; expected none, or the file that was stored")
    if found.st_size != entry.size or hash_of(directory / path) != entry.sha256:
        raise RequantError(f"{directory / path}: another file is here; expected none, or the one that was stored")
    return True


def _check_link(directory: Path, path: str) -> None:
    """Raises RequantError if anything but a link is where a link is to be."""
    try:
        with folder_of(directory, path) as (handle, name):
            found = os.stat(name, dir_fd=handle, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISLNK(found.st_mode):
        raise RequantError(f"{directory / path}: no link; expected none, or the link that was stored")


def _fetch(directory: Path, folder: Folder, path: str, entry: StoredFile) -> None:
    """Brings a file to its place; what had come of it before is taken up."""
    name = f"{OBJECTS}/{entry.sha256}"
    partial = directory / PARTIAL / entry.sha256
    partial.parent.mkdir(parents=True, exist_ok=True)

    def append() -> None:
        with partial.open("ab") as file:
            if file.tell() < entry.size:
                for piece in pieces(folder, name, file.tell(), entry.size):
                    file.write(piece)

    patiently(append, folder.url(name), kept=lambda: partial.stat().st_size if partial.exists() else 0)
    if hash_of(partial) != entry.sha256:
        found = hash_of(partial)
        partial.unlink()
        raise RequantError(f"{folder.url(name)}: sha256 {found} found; {folder.url(MANIFEST)} expects its name")
    put_inside(directory, path, lambda handle, temporary: move(partial, handle, temporary))


def _link_or_copy(directory: Path, first: str, path: str) -> None:
    """Gives the file `first` the second name `path`; copies where the file system has no hard links."""

    def write(handle: int, temporary: str) -> None:
        with folder_of(directory, first) as (folder, name):
            try:
                os.link(name, temporary, src_dir_fd=folder, dst_dir_fd=handle, follow_symlinks=False)
            except OSError:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                try:
                    copy(file, handle, temporary)
                finally:
                    os.close(file)

    put_inside(directory, path, write)


def _date(directory: Path, path: str, mtime_ns: int) -> None:
    with folder_of(directory, path) as (handle, name):
        os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=handle, follow_symlinks=False)


def _link(directory: Path, path: str, link: StoredLink, say: Say) -> None:
    target = directory.resolve() / link.target if link.inside else Path(link.target)
    put_inside(directory, path, lambda handle, temporary: os.symlink(target, temporary, dir_fd=handle))
    _date(directory, path, link.mtime_ns)
    if not (directory / path).exists():
        say(f"warning: {path}: {target} is not there: it will be downloaded, and what was made of it made again")

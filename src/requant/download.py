"""Files of a hub model: fetched to their place under a name of their own, checked, and only then put there.

huggingface_hub 2.4.0 begins a download anew in each process and does not check what came over HTTP. So the transfer
is its `http_get`, which appends to a file that outlives the process; the hash of the lock decides whether the file
gets its name. What stands at that name already is checked too, and never deleted.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from requant.errors import RequantError
from requant.hub import file_url, get, patiently
from requant.jobs import progress
from requant.locks import checked_file
from requant.records import CheckedFile, Lock
from requant.whole import written_whole

COMPUTES = False  # files are what their hashes say, whoever fetched them


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit, and where its files go: `directory`, or huggingface_hub's cache."""

    hub: str
    commit: str
    directory: str | None = None

    @property
    def root(self) -> Path:
        """The directory of the files, or the cache's folder of the repository."""
        if self.directory:
            return Path(os.path.expanduser(self.directory)).absolute()
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE).absolute() / f"models--{self.hub.replace('/', '--')}"

    def place(self, name: str) -> Path:
        """Where a file is once it is whole; in the cache a link to its blob."""
        return self.root / name if self.directory else self.root / "snapshots" / self.commit / name

    def partial(self, name: str) -> Path:
        """Where a file grows; its name is the file's, so that it can be checked there."""
        return self.root / ".cache" / "requant" / self.commit / name


def obtain(model: HubModel, name: str, lock: Lock) -> CheckedFile:
    """Sees to it that a file of the lock is at `model.place(name)`, with the hash and the tensors of the lock.

    Raises RequantError with the file, what was found and what is expected, if what is there or what the hub sends
    is something else; and if the hub does not send it.
    """
    from huggingface_hub.utils import WeakFileLock

    place, partial = model.place(name), model.partial(name)
    if not place.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(partial.with_name(f"{name}.lock")):  # another build may want the same file
            if not place.exists() and not _linked_in_cache(model, name):
                found = fetch(model, name, lock)
                _put(model, name)
                return found
    try:
        return checked_file(place.parent, name, lock)
    except RequantError as error:
        raise RequantError(f"{error}; to have it downloaded anew, remove {place.resolve()}") from None


def fetch(model: HubModel, name: str, lock: Lock, again: bool = True) -> CheckedFile:
    """Downloads a file to `model.partial(name)`, from where an earlier attempt ended, and checks it.

    With `again` a file that is not the lock's is fetched once more from its beginning: what had come of it before
    may have been bad.
    """
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    what, wanted, partial = f"{model.hub}/{name}", lock.files[name], model.partial(name)
    if wanted.size > MAX_HTTP_DOWNLOAD_SIZE:
        raise RequantError(
            f"{what}: {wanted.size} bytes; the hub sends {MAX_HTTP_DOWNLOAD_SIZE} at most over HTTP: fetch it with "
            f"`hf download {model.hub} {name} --revision {model.commit}`, and it is taken from there"
        )
    if _size(partial) > wanted.size:
        partial.unlink()
    start, had = time.monotonic(), _size(partial)
    patiently(lambda: _append(model, name, wanted.size), what, kept=lambda: _size(partial))
    progress(f"{what}: {wanted.size - had} of {wanted.size} bytes in {time.monotonic() - start:.1f} s")
    try:
        return checked_file(partial.parent, name, lock)
    except RequantError as error:
        partial.unlink()
        reason = str(error).replace(str(partial), what)
        if not again:
            raise RequantError(f"{reason}; the hub sent it so when asked again, too") from None
    progress(f"{reason}; fetched once more")
    return fetch(model, name, lock, again=False)


def link(place: Path, path: Path) -> None:
    """Makes `path` a symbolic link to `place`; what was there is replaced."""
    with written_whole(path) as partial:
        partial.symlink_to(place)


def bytes_to_come(model: HubModel, lock: Lock) -> int:
    """Bytes of the lock's files that are not in their place, less what has come of them."""
    missing = [name for name in lock.files if not model.place(name).exists()]
    return sum(max(lock.files[name].size - _size(model.partial(name)), 0) for name in missing)


def check_download_room(name: str, model: HubModel, lock: Lock) -> None:
    """Raises RequantError if the disk that the files of the model `name` go to can't hold those still to come."""
    wanted = bytes_to_come(model, lock)
    there = next(folder for folder in (model.root, *model.root.parents) if folder.exists())
    if wanted > (free := shutil.disk_usage(there).free):
        raise RequantError(
            f"models.{name}: {wanted} bytes are still to be downloaded to {model.root}; {free} are free there: make "
            f"room, or name another place (models.{name}.directory, or the environment's HF_HUB_CACHE)"
        )


def _append(model: HubModel, name: str, size: int) -> None:
    with model.partial(name).open("ab") as file:
        get(file_url(model.hub, model.commit, name), file, size)


def _put(model: HubModel, name: str) -> None:
    """Moves a checked file to its place; in the cache, to the blob that the hub's entity tag names."""
    if model.directory:
        os.replace(model.partial(name), model.place(name))
        return
    blob = _blob(model, name)
    blob.parent.mkdir(parents=True, exist_ok=True)
    os.replace(model.partial(name), blob)
    _linked_in_cache(model, name)


def _linked_in_cache(model: HubModel, name: str) -> bool:
    """Whether the file's blob is in the cache; huggingface_hub then links it into the snapshot of the commit."""
    if model.directory or not _blob(model, name).exists():
        return False
    from huggingface_hub import hf_hub_download

    patiently(lambda: hf_hub_download(model.hub, name, revision=model.commit), f"{model.hub}/{name}")
    return True


def _blob(model: HubModel, name: str) -> Path:
    from huggingface_hub import get_hf_file_metadata

    url, what = file_url(model.hub, model.commit, name), f"{model.hub}/{name}"
    found = patiently(lambda: get_hf_file_metadata(url, timeout=30), what)
    if not found.etag or "/" in found.etag:
        raise RequantError(f"{what}: entity tag {found.etag!r} found; expected the hash that names its blob")
    return model.root / "blobs" / found.etag


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

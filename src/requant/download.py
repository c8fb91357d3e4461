"""Files of a model from the hub or a bucket: fetched to their place under a name of their own, checked, and only then
put there.

huggingface_hub 2.4.0 begins a download anew in each process and does not check what came over HTTP. So the transfer
is its `http_get`, which appends to a file that outlives the process; the hash of the lock decides whether the file
gets its name. What stands at that name already is checked too, and never deleted.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from requant.bucket import BucketModel
from requant.carried import folder_of
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

    def what(self, name: str) -> str:
        """A file, for messages."""
        return f"{self.hub}/{name}"

    def is_here(self, name: str) -> bool:
        """Whether a file is in its place, or its blob in the cache: huggingface_hub then links it into the snapshot."""
        if self.place(name).exists():
            return True
        if self.directory or not self._blob(name).exists():
            return False
        self._link(name)
        return True

    def grow(self, name: str, size: int) -> None:
        """Appends to a partial file what it lacks of `size` bytes."""
        from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

        partial = self.partial(name)
        if size > MAX_HTTP_DOWNLOAD_SIZE:
            raise RequantError(
                f"{self.what(name)}: {size} bytes; the hub sends {MAX_HTTP_DOWNLOAD_SIZE} at most over HTTP: fetch it "
                f"with `hf download {self.hub} {name} --revision {self.commit}`, and it is taken from there"
            )

        def append() -> None:
            with partial.open("ab") as file:
                get(file_url(self.hub, self.commit, name), file, size)

        patiently(append, self.what(name), kept=lambda: _size(partial))

    def put(self, name: str) -> None:
        """Moves a checked file to its place; in the cache, to the blob that the hub's entity tag names."""
        if self.directory:
            self.place(name).parent.mkdir(exist_ok=True)
            os.replace(self.partial(name), self.place(name))
            return
        blob = self._blob(name)
        blob.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.partial(name), blob)
        self._link(name)

    def _link(self, name: str) -> None:
        from huggingface_hub import hf_hub_download

        patiently(lambda: hf_hub_download(self.hub, name, revision=self.commit), self.what(name))

    def _blob(self, name: str) -> Path:
        from huggingface_hub import get_hf_file_metadata

        url = file_url(self.hub, self.commit, name)
        found = patiently(lambda: get_hf_file_metadata(url, timeout=30), self.what(name))
        if not found.etag or "/" in found.etag:
            raise RequantError(
                f"{self.what(name)}: entity tag {found.etag!r} found; expected the hash that names its blob"
            )
        return self.root / "blobs" / found.etag


RemoteModel = HubModel | BucketModel


def remote_model(place: dict[str, str | None]) -> RemoteModel:
    """The model that `place` tells of: the fields of a `HubModel`, or of a `BucketModel`."""
    return BucketModel(**place) if "bucket" in place else HubModel(**place)


def obtain(model: RemoteModel, name: str, lock: Lock) -> CheckedFile:
    """Sees to it that a file of the lock is at `model.place(name)`, with the hash and the tensors of the lock.

    Raises RequantError with the file, what was found and what is expected, if what is there or what is sent is
    something else; and if it is not sent.
    """
    from huggingface_hub.utils import WeakFileLock

    place, partial = model.place(name), model.partial(name)
    if not place.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(partial.with_name(f"{partial.name}.lock")):  # another build may want the same file
            if not model.is_here(name):
                found = fetch(model, name, lock)
                model.put(name)
                return found
    try:
        return checked_file(folder_of(place, name), name, lock)
    except RequantError as error:
        raise RequantError(f"{error}; to have it downloaded anew, remove {place.resolve()}") from None


def fetch(model: RemoteModel, name: str, lock: Lock, again: bool = True) -> CheckedFile:
    """Downloads a file to `model.partial(name)`, from where an earlier attempt ended, and checks it.

    With `again` a file that is not the lock's is fetched once more from its beginning: what had come of it before
    may have been bad.
    """
    what, wanted, partial = model.what(name), lock.files[name], model.partial(name)
    if _size(partial) > wanted.size:
        partial.unlink()
    start, had = time.monotonic(), _size(partial)
    model.grow(name, wanted.size)
    progress(f"{what}: {wanted.size - had} of {wanted.size} bytes in {time.monotonic() - start:.1f} s")
    try:
        return checked_file(folder_of(partial, name), name, lock)
    except RequantError as error:
        partial.unlink()
        reason = str(error).replace(str(partial), what)
        if not again:
            raise RequantError(f"{reason}; it was sent so when asked for again, too") from None
    progress(f"{reason}; fetched once more")
    return fetch(model, name, lock, again=False)


def link(place: Path, path: Path) -> None:
    """Makes `path` a symbolic link to `place`; what was there is replaced."""
    with written_whole(path) as partial:
        partial.symlink_to(place)


def bytes_to_come(model: RemoteModel, lock: Lock) -> int:
    """Bytes of the lock's files that are not in their place, less what has come of them."""
    missing = [name for name in lock.files if not model.place(name).exists()]
    return sum(max(lock.files[name].size - _size(model.partial(name)), 0) for name in missing)


def check_download_room(name: str, model: RemoteModel, lock: Lock) -> None:
    """Raises RequantError if the disk that the files of the model `name` go to can't hold those still to come."""
    wanted = bytes_to_come(model, lock)
    there = next(folder for folder in (model.root, *model.root.parents) if folder.exists())
    if wanted > (free := shutil.disk_usage(there).free):
        raise RequantError(
            f"models.{name}: {wanted} bytes are still to be downloaded to {model.root}; {free} are free there: make "
            f"room, or name another place (models.{name}.directory, or the environment's HF_HUB_CACHE)"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

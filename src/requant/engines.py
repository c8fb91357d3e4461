"""The engine of a target, started: a program of this machine, or a container."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from requant.config import Target
from requant.container import serve_in_container
from requant.serving import Server, serve


@contextlib.contextmanager
def serve_at(
    target: Target,
    model: Path,
    log: Path,
    threads: int = 1,
    *,
    name: str | None = None,
    port: int = 0,
    linked: Collection[Path] = (),
) -> Iterator[Server]:
    """Serves the checkpoint in `model` as `target` says; the engine's output goes to `log`. It ends with the block.

    name: what requests call the model, where the engine can be told; the directory's name if absent. port: of the
    loopback; 0 for a free one. linked: files that links in the checkpoint may lead to (`served_copy.linked_files`);
    a container sees no others. Raises RequantError if the engine can't be started, and with the log's first error and
    path if it does not answer in time.
    """
    named = {"threads": threads, "name": name, "port": port}
    if target.image is None:
        serving = serve(model, log, target, **named)
    else:
        serving = serve_in_container(model, log, target, **named, linked=linked)
    with serving as server:
        yield server

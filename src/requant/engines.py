"""The engine of a target, started: a program of this environment, or a container."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from requant.config import Target
from requant.errors import RequantError
from requant.serving import Server, serve


@contextlib.contextmanager
def serve_at(target: Target, model: Path, log: Path, threads: int = 1) -> Iterator[Server]:
    """Serves the checkpoint in `model` as `target` says; the engine's output goes to `log`. It ends with the block.

    Raises RequantError, with the log's last lines and path, if it does not answer in time.
    """
    if target.engine != "transformers" or target.image is not None:
        raise RequantError(f"engine {target.engine}, image {target.image}: not started here; expected transformers")
    with serve(model, log, device=target.device, threads=threads, startup_seconds=target.startup_seconds) as server:
        yield server

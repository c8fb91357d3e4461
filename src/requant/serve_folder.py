"""`requant serve`: any checkpoint folder at a target, in the foreground, or the request shown and nothing started."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # not where it is used: Ctrl-C in an import, which runs strings, ends Python by SIGINT, caught or not

from requant.architecture import expert_counts, has_plain_experts
from requant.checkpoint import Checkpoint
from requant.config import Target
from requant.engine_command import LOOPBACK, check_quantization, docker_command, engine_command, quantization_of
from requant.engine_keeps import packed_problem
from requant.errors import RequantError
from requant.schemes import SCHEMES, Scheme, scheme_of
from requant.served_copy import why_decoded
from requant.targets import family_problem, holds_packed, shortage, unsupported, wanted_context

PACKED = ".weight_packed"

COMPUTES = False  # it serves for people; the deploy stage has its own way to the engine


@dataclass(frozen=True)
class Serving:
    """What `requant serve` serves: the checkpoint in `folder`, called `name`, at `target`, called `target_name`.

    quantization: as engines call it, None for none; why_decoded: why a BF16 copy of it is served, None if it is not.
    """

    folder: Path
    name: str
    target_name: str
    target: Target
    quantization: str | None
    why_decoded: str | None


def planned(folder: Path, target_name: str, target: Target) -> Serving:
    """How the checkpoint in `folder` is served at `target`.

    Raises RequantError if it is none, if the target can't serve it (its format, its family, or its size), and if a
    container would be shown what a link in it leads to elsewhere.
    """
    folder = folder.absolute()
    checkpoint, quantization = Checkpoint(folder), quantization_of(folder)
    config, scheme = checkpoint.config, _scheme(folder, checkpoint.config, quantization)
    blocks = int(config.get("num_hidden_layers") or 0)
    weights = {name.removesuffix("_packed") for name in checkpoint.index}
    moe, plain_experts = bool(expert_counts(weights, blocks)), has_plain_experts(checkpoint.index, blocks)
    reason = None if scheme is None else why_decoded(scheme.format, moe, target, plain_experts)
    if reason is None:
        check_quantization(str(folder), quantization, target)
    family = str(config.get("model_type"))
    problem = (scheme and unsupported(scheme, target, family, moe)) or family_problem(family, target)
    if problem is None and reason is None:
        packed = [name.removesuffix(PACKED) for name in checkpoint.index if name.endswith(PACKED)]
        problem = packed_problem(packed, family, target)
    if problem is not None:
        raise RequantError(f"{folder}: can't be served at target {target_name!r}: {problem}; expected another target")
    if scheme is not None and (holds_packed(target) or not scheme.quantizes):
        stored = sum((folder / shard).stat().st_size for shard in checkpoint.shards)
        wanted = wanted_context(target, config, 1)
        if (short := shortage(target, stored, config, wanted)) is not None:
            raise RequantError(f"{folder}: does not fit target {target_name!r}: {short}")
    if target.image is not None:
        from requant.container import links_out

        links_out(folder)
    name = folder.parent.name if folder.name == "model" else folder.name
    return Serving(folder, name, target_name, target, quantization, reason)


def _scheme(folder: Path, config: dict[str, Any], quantization: str | None) -> Scheme | None:
    """The scheme of a release; None for a checkpoint of another tool's format, which is left to the engine to judge."""
    if quantization is None:
        return SCHEMES["BF16"]
    return scheme_of(config, str(folder / "config.json")) if quantization == "compressed-tensors" else None


def shown(serving: Serving, port: int) -> dict[str, Any]:
    """What would be started: the request to Docker, None for a program, and the command as words; nothing is."""
    quantization = None if serving.why_decoded else serving.quantization
    if serving.target.image is None:
        command = engine_command(serving.target, str(serving.folder), serving.name, port, LOOPBACK, quantization)
        request = None
    else:
        from requant.container import container_request

        request = container_request(serving.target, serving.folder, serving.name, port, quantization=quantization)
        command = docker_command(request)
    return {
        "target": serving.target_name,
        "model": str(serving.folder),
        "decoded": serving.why_decoded,
        "environment": {} if request else dict(serving.target.environment),
        "request": request,
        "command": command,
    }


@contextlib.contextmanager
def served(serving: Serving, port: int, log: Path, say: Callable[[str], None]) -> Iterator[Any]:
    """A `serving.Server` of it, until the block ends. say: called with each line for the user."""
    from requant.engines import serve_at

    with contextlib.ExitStack() as stack:
        folder = serving.folder
        if serving.why_decoded is not None:
            from requant.packed import write_decoded

            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="requant-serve-")))
            scratch.chmod(0o755)  # a container's user is another one
            folder = scratch / serving.name
            say(f"decoding the weights to BF16 in {folder}: {serving.why_decoded}")
            write_decoded(serving.folder, folder)
        say(f"starting {serving.target.engine} (log: {log})")
        yield stack.enter_context(serve_at(serving.target, folder, log, name=serving.name, port=port))


def is_running(pid: int) -> bool:
    """Whether that process runs; one that has ended, and that nobody waited for, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

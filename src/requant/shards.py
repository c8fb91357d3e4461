"""Which safetensors files of a directory, repository or bucket hold the model.

Those that the index names; without one `model.safetensors`, or the only one there is. Besides, a file that the index
forgot and that holds layers for multi-token prediction alone (an `mtp.safetensors`), where config.json counts them and
no named file has them. Others are not read: copies under other names, adapters, what was left of another format.
"""

from collections.abc import Callable, Iterable
from typing import Any

from requant.architecture import BLOCK_TENSOR, drafting_layers
from requant.errors import RequantError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


def in_folder(names: Iterable[str]) -> list[str]:
    """The safetensors files of the folder itself among `names`, sorted."""
    return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)


def only_shard(where: str, names: Iterable[str], beside: str = "") -> str:
    """The shard among `names`, where there is no index. Raises RequantError naming `where`, and what is `beside`, if
    nothing says which it is."""
    shards = in_folder(names)
    if WHOLE in shards:
        return WHOLE
    if len(shards) != 1:
        raise RequantError(
            f"{where}: {len(shards)} safetensors files and no {INDEX}{beside}; expected an index, {WHOLE}, or one file"
        )
    return shards[0]


def unnamed(names: Iterable[str], stored: dict[str, str]) -> list[str]:
    """The safetensors files among `names` that hold no tensor of `stored`, the shard of each tensor."""
    return sorted(set(in_folder(names)) - set(stored.values()))


def with_drafting(
    config: dict[str, Any], stored: dict[str, str], names: Iterable[str], tensors_in: Callable[[str], Iterable[str]]
) -> dict[str, str]:
    """`stored`, the shard of each tensor, with the layers for multi-token prediction that the index forgot.

    names: of the files; tensors_in: the names in a shard, asked of no more shards than have to be. Raises RequantError
    if two of them hold one tensor.
    """
    counted, blocks = drafting_layers(config), config.get("num_hidden_layers")
    if not counted or type(blocks) is not int:
        return stored
    missing = set(range(blocks, blocks + counted)) - {_layer(name) for name in stored}
    found: dict[str, str] = {}
    for shard in unnamed(names, stored) if missing else ():
        tensors = list(tensors_in(shard))
        if not tensors or not {_layer(name) for name in tensors} <= missing:
            continue
        for name in tensors:
            if name in found:
                raise RequantError(f"{shard}: {name}: found in {found[name]} too, and {INDEX} names neither of them")
            found[name] = shard
    return stored | found


def _layer(name: str) -> int | None:
    match = BLOCK_TENSOR.fullmatch(name)
    return int(match[1]) if match else None

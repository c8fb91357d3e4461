"""Reading and writing safetensors: headers without torch, tensors by name, whole and deterministic files."""

import hashlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from requant.errors import RequantError
from requant.records import FileEntry, TensorEntry
from requant.whole import written_whole

if TYPE_CHECKING:
    import torch

    from requant.naming import Place

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors that the header of `path` describes.

    Raises RequantError naming the file if it is no safetensors file, is cut short, or has tensors that overlap,
    leave gaps or differ in size from their dtype and shape.
    """
    path = Path(path)
    with path.open("rb") as file:
        return header_of(file, path.stat().st_size, path)


def header_of(file: BinaryIO, size: int, path: Path) -> dict[str, TensorEntry]:
    """The tensors that `file`, the beginning of a shard of `size` bytes, describes; `path` names it in errors.

    Raises RequantError as `read_header` does.
    """
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
    if length > min(HEADER_LIMIT, size - 8):
        raise RequantError(f"{path}: not a whole safetensors file: its header claims {length} bytes, it has {size}")
    try:
        entries = json.loads(file.read(length))
    except ValueError as error:
        raise RequantError(f"{path}: not a safetensors file: its header is no JSON ({error})") from None
    entries.pop("__metadata__", None)
    tensors, start = {}, 8 + length
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        wanted = DTYPE_BYTES.get(entry["dtype"], 0)
        for extent in entry["shape"]:
            wanted *= extent
        if begin != expected or end - begin != wanted:
            raise RequantError(
                f"{path}: {name}: bytes {begin}..{end} found; expected {expected}..{expected + wanted} "
                f"for {entry['dtype']} {entry['shape']}"
            )
        tensors[name] = TensorEntry(dtype=entry["dtype"], shape=entry["shape"], shard=path.name, offset=start + begin)
        expected = end
    if start + expected != size:
        raise RequantError(f"{path}: {size} bytes found; its header describes {start + expected}: cut short or padded")
    return tensors


def file_entry(path: str | Path) -> FileEntry:
    """Size and sha256 of a file, read in one pass."""
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(size=file.tell(), sha256=digest)


def read_tensors(directory: str | Path, shard_of: dict[str, str], names: list[str]) -> dict[str, "torch.Tensor"]:
    """The tensors `names`, each from the shard that `shard_of` names, one shard open at a time."""
    from safetensors import safe_open

    wanted: dict[str, list[str]] = {}
    for name in names:
        if name not in shard_of:
            raise RequantError(f"{directory}: no tensor {name!r}; the checkpoint does not fit its config.json")
        wanted.setdefault(shard_of[name], []).append(name)
    tensors = {}
    for shard, members in sorted(wanted.items()):
        with safe_open(Path(directory) / shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in members}
    return tensors


def read_slices(
    directory: str | Path, shard_of: dict[str, str], slices: dict[str, "Place"]
) -> dict[str, "torch.Tensor"]:
    """Some experts' rows [rows, columns] of stacked tensors [experts, parts x rows, columns], by the names of `slices`.

    No more than those rows is read.
    """
    from safetensors import safe_open

    wanted: dict[str, list[str]] = {}
    for name, place in slices.items():
        wanted.setdefault(shard_of[place.stored], []).append(name)
    tensors = {}
    for shard, members in sorted(wanted.items()):
        with safe_open(Path(directory) / shard, framework="pt") as file:
            for name in members:
                place = slices[name]
                stacked = file.get_slice(place.stored)
                rows = stacked.get_shape()[1] // place.parts
                tensors[name] = stacked[place.expert, place.part * rows : (place.part + 1) * rows]
    return tensors


def save(path: str | Path, tensors: dict[str, "torch.Tensor"]) -> None:
    """Writes `tensors` whole (temporary name, then rename), with the same bytes every time.

    One metadata key only: safetensors writes several in random order.
    """
    from safetensors.torch import save_file

    with written_whole(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})

"""Reading and writing safetensors: headers without torch, tensors by name, whole and deterministic files.

A file that requant writes has, in its header, the digest of each of its tensors, and a digest of the header itself.
Whatever is read is held against them while it is in memory: a bit that flipped since is found by the first reader.
Files of a source have none; those that its check took (`requant.intact`) are put in their place by `expect`.
"""

import json
import os
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from requant.errors import RequantError, brief
from requant.records import TensorEntry
from requant.untrusted import is_tensor_name, json_object, open_file
from requant.whole import written_whole

if TYPE_CHECKING:
    import torch

    from requant.naming import Place

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
DTYPE_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
LARGEST_RANK = 64  # dimensions that a PyTorch tensor can have

# The metadata key of the digests: 64-bit XXH3, ten times as fast as SHA-256, of which pack and lock have one a file.
DIGESTS = "xxh3_64"
DIGEST_LENGTH = 16  # hexadecimal digits

_expected: dict[Path, dict[str, str]] = {}


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors that the header of `path` describes.

    Raises RequantError naming the file if it is no safetensors file, is cut short, or has tensors that overlap,
    leave gaps or differ in size from their dtype and shape.
    """
    path = Path(path)
    with open_file(path, "a safetensors file") as file:
        return header_of(file, os.fstat(file.fileno()).st_size, path)


def header_of(file: BinaryIO, size: int, path: Path) -> dict[str, TensorEntry]:
    """The tensors that `file`, the beginning of a shard of `size` bytes, describes; `path` names it in errors.

    Raises RequantError as `read_header` does.
    """
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
    if length > size - 8:
        raise RequantError(f"{path}: not a whole safetensors file: its header claims {length} bytes, it has {size}")
    if length > HEADER_LIMIT:
        raise RequantError(
            f"{path}: not a safetensors file: a header of {length} bytes; expected {HEADER_LIMIT} at most"
        )
    try:
        described = json_object(file.read(length), "its header")
    except RequantError as error:
        raise RequantError(f"{path}: not a safetensors file: {error}") from None
    _check_metadata(path, described.pop("__metadata__", {}))
    found = {name: _described(path, name, entry) for name, entry in described.items()}
    tensors, start = {}, 8 + length
    expected = 0
    for name, (dtype, shape, begin, end) in sorted(found.items(), key=lambda item: item[1][2:]):
        wanted = DTYPE_BYTES[dtype]
        for extent in shape:
            wanted *= extent
        if begin != expected or end - begin != wanted:
            raise RequantError(
                f"{path}: {name}: bytes {begin}..{end} found; expected {expected}..{expected + wanted} "
                f"for {dtype} {brief(shape)}"
            )
        tensors[name] = TensorEntry(dtype=dtype, shape=shape, shard=path.name, offset=start + begin)
        expected = end
    if start + expected != size:
        raise RequantError(f"{path}: {size} bytes found; its header describes {start + expected}: cut short or padded")
    return tensors


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise RequantError(f"{path}: __metadata__: {brief(metadata)}; expected keys with texts")


def _described(path: Path, name: str, entry: Any) -> tuple[str, list[int], int, int]:
    """(dtype, shape, begin, end) of a tensor, each of the right type; begin and end count from the header's end."""
    if not is_tensor_name(name):
        raise RequantError(f"{path}: {brief(name)}: expected a tensor's name, printable and of 512 characters or less")
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise RequantError(f"{path}: {name}: {brief(entry)} found; expected {', '.join(keys)}")
    dtype, shape, offsets = (entry[key] for key in keys)
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise RequantError(f"{path}: {name}: dtype {brief(dtype)} found; expected one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > LARGEST_RANK:
        raise RequantError(f"{path}: {name}: shape {brief(shape)} found; expected a list of numbers from 0 to 2^63 - 1")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise RequantError(f"{path}: {name}: data_offsets {brief(offsets)} found; expected [begin, end]")
    return dtype, shape, *offsets


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(number) is int and 0 <= number < 2**63 for number in found)


def digest(tensor: "torch.Tensor") -> str:
    """XXH3 of the bytes of a tensor, 16 hexadecimal digits."""
    import torch
    import xxhash

    return xxhash.xxh3_64_hexdigest(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def tensor_digests(path: str | Path) -> dict[str, str]:
    """The digest of each tensor of the safetensors file `path`, taken anew."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: digest(file.get_tensor(name)) for name in sorted(file.keys())}


def expect(path: str | Path, digests: dict[str, str]) -> None:
    """Has every tensor that this process reads of `path`, a file that `save` did not write, held against `digests`."""
    _expected[Path(path).absolute()] = digests


def kept_digests(path: str | Path) -> dict[str, str]:
    """The digests that `save` left in the header of `path`, else those that `expect` was given; empty without either.

    Raises RequantError naming the file if it is absent, is cut short, or its header is not as it was written.
    """
    path = Path(path)
    if not path.exists():
        raise RequantError(f"{path}: not there; expected a safetensors file")
    found = path.stat()
    written = _digests_in(path, found.st_mtime_ns, found.st_size)
    return _expected.get(path.absolute(), written)


@cache
def _digests_in(path: Path, _modified: int, _size: int) -> dict[str, str]:
    try:
        tensors = read_header(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise RequantError(f"{path}: a header of another shape found ({error!r}); {_remedy(path)}") from None
    kept = _header(path).get("__metadata__", {}).get(DIGESTS)
    if kept is None:
        return {}
    digests = _by_name(kept[DIGEST_LENGTH:], sorted(tensors))
    if kept != _sealed(tensors, digests):
        raise RequantError(f"{path}: its header has changed since it was written; {_remedy(path)}")
    return digests


def _header(path: Path) -> dict:
    with path.open("rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def _by_name(joined: str, names: list[str]) -> dict[str, str]:
    return {name: joined[i * DIGEST_LENGTH : (i + 1) * DIGEST_LENGTH] for i, name in enumerate(names)}


def _sealed(tensors: dict[str, TensorEntry], digests: dict[str, str]) -> str:
    """The value of the key DIGESTS: a digest of names, dtypes, shapes and digests, and then these in order of names."""
    import xxhash

    rows = [[name, tensors[name].dtype, tensors[name].shape, digests[name]] for name in sorted(tensors)]
    return xxhash.xxh3_64_hexdigest(json.dumps(rows).encode()) + "".join(digests[name] for name in sorted(tensors))


def _remedy(path: Path) -> str:
    if path.absolute() in _expected:
        return "restore the file"
    if path.parent.name == "model":
        return "delete pack.json and the file of that block in blocks/ to rebuild"
    return "delete it to rebuild"


def check_tensor(path: str | Path, name: str, tensor: "torch.Tensor", digests: dict[str, str]) -> "torch.Tensor":
    """`tensor`, as read from `path`. RequantError if `digests` has another digest for it."""
    if name in digests and (found := digest(tensor)) != digests[name]:
        raise RequantError(
            f"{path}: {name}: its bytes have changed since they were {DIGESTS} {digests[name]}, {found} found; "
            f"{_remedy(Path(path))}"
        )
    return tensor


def load(path: str | Path, *names: str) -> dict[str, "torch.Tensor"]:
    """The tensors of `path` that are named, all without a name, each held against its digest.

    Raises RequantError naming the file, and the tensor that has changed since it was written.
    """
    from safetensors import safe_open

    digests = kept_digests(path)
    with safe_open(path, framework="pt") as file:
        return {name: check_tensor(path, name, file.get_tensor(name), digests) for name in names or file.keys()}


def read_tensors(directory: str | Path, shard_of: dict[str, str], names: list[str]) -> dict[str, "torch.Tensor"]:
    """The tensors `names`, each from the shard that `shard_of` names, one shard open at a time.

    Raises RequantError naming a tensor that no shard has, or as `load` does.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        if name not in shard_of:
            raise RequantError(f"{directory}: no tensor {name!r}; the checkpoint does not fit its config.json")
        wanted.setdefault(shard_of[name], []).append(name)
    tensors = {}
    for shard, members in sorted(wanted.items()):
        tensors |= load(Path(directory) / shard, *members)
    return tensors


def read_slices(
    directory: str | Path, shard_of: dict[str, str], slices: dict[str, "Place"]
) -> dict[str, "torch.Tensor"]:
    """Some experts' rows [rows, columns] of stacked tensors [experts, parts x rows, columns], by the names of `slices`.

    No more than those rows is kept; the whole tensor is read once by a process, to hold it against its digest.
    """
    from safetensors import safe_open

    wanted: dict[str, list[str]] = {}
    for name, place in slices.items():
        wanted.setdefault(shard_of[place.stored], []).append(name)
    tensors = {}
    for shard, members in sorted(wanted.items()):
        path = Path(directory) / shard
        for stored in sorted({slices[name].stored for name in members}):
            _check_once(path, stored, path.stat().st_mtime_ns)
        with safe_open(path, framework="pt") as file:
            for name in members:
                place = slices[name]
                stacked = file.get_slice(place.stored)
                rows = stacked.get_shape()[1] // place.parts
                tensors[name] = stacked[place.expert, place.part * rows : (place.part + 1) * rows]
    return tensors


@cache
def _check_once(path: Path, name: str, _modified: int) -> None:
    if name in kept_digests(path):
        load(path, name)


def save(path: str | Path, tensors: dict[str, "torch.Tensor"]) -> None:
    """Writes `tensors` whole (temporary name, then rename), with their digests, and with the same bytes every time.

    The file's mode is that of any new file; safetensors alone would leave it to its owner.
    """
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digests = {name: digest(tensor) for name, tensor in contiguous.items()}
    blank = "0" * DIGEST_LENGTH * (len(digests) + 1)
    with written_whole(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(contiguous, partial, metadata={"format": "pt", DIGESTS: blank})
        _seal(partial, digests)
        partial.chmod(mode)


def _seal(path: Path, digests: dict[str, str]) -> None:
    """Puts the digests into the header of `path`, whose metadata safetensors has written in random order."""
    header = _header(path)
    header["__metadata__"] = {"format": "pt", DIGESTS: _sealed(read_header(path), digests)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if len(text) > length:
            raise RequantError(f"{path}: a header of {len(text)} bytes does not fit into {length}")
        file.write(text.ljust(length))

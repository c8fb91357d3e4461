"""Two copies of a release, held against each other: file by file by hash, and tensor by tensor where a shard differs.

What is published is a folder, or no more than the hashes in its provenance. Only shards whose hashes differ are opened,
one tensor at a time: a release of any size is compared in the memory of its largest tensor.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from requant import decode
from requant.architecture import block_count, block_of
from requant.carried import is_read
from requant.checkpoint import INDEX, Checkpoint
from requant.config import Reproduce, reproduce_limits
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.packed import PARTS, check_parts, decode_parts
from requant.records import Record, TensorEntry
from requant.safetensors_io import read_header
from requant.schemes import Scheme, scheme_of

if TYPE_CHECKING:
    import torch

# Of its own at every signing, and what a download adds to a folder.
NOT_COMPARED = ("model.sig", ".gitattributes")
NOT_COMPARED_FOLDERS = (".cache", ".git")
ROWS = 4096  # of a tensor that are compared at a time

OUTCOMES = {"identical": 0, "within tolerance": 3, "outside tolerance": 4}


class FileDifference(Record):
    name: str
    found: Literal["differs", "missing", "extra"] = Field(description="in the rebuilt release")
    part: Literal["checkpoint", "document"] = Field(
        description="document: tells of the checkpoint (card, pictures, provenance, hashes); no engine reads it"
    )
    published_sha256: str | None
    rebuilt_sha256: str | None


class TensorDifference(Record):
    """A weight, or a tensor that is part of none, whose bytes differ."""

    block: int | None = Field(description="null for what belongs to no block")
    name: str = Field(description="of a quantized weight without the names of its parts")
    found: str = Field(description="values; or what makes the two no pair: missing, extra, shape, dtype, parts")
    elements: int = Field(description="codes of a quantized weight, else values")
    differing: int | None = Field(description="of `elements`; null where the two are no pair")
    cosine: float | None = Field(description="of the two decoded tensors; null where one is zero throughout")
    relative_error: float | None = Field(description="norm of the difference, over that of the published tensor")
    parts: list[str] = Field([], description="stored tensors of a quantized weight that differ, by their last names")
    within: bool = Field(description="whether the tolerance allows it")


class Comparison(Record):
    """What came of holding a rebuilt release against the published one."""

    published: str
    rebuilt: str
    outcome: Literal[tuple(OUTCOMES)]
    tolerance: Reproduce = Field(description="the limits that were held, those of the scheme among them")
    files_compared: int
    files_identical: int
    files: list[FileDifference] = Field(description="those of the checkpoint first")
    tensors_compared: int = Field(description="weights in the shards that differ and could be opened on both sides")
    tensors: list[TensorDifference] = Field(description="by block, what belongs to none last, then by name")
    not_opened: list[str] = Field(description="shards that differ, and of which only the published hash is known")

    @property
    def status(self) -> int:
        """The exit status that stands for the outcome."""
        return OUTCOMES[self.outcome]


@dataclass(frozen=True)
class Published:
    """A published release: the hash of each file, and the folder that the files are in, if they are at hand.

    checkpoint: the names of the files that engines read, all others are documents; unknown if None.
    """

    shown: str
    digests: Mapping[str, str]
    folder: Path | None
    checkpoint: frozenset[str] | None = None

    def part(self, name: str) -> str:
        """Whether a file is of the `checkpoint`, or a `document`."""
        known = name in self.checkpoint if self.checkpoint is not None else False
        return "checkpoint" if known or is_of_checkpoint(name) else "document"


def is_of_checkpoint(name: str) -> bool:
    """Whether a file of this name is one that engines read."""
    return name in ("config.json", INDEX) or is_read(name) or name.endswith(".safetensors")


def files_of(folder: Path) -> list[str]:
    """The files of a release's folder that are compared, by their paths in it, sorted."""
    if not folder.is_dir():
        raise RequantError(f"{folder}: not there; expected the folder of a release")
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (path for path in paths if path.parts[0] not in NOT_COMPARED_FOLDERS)
    return sorted(path.as_posix() for path in kept if path.name not in NOT_COMPARED)


def digests_of(folder: Path) -> dict[str, str]:
    """sha256 of each file of a release's folder, by its path in it."""
    return {name: file_entry(folder / name).sha256 for name in files_of(folder)}


def compare(published: Published, rebuilt: Path, tolerance: Reproduce) -> Comparison:
    """Holds the release in the folder `rebuilt` against the published one.

    Only files that either side has are named. Raises RequantError if `rebuilt` is no folder, or a shard that has to be
    opened is no safetensors file.
    """
    here = digests_of(rebuilt)
    if published.folder is None:  # what is known by hashes alone are the checkpoint's files
        here = {name: digest for name, digest in here.items() if published.part(name) == "checkpoint"}
    names = sorted(published.digests.keys() | here.keys())
    found = [difference for name in names if (difference := _file(name, published, here)) is not None]
    found.sort(key=lambda file: (file.part, file.name))
    shards = [file for file in found if file.name.endswith(".safetensors")]
    openable, closed = _openable(shards, published.folder)
    limits = reproduce_limits(tolerance, _scheme(rebuilt).name)
    tensors, compared = _tensors(openable, published.folder, rebuilt, limits) if openable else ([], 0)
    checkpoint = [file for file in found if file.part == "checkpoint"]
    return Comparison(
        published=published.shown,
        rebuilt=str(rebuilt),
        outcome=_outcome(checkpoint, tensors, closed),
        tolerance=limits,
        files_compared=len(names),
        files_identical=len(names) - len(found),
        files=found,
        tensors_compared=compared,
        tensors=tensors,
        not_opened=closed,
    )


def _file(name: str, published: Published, here: Mapping[str, str]) -> FileDifference | None:
    there, mine = published.digests.get(name), here.get(name)
    if there == mine:
        return None
    found = "missing" if mine is None else "extra" if there is None else "differs"
    return FileDifference(
        name=name, found=found, part=published.part(name), published_sha256=there, rebuilt_sha256=mine
    )


def _openable(shards: Iterable[FileDifference], folder: Path | None) -> tuple[list[FileDifference], list[str]]:
    """The shards whose tensors can be compared, and the names of those that are not at hand on the published side."""
    wanted = [file for file in shards if file.published_sha256 is None or (folder and (folder / file.name).is_file())]
    opened = {file.name for file in wanted}
    return wanted, [file.name for file in shards if file.name not in opened]


def _outcome(checkpoint: list[FileDifference], tensors: list[TensorDifference], closed: list[str]) -> str:
    """Tensors may differ within the tolerance; a shard whose tensors are not known, and any other file, may not."""
    if not checkpoint:
        return "identical"
    exact = [file for file in checkpoint if file.found != "differs" or not file.name.endswith(".safetensors")]
    allowed = not exact and not closed and all(tensor.within for tensor in tensors)
    return "within tolerance" if allowed else "outside tolerance"


class _Side:
    """The shards of one copy that are opened: headers first, tensors when they are asked for."""

    def __init__(self, folder: Path, shards: Iterable[str]):
        self.folder = folder
        self.entries: dict[str, TensorEntry] = {}
        for shard in shards:
            self.entries |= read_header(folder / shard)

    def rows(self, name: str) -> Iterator["torch.Tensor"]:
        """The tensor `name`, some rows at a time."""
        from safetensors import safe_open

        entry = self.entries[name]
        with safe_open(self.folder / entry.shard, framework="pt") as file:
            if not entry.shape:
                yield file.get_tensor(name)
                return
            tensor = file.get_slice(name)
            for first in range(0, entry.shape[0], ROWS):
                yield tensor[first : first + ROWS]

    def whole(self, name: str) -> "torch.Tensor":
        from safetensors import safe_open

        with safe_open(self.folder / self.entries[name].shard, framework="pt") as file:
            return file.get_tensor(name)


def _tensors(
    shards: list[FileDifference], folder: Path | None, rebuilt: Path, tolerance: Reproduce
) -> tuple[list[TensorDifference], int]:
    """The differences of all weights in `shards`, and how many weights were compared."""
    scheme, blocks = _scheme(rebuilt), block_count(Checkpoint(rebuilt).config)
    there = _Side(folder or rebuilt, [file.name for file in shards if file.found != "extra"])
    mine = _Side(rebuilt, [file.name for file in shards if file.found != "missing"])
    weights: dict[str, list[str]] = {}
    for name in there.entries.keys() | mine.entries.keys():
        weights.setdefault(_weight_of(name), []).append(name)
    found = (_weight(name, sorted(parts), there, mine, scheme, blocks, tolerance) for name, parts in weights.items())
    differing = [difference for difference in found if difference is not None]
    return sorted(differing, key=lambda d: (d.block is None, d.block, d.name)), len(weights)


def _scheme(folder: Path) -> Scheme:
    return scheme_of(Checkpoint(folder).config, str(folder / "config.json"))


def _weight_of(name: str) -> str:
    """The weight that a stored tensor is a part of; itself if it is none."""
    module, _, last = name.rpartition(".")
    return f"{module}.weight" if last in PARTS else name


def _weight(
    name: str, parts: list[str], there: _Side, mine: _Side, scheme: Scheme, blocks: int, tolerance: Reproduce
) -> TensorDifference | None:
    """How one weight differs, or None if its bytes are the same."""
    block = block_of(name, blocks)
    unpaired = _unpaired(parts, there, mine)
    if unpaired is not None:
        return TensorDifference(
            block=block,
            name=name,
            found=unpaired,
            elements=sum(_count(there, part) for part in parts),
            differing=None,
            cosine=None,
            relative_error=None,
            within=False,
        )
    changed = [part for part in parts if _differing(part, there, mine)]
    if not changed:
        return None
    if parts == [name]:
        return _difference(block, name, _values(name, there, mine), [], False)
    codes, short = _codes(there, mine, parts, scheme, name), [part.rpartition(".")[2] for part in changed]
    ranges = [_values(part, there, mine) for part in changed if part.endswith(".input_global_scale")]
    within = "weight_shape" not in short and _allowed(codes, ranges, tolerance)
    return _difference(block, name, codes, short, within)


def _differing(name: str, there: _Side, mine: _Side) -> int:
    """How many values of a tensor have other bytes."""
    return sum(int(_unequal(*rows).sum()) for rows in zip(there.rows(name), mine.rows(name), strict=True))


def _unequal(one: "torch.Tensor", other: "torch.Tensor") -> "torch.Tensor":
    """bool [values]: which values of two tensors of one shape and dtype have other bytes."""
    import torch

    size = one.element_size()
    first, second = (rows.contiguous().reshape(-1).view(torch.uint8).view(-1, size) for rows in (one, other))
    return (first != second).any(-1)


def _values(name: str, there: _Side, mine: _Side) -> "_Sums":
    """The sums of a tensor that is not packed."""
    found = _Sums(elements=_count(there, name), differing=_differing(name, there, mine))
    for one, other in zip(there.rows(name), mine.rows(name), strict=True):
        found.add(one.double().numpy(), other.double().numpy())
    return found


def _unpaired(parts: list[str], there: _Side, mine: _Side) -> str | None:
    """Why two copies of a weight can't be compared value by value; None if they can."""
    if not any(part in mine.entries for part in parts):
        return "missing"
    if not any(part in there.entries for part in parts):
        return "extra"
    for part in parts:
        if part not in mine.entries or part not in there.entries:
            return f"parts: {part.rpartition('.')[2]} is in one of the two"
        one, other = there.entries[part], mine.entries[part]
        if one.dtype != other.dtype:
            return f"dtype: {one.dtype}, rebuilt {other.dtype}"
        if one.shape != other.shape:
            return f"shape: {one.shape}, rebuilt {other.shape}"
    return None


def _count(side: _Side, name: str) -> int:
    return int(np.prod(side.entries[name].shape, dtype=np.int64)) if name in side.entries else 0


@dataclass
class _Sums:
    """What two tensors have in common, in float64."""

    elements: int
    differing: int
    both: float = 0.0
    one: float = 0.0
    other: float = 0.0
    error: float = 0.0

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        """Adds values, some rows of the two tensors."""
        one, other = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
        self.both += float(one @ other)
        self.one += float(one @ one)
        self.other += float(other @ other)
        self.error += float(((one - other) ** 2).sum())

    @property
    def cosine(self) -> float | None:
        norms = np.sqrt(self.one) * np.sqrt(self.other)
        return _finite(min(self.both / norms, 1.0)) if norms > 0 else None

    @property
    def relative_error(self) -> float | None:
        return _finite(np.sqrt(self.error / self.one)) if self.one > 0 else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _codes(there: _Side, mine: _Side, parts: list[str], scheme: Scheme, name: str) -> _Sums:
    """Codes of a quantized weight that differ, and the sums of its decoded values."""
    try:
        (one, first), (other, second) = (_decoded(side, parts, scheme) for side in (there, mine))
    except RequantError as error:
        raise RequantError(f"{name}: {error}") from None
    found = _Sums(elements=one.size, differing=int((one != other).sum()))
    for begin in range(0, len(first), ROWS):
        found.add(first[begin : begin + ROWS], second[begin : begin + ROWS])
    return found


def _decoded(side: _Side, names: list[str], scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """(codes, decoded float32 values), [out, in] each, of one quantized weight."""
    parts = {name.rpartition(".")[2]: side.whole(name) for name in names}
    check_parts(parts, scheme)
    packed = parts["weight_packed"].numpy()
    if scheme.is_nvfp4:
        return decode.nvfp4_codes(packed), decode_parts(parts, scheme)
    columns = int(parts["weight_shape"][1])
    return decode.int_codes(packed, scheme.weight_bits, columns), decode_parts(parts, scheme)


def _allowed(codes: _Sums, ranges: list[_Sums], tolerance: Reproduce) -> bool:
    """Whether the tolerance allows how a quantized weight differs. `ranges`: those of its inputs, where they differ."""
    errors = [each.relative_error for each in (codes, *ranges)]
    return (
        codes.cosine is not None
        and codes.cosine >= tolerance.min_cosine
        and codes.differing <= tolerance.max_code_fraction * codes.elements
        and all(error is not None and error <= tolerance.max_relative_error for error in errors)
    )


def _difference(block: int | None, name: str, sums: _Sums, parts: list[str], within: bool) -> TensorDifference:
    return TensorDifference(
        block=block,
        name=name,
        found="values",
        elements=sums.elements,
        differing=sums.differing,
        cosine=sums.cosine,
        relative_error=sums.relative_error,
        parts=parts,
        within=within,
    )

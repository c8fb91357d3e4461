"""A checkpoint directory as Hugging Face lays it out: config, tokenizer, safetensors shards and their index."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant import fp8
from requant.architecture import block_of
from requant.carried import TOKENIZER_FILES, carried_in, left_behind, names_in
from requant.errors import RequantError, brief
from requant.naming import Place, entries, left_out, places
from requant.records import KeepList, TensorEntry
from requant.safetensors_io import read_header, read_slices
from requant.shards import INDEX, only_shard, unnamed, with_drafting
from requant.untrusted import is_file_name, is_tensor_name, read_json_object
from requant.view import View

if TYPE_CHECKING:
    import torch


class Checkpoint:
    """Reads a checkpoint directory lazily: nothing but config.json is opened before it is asked for.

    With a `keep` list it is the pruned model that the list describes: `config`, `index`, `places` and `read` are that
    model's, `stored` and `files` are still those in the directory.
    """

    def __init__(self, directory: str | Path, keep: KeepList | None = None):
        self.directory = Path(directory)
        self.stored_config = self._json("config.json")
        self.view = View(keep, self.stored_config) if keep else None
        self.config = self.view.config if self.view else self.stored_config

    def _json(self, name: str) -> dict[str, Any]:
        return read_json_object(self.directory / name, "a Hugging Face checkpoint directory with that file")

    @cached_property
    def index(self) -> dict[str, str]:
        """The shard file of each tensor that the model has, by the names that requant has for them (see `naming`)."""
        return {name: self.stored[place.stored] for name, place in self.places.items()}

    @cached_property
    def places(self) -> dict[str, Place]:
        """Where each tensor is stored, by its name inside requant; factors of FP8 weights have no place of their own.

        Raises RequantError as `naming.places` does.
        """
        found = places(fp8.without_scales(self.stored), self.stored_config)
        return found if self.view is None else {new: found[old] for new, old in self.view.sources(found).items()}

    def entries(self, stored: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """The tensors that the model has, by their names inside requant, of those in the headers of its files.

        A router of which some rows are left out has its new shape; its offset is that of the whole tensor.
        """
        found = entries(fp8.without_scales(stored), self.stored_config)
        if self.view is None:
            return found
        return {new: self._entry(new, found[old]) for new, old in self.view.sources(found).items()}

    def _entry(self, name: str, entry: TensorEntry) -> TensorEntry:
        rows = self.view.rows(name)
        return entry if rows is None else entry.model_copy(update={"shape": [len(rows), *entry.shape[1:]]})

    def described(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """The tensors `names` of the model, from the headers of the shards that hold one of them and of no others."""
        wanted = set(names)
        found: dict[str, TensorEntry] = {}
        for shard in sorted({self.index[name] for name in wanted}):
            found |= read_header(self.directory / shard)
        return {name: entry for name, entry in self.entries(found).items() if name in wanted}

    def in_blocks(self, first: int, last: int) -> list[str]:
        """The names of the model's tensors in blocks `first` to `last`, the last one not counted."""
        return [name for name in self.index if (found := block_of(name, last)) is not None and found >= first]

    @property
    def left_out(self) -> dict[str, str]:
        """Names of stored tensors that are no part of the model, each with the reason (`naming.left_out`)."""
        return left_out(fp8.without_scales(self.stored))

    @cached_property
    def stored(self) -> dict[str, str]:
        """The shard file of each tensor, by the names in the files; of all that is stored, part of the model or not.

        Raises RequantError if the index names a shard by a path, or if nothing says which files hold the model
        (`shards`).
        """
        files = [path.name for path in self.directory.iterdir()]
        if INDEX in files:
            found = self.stored_index()
        else:
            pickled = sorted(name for name in files if name.endswith(".bin"))
            beside = f", but {pickled[0]}: pickled weights are not read, for that would run code" if pickled else ""
            shard = only_shard(str(self.directory), files, beside)
            found = dict.fromkeys(read_header(self.directory / shard), shard)
        return with_drafting(self.stored_config, found, files, lambda shard: read_header(self.directory / shard))

    @property
    def unnamed(self) -> list[str]:
        """The safetensors files in the directory that are not read (`shards`)."""
        return unnamed((path.name for path in self.directory.iterdir()), self.stored)

    def stored_index(self) -> dict[str, str]:
        """The shard file of each tensor as the index has it. RequantError if it is none, or names a shard by a path."""
        return self._checked_index(self._json(INDEX).get("weight_map"))

    def _checked_index(self, weight_map: Any) -> dict[str, str]:
        path = self.directory / INDEX
        if not isinstance(weight_map, dict) or not weight_map:
            raise RequantError(f"{path}: `weight_map`: found {brief(weight_map)}; expected tensor: shard")
        for name, shard in weight_map.items():
            if not is_tensor_name(name):
                raise RequantError(
                    f"{path}: {brief(name)}: found; expected a tensor's name, printable and not too long"
                )
            if not is_file_name(shard):
                raise RequantError(f"{path}: {name}: shard {brief(shard)}; expected a file name without a path")
            if not shard.endswith(".safetensors"):
                raise RequantError(f"{path}: {name}: shard {brief(shard)}; expected a safetensors file")
        return weight_map

    @property
    def shards(self) -> list[str]:
        """File names of the shards, sorted."""
        return sorted(set(self.stored.values()))

    @property
    def carried_files(self) -> list[str]:
        """Files beside the weights that a release takes along unchanged (`carried`)."""
        return carried_in(self.directory)

    @property
    def tokenizer_files(self) -> list[str]:
        """Those of them that text becomes tokens by."""
        return [name for name in self.carried_files if name in TOKENIZER_FILES]

    @property
    def files(self) -> list[str]:
        """Names of the files that a build uses, sorted: config.json, shards, their index, and what is carried along."""
        index = [INDEX] if (self.directory / INDEX).exists() else []
        return sorted(["config.json", *self.carried_files, *index, *self.shards])

    def left_behind(self, used: Iterable[str] | None = None) -> list[str]:
        """What is in the directory besides the files `used`, by default `files`; a folder ends in `/`."""
        return left_behind(names_in(self.directory), self.files if used is None else used)

    def read(self, names: list[str], device: "str | torch.device" = "cpu") -> dict[str, "torch.Tensor"]:
        """The tensors `names`: FP8 weights decoded to BF16, others as they are stored, stacked ones one by one.

        Raises RequantError naming a tensor that is not there, or has values that are not finite.

        What is decoded is decoded on `device`, and stays there.
        """
        if self.view is not None:
            self.view.check_decided(names)
        wanted = {name: self.places.get(name, Place(name)) for name in names}
        whole = {name: place.stored for name, place in wanted.items() if place.expert is None}
        tensors = fp8.read(self.directory, self.stored, list(whole.values()), self.config, device)
        slices = {name: place for name, place in wanted.items() if place.expert is not None}
        found = {name: self._kept_rows(name, tensors[stored]) for name, stored in whole.items()} | read_slices(
            self.directory, self.stored, slices
        )
        for name, tensor in found.items():
            self._check_finite(name, tensor)
        return found

    def _check_finite(self, name: str, tensor: "torch.Tensor") -> None:
        """Raises RequantError naming the tensor if a value of it is NaN or infinite, or too large for BF16, which F32
        reaches beyond by a little. One pass, nothing is copied."""
        if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
            return
        low, high = (peak.bfloat16() for peak in tensor.aminmax())
        if not bool(low.isfinite() & high.isfinite()):
            bad = int((~tensor.bfloat16().isfinite()).sum())
            raise RequantError(
                f"{self.directory}: {name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite ones"
            )

    def _kept_rows(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        rows = self.view.rows(name) if self.view else None
        return tensor if rows is None else tensor[rows]

    def tokenizer(self):
        """The checkpoint's transformers tokenizer (`tokenizer.tokenizer_of`)."""
        from requant.tokenizer import tokenizer_of

        return tokenizer_of(self)

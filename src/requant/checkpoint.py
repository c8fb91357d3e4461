"""A checkpoint directory as Hugging Face lays it out: config, tokenizer, safetensors shards and their index."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant import fp8
from requant.errors import RequantError, brief, plain
from requant.naming import Place, entries, places
from requant.records import KeepList, TensorEntry
from requant.safetensors_io import read_header, read_slices
from requant.untrusted import is_file_name, is_tensor_name, read_json_object
from requant.view import View

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them is enough
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


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

    @cached_property
    def stored(self) -> dict[str, str]:
        """The shard file of each tensor, by the names in the files."""
        return self.stored_index()

    def stored_index(self) -> dict[str, str]:
        """The shard file of each tensor, by the names in the files.

        Raises RequantError if the index names a shard by a path, or if there is neither an index nor a single shard.
        """
        if (self.directory / INDEX).exists():
            return self._checked_index(self._json(INDEX).get("weight_map"))
        shards = sorted(self.directory.glob("*.safetensors"))
        if len(shards) != 1:
            pickled = sorted(path.name for path in self.directory.glob("*.bin")) if not shards else []
            beside = f", but {pickled[0]}: pickled weights are not read, for that would run code" if pickled else ""
            raise RequantError(
                f"{self.directory}: {len(shards)} safetensors files and no {INDEX}{beside}; "
                "expected an index, or one file"
            )
        return dict.fromkeys(read_header(shards[0]), shards[0].name)

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
        """Tokenizer and generation files that a release takes along unchanged."""
        return [name for name in TOKENIZER_FILES if (self.directory / name).exists()]

    @property
    def files(self) -> list[str]:
        """Names of the files that a build uses, sorted: config.json, shards, their index, and what is carried along."""
        index = [INDEX] if (self.directory / INDEX).exists() else []
        return sorted(["config.json", *self.carried_files, *index, *self.shards])

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
        """Raises RequantError naming the tensor if a value of it is NaN or infinite. One pass, nothing is copied."""
        if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
            return
        low, high = tensor.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            bad = int((~tensor.isfinite()).sum())
            raise RequantError(
                f"{self.directory}: {name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite ones"
            )

    def _kept_rows(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        rows = self.view.rows(name) if self.view else None
        return tensor if rows is None else tensor[rows]

    def tokenizer(self):
        """The checkpoint's tokenizer. RequantError if its files are missing, or transformers makes none of them."""
        from transformers import AutoTokenizer

        if not any((self.directory / name).exists() for name in TOKENIZERS):
            raise RequantError(f"{self.directory}: no tokenizer.json, tokenizer.model or vocab.json; expected one")
        try:
            return AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise RequantError(f"{self.directory}: no tokenizer can be made of its files: {plain(error)}") from error

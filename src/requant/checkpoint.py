"""A checkpoint directory as Hugging Face lays it out: config, tokenizer, safetensors shards and their index."""

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant import fp8
from requant.errors import RequantError
from requant.naming import Place, entries, places
from requant.records import KeepList, TensorEntry
from requant.safetensors_io import read_header, read_slices
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
        path = self.directory / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequantError(f"{path}: not there; expected a Hugging Face checkpoint directory") from None
        except ValueError as error:
            raise RequantError(f"{path}: no JSON: {error}") from None
        if not isinstance(found, dict):
            raise RequantError(f"{path}: a {type(found).__name__} found; expected keys and values")
        return found

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
        """The shard file of each tensor, by the names in the files."""
        if (self.directory / INDEX).exists():
            weight_map = self._json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise RequantError(
                    f"{self.directory / INDEX}: `weight_map`: found {weight_map!r}; expected tensor: shard"
                )
            return weight_map
        shards = sorted(self.directory.glob("*.safetensors"))
        if len(shards) != 1:
            raise RequantError(
                f"{self.directory}: {len(shards)} safetensors files and no {INDEX}; expected an index, or one file"
            )
        return dict.fromkeys(read_header(shards[0]), shards[0].name)

    @property
    def shards(self) -> list[str]:
        """File names of the shards, sorted. RequantError if one is a path and not a name in the directory."""
        names = sorted(set(self.stored.values()))
        for name in names:
            if Path(name).name != name:
                raise RequantError(f"{self.directory / INDEX}: shard {name!r}; expected a file name without a path")
        return names

    @property
    def carried_files(self) -> list[str]:
        """Tokenizer and generation files that a release takes along unchanged."""
        return [name for name in TOKENIZER_FILES if (self.directory / name).exists()]

    @property
    def files(self) -> list[str]:
        """Names of the files that a build uses, sorted: config.json, shards, their index, and what is carried along."""
        index = [INDEX] if (self.directory / INDEX).exists() else []
        return sorted(["config.json", *self.carried_files, *index, *self.shards])

    def read(self, names: list[str]) -> dict[str, "torch.Tensor"]:
        """The tensors `names`: FP8 weights decoded to BF16, others as they are stored, stacked ones one by one."""
        if self.view is not None:
            self.view.check_decided(names)
        wanted = {name: self.places.get(name, Place(name)) for name in names}
        whole = {name: place.stored for name, place in wanted.items() if place.expert is None}
        tensors = fp8.read(self.directory, self.stored, list(whole.values()), self.config)
        slices = {name: place for name, place in wanted.items() if place.expert is not None}
        return {name: self._kept_rows(name, tensors[stored]) for name, stored in whole.items()} | read_slices(
            self.directory, self.stored, slices
        )

    def _kept_rows(self, name: str, tensor: "torch.Tensor") -> "torch.Tensor":
        rows = self.view.rows(name) if self.view else None
        return tensor if rows is None else tensor[rows]

    def tokenizer(self):
        """The checkpoint's tokenizer. RequantError if its files are missing."""
        from transformers import AutoTokenizer

        if not any((self.directory / name).exists() for name in TOKENIZERS):
            raise RequantError(f"{self.directory}: no tokenizer.json, tokenizer.model or vocab.json; expected one")
        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)

"""What an engine is given of a checkpoint: a folder that is there while it is served, and gone afterwards.

The packed checkpoint as it is, as links; or its weights decoded to BF16, where the engine can't compute the format.
Either way the engine's own sampling settings are left out: requests say how to choose tokens, nothing else does.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from requant.carried import TOKENIZERS
from requant.checkpoint import Checkpoint
from requant.config import Target
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.records import FileEntry
from requant.tokenizer import made_files, write_made

# Why transformers is not given a format as it is stored; it reads the formats that are not here.
WHY_DECODED = {
    "nvfp4-pack-quantized": "has no arithmetic in NVFP4",
}
WHY_DECODED_MOE = {  # besides, for a mixture of experts
    "nvfp4-pack-quantized": (
        "loads compressed-tensors NVFP4 mixture-of-experts weights without dividing by their global scale "
        "(huggingface/transformers issue 48371), and "
    ),
}
WHY_ASKED = "the config asks for it (`targets`: `weights: decoded`)"


# Seen with transformers 5.23.0: its conversion of a block's experts takes packed ones alone.
WHY_DECODED_PLAIN_EXPERTS = (
    "loads no packed checkpoint in which a block keeps its experts in BF16, but ends with errors of their conversion"
)


def why_decoded(stored_format: str | None, moe: bool, target: Target, plain_experts: bool = False) -> str | None:
    """Why weights stored in that format are decoded to be served at `target`; None if they are served as they are.

    stored_format: None for BF16, which nothing can be decoded to. plain_experts: whether the experts of a block are in
    BF16 all the same.
    """
    if stored_format is None:
        return None
    if target.engine == "transformers" and stored_format in WHY_DECODED:
        besides = WHY_DECODED_MOE.get(stored_format, "") if moe else ""
        return f"transformers {besides}{WHY_DECODED[stored_format]}"
    if target.engine == "transformers" and plain_experts:
        return f"transformers {WHY_DECODED_PLAIN_EXPERTS}"
    return WHY_ASKED if target.weights == "decoded" else None


@contextlib.contextmanager
def served_copy(checkpoint: Path, names: list[str], folder: Path, decode: bool = False) -> Iterator[Path]:
    """The checkpoint's files `names` in `folder`/model, as links; with `decode` its weights in BF16.

    What a killed job left in `folder` is removed first.
    """
    with temporary_folder(folder) as scratch:
        model = scratch / "model"
        if decode:
            from requant.packed import write_decoded

            write_decoded(checkpoint, model)
        else:
            mirror(checkpoint, names, model)
        make_greedy(model)
        yield model


def mirror(packed: Path, names: list[str], folder: Path) -> None:
    """Lays the files `names` of `packed` out in `folder`: shards as links, the others as copies that may be edited.

    A source whose tokenizer has another form gets the files that a release of it has (`tokenizer`).
    """
    folder.mkdir()
    for name in names:
        path, place = packed / name, folder / name
        place.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            place.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, place)
    if set(TOKENIZERS) & set(names):
        write_made(made_files(Checkpoint(folder)), folder)


def linked_files(folder: Path) -> list[Path]:
    """The files that the links in a folder lead to which `mirror` laid out, for `serve_at`."""
    return [Path(os.readlink(path)) for path in folder.iterdir() if path.is_symlink()]


def check_files(directory: str | Path, files: dict[str, FileEntry]) -> None:
    """Compares the packed files with what `pack` recorded: what is served must be what was verified."""
    for name, expected in sorted(files.items()):
        path = Path(directory) / name
        found = file_entry(path) if path.is_file() else None
        if found != expected:
            raise RequantError(
                f"{path}: {f'sha256 {found.sha256[:16]}...' if found else 'not there'}; expected "
                f"{expected.sha256[:16]}... as packed: the file was changed since; run `pack` again"
            )


@contextlib.contextmanager
def temporary_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder of a fixed name, gone afterwards; what a killed job left there is removed first."""
    path = Path(path)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def make_greedy(directory: Path) -> None:
    """Leaves only token ids in generation_config.json: penalties would hide the model's own choice."""
    path = directory / "generation_config.json"
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
        ids = {key: value for key, value in settings.items() if key.endswith("_token_id")}
        path.write_text(json.dumps(ids, sort_keys=True), encoding="utf-8")

"""Packing: block files become the shards of a Hugging Face checkpoint, by hard links, with index and config.

Shard i is block i's file; the last shard holds what belongs to no block (embeddings, final norm, head,
multi-token prediction), as in the source.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.architecture import EXPERT_TENSOR, block_of, expert_counts, is_drafting, without_drafting
from requant.blocks import model_config
from requant.carried import TEMPLATES, is_carried
from requant.checkpoint import INDEX, Checkpoint
from requant.config_json import release_config
from requant.cut import cut_config
from requant.dtypes import main_dtype, released_dtypes, torch_dtype
from requant.encoding import quantization_config
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.locks import elements, shared_experts, tensors_of
from requant.naming import engine_names, module_name, released_name
from requant.records import BlockRecord, KeepList, PackRecord, TensorEntry, read_json, write_json, write_text
from requant.safetensors_io import DTYPE_BYTES, load, read_header, save
from requant.schemes import SCHEMES, Scheme
from requant.tokenizer import converted_from, made_files, write_made
from requant.whole import remove_leftovers, written_whole

if TYPE_CHECKING:
    import torch


def shard_name(number: int, blocks: int) -> str:
    """File name of shard `number` (from 1) of a model of `blocks` blocks."""
    return f"model-{number:05d}-of-{blocks + 1:05d}.safetensors"


def link_or_copy(source: Path, target: Path) -> bool:
    """Gives `source` the second name `target` in one step; copies where the file system has no hard links.

    Returns whether the bytes are shared.
    """
    with written_whole(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
            return False
    return True


def pack(
    source: Path,
    release: str,
    model: str,
    scheme_name: str,
    blocks_dir: Path,
    out: Path,
    out_record: Path,
    mtp: str = "keep",
    keep: KeepList | None = None,
    carried: Sequence[str] | None = None,
) -> PackRecord:
    """Makes the checkpoint directory `out` from the block files in `blocks_dir` and the source's remaining tensors.

    mtp: `drop` leaves out the tensors of multi-token prediction, and config.json says so. keep: the experts that a
    pruned model has of the source; it has no multi-token prediction. carried: the source's files beside the weights
    that the release takes along; all that it can if None.
    """
    start = time.monotonic()
    checkpoint, scheme = Checkpoint(source, keep), SCHEMES[scheme_name]
    blocks = checkpoint.config["num_hidden_layers"]
    drafting = {name for name in checkpoint.index if is_drafting(name, blocks)}
    dropped = drafting if mtp == "drop" else set()
    config = without_drafting(checkpoint.config) if dropped else checkpoint.config
    laid_out = lay_out(checkpoint, scheme, blocks_dir, config, dropped, out, carried)

    tensors = checkpoint.entries(tensors_of(str(source)))
    tensors = {name: entry for name, entry in tensors.items() if name not in dropped}
    packed = {module_name(name, checkpoint.config): entry for name, entry in laid_out.stored.items()}
    counted = _count(release, model, scheme.name, checkpoint, tensors, packed, laid_out.quantized)
    remove_strangers(out, laid_out.files)
    record = PackRecord(
        **counted,
        files={name: file_entry(out / name) for name in sorted(laid_out.files)},
        bytes=sum((out / shard_name(n, blocks)).stat().st_size for n in range(1, blocks + 2)),
        source_bytes=sum((checkpoint.directory / shard).stat().st_size for shard in checkpoint.shards),
        multi_token_prediction=_drafting(checkpoint, dropped),
        tensors_left_out=checkpoint.left_out,
        tokenizer_from=converted_from(checkpoint),
        hard_linked=laid_out.hard_linked,
        seconds=time.monotonic() - start,
    )
    write_json(out_record, record)
    return record


@dataclass(frozen=True)
class LaidOut:
    """A checkpoint directory that was made. files: names of all its files; stored: its tensors, by the names in them.

    quantized: the weights (source names) that are packed; hard_linked: whether all blocks share their bytes.
    """

    files: list[str]
    stored: dict[str, TensorEntry]
    quantized: set[str]
    hard_linked: bool


def lay_out(
    checkpoint: Checkpoint,
    scheme: Scheme,
    blocks_dir: Path,
    config: dict[str, Any],
    dropped: set[str],
    out: Path,
    carried: Sequence[str] | None = None,
) -> LaidOut:
    """Makes the checkpoint directory `out` of block files and the source's tensors outside of blocks.

    config: that of the model that is made, which may have fewer blocks than the source: the first ones, and none of the
    others' tensors. dropped: tensors of no block that it does not have either. carried: as of `pack`. Raises
    RequantError if a block file is not as it was written.
    """
    blocks, whole = config["num_hidden_layers"], checkpoint.config["num_hidden_layers"]
    out.mkdir(parents=True, exist_ok=True)
    quantizing = range(blocks if scheme.quantizes else 0)
    for block in range(blocks):
        load(blocks_dir / f"{block}.safetensors")  # raises if a bit flipped since it was written
    records = [read_json(blocks_dir / f"{block}.json", BlockRecord) for block in quantizing]
    linked = [
        link_or_copy(blocks_dir / f"{block}.safetensors", out / shard_name(block + 1, blocks))
        for block in range(blocks)
    ]
    block_by_name = {name: block_of(name, whole) for name in checkpoint.index.keys() - dropped}
    rest = sorted(name for name, block in block_by_name.items() if block is None)
    outer = {released_name(name, config): tensor for name, tensor in outside(checkpoint, rest, blocks).items()}
    save(out / shard_name(blocks + 1, blocks), outer)

    stored: dict[str, TensorEntry] = {}
    for number in range(1, blocks + 2):
        stored |= read_header(out / shard_name(number, blocks))
    sizes = sum(_bytes(entry) for entry in stored.values())
    index = {"metadata": {"total_size": sizes}, "weight_map": {name: stored[name].shard for name in sorted(stored)}}
    write_text(out / INDEX, json.dumps(index, indent=2) + "\n")
    matrices = {name.removesuffix(".weight") for name in outer if outer[name].dim() == 2 and "embed" not in name}
    held = [name for name, block in block_by_name.items() if block is None or block < blocks]
    kept = {name for record in records for name in record.kept} | routers(held)
    ignored = sorted({"lm_head"} | matrices | {asked for name in kept for asked in engine_names(name, config)})
    written = release_config(config, outer, model_config(config).rope_parameters)
    if scheme.quantizes:
        written["quantization_config"] = quantization_config(scheme, ignored)
    write_text(out / "config.json", json.dumps(written, indent=2, sort_keys=True) + "\n")
    carried = checkpoint.carried_files if carried is None else carried
    for name in carried:
        with written_whole(out / name) as partial:  # a copy: a release must not share bytes with the user's source
            shutil.copyfile(checkpoint.directory / name, partial)
    made = made_files(checkpoint)
    write_made(made, out)
    beside = dict.fromkeys([*carried, *made])
    return LaidOut(
        files=["config.json", INDEX, *beside, *(shard_name(n, blocks) for n in range(1, blocks + 2))],
        stored=stored,
        quantized={name for record in records for name in record.quantized},
        hard_linked=all(linked),
    )


def outside(checkpoint: Checkpoint, names: list[str], blocks: int) -> dict[str, "torch.Tensor"]:
    """The tensors `names`, which are in no block, as a release of the first `blocks` blocks stores them (`dtypes`)."""
    main = main_dtype(checkpoint.described(checkpoint.in_blocks(0, blocks)).values())
    dtypes = released_dtypes(checkpoint.described(names), main)
    return {name: tensor.to(torch_dtype(dtypes[name])) for name, tensor in checkpoint.read(names).items()}


def pack_first(
    source: Path, scheme_name: str, blocks_dir: Path, blocks: int, out: Path, keep: KeepList | None = None
) -> LaidOut:
    """Makes a checkpoint of a release's first `blocks` blocks, as `pack` makes one of all; no multi-token prediction.

    keep: as of `pack`; a list that decides on these blocks, or on one of them, is enough.
    """
    checkpoint = Checkpoint(source, keep)
    drafting = {name for name in checkpoint.index if is_drafting(name, checkpoint.config["num_hidden_layers"])}
    config = cut_config(checkpoint.config, blocks)
    carried = checkpoint.tokenizer_files
    return lay_out(checkpoint, SCHEMES[scheme_name], blocks_dir, config, drafting, out, carried)


def _drafting(checkpoint: Checkpoint, dropped: set[str]) -> str:
    """What became of the source's layers for multi-token prediction."""
    blocks = checkpoint.config["num_hidden_layers"]
    if not any(is_drafting(name, blocks) for name in checkpoint.stored.keys() - checkpoint.left_out.keys()):
        return "none"
    return "dropped" if dropped or checkpoint.view else "kept"


def remove_strangers(out: Path, names: list[str]) -> None:
    """Removes shards and carried files that an earlier release left in `out`, and what killed jobs did."""
    for path in [*out.iterdir(), *(out / TEMPLATES).glob("*")]:
        name = path.relative_to(out).as_posix()
        if name not in names and path.is_file() and (path.suffix == ".safetensors" or is_carried(name)):
            path.unlink()
    remove_leftovers(out)


def routers(names: list[str]) -> set[str]:
    """Modules that choose experts: no Linears in transformers, but in other engines, so `ignore` has to name them."""
    return {name.removesuffix(".weight") for name in names if name.endswith(".mlp.gate.weight")}


def _bytes(entry: TensorEntry) -> int:
    return elements(entry) * DTYPE_BYTES[entry.dtype]


def _count(
    release: str,
    model: str,
    scheme: str,
    checkpoint: Checkpoint,
    source: dict[str, TensorEntry],
    stored: dict[str, TensorEntry],
    quantized: set[str],
) -> dict:
    """The figures of a PackRecord that are counted from tensors, all by their names inside requant."""
    config = checkpoint.config
    blocks = config["num_hidden_layers"]
    if missing := sorted(quantized - source.keys()):
        raise RequantError(f"{release}: {missing[0]} is quantized; the source has no such tensor")
    experts = expert_counts(list(source), blocks)
    packed = [name for name in stored if f"{name.rpartition('.')[0]}.weight" in quantized]
    quantized_parameters = sum(elements(source[name]) for name in quantized)
    packed_bits = 8 * sum(_bytes(stored[name]) for name in packed)
    per_token = config.get("num_experts_per_tok", 0) if experts else 0
    in_experts: dict[int, int] = {}
    for name, entry in source.items():
        if EXPERT_TENSOR.fullmatch(name) and (block := block_of(name, blocks)) is not None:
            in_experts[block] = in_experts.get(block, 0) + elements(entry)
    drafting = sum(elements(entry) for name, entry in source.items() if is_drafting(name, blocks))
    idle = sum(count * (experts[block] - per_token) // experts[block] for block, count in in_experts.items())
    parameters = sum(elements(entry) for entry in source.values())
    return {
        "release": release,
        "model": model,
        "scheme": scheme,
        "parameters": parameters,
        "quantized_parameters": quantized_parameters,
        "bits_per_quantized_weight": packed_bits / quantized_parameters if quantized else None,
        "blocks": blocks,
        "dense_blocks": blocks - len(experts),
        "moe_blocks": len(experts),
        "routed_experts": next(iter(experts.values()), 0),
        "shared_experts": shared_experts(config, list(source)),
        "experts_per_token": per_token,
        "activated_parameters": parameters - idle - drafting,
    }

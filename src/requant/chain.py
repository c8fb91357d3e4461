"""The reference chain: hidden states of the source model between its blocks, computed once for every release.

`embedded` holds the embeddings, hidden_{i} the output of block i, of the calibration tokens; heldout_embedded and
heldout_hidden_{i} beside them those of the held-out tokens, which are few and go with them.
Every pass runs on one thread, whatever the environment says: the last bits of some sums depend on their number.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from requant.architecture import block_of, expert_counts
from requant.checkpoint import Checkpoint
from requant.disk import heldout_beside
from requant.errors import RequantError
from requant.jobs import peak_memory_bytes
from requant.reap import Watch
from requant.records import KeepList, RoutingRecord, write_json
from requant.routing import observe
from requant.safetensors_io import load, save
from requant.saliency import write_table
from requant.streamed import StreamedModel
from requant.view import group_count

if TYPE_CHECKING:
    import pandas as pd


def load_masks(tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """The masks of a token file for `calibration` and `heldout`; None where no token is padding."""
    masks = {part: tokens[f"{part}_mask"] for part in ("calibration", "heldout")}
    return {part: None if bool(mask.all()) else mask for part, mask in masks.items()}


def finite(states: torch.Tensor) -> bool:
    """Whether hidden states [n, T, width] have neither NaN nor infinite values."""
    return all(bool(sample.isfinite().all()) for sample in states)


def save_states(path: str | Path, states: dict[str, torch.Tensor]) -> None:
    """Writes hidden states, BF16 [n, seqlen, width]: `calibration` to `path`, `heldout` beside it."""
    save(heldout_beside(path), {"heldout": states["heldout"]})
    save(path, {"calibration": states["calibration"]})


def embed(source: str | Path, tokens_path: str | Path, hidden_path: str | Path) -> None:
    """Writes the embeddings of the calibration and held-out tokens, BF16 [n, seqlen, width] each.

    Tensors outside of blocks are all read here, one by one: a value in them that is not finite would else be found by
    the jobs behind the last block.
    """
    torch.set_num_threads(1)
    model, tokens = StreamedModel(Checkpoint(source)), load(tokens_path)
    for name in model.checkpoint.index:
        if block_of(name, model.blocks) is None:
            model.checkpoint.read([name])
    save_states(hidden_path, {part: model.embed(tokens[part]) for part in ("calibration", "heldout")})


def observe_block(
    source: str | Path, tokens_path: str | Path, hidden_path: str | Path, block: int, device: str = "cpu"
) -> "pd.DataFrame":
    """The table of saliencies of block `block`, on the hidden states of the calibration tokens in `hidden_path`."""
    torch.set_num_threads(1)
    model, watch = StreamedModel(Checkpoint(source), device), Watch()
    mask = load_masks(load(tokens_path))["calibration"]
    observe(model, model.block(block), load(hidden_path, "calibration")["calibration"], mask, watch=watch)
    return watch.table(group_count(model.checkpoint.config))


def run_reference_block(
    source: str | Path,
    tokens_path: str | Path,
    hidden_path: str | Path,
    block: int,
    out_hidden: str | Path,
    out_routing: str | Path,
    out_saliency: str | Path,
    model_name: str,
    calibration: str,
    keep: KeepList | None = None,
    device: str = "cpu",
) -> RoutingRecord:
    """Runs block `block` of a model over both token sets; writes its output, the routing record and the saliencies of
    its experts on the calibration tokens.

    keep: the experts that a pruned model has of the checkpoint in `source`.
    """
    start = time.monotonic()
    torch.set_num_threads(1)
    model = StreamedModel(Checkpoint(source, keep), device)
    hidden, masks = load(hidden_path) | load(heldout_beside(hidden_path)), load_masks(load(tokens_path))
    module = model.block(block)
    watches = {"calibration": Watch(), "heldout": None}
    seen = {part: observe(model, module, hidden[part], masks[part], watch=watch) for part, watch in watches.items()}
    for part, found in seen.items():
        if not finite(found.output):
            raise RequantError(
                f"{model_name} block {block}: its output has NaN or infinite values over the {part} tokens; expected "
                "finite ones: this model can't be run in BF16 on them"
            )
    save_states(out_hidden, {part: found.output for part, found in seen.items()})
    write_table(out_saliency, watches["calibration"].table(group_count(model.checkpoint.config)))
    counts = seen["calibration"].tokens_per_expert
    mask = masks["calibration"]
    record = RoutingRecord(
        model=model_name,
        calibration=calibration,
        block=block,
        kind="moe" if block in expert_counts(model.checkpoint.index, model.blocks) else "dense",
        tokens=hidden["calibration"].shape[:2].numel() if mask is None else int(mask.sum()),
        tokens_per_expert=counts,
        never_reached=[expert for expert, count in enumerate(counts) if count == 0],
        seconds=time.monotonic() - start,
        device=device,
        peak_memory_bytes=peak_memory_bytes(),
    )
    write_json(out_routing, record)
    return record

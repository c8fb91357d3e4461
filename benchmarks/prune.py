"""Pruned against original, by method, ratio and mode of observation: benchmarks/results/prune.json.

    python benchmarks/prune.py BUILD [--seeds 10]

BUILD is a directory in which `snakemake results/reference/demo-moe/demo/hidden_5.safetensors` was run: the embedded
model, observed on the calibration tokens of its default build and measured on the held-out ones, in BF16.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from requant.checkpoint import Checkpoint  # noqa: E402
from requant.evaluate import tally  # noqa: E402
from requant.keep_list import Pruning, keep_list  # noqa: E402
from requant.reap import Watch  # noqa: E402
from requant.records import KeepList  # noqa: E402
from requant.routing import observe  # noqa: E402
from requant.saliency import read_table, write_table  # noqa: E402
from requant.streamed import StreamedModel  # noqa: E402

MODEL, BEFORE, GROUPS = ROOT / "demo/model", 16, 4
RATIOS = {"25 %": 12, "50 %": 8}


def pruning(method: str, mode: str, seed: int, experts: int) -> Pruning:
    return Pruning("pruned", "demo-moe", method, mode, "demo", seed, BEFORE, experts, GROUPS)


def in_sequence(chosen: Pruning, states: dict[str, torch.Tensor], folder: Path) -> KeepList:
    """The keep list of a model each of whose blocks is observed on the output of the pruned ones before it."""
    original, hidden, tables = StreamedModel(Checkpoint(MODEL)), states["calibration"], {}
    for block in range(original.blocks):
        watch, tables[block] = Watch(), folder / f"sequential_{block}.csv"
        observe(original, original.block(block), hidden, None, watch=watch)
        write_table(tables[block], watch.table(GROUPS))
        keep = keep_list(chosen, {block: tables[block]})
        pruned = StreamedModel(Checkpoint(MODEL, keep))
        hidden = pruned.run(pruned.block(block), hidden)
    return keep_list(chosen, tables)


def quality(keep: KeepList, start: torch.Tensor, end: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Of the model that `keep` leaves, on the held-out tokens: `start` and `end` are the original's chain."""
    model, hidden = StreamedModel(Checkpoint(MODEL, keep)), start
    for block in range(model.blocks):
        hidden = model.run(model.block(block), hidden)
    return tally(model, end, {"pruned": hidden}, tokens, None)["pruned"].quality().model_dump()


def mass_kept(keep: KeepList, tables: dict[int, Path]) -> float:
    """Mean over the MoE blocks of the part of the mass that the kept experts had."""
    shares = []
    for block, kept in keep.blocks.items():
        table = read_table(tables[block])
        shares.append(table["mass"][table["expert"].isin(kept)].sum() / table["mass"].sum())
    return float(sum(shares) / len(shares))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chain = arguments.build / "results/reference/demo-moe/demo"
    tokens = load_file(arguments.build / "results/calibration/demo-moe/demo/tokens.safetensors")["heldout"]
    tables = {block: chain / f"saliency_{block}.csv" for block in range(6)}
    states, end = load_file(chain / "embedded.safetensors"), load_file(chain / "hidden_5.safetensors")["heldout"]
    runs = [(method, mode, 0) for method in ("reap", "frequency") for mode in ("oneshot", "sequential")]
    runs += [("random", "oneshot", seed) for seed in range(arguments.seeds)]
    results = []
    for ratio, experts in RATIOS.items():
        for method, mode, seed in runs:
            chosen = pruning(method, mode, seed, experts)
            with tempfile.TemporaryDirectory() as folder:
                keep = keep_list(chosen, tables) if mode == "oneshot" else in_sequence(chosen, states, Path(folder))
            found = {"ratio": ratio, "method": method, "observe": mode, "seed": seed}
            found |= {"mass_kept": mass_kept(keep, tables)} | quality(keep, states["heldout"], end, tokens)
            results.append(found)
            print(found, flush=True)
    path = ROOT / "benchmarks" / "results" / "prune.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

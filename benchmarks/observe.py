"""What observing the experts adds to the reference pass of a block: benchmarks/results/observe.json.

    python benchmarks/observe.py [--pairs 15] [--threads 1]

Each pass is made with and without, one right after the other, so that the ratio of a pair is of one moment of the
machine; the order within a pair alternates. The embedded model's block has 128 samples of its calibration text, as in
its build; the wide block random weights and inputs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "demo"), str(ROOT / "benchmarks")]

from generate import documents  # noqa: E402
from job_memory import config_of  # noqa: E402

from requant.blocks import empty_block, empty_model  # noqa: E402
from requant.checkpoint import Checkpoint  # noqa: E402
from requant.reap import Watch  # noqa: E402
from requant.routing import observe  # noqa: E402
from requant.streamed import StreamedModel  # noqa: E402

WIDE = {"width": 1024, "experts": 64, "inner": 512, "samples": 16, "length": 256}
BLOCK = 3


def embedded() -> tuple:
    """(model, block, hidden states before it) of the embedded model."""
    model = StreamedModel(Checkpoint(ROOT / "demo/model"))
    tokenizer, ids = model.checkpoint.tokenizer(), []
    for row in documents("calibration", "stories", 2000, 1):
        ids += tokenizer(row["text"])["input_ids"]
    tokens = torch.tensor(ids[: 128 * 128]).view(128, 128)
    states = model.stream(tokens)
    hidden = [next(states) for _ in range(BLOCK + 1)][-1]
    return model, model.block(BLOCK), hidden


def wide() -> tuple:
    """The same of a random block; its model is the embedded one but for the shape, and reads nothing."""
    config = CONFIG_MAPPING["deepseek_v3"](**config_of(WIDE))
    model = StreamedModel(Checkpoint(ROOT / "demo/model"))
    model.empty = empty_model(config.to_dict())
    model.config = model.empty.config
    model.rotary = type(model.empty.model.rotary_emb)(model.config)
    block = empty_block(type(model.empty.model.layers[0]), model.config, 0).to_empty(device="cpu")
    torch.manual_seed(0)
    for tensor in block.state_dict().values():
        tensor.normal_(0, 0.05)
    hidden = torch.randn(WIDE["samples"], WIDE["length"], WIDE["width"]).to(torch.bfloat16)
    return model, block.eval().requires_grad_(False), hidden


def seconds(model: StreamedModel, block: torch.nn.Module, hidden: torch.Tensor, watched: bool) -> float:
    start, watch = time.perf_counter(), Watch() if watched else None
    observe(model, block, hidden, None, watch=watch)
    if watch is not None:
        watch.table(4)
    return time.perf_counter() - start


def measure(name: str, case: tuple, pairs: int) -> dict:
    """Ratios of pairs of passes, and the median seconds of each side."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for watched in (False, True):
        seconds(*case, watched)
    for pair in range(pairs):
        for watched in (pair % 2 == 1, pair % 2 == 0):
            found[watched].append(seconds(*case, watched))
    ratios = sorted(after / before for before, after in zip(found[False], found[True], strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "block": name,
        "tokens": case[2].shape[:2].numel(),
        "pairs": pairs,
        "seconds_without": statistics.median(found[False]),
        "seconds_with": statistics.median(found[True]),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "ratio_range": [ratios[0], ratios[-1]],
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name, make in (("embedded model", embedded), ("random, 64 experts of 512, width 1024", wide)):
        results.append(measure(name, make(), arguments.pairs))
        print(results[-1], flush=True)
    path = ROOT / "benchmarks" / "results" / "observe.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

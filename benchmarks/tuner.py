"""The `fused` tuner beside AutoRound: speed, memory, loss curves and growth, measured side by side.

    snakemake --cores all results/reference/demo-moe/demo/hidden_5.safetensors     (the demo's hidden states, once)
    python benchmarks/tuner.py speed | same | growth [--out DIRECTORY]

Both engines tune the same block on the same tokens in the same order of samples. Each run is a process of its own, so
that peak memory is its own. Results are JSON files; `growth` draws a picture too.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

DEMO = ROOT / "demo" / "model"
CHAIN = ROOT / "results" / "reference" / "demo-moe" / "demo"
SEED = 7


def demo_case(block: int):
    """(model, hidden states, targets) of a block of the embedded model, from the build's reference chain."""
    from safetensors.torch import load_file

    from requant.checkpoint import Checkpoint
    from requant.streamed import StreamedModel

    before = CHAIN / (f"hidden_{block - 1}.safetensors" if block else "embedded.safetensors")
    if not (CHAIN / f"hidden_{block}.safetensors").exists():
        sys.exit(f"{CHAIN}: no hidden states of block {block}; build them first, see --help")
    hidden, targets = (load_file(path)["calibration"] for path in (before, CHAIN / f"hidden_{block}.safetensors"))
    return StreamedModel(Checkpoint(DEMO)), hidden, targets


def random_case(family: str, experts: int, tokens: int, width: int, samples: int = 32):
    """(model, hidden states, targets) of a random block of `family`; block 1 of two."""
    import tempfile

    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import random_checkpoint

    from requant.checkpoint import Checkpoint
    from requant.streamed import StreamedModel

    folder = tempfile.mkdtemp()
    random_checkpoint(folder, family, experts, width)
    model = StreamedModel(Checkpoint(folder))
    generator = torch.Generator().manual_seed(SEED)
    hidden = torch.randn(samples, tokens, width, generator=generator).to(torch.bfloat16)
    return model, hidden, model.run(model.block(1), hidden)


def run(case: dict) -> dict:
    """Tunes one case with one engine; what is measured of it."""
    import logging

    import torch

    from requant.config import Tuning
    from requant.quantize import prepare
    from requant.schemes import SCHEMES

    torch.set_num_threads(case["threads"])
    if "block" in case:
        model, hidden, targets = demo_case(case["block"])
        index = case["block"]
    else:
        model, hidden, targets = random_case(**case["random"])
        index = 1
    if case.get("nudge"):  # the least change of one value of each sample
        hidden.view(torch.int16)[:, 0, 0] += 1
    scheme = SCHEMES[case["scheme"]]
    prepared = prepare(model, index, scheme, [], hidden, None)
    prefix = f"model.layers.{index}."
    linears = [name.removeprefix(prefix) for name in prepared.linears]
    tuning = Tuning(
        engine="auto_round" if case["engine"].startswith("auto_round") else "fused",
        iters=case["iters"],
        threads=case["threads"],
    )
    stamps: list[float] = []
    what = (hidden, targets, None, model.positions(hidden.shape[1]), scheme, tuning, case.get("seed", SEED))

    def stamp(iteration: int, loss: float) -> None:
        stamps.append(time.perf_counter())

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if tuning.engine == "fused":
        from requant import fused

        tuned = fused.tune(prepared.block, linears, *what, stamp)
    else:
        logging.getLogger("autoround").propagate = False
        from requant import autoround

        compile_it = case["engine"].endswith("compiled")
        tuned = autoround.tune(prepared.block, model.config, str(DEMO), linears, *what, stamp, torch_compile=compile_it)
    seconds = time.perf_counter() - start
    gaps = sorted(later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return case | {
        "seconds": seconds,
        "seconds_per_iteration": gaps[len(gaps) // 2],
        "peak_bytes": peak * 1024,
        "peak_over_start_bytes": (peak - before) * 1024,
        "losses": tuned.losses,
        "full_loss": full_loss(model, index, prepared, tuned, scheme, hidden, targets),
    }


def full_loss(model, index: int, prepared, tuned, scheme, hidden, targets) -> float:
    """MSE of the block as it would be shipped, over all samples: what the best minibatch stands for."""
    from requant.quantize import mean_squared_error, packed_tensors, shipped_block
    from requant.routing import observe

    prefix = f"model.layers.{index}."
    source = {prefix + name: tensor for name, tensor in model.block(index).state_dict().items()}
    weights = {prefix + name: weight for name, weight in tuned.weights.items()}
    tensors = packed_tensors(source, weights, prepared.peaks, scheme)
    shipped = shipped_block(model, index, tensors, prepared.linears, scheme)
    return mean_squared_error(observe(model, shipped, hidden, None).output, targets, None)


def measured(case: dict) -> dict:
    """`run` in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case["threads"])}
    done = subprocess.run(
        [sys.executable, __file__, "run", json.dumps(case)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{case}: failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """Where it was measured."""
    from importlib.metadata import version

    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    versions = {name: version(name) for name in ("torch", "auto-round", "numba", "transformers")}
    return {"cpu": model or platform.machine(), "cores": os.cpu_count(), **versions}


def same(out: Path, iters: int) -> None:
    """Loss curves of both engines on every block of the demo, and AutoRound's beside itself with its input nudged."""
    results = []
    for scheme in ("NVFP4", "W3A16"):
        for block in range(6):
            for engine, nudge in (("auto_round", False), ("auto_round", True), ("fused", False)):
                case = {"engine": engine, "nudge": nudge, "block": block, "scheme": scheme, "iters": iters}
                results.append(measured(case | {"threads": 1}))
            plain, nudged, fused = results[-3:]
            print(
                f"{scheme} block {block}: full loss fused/auto_round {fused['full_loss'] / plain['full_loss']:.4f}, "
                f"nudged/auto_round {nudged['full_loss'] / plain['full_loss']:.4f}",
                flush=True,
            )
            write(out / "tuner_same.json", results)


def write(path: Path, results: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "same", "growth", "run"))
    parser.add_argument("case", nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()
    if options.what == "run":
        print(json.dumps(run(json.loads(options.case))))
    elif options.what == "same":
        same(options.out, options.iters)


if __name__ == "__main__":
    main()

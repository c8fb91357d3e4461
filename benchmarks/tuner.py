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
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

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


def random_case(experts: int, tokens: int, width: int):
    """(model, hidden states, targets) of a random DeepSeek-V3 block; each token goes to 4 experts of half its width."""
    shape = {"n_routed_experts": experts, "num_experts_per_tok": 4, "hidden_size": width, "num_hidden_layers": 2}
    shape |= {"moe_intermediate_size": max(128, width // 2), "intermediate_size": 2 * width}
    return random_model("deepseek_v3", tokens, width, **shape)


def family_case(family: str):
    """(model, hidden states, targets) of a random block of the tests' tiny model of a family."""
    return random_model(family, tokens=64, width=128)


def random_model(family: str, tokens: int, width: int, samples: int = 32, **shape):
    """(model, hidden states, targets) of block 1 of a random model."""
    import tempfile

    import tiny
    import torch

    from requant.checkpoint import Checkpoint
    from requant.streamed import StreamedModel

    folder = tempfile.mkdtemp()
    tiny.write_checkpoint(Path(folder), family, shard_size="10GB", **shape)
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
        model, hidden, targets = family_case(case["family"]) if "family" in case else random_case(**case["random"])
        index = 1
    if case.get("nudge"):  # the least change of one value of each sample
        hidden.view(torch.int16)[:, 0, 0] += 1
    scheme = SCHEMES[case["scheme"]]
    prepared = prepare(model, index, scheme, [], hidden, None)
    prefix = f"model.layers.{index}."
    linears = [name.removeprefix(prefix) for name in prepared.linears]
    # unless it is said, both keep the parameters of the lowest minibatch, as AutoRound does
    tuning = Tuning(
        judge=case.get("judge", "minibatch"),
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
    command = [sys.executable, __file__, "run", json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{case}: failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """Where it was measured."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {name: version(name) for name in ("torch", "auto-round", "numba", "transformers")}
    return {"cpu": model or platform.machine(), "cores": os.cpu_count(), **versions}


SAME_CASES = [{"block": block} for block in range(6)]
SAME_CASES += [{"family": family} for family in ("deepseek_v3", "qwen3_moe", "qwen3", "llama")]


def same(out: Path, iters: int) -> None:
    """Loss curves of both engines on every block of the demo and on random blocks, and their losses over all samples.

    AutoRound also beside itself with its input nudged, and `fused` also as it chooses by default.
    """
    results = []
    for scheme in ("NVFP4", "W3A16"):
        for what in SAME_CASES:
            case = what | {"scheme": scheme, "iters": iters, "threads": 1}
            plain = measured(case | {"engine": "auto_round"})
            others = {
                "nudged": measured(case | {"engine": "auto_round", "nudge": True}),
                "fused": measured(case | {"engine": "fused"}),
                "fused by samples": measured(case | {"engine": "fused", "judge": "samples"}),
            }
            results += [plain, *others.values()]
            ratios = (f"{name} {other['full_loss'] / plain['full_loss']:.4f}" for name, other in others.items())
            print(f"{scheme} {what}: full loss over auto_round's: {', '.join(ratios)}", flush=True)
            write(out / "tuner_same.json", results)


ENGINES = ("auto_round", "auto_round compiled", "fused")


def speed(out: Path, iters: int) -> None:
    """Seconds an iteration and peak memory of AutoRound, with and without its compilation, and of `fused`."""
    results = []
    cases = [({"block": block}, scheme) for block in (2, 0) for scheme in ("NVFP4", "W3A16")]
    cases += [({"random": {"experts": 64, "tokens": 128, "width": 128}}, scheme) for scheme in ("NVFP4", "W3A16")]
    for what, scheme in cases:
        found = {}
        for engine in ENGINES:
            for threads in (1, 2):
                case = what | {"engine": engine, "scheme": scheme, "iters": iters, "threads": threads}
                results.append(measured(case) | {"full_loss": None, "losses": None})
                found[engine, threads] = results[-1]
        theirs = min((found[key] for key in found if key[0] != "fused"), key=seconds)
        ours = min((found[key] for key in found if key[0] == "fused"), key=seconds)
        print(
            f"{what} {scheme}: {theirs['engine']} {seconds(theirs) * 1e3:.0f} ms on {theirs['threads']} threads, "
            f"fused {seconds(ours) * 1e3:.1f} ms on {ours['threads']}: {seconds(theirs) / seconds(ours):.1f} times; "
            f"peak {theirs['peak_bytes'] / 1e6:.0f} and {ours['peak_bytes'] / 1e6:.0f} MB",
            flush=True,
        )
        write(out / "tuner_speed.json", results)


def seconds(found: dict) -> float:
    return found["seconds_per_iteration"]


def growth(out: Path, iters: int) -> None:
    """Time and memory of random blocks by experts, tokens and width, beside what operations and bytes alone take."""
    rates = machine_rates()
    sizes = [(experts, 128, 128) for experts in (8, 16, 32, 64, 128)]
    sizes += [(16, tokens, 128) for tokens in (32, 64, 256)] + [(16, 128, width) for width in (256, 512)]
    results = []
    for experts, tokens, width in sizes:
        beside = tokens == width == 128 and experts <= 64
        for engine in ("fused", "auto_round") if beside else ("fused",):
            case = {"random": {"experts": experts, "tokens": tokens, "width": width}, "engine": engine}
            found = measured(case | {"scheme": "NVFP4", "iters": iters, "threads": 1})
            found |= {"bound_seconds": bound(experts, tokens, width, rates), "losses": None, "full_loss": None}
            results.append(found)
            print(
                f"{engine}: {experts} experts, 8 x {tokens} tokens, width {width}: {seconds(found) * 1e3:.1f} ms, "
                f"bound {found['bound_seconds'] * 1e3:.2f} ms, "
                f"peak over start {found['peak_over_start_bytes'] / 1e6:.0f} MB",
                flush=True,
            )
    write(out / "tuner_growth.json", results, rates)
    draw(results, out / "tuner_growth.png")


def machine_rates() -> dict:
    """This machine's own rates on one thread: BF16 matrix products, and reading and writing memory."""
    import torch

    torch.set_num_threads(1)
    a = torch.randn(1024, 1024).to(torch.bfloat16)
    big = torch.zeros(64 * 2**20)
    other = torch.empty_like(big)
    return {
        "matrix_flops": 2 * 1024**3 / best_of(lambda: a @ a),
        "memory_bytes_per_second": 2 * big.nbytes / best_of(lambda: other.copy_(big)),
    }


def best_of(work, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def bound(experts: int, tokens: int, width: int, rates: dict) -> float:
    """Seconds that one iteration takes at least: its matrix products, or the bytes that have to pass through memory.

    A weight is read (2 bytes), as are its offset (2) and gradient (2), which was written (2); offset and value are
    written (4). Activations of the experts pass once each way through each of their six tensors.
    """
    inner = max(128, width // 2)
    weights = (experts + 1) * 3 * width * inner
    rows = 8 * tokens * 4
    flops = 6 * (rows + 8 * tokens) * 3 * width * inner
    memory = 12 * weights + 2 * 2 * rows * (3 * width + 3 * inner)
    return max(flops / rates["matrix_flops"], memory / rates["memory_bytes_per_second"])


def draw(results: list[dict], path: Path) -> None:
    """Milliseconds an iteration by number of experts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    same_size = [found for found in results if found["random"]["tokens"] == found["random"]["width"] == 128]
    for engine in ("auto_round", "fused"):
        points = [
            (found["random"]["experts"], seconds(found) * 1e3) for found in same_size if found["engine"] == engine
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=engine)
    points = [(found["random"]["experts"], found["bound_seconds"] * 1e3) for found in same_size]
    axes.plot(*zip(*sorted(set(points)), strict=True), linestyle="--", color="gray", label="operations and bytes alone")
    axes.set(xscale="log", yscale="log", xlabel="routed experts", ylabel="milliseconds an iteration")
    axes.set_title("NVFP4, width 128, 8 x 128 tokens, one thread")
    axes.set_xticks([8, 16, 32, 64, 128], labels=["8", "16", "32", "64", "128"])
    axes.legend(loc="center right")
    figure.savefig(path, dpi=120)


def write(path: Path, results: list[dict], rates: dict | None = None) -> None:
    """Results with the machine that they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine() | (rates or {}), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "same", "growth", "run"))
    parser.add_argument("case", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()
    if options.what == "run":
        print(json.dumps(run(json.loads(options.case))))
    else:
        {"speed": speed, "same": same, "growth": growth}[options.what](options.out, options.iters)


if __name__ == "__main__":
    main()

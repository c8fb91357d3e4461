"""A DeepSeek-V3.2 decoder block of true size, quantized on one GPU: seconds, where they go, memory, losses.

    python benchmarks/real_block.py [--out FILE] [EXPERTS:SCHEME:ENGINE:SAMPLES:ITERS ...]

Each case is a process of its own: what a quantize job does with a block, but for reading and writing files. Weights
are random with the statistics of trained ones: normal, a scale of its own a row, one weight in a thousand eight times
as large; hidden states are normal. 0 experts are the dense block. A step has 8 samples of 2048 tokens.

The split of an iteration is that of its kernels by torch's profiler. The floor is the larger of the times that its
matrix products and the bytes that it can't avoid would take at the rates measured beside it: a product of 8192 x 8192
x 8192, a copy of 2 GB. Bytes: every weight's value read once, its offset read and written. The engine auto_round is
AutoRound's `quantize_block` on the same block; where memory stops it, its message is the result.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

# config.json of DeepSeek-V3.2 where it shapes a block.
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "model_type": "deepseek_v32",
}
LENGTH, BATCH = 2048, 8
CASES = (
    "192:NVFP4:fused:512:200",
    "128:W3A16:fused:64:100",
    "0:NVFP4:fused:64:100",
    "0:NVFP4:auto_round:16:6",
    "16:NVFP4:fused:16:12",
    "16:NVFP4:auto_round:16:6",
    "192:NVFP4:auto_round:16:6",
)
PROFILED = (4, 6)  # iterations: from the end of the first to the end of the last
KERNELS = (  # first match wins
    ("copies from the CPU", r"Memcpy HtoD"),
    ("attention", r"sdpa|flash|fmha|cudnn"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|xmma"),
    ("quantization", r"^_(nvfp4|integer)_|^_round_inputs"),
    ("routing, rounding of experts' inputs", r"^_(spread|gate|combine)|sort|topk|TopK|scatter|gather|histogram"),
)
REST = "the rest"


def shape_of(experts: int) -> dict:
    """config.json of a model whose block 3 has that many experts, and whose block 0 is dense."""
    return SHAPE | {"n_routed_experts": experts or 8}


class RandomCheckpoint:
    """The tensors of one block, made anew at every reading, always the same."""

    directory = "random"

    def __init__(self, config: dict, block: int):
        from requant.blocks import empty_block, empty_model, model_config

        self.config, self.block = config, block
        layer = type(empty_model(config).model.layers[block])
        state = empty_block(layer, model_config(config), block).state_dict()
        self.shapes = {f"model.layers.{block}.{name}": tensor.shape for name, tensor in state.items()}
        self.index = dict.fromkeys(self.shapes, "random")

    def read(self, names: list[str], device="cpu") -> dict:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        return {name: self._tensor(name, generator, device) for name in names}

    def _tensor(self, name: str, generator, device):
        import torch

        shape = self.shapes[name]
        if name.endswith("bias"):
            return torch.zeros(shape, device=device)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
        rows = torch.empty(shape[0], 1, device=device).uniform_(0.5, 1.5, generator=generator) * shape[1] ** -0.5
        outliers = torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(generator=generator) < 0.001
        return weight.mul_(rows.to(torch.bfloat16)).mul_(1 + 7 * outliers)


def rates() -> dict:
    """This device's own: operations and bytes (read and written) a second."""
    import torch

    def seconds(work) -> float:
        found = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
        return median(found[2:])

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    operations = 2 * 8192**3 / seconds(lambda: left @ right)
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    moved = 2 * 2**31 / seconds(lambda: target.copy_(source))
    return {"operations_per_second": operations, "bytes_per_second": moved}


def work_of(experts: int) -> tuple[float, float]:
    """(operations of the products of an iteration, weights) of a block."""
    from requant.duration import WITH_BACKWARD
    from requant.shapes import pass_work
    from requant.structure import from_config

    config = shape_of(experts)
    kind = next(kind for kind in from_config(config).kinds if (3 if experts else 0) in kind.blocks)
    weights = sum(rows * columns for rows, columns in kind.linear_shapes.values())
    return WITH_BACKWARD * pass_work(kind, config, BATCH * LENGTH, LENGTH), weights


def split(profiler, iterations: int) -> dict[str, float]:
    """Seconds an iteration of each kind of kernel."""
    from torch.autograd import DeviceType

    found = dict.fromkeys([kind for kind, _ in KERNELS] + [REST], 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            kind = next((kind for kind, pattern in KERNELS if re.search(pattern, event.key)), REST)
            found[kind] += event.self_device_time_total / 1e6 / iterations
    return found


def run(experts: int, scheme_name: str, engine: str, samples: int, iters: int) -> dict:
    """One case, in this process."""
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, profile

    from requant import fused, quantize
    from requant.config import Tuning
    from requant.schemes import SCHEMES
    from requant.streamed import StreamedModel

    index, scheme = (3 if experts else 0), SCHEMES[scheme_name]
    measured = rates()
    torch.cuda.empty_cache()
    model = StreamedModel(RandomCheckpoint(shape_of(experts), index), "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.empty(samples, LENGTH, SHAPE["hidden_size"], dtype=torch.bfloat16)
    for sample in hidden:
        sample.copy_(torch.randn(sample.shape, generator=generator, device="cuda"))
    stamps, losses = [], []
    profiler = profile(activities=[ProfilerActivity.CUDA])

    def report(iteration: int, loss: float) -> None:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        losses.append(loss)
        if engine == "fused" and iteration == PROFILED[0]:
            profiler.__enter__()
        if engine == "fused" and iteration == PROFILED[1]:
            profiler.__exit__(None, None, None)

    seconds = {}

    def timed(name: str, function):
        def call(*arguments, **keywords):
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
            return result

        return call

    directory = Path(tempfile.mkdtemp())  # AutoRound asks for a model's folder
    (directory / "config.json").write_text(json.dumps(shape_of(experts)), encoding="utf-8")
    tuning = Tuning(iters=iters, device="cuda", engine=engine, batch_size=BATCH)
    job = quantize.BlockJob(
        source=directory, release="real-block", model="random", block=index, scheme=scheme_name, tuning=tuning,
        keep=[], tokens=Path(), hidden=Path(), targets=Path(),
    )  # fmt: skip
    start = time.perf_counter()
    prepared = timed("observe", quantize.prepare)(model, index, scheme, [], hidden, None)
    targets = prepared.seen.output
    predicted = fused.peak_bytes(prepared.block, BATCH * LENGTH, SHAPE["num_experts_per_tok"], scheme, iters)
    torch.cuda.reset_peak_memory_stats()
    quantize.fused.tune = timed("tune", quantize.fused.tune)
    quantize.autoround.tune = timed("tune", quantize.autoround.tune)
    quantize.packed_tensors = timed("pack", quantize.packed_tensors)
    quantize.shipped_block = timed("decode", quantize.shipped_block)
    quantize.observe = timed("run what is shipped", quantize.observe)
    made = quantize.make_block(model, job, prepared, hidden, targets, None, report)
    whole = time.perf_counter() - start
    gaps = [later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False)]
    quiet = [gap for place, gap in enumerate(gaps) if not PROFILED[0] <= place <= PROFILED[1]]
    iteration = median(quiet or gaps)
    operations, weights = work_of(experts)
    by_products = operations / measured["operations_per_second"]
    by_bytes = 6 * weights / measured["bytes_per_second"]
    kept = made.losses[made.kept]
    found = {
        "experts": experts,
        "scheme": scheme_name,
        "engine": engine,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "samples": samples,
        "tokens_per_step": BATCH * LENGTH,
        "iterations": iters,
        "rates": measured,
        "seconds_per_iteration": iteration,
        "floor": {"products": by_products, "bytes": by_bytes, "ratio": iteration / max(by_products, by_bytes)},
        "job_seconds": whole,
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "predicted_bytes": predicted,
        "losses": {place: losses[place] for place in (0, 50, 100, 150, iters - 1) if place < iters},
        "lowest_loss": kept if made.kept < iters - 1 else min(losses),
        "kept_iteration": made.kept,
    }
    if engine == "fused" and iters > PROFILED[1]:
        found["split"] = split(profiler, PROFILED[1] - PROFILED[0])
        found["split"]["no kernel runs"] = max(0.0, iteration - sum(found["split"].values()))
    return found


def shown(found: dict) -> str:
    """A case in a few lines."""
    name = f"{found['experts']} experts {found['scheme']} {found['engine']}"
    if "error" in found:
        return f"{name}: {found['error']}"
    floor, seconds = found["floor"], {key: round(value, 1) for key, value in found["seconds"].items()}
    lines = [
        f"{name}: {found['seconds_per_iteration']:.4f} s an iteration, {floor['ratio']:.2f} x the floor (products "
        f"{floor['products']:.4f}, bytes {floor['bytes']:.4f}); job {found['job_seconds']:.0f} s {seconds}; peak "
        f"{found['peak_bytes'] / 1e9:.2f} GB, predicted {found['predicted_bytes'] / 1e9:.2f}; losses {found['losses']}"
    ]
    if "split" in found:
        lines.append("  " + ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in found["split"].items()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    results = []
    for case in options.cases:
        experts, scheme, engine, samples, iters = case.split(":")
        settings = (int(experts), scheme, engine, int(samples), int(iters))
        if options.one:
            print(json.dumps(run(*settings)))
            return
        done = subprocess.run([sys.executable, __file__, "--one", case], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            found = {"experts": settings[0], "scheme": scheme, "engine": engine, "samples": settings[3]}
            found["error"] = lines[-1][:400] if lines else f"exit status {done.returncode}"
            print(done.stderr[-2500:] if "OutOfMemory" not in done.stderr else "", flush=True)
        else:
            found = json.loads(done.stdout.splitlines()[-1])
        results.append(found)
        print(shown(found), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

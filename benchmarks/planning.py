"""How long `snakemake -n` takes, and how much memory, against the blocks of a model: two releases, from a lock alone.

    python benchmarks/planning.py [--blocks 8 16 32 61 100 200] [--experts 256] [--runs 3] [--out FILE]

The model has DeepSeek-V3's tensors, in FP8 with a factor a block, in shards of its size; with 61 blocks and 256
experts that is as many tensors as it has. Nothing but the lock is made of it: it is a model from the hub, whose files
jobs would download. Each plan is of a whole build, from tokens to card, in a directory of its own.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from requant.checkpoint import INDEX  # noqa: E402
from requant.fp8 import SCALE_SUFFIX, scale_shape  # noqa: E402
from requant.records import FileEntry, Lock, TensorEntry, write_json  # noqa: E402
from requant.safetensors_io import DTYPE_BYTES  # noqa: E402

WIDTH, VOCABULARY, DENSE_WIDTH, EXPERT_WIDTH, DENSE_BLOCKS = 7168, 129280, 18432, 2048, 3
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SHARD_BYTES = 4_300_000_000
ATTENTION = {
    "q_a_proj": [1536, WIDTH],
    "q_b_proj": [24576, 1536],
    "kv_a_proj_with_mqa": [576, WIDTH],
    "kv_b_proj": [32768, 512],
    "o_proj": [WIDTH, 16384],
}


def linears_of(block: int, experts: int) -> Iterator[tuple[str, list[int]]]:
    """(name, shape) of the FP8 Linears of a block, in the block."""
    yield from ((f"self_attn.{name}", shape) for name, shape in ATTENTION.items())
    routed = [(f"mlp.experts.{expert}", EXPERT_WIDTH) for expert in range(experts)]
    mlps = [("mlp", DENSE_WIDTH)] if block < DENSE_BLOCKS else [("mlp.shared_experts", EXPERT_WIDTH), *routed]
    for name, inner in mlps:
        yield from ((f"{name}.{part}_proj", [inner, WIDTH]) for part in ("gate", "up"))
        yield f"{name}.down_proj", [WIDTH, inner]


def block_tensors(block: int, experts: int) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of the tensors of a block."""
    prefix = f"model.layers.{block}."
    for name, shape in linears_of(block, experts):
        yield f"{prefix}{name}.weight", "F8_E4M3", shape
        yield f"{prefix}{name}.weight{SCALE_SUFFIX}", "F32", scale_shape(shape, (128, 128))
    norms = {"input_layernorm": WIDTH, "post_attention_layernorm": WIDTH}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    yield from ((f"{prefix}{name}.weight", "BF16", [width]) for name, width in norms.items())
    if block >= DENSE_BLOCKS:
        yield f"{prefix}mlp.gate.weight", "BF16", [experts, WIDTH]
        yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", [experts]


def model_tensors(blocks: int, experts: int) -> Iterator[tuple[str, str, list[int]]]:
    """(name, dtype, shape) of all tensors: blocks, embeddings, norm, head and a multi-token-prediction layer."""
    yield "model.embed_tokens.weight", "BF16", [VOCABULARY, WIDTH]
    for block in range(blocks):
        yield from block_tensors(block, experts)
    yield "model.norm.weight", "BF16", [WIDTH]
    yield "lm_head.weight", "BF16", [VOCABULARY, WIDTH]
    yield from block_tensors(max(blocks, DENSE_BLOCKS), experts)
    prefix = f"model.layers.{blocks}."
    yield from ((f"{prefix}{name}.weight", "BF16", [WIDTH]) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield from (
        (f"{prefix}{name}.weight", "BF16", [VOCABULARY, WIDTH]) for name in ("embed_tokens", "shared_head.head")
    )
    yield f"{prefix}eh_proj.weight", "BF16", [WIDTH, 2 * WIDTH]


def make_lock(blocks: int, experts: int) -> Lock:
    """The lock of such a model; hashes are of nothing."""
    tensors, sizes = {}, [0]
    for name, dtype, shape in model_tensors(blocks, experts):
        if sizes[-1] > SHARD_BYTES:
            sizes.append(0)
        tensors[name] = TensorEntry(
            dtype=dtype, shape=shape, shard=f"model-{len(sizes):05d}.safetensors", offset=sizes[-1]
        )
        count = DTYPE_BYTES[dtype]
        for extent in shape:
            count *= extent
        sizes[-1] += count
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX]
    files = dict.fromkeys(names, 0) | {f"model-{i:05d}.safetensors": size for i, size in enumerate(sizes, start=1)}
    return Lock(
        model="large",
        revision="0" * 40,
        files={name: FileEntry(size=size, sha256="0" * 64) for name, size in sorted(files.items())},
        tensors=tensors,
        config={
            "model_type": "deepseek_v3",
            "hidden_size": WIDTH,
            "vocab_size": VOCABULARY,
            "intermediate_size": DENSE_WIDTH,
            "moe_intermediate_size": EXPERT_WIDTH,
            "first_k_dense_replace": DENSE_BLOCKS,
            "n_routed_experts": experts,
            "num_experts_per_tok": min(8, experts),
            "n_group": min(8, experts // 2),
            "topk_group": min(4, experts // 2),
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "num_hidden_layers": blocks,
            "num_nextn_predict_layers": 1,
            "quantization_config": QUANTIZATION,
        },
    )


def lay_out(directory: Path, blocks: int, experts: int) -> dict[str, int]:
    """Puts what a plan needs into `directory`: the lock of a model from the hub, a text and two releases.

    Returns the counts of the lock.
    """
    lock = make_lock(blocks, experts)
    write_json(directory / "locks/large.json", lock)
    (directory / "text.txt").write_text("one\n\ntwo\n")
    releases = {
        f"large-{scheme.lower()}": {"model": "large", "scheme": scheme, "calibration": "text"}
        for scheme in ("NVFP4", "W3A16")
    }
    config = {
        "models": {"large": {"hub": "example/large", "revision": lock.revision}},
        "calibrations": {"text": {"sources": [{"path": "text.txt"}]}},
        "releases": releases,
        "build": list(releases),
    }
    (directory / "planning.yaml").write_text(yaml.safe_dump(config))
    return {
        "tensors": len(lock.tensors),
        "shards": sum(name.endswith(".safetensors") for name in lock.files),
        "lock_bytes": (directory / "locks/large.json").stat().st_size,
    }


def plan(directory: Path) -> dict:
    """Seconds (of a clock and of the processor), peak memory and jobs of one dry run of the build in `directory`."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    log = directory / "log"
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--configfile", "planning.yaml", "--cores", "1", "-n"],
            cwd=directory,
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(process.args)}: exit status {process.returncode}\n{log.read_text()[-2000:]}")
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", log.read_text(), re.MULTILINE))
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        "jobs": {rule: int(count) for rule, count in jobs.items()},
    }


def measure(blocks: int, experts: int, runs: int) -> dict:
    """The median run of `runs` plans of a model of `blocks` blocks.

    The lock is made in a process of its own: the peak of a child counts from what its parent holds.
    """
    with tempfile.TemporaryDirectory(prefix="requant-planning-") as name:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            counts = pool.submit(lay_out, Path(name), blocks, experts).result()
        load = os.getloadavg()[0]
        found = [plan(Path(name)) for _ in range(runs)]
    measured = ("seconds", "processor_seconds", "peak_bytes")
    return (
        {"blocks": blocks, "experts": experts, "runs": runs, "load_before": load, "jobs": found[0]["jobs"]}
        | counts
        | {key: statistics.median(run[key] for run in found) for key in measured}
    )


def main() -> None:
    """Measures, prints the table and writes every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32, 61, 100, 200])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planning.json")
    options = parser.parse_args()
    print("| blocks | tensors | shards | jobs | seconds | of the processor | peak, MB |", flush=True)
    print("|---:|---:|---:|---:|---:|---:|---:|")
    results = []
    for blocks in options.blocks:
        row = measure(blocks, options.experts, options.runs)
        results.append(row)
        print(
            f"| {blocks} | {row['tensors']:,} | {row['shards']} | {row['jobs']['total']} | {row['seconds']:.1f} | "
            f"{row['processor_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} |",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Blocks of one release side by side: seconds on one and on more devices, with both tuning inputs.

    python benchmarks/devices.py [--device cuda] [--counts 1 2] [--inputs reference quantized] [--blocks 6]
                                 [--width 2048] [--experts 64] [--samples 256] [--length 2048] [--iters 150]
                                 [--out FILE]

A random DeepSeek-V3 of one dense block and MoE blocks; NVFP4. What is timed is one Snakemake call from the embedded
tokens to the last block: the reference chain and all quantize jobs, starting them included. On GPUs a count is that of
`--resources gpu=`, on a CPU that of `--cores`. Every build has to give the bytes of the first one with its inputs.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]


def make(folder: Path, arguments: argparse.Namespace) -> None:
    """The checkpoint, its text and the config of one release for each kind of tuning inputs."""
    import tiny

    width = arguments.width
    tiny.write_checkpoint(
        folder / "model",
        "deepseek_v3",
        shard_size="1GB",
        num_hidden_layers=arguments.blocks,
        hidden_size=width,
        intermediate_size=4 * width,
        moe_intermediate_size=width // 2,
        n_routed_experts=arguments.experts,
        num_experts_per_tok=4,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        q_lora_rank=width // 2,
        kv_lora_rank=width // 4,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    tiny.write_text(folder / "text.txt", count=(arguments.samples + 64) * arguments.length // 20)
    of_release = {"model": "m", "calibration": "c", "scheme": "NVFP4", "deploy": {"load_test_blocks": 0}}
    tuned = {inputs: {"inputs": inputs, "iters": arguments.iters} for inputs in arguments.inputs}
    config = {
        "device": arguments.device,
        "models": {"m": {"path": str(folder / "model")}},
        "calibrations": {
            "c": {
                "sources": [{"path": str(folder / "text.txt")}],
                "nsamples": arguments.samples,
                "seqlen": arguments.length,
                "heldout": {"nsamples": 8},
            }
        },
        "releases": {f"on-{name}": of_release | {"tuning": tuning} for name, tuning in tuned.items()},
        "build": [f"on-{name}" for name in tuned],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def snakemake(folder: Path, place: Path, limits: list[str], targets: list[str]) -> float:
    """Seconds of one call."""
    command = ["snakemake", "--snakefile", ROOT / "Snakefile", "--directory", place, *limits]
    start = time.monotonic()
    subprocess.run([*command, "--configfile", folder / "config.yaml", "--", *targets], check=True)
    return time.monotonic() - start


def build(folder: Path, inputs: str, count: int, arguments: argparse.Namespace) -> dict:
    """One timed build, in a directory of its own that begins with the embedded tokens."""
    place = folder / f"{inputs}-{count}"
    shutil.copytree(folder / "begun", place, copy_function=os.link, symlinks=True)
    shutil.rmtree(place / ".snakemake", ignore_errors=True)
    shutil.copytree(folder / "begun" / ".snakemake", place / ".snakemake")
    last = arguments.blocks - 1
    cores = max(count, 2 * count if arguments.device != "cpu" else 0)
    limits = ["--cores", str(cores), "--resources", f"gpu={count}"]
    targets = [f"results/on-{inputs}/blocks/{block}.json" for block in range(arguments.blocks)]
    seconds = snakemake(folder, place, limits, targets)
    records = [json.loads((place / target).read_text()) for target in targets]
    routing = [place / f"results/reference/m/c/routing_{block}.json" for block in range(last + 1)]
    logs = [(place / f"logs/quantize/on-{inputs}/{block}.log").read_text() for block in range(arguments.blocks)]
    places = [re.search(r"^on GPU (\S+) of", log, re.MULTILINE) for log in logs]
    found = {
        "inputs": inputs,
        "devices": count,
        "seconds": round(seconds, 1),
        "quantize_seconds": [round(record["seconds"], 1) for record in records],
        "reference_seconds": [round(json.loads(path.read_text())["seconds"], 1) for path in routing],
        "gpus": [place and place[1] for place in places],
        "sha256": [record["sha256"] for record in records],
    }
    shutil.rmtree(place)
    return found


def main() -> None:
    """Builds each case, prints its seconds and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--inputs", nargs="+", choices=("reference", "quantized"), default=["reference", "quantized"])
    for name, default in (("blocks", 6), ("width", 2048), ("experts", 64), ("samples", 256), ("length", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--iters", type=int, default=150)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "devices.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="requant-devices-") as scratch:
        folder = Path(scratch)
        make(folder, arguments)
        begun = ["results/reference/m/c/embedded.safetensors", "results/source/m/source.json"]
        snakemake(folder, folder / "begun", ["--cores", "2"], begun)
        shape = {name: value for name, value in vars(arguments).items() if name not in ("out", "counts", "inputs")}
        found = {"machine": machine(arguments.device), "shape": shape, "builds": []}
        first: dict[str, list[str]] = {}
        for inputs in arguments.inputs:
            for count in arguments.counts:
                done = build(folder, inputs, count, arguments)
                hashes = done.pop("sha256")
                done["same_bytes"] = hashes == first.setdefault(inputs, hashes)
                found["builds"].append(done)
                print(json.dumps(done), flush=True)
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def machine(device: str) -> str:
    """What the jobs ran on."""
    import torch

    if device == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


if __name__ == "__main__":
    main()

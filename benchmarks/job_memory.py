"""Peak memory of jobs on a CPU beside what plans predict: benchmarks/results/job_memory.json.

    python benchmarks/job_memory.py

Random DeepSeek-V3 blocks; `reference` and `quantize` (3 iterations) jobs, each in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

CASES = (
    {"width": 128, "experts": 16, "inner": 128, "samples": 128, "length": 128},
    {"width": 512, "experts": 16, "inner": 256, "samples": 64, "length": 256},
    {"width": 1024, "experts": 16, "inner": 512, "samples": 32, "length": 512},
    {"width": 1024, "experts": 64, "inner": 512, "samples": 32, "length": 128},
    {"width": 1024, "experts": 0, "inner": 4096, "samples": 32, "length": 512},
)
SCHEMES = ("NVFP4", "W3A16")


def config_of(case: dict) -> dict:
    """config.json of a model of one block: MoE, or dense where it has no experts."""
    width = case["width"]
    return {
        "model_type": "deepseek_v3",
        "vocab_size": 320,
        "hidden_size": width,
        "intermediate_size": case["inner"],
        "moe_intermediate_size": case["inner"],
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_shared_experts": 1,
        "n_routed_experts": case["experts"] or 8,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 0 if case["experts"] else 1,
        "q_lora_rank": width // 4,
        "kv_lora_rank": width // 4,
        "qk_nope_head_dim": width // 8,
        "qk_rope_head_dim": 32,
        "v_head_dim": width // 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def make(case: dict, folder: Path) -> None:
    """The checkpoint, the tokens and their embeddings."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from requant.chain import embed
    from requant.safetensors_io import save

    torch.manual_seed(0)
    config = CONFIG_MAPPING["deepseek_v3"](**config_of(case), initializer_range=0.08)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).save_pretrained(
        folder / "model"
    )
    tensors = {}
    for part, samples in (("calibration", case["samples"]), ("heldout", case["samples"] // 8)):
        shape = (samples, case["length"])
        tensors |= {part: torch.randint(0, 320, shape, dtype=torch.int32)}
        tensors |= {f"{part}_mask": torch.ones(shape, dtype=torch.uint8)}
    save(folder / "tokens", tensors)
    embed(folder / "model", folder / "tokens", folder / "embedded")


def reference(folder: Path) -> int:
    from requant.chain import run_reference_block

    paths = [folder / name for name in ("model", "tokens", "embedded")]
    written = [folder / name for name in ("hidden", "routing.json", "saliency.csv")]
    return run_reference_block(*paths, 0, *written, "m", "c").peak_memory_bytes


def quantize(folder: Path, scheme: str) -> int:
    from requant.config import Tuning
    from requant.quantize import BlockJob, quantize_block

    paths = [folder / name for name in ("tokens", "embedded", "hidden")]
    job = BlockJob(folder / "model", "r", "m", 0, scheme, Tuning(iters=3), [], *paths)
    return quantize_block(job, folder / "block", folder / "block.json", folder / "output").peak_memory_bytes


def predicted(case: dict, scheme: str) -> dict[str, int]:
    from requant.config import Calibration, Tuning
    from requant.memory import cpu_bytes
    from requant.schemes import SCHEMES as ALL
    from requant.structure import from_config

    samples = case["samples"]
    calibration = Calibration(nsamples=samples, seqlen=case["length"], heldout={"nsamples": samples // 8})
    return cpu_bytes(from_config(config_of(case)), calibration, ALL[scheme], Tuning(iters=3))


def in_a_process(*arguments: str) -> int:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) > 1:
        what, folder, *rest = sys.argv[1:]
        {"make": lambda: print(make(json.loads(rest[0]), Path(folder)) or 0),
         "reference": lambda: print(reference(Path(folder))),
         "quantize": lambda: print(quantize(Path(folder), rest[0]))}[what]()  # fmt: skip
        return
    results = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            in_a_process("make", folder, json.dumps(case))
            found = {"reference": in_a_process("reference", folder)}
            found |= {f"quantize {scheme}": in_a_process("quantize", folder, scheme) for scheme in SCHEMES}
        guesses = {scheme: predicted(case, scheme) for scheme in SCHEMES}
        expected = {"reference": guesses[SCHEMES[0]]["reference"]}
        expected |= {f"quantize {scheme}": guesses[scheme]["quantize"] for scheme in SCHEMES}
        results.append(case | {"peak_bytes": found, "predicted_bytes": expected})
        print(
            case, {job: f"{found[job] / 1e6:.0f} MB, predicted {expected[job] / 1e6:.0f}" for job in found}, flush=True
        )
    path = ROOT / "benchmarks" / "results" / "job_memory.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

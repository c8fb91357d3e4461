"""DeepSeek-V3.2 decoder blocks of true size on one GPU, tuned by the `fused` engine: seconds and memory.

    python benchmarks/real_block.py [--experts 8 32 192] [--iters 6] [--scheme NVFP4] [--out FILE]

Weights are random, with the statistics of trained ones: normal, a scale of its own a row, one weight in a thousand
eight
times as large. Samples are 8 of 2048 tokens a step. Peaks are torch's, of one process a block.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

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
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
}


def random_weight(shape, generator, device):
    """BF16 [out, in]: normal rows, each with a scale of its own, and outliers."""
    import torch

    weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    rows = torch.empty(shape[0], 1, device=device).uniform_(0.5, 1.5, generator=generator) * shape[1] ** -0.5
    outliers = torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(generator=generator) < 0.001
    return weight.mul_(rows.to(torch.bfloat16)).mul_(1 + 7 * outliers)


def build(experts: int, device: str):
    """(config, block) of `experts` routed experts, 0 for a dense block, on `device`."""
    import torch
    from torch import nn

    from requant.blocks import empty_block, empty_model, model_config

    config = model_config(SHAPE | {"model_type": "deepseek_v3", "n_routed_experts": experts or 8})
    model = empty_model(SHAPE | {"model_type": "deepseek_v3", "n_routed_experts": experts or 8})
    block = empty_block(type(model.model.layers[0]), config, 3 if experts else 0).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = random_weight(module.weight.shape, generator, device)
        elif name.endswith("norm"):
            module.weight.data.fill_(1)
        elif name.endswith("gate") and not isinstance(module, nn.Linear):
            module.weight.data = random_weight(module.weight.shape, generator, device)
            module.e_score_correction_bias.zero_()
    config._attn_implementation = "sdpa"
    rotary = type(model.model.rotary_emb)(config)
    return config, block.eval().requires_grad_(False), rotary


def run(experts: int, iters: int, scheme_name: str, length: int, samples: int) -> dict:
    import torch
    from torch import nn

    from requant import fused
    from requant.config import Tuning
    from requant.nvfp4 import global_scale
    from requant.schemes import SCHEMES

    device = "cuda"
    scheme = SCHEMES[scheme_name]
    config, block, rotary = build(experts, device)
    positions = rotary(torch.empty(1, dtype=torch.bfloat16), torch.arange(length)[None])
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(samples, length, config.hidden_size, generator=generator).to(torch.bfloat16)
    on_device = tuple(part.to(device) for part in positions)
    with torch.no_grad():
        targets = torch.cat([block(row[None].to(device), position_embeddings=on_device).cpu() for row in hidden])
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    linears = [name for name in linears if not name.endswith("mlp.gate")]
    for name in linears:
        module = block.get_submodule(name)
        if scheme.is_nvfp4:
            module.weight_global_scale = global_scale(module.weight.abs().amax().cpu())
            module.act_max = torch.tensor([8.0])
    predicted = fused.peak_bytes(block, 8 * length, 8, scheme, 200) if hasattr(fused, "peak_bytes") else None
    stamps: list[float] = []
    losses: list[float] = []

    def report(iteration: int, loss: float) -> None:
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        losses.append(loss)

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    tuning = Tuning(iters=iters, device=device)
    fused.tune(block, linears, hidden, targets, None, positions, scheme, tuning, 3, report)
    gaps = sorted(later - earlier for earlier, later in zip(stamps, stamps[1:], strict=False))
    return {
        "experts": experts,
        "scheme": scheme_name,
        "device": torch.cuda.get_device_name(),
        "iterations": iters,
        "tokens_per_step": 8 * length,
        "seconds_per_iteration": gaps[len(gaps) // 2],
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "predicted_bytes": predicted,
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 8, 32, 192], help="0 is a dense block")
    parser.add_argument("--iters", type=int, default=6)
    parser.add_argument("--scheme", default="NVFP4")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.experts[0], options.iters, options.scheme, options.length, options.samples)))
        return
    results = []
    for experts in options.experts:
        command = [sys.executable, __file__, "--one", "--experts", str(experts), "--iters", str(options.iters)]
        command += ["--scheme", options.scheme, "--length", str(options.length), "--samples", str(options.samples)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{experts} experts: failed\n{done.stderr[-1500:]}", flush=True)
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        found = results[-1]
        print(
            f"{experts} experts {found['scheme']}: {found['seconds_per_iteration']:.3f} s an iteration, peak "
            f"{found['peak_bytes'] / 1e9:.2f} GB, predicted {(found['predicted_bytes'] or 0) / 1e9:.2f} GB, "
            f"loss {found['losses'][0]:.4g} -> {min(found['losses']):.4g}",
            flush=True,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

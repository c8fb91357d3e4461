"""How fast an engine serves a model of true width, in each scheme: benchmarks/results/serving.json.

    python benchmarks/serving.py vllm [--scheme BF16 NVFP4 W4A16] [--experts 192] [--concurrency 1 4 16 64]

Three blocks of DeepSeek-V3.2's width, the first dense, with random weights (`real_block.py`) and a vocabulary of 320
tokens: what is measured is the blocks, not a model of 61. Each scheme is made by plain rounding, packed, and served by
the engine as a program, with what the engine needs unpacked in BF16. A row has what `throughput.json` of a release has:
tokens a second, and seconds to the first token, at each number of requests at a time. Rows are written as they come,
and those that are there are kept; BF16 beside the others in one run is what they are compared with.

With 192 experts the source takes 36 GB of disk, a quantized release 10 GB while it is served. A small model is that of
`--width 512 --experts 16`.
"""

import argparse
import gc
import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import engines
import real_block
import tiny

from requant import throughput
from requant.config import Release, Target, Throughput, Tuning
from requant.config_json import COMPUTED
from requant.engine_keeps import for_engine
from requant.engines import serve_at
from requant.environment import machine
from requant.schemes import SCHEMES

OUT = engines.ROOT / "benchmarks/results/serving.json"
FAMILY = "deepseek_v32"
# Of the shape that are not its own: a dense block, two with experts; and what releases say: BF16 is the source itself.
HERE = COMPUTED[FAMILY] | {
    "num_hidden_layers": engines.BLOCKS,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "vocab_size": 320,
    "architectures": ["DeepseekV32ForCausalLM"],
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
}
KEYS = ("engine", "engine_version", "gpu", "width", "experts", "scheme")
REQUEST_SECONDS = 3600.0


def shape_of(experts: int, width: int) -> dict:
    """config.json of the model; narrower ones have narrower experts and fewer heads."""
    config = real_block.shape_of(experts) | HERE
    if width != config["hidden_size"]:
        config |= {"hidden_size": width, "intermediate_size": width, "moe_intermediate_size": 256}
        config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512}
    return config


def write_source(config: dict, folder: Path, device: str) -> None:
    """A checkpoint with these sizes, a shard a block, and its tokenizer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    names: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    shape = (config["vocab_size"], config["hidden_size"])
    outside = {
        "model.embed_tokens.weight": torch.empty(shape).normal_(generator=generator).to(torch.bfloat16),
        "lm_head.weight": (0.02 * torch.empty(shape).normal_(generator=generator)).to(torch.bfloat16),
        "model.norm.weight": torch.ones(config["hidden_size"], dtype=torch.bfloat16),
    }
    for block in range(-1, engines.BLOCKS):
        shard = f"model-{block + 2:05}-of-{engines.BLOCKS + 1:05}.safetensors"
        tensors = outside
        if block >= 0:
            random = real_block.RandomCheckpoint(config, block)
            tensors = {name: tensor.cpu() for name, tensor in random.read(list(random.index), device).items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, shard)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    tiny.write_tokenizer(folder)
    engines.make_readable(folder)


def text_of(words: int, seed: int) -> str:
    """So many words; of the vocabulary each is about a token."""
    return " ".join(" ".join(tiny.sentences(words, seed)).split()[:words])


def measure(scheme: str, release: Release, target: Target, model: Path, folder: Path, settings: Throughput) -> dict:
    """The row of one scheme."""
    import torch

    served, log = model / "source", folder / "engine.log"
    if SCHEMES[scheme].quantizes:
        engines.make_checkpoint(release, model, folder)
        served = folder / "model"
    count = max(settings.concurrency) * (settings.repeats + settings.warmup)
    prompts = [text_of(settings.prompt_tokens, number + 2) for number in range(count)]
    gc.collect()
    if target.device == "cuda":
        torch.cuda.empty_cache()  # the engine needs what the making took
    with serve_at(target, served, log) as server:
        levels = throughput.measure(scheme, server, target.engine, prompts, settings, REQUEST_SECONDS)
    return {
        "scheme": scheme,
        "bytes": sum(path.stat().st_size for path in served.glob("*.safetensors")),
        "kept": release.keep,
        "command": server.command,
        "startup_seconds": server.startup_seconds,
        "kernels": engines.kernels_in(engines.engine_log.read(log)),
        "levels": [level.model_dump() for level in levels],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", choices=["transformers", "vllm", "sglang"])
    parser.add_argument("--scheme", nargs="+", choices=list(SCHEMES), default=["BF16", "NVFP4", "W4A16"])
    parser.add_argument("--experts", type=int, default=192)
    parser.add_argument("--width", type=int, default=real_block.SHAPE["hidden_size"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--argument", action="append", default=[])
    parser.add_argument("--variable", action="append", default=[])
    parser.add_argument("--startup", type=int, default=1800)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    engines.check_installed(parser, options.engine)
    options.devices = 1
    target = engines.target_of(options)
    target = target.model_copy(update={"arguments": options.argument, "memory_fraction": 0.85})
    settings = Throughput(
        concurrency=options.concurrency, prompt_tokens=options.prompt_tokens, max_tokens=options.max_tokens
    )
    device = target.device
    tuning = Tuning(iters=0, inputs="reference", device=device)
    common = {"engine": target.engine, "engine_version": version(target.engine), "gpu": target.gpu}
    common |= {"width": options.width, "experts": options.experts, "arguments": target.arguments}
    with TemporaryDirectory() as scratch:
        model = Path(scratch)
        config = shape_of(options.experts, options.width)
        write_source(config, model / "source", device)
        engines.run_chain(model / "source", model, device)
        for scheme in options.scheme:
            release = for_engine(Release(model="random", scheme=scheme, tuning=tuning), FAMILY, target)
            with TemporaryDirectory(dir=scratch) as folder:
                row = common | measure(scheme, release, target, model, Path(folder), settings)
            row |= {"settings": settings.model_dump(), "machine": machine().model_dump()}
            engines.put(options.out, row, KEYS)


if __name__ == "__main__":
    main()

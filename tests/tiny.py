"""Tiny random checkpoints of each family, with a tokenizer of their own: small enough to build in a test."""

import json
import random
import shutil
from pathlib import Path

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "hill", "and", "then", "saw", "red", "blue", "ball"]
WORDS += ["one", "two", "three", "Ann", "Ben", "went", "home"]

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}

DEEPSEEK = SIZES | {
    "moe_intermediate_size": 128,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}

FAMILIES = {
    "deepseek_v3": DEEPSEEK,
    "qwen3_moe": SIZES
    | {
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "deepseek_v32": DEEPSEEK | {"index_topk": 2048, "index_n_heads": 4, "index_head_dim": 128},
    "kimi_k2": DEEPSEEK | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
    "glm4_moe": SIZES
    | {
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "num_nextn_predict_layers": 0,
    },
    "mixtral": SIZES | {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    "llama": SIZES | {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "qwen3": SIZES | {"num_key_value_heads": 2, "head_dim": 32},
}


def sentences(count: int, seed: int) -> list[str]:
    """Documents of a few dozen random words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(20, 60))) + "." for _ in range(count)]


def write_text(path: Path, count: int = 400, seed: int = 0) -> Path:
    """A text file of `count` documents, parted by blank lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sentences(count, seed)) + "\n", encoding="utf-8")
    return path


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer trained on the sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(200, 1), vocab_size=320, special_tokens=special, show_progress=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(directory)


def write_checkpoint(
    directory: Path,
    model_type: str,
    seed: int = 0,
    shard_size: str = "400KB",
    stacked: bool = False,
    mtp: bool = False,
    **changes,
) -> Path:
    """A random BF16 checkpoint of `model_type` in several shards. Weights are larger than usual, so that every
    block moves the logits.

    stacked: experts in one tensor a block, as transformers holds them. mtp: a layer for multi-token prediction too.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from requant.architecture import FAMILIES as CODE

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[CODE[model_type]](**({"initializer_range": 0.08} | FAMILIES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=shard_size, save_original_format=not stacked)
    if model_type == "kimi_k2":  # as its maker publishes it
        edit_config(directory, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    if mtp:
        add_mtp(directory, config.num_hidden_layers)
    write_tokenizer(directory)
    return directory


def plain_decoding(weight, scales, size: int = 128):
    """BF16 [out, in]: each e4m3 value times the factor of its block, one block after another."""
    import torch

    decoded = torch.empty(weight.shape, dtype=torch.bfloat16)
    for top in range(0, weight.shape[0], size):
        for left in range(0, weight.shape[1], size):
            part = (slice(top, top + size), slice(left, left + size))
            decoded[part] = (weight[part].float() * float(scales[top // size, left // size])).to(torch.bfloat16)
    return decoded


def round_to_fp8(weight, size: int = 128):
    """(e4m3 [out, in], float32 factors [ceil(out / size), ceil(in / size)]): each block's peak becomes 448."""
    import torch

    rows, columns = (-(-extent // size) for extent in weight.shape)
    quantized, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = (slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))
            scales[row, column] = weight[part].abs().max().float() / 448
            quantized[part] = (weight[part].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return quantized, scales


def write_fp8(source: Path, directory: Path, decoded: Path | None = None) -> Path:
    """`source` with the Linears of its blocks in FP8 as DeepSeek-V3 publishes them, their factors in other shards.

    The router's correction bias is in F32, as it is there. Block 0's tensors stand behind the last block once more, as
    a multi-token-prediction layer. `decoded` gets the same model in BF16.
    """
    from safetensors.torch import load_file, save_file

    shards = {path.name: load_file(path) for path in sorted(source.glob("*.safetensors"))}
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    drafting = f"model.layers.{config['num_hidden_layers']}."
    for tensors in shards.values():
        again = {name: t for name, t in tensors.items() if name.startswith("model.layers.0.")}
        tensors |= {name.replace("model.layers.0.", drafting): tensor.clone() for name, tensor in again.items()}
    in_fp8, in_bf16 = {name: {} for name in shards}, {name: {} for name in shards}
    for shard, other in zip(shards, [*list(shards)[1:], next(iter(shards))], strict=True):
        for name, tensor in shards[shard].items():
            wide = tensor.float() if name.endswith("e_score_correction_bias") else tensor
            in_fp8[shard][name] = in_bf16[shard][name] = wide
            if name.startswith("model.layers.") and "_proj" in name:
                in_fp8[shard][name], scales = round_to_fp8(tensor)
                in_fp8[other][f"{name}_scale_inv"] = scales
                in_bf16[shard][name] = plain_decoding(in_fp8[shard][name], scales)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    written = [(directory, in_fp8, config | {"quantization_config": fp8})]
    written += [(decoded, in_bf16, config)] if decoded else []
    for folder, contents, its_config in written:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for shard, tensors in contents.items():
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        index = {name: shard for shard, tensors in contents.items() for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (folder / "config.json").write_text(json.dumps(its_config))
    return directory


BESIDE = {
    "LICENSE": "do what you like\n",
    "NOTICE.txt": "made of noise\n",
    "chat_template.json": '{"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}\n',
    "additional_chat_templates/tool_use.jinja": "{{ messages[0].content }}",
    "preprocessor_config.json": "{}\n",
}
LEFT_BEHIND = {"README.md": "# a model\n", "tool_parser.py": "raise SystemExit\n", "figures/scores.png": "no picture\n"}


def add_beside(directory: Path) -> None:
    """Adds files beside the weights: those of BESIDE go along with a release, those of LEFT_BEHIND do not."""
    for name, text in (BESIDE | LEFT_BEHIND).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)


def forget_mtp(directory: Path) -> None:
    """Takes the layer for multi-token prediction out of the index, which leaves mtp.safetensors without a name."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != "mtp.safetensors"}
    path.write_text(json.dumps(index))


def edit_config(directory: Path, **changes) -> None:
    """Changes keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_mtp(directory: Path, blocks: int) -> None:
    """Adds a layer for multi-token prediction behind the blocks, in a shard of its own: the last block's tensors and
    those that such a layer has besides."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        tensors |= load_file(directory / shard)
    last, behind = f"model.layers.{blocks - 1}.", f"model.layers.{blocks}."
    layer = {behind + name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"]
    projection = head[: len(norm)].repeat(1, 2).clone()
    layer |= {f"{behind}{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    layer |= {f"{behind}eh_proj.weight": projection, f"{behind}shared_head.head.weight": head.clone()}
    save_file(layer, directory / "mtp.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(layer, "mtp.safetensors")
    path.write_text(json.dumps(index))
    edit_config(directory, num_nextn_predict_layers=1)

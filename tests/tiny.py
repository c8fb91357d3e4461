"""Tiny random checkpoints of each family, with a tokenizer of their own: small enough to build in a test."""

import random
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

FAMILIES = {
    "deepseek_v3": SIZES
    | {
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
    },
    "qwen3_moe": SIZES
    | {
        "moe_intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
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


def write_checkpoint(directory: Path, model_type: str, seed: int = 0, shard_size: str = "400KB", **changes) -> Path:
    """A random BF16 checkpoint of `model_type` in several shards. Weights are larger than usual, so that every
    block moves the logits."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**(FAMILIES[model_type] | changes), initializer_range=0.08)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(directory)
    return directory

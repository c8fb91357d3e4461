"""Tiny random checkpoints for unit tests: a Llama with a byte-level tokenizer, plain or in NVFP4."""

import json
import random
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from requant import nvfp4
from requant.encoding import encode, plain_rounding, quantization_config
from requant.hashing import file_entry
from requant.records import PackRecord
from requant.safetensors_io import save
from requant.schemes import SCHEMES

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "one", "two", "went", "to", "market")


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences of 12 words."""
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=12)) + "." for _ in range(count)]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(300), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_source(directory: Path, seed: int = 0, spread: float = 0.1) -> Path:
    """A Llama of 3 blocks with weights of standard deviation `spread`; returns the directory."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_packed(source: Path, directory: Path) -> Path:
    """`source` in NVFP4 by plain rounding, every block Linear quantized; returns the directory."""
    scheme = SCHEMES["NVFP4"]
    directory.mkdir(parents=True)
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not re.search(r"_proj\.weight$", name):
            stored[name] = tensor
            continue
        tensor_scale = nvfp4.global_scale(tensor.abs().amax())
        rounded = plain_rounding(tensor, tensor_scale, scheme)
        stored |= encode(name.removesuffix(".weight"), rounded, torch.tensor([64.0]), scheme)
    save(directory / "model.safetensors", stored)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    return directory


def pack_record(packed: Path) -> PackRecord:
    """What `pack` would say of `packed`: true files, counts of no meaning."""
    counts = dict.fromkeys((name for name, field in PackRecord.model_fields.items() if field.is_required()), 0)
    files = {path.name: file_entry(path) for path in packed.iterdir()}
    named = {"release": "tiny", "model": "tiny", "scheme": "NVFP4", "multi_token_prediction": "none", "files": files}
    return PackRecord(**counts | named)


def heldout(rows: int = 12, length: int = 48) -> torch.Tensor:
    """int32 [rows, length]: sentences, each begun by <s>, cut and joined."""
    tokenizer = tiny_tokenizer()
    ids = [token for text in texts(rows * length // 12, seed=1) for token in tokenizer(text)["input_ids"]]
    return torch.tensor(ids[: rows * length], dtype=torch.int32).view(rows, length)

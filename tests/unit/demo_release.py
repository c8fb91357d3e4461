"""The embedded model as a release: quantized by plain rounding, evaluated, and what a smoke test needs beside it."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

from requant import nvfp4
from requant.architecture import fused_groups
from requant.checkpoint import INDEX
from requant.encoding import encode, plain_rounding, quantization_config
from requant.hashing import file_entry
from requant.packed import PackedCheckpoint
from requant.records import EvaluateRecord, ModelQuality, PackRecord, ReferenceText, write_json
from requant.reference_text import RECORDED, first_rows, log_probabilities
from requant.safetensors_io import save
from requant.schemes import SCHEMES
from requant.streamed import StreamedModel

DEMO = Path(__file__).parents[2] / "demo"
SEQLEN = 128
QUANTIZED = re.compile(r"layers\..*_proj(_with_mqa)?\.weight$")


def heldout(rows: int) -> torch.Tensor:
    """int32 [rows, SEQLEN]: stories and exercises of the test split in turn, joined and cut."""
    sys.path.append(str(DEMO))
    documents = import_module("generate").documents
    tokenizer = PackedCheckpoint(DEMO / "model").tokenizer()
    kinds = [documents("test", kind, 12 * rows, 7) for kind in ("stories", "exercises")]
    ids: list[int] = []
    for row in (row for pair in zip(*kinds, strict=False) for row in pair):
        ids += tokenizer(row["text"])["input_ids"]
        if len(ids) >= rows * SEQLEN:
            break
    return torch.tensor(ids[: rows * SEQLEN], dtype=torch.int32).view(rows, SEQLEN)


def pack_demo(scheme_name: str, directory: Path) -> Path:
    """The demo in that scheme, every Linear of a block rounded to nearest; returns the directory.

    Linears whose products engines fuse have one global scale: vLLM takes the first one's for all of them.
    """
    scheme, source = SCHEMES[scheme_name], DEMO / "model"
    directory.mkdir(parents=True)
    tensors = {shard: load_file(shard) for shard in sorted(source.glob("*.safetensors"))}
    weights = {name: tensor for stored in tensors.values() for name, tensor in stored.items() if QUANTIZED.search(name)}
    scales: dict[str, torch.Tensor | None] = dict.fromkeys(weights)
    if scheme.is_nvfp4:
        for group in [*([name] for name in weights), *fused_groups(list(weights))]:
            amax = torch.stack([weights[name].abs().amax() for name in group]).amax()
            scales |= dict.fromkeys(group, nvfp4.global_scale(amax))
    shards: dict[str, str] = {}
    for shard, kept in tensors.items():
        stored = {}
        for name, tensor in kept.items():
            if name in weights:
                rounded = plain_rounding(tensor, scales[name], scheme)
                stored |= encode(name.removesuffix(".weight"), rounded, torch.tensor([64.0]), scheme)
            else:
                stored[name] = tensor
        save(directory / shard.name, stored)
        shards |= dict.fromkeys(stored, shard.name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(source / name, directory / name)
    return directory


@dataclass(frozen=True)
class DemoRelease:
    """Files of a release in `folder`: model/, pack.json, evaluate.json, tokens.safetensors."""

    folder: Path
    scheme: str

    @cached_property
    def packed(self) -> PackedCheckpoint:
        return PackedCheckpoint(self.folder / "model")


def make_release(scheme: str, folder: Path, rows: int = 16) -> DemoRelease:
    """A release of the demo with a true pack.json, and an evaluate.json that is true in its reference text alone."""
    tokens = heldout(rows)
    packed = PackedCheckpoint(pack_demo(scheme, folder / "model"))
    save(folder / "tokens.safetensors", {"heldout": tokens, "heldout_mask": torch.ones_like(tokens).byte()})
    files = {path.name: file_entry(path) for path in packed.directory.iterdir()}
    counts = dict.fromkeys((name for name, field in PackRecord.model_fields.items() if field.is_required()), 0)
    named = {"release": "demo", "model": "demo", "scheme": scheme, "multi_token_prediction": "none", "files": files}
    write_json(folder / "pack.json", PackRecord(**counts | named | {"moe_blocks": 5}))
    text = first_rows(tokens, None, RECORDED)
    write_json(folder / "evaluate.json", evaluate_record(reference_text(packed, text)))
    return DemoRelease(folder, scheme)


def reference_text(packed: PackedCheckpoint, text: list[list[int]]) -> ReferenceText:
    """What evaluation would say of `text`."""
    found, longest = {}, max(map(len, text))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in text])
    for rounds in (True, False):
        model = StreamedModel(packed, quantize_activations=rounds)
        *_, hidden = model.stream(tokens)
        found[rounds] = log_probabilities(model.head(), hidden, text)
    alone = found[False] if packed.scheme.quantizes_activations else None
    return ReferenceText(tokens=text, log_probabilities=found[True], weights_alone=alone)


def evaluate_record(text: ReferenceText) -> EvaluateRecord:
    quality = ModelQuality(perplexity=1.0, kl_divergence=0.0, kl_divergence_stderr=0.0, top1_agreement=1.0)
    return EvaluateRecord(
        release="demo",
        model="demo",
        tokens=1,
        samples=1,
        seqlen=SEQLEN,
        heldout_sha256="",
        activations="",
        source=quality,
        rounded=None,
        quantized=quality,
        block_mse=[],
        reference_text=text,
        seconds=0.0,
        peak_memory_bytes=0,
    )

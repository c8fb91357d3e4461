"""Damage done to what an engine serves, while requant has the true release."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from requant.packed import PackedCheckpoint
from requant.safetensors_io import save

Damage = Callable[[Path], None]  # done to the folder that the engine gets


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites the shards of `folder` after `change` has edited all their tensors; links are cut first."""
    shards = {path: load_file(path) for path in folder.glob("*.safetensors")}
    merged = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    change(merged)
    for path, tensors in shards.items():
        path.unlink()
        save(path, {name: merged[name].clone() for name in tensors})


def double_scale(packed: PackedCheckpoint, linear: str) -> Damage:
    """What a loader gives that takes the global scale of `linear` for twice of what it is.

    Where integers are served as they are, which have no global scale, all scales of groups are doubled.
    """

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if f"{linear}.weight_scale" in tensors:
            tensors[f"{linear}.weight_scale"] *= 2
        else:
            scale = packed.parts(f"{linear}.weight")["weight_global_scale"]
            decoded = torch.from_numpy(packed.decoded(f"{linear}.weight"))
            tensors[f"{linear}.weight"] = (decoded * (scale / (2 * scale))).to(torch.bfloat16)

    return lambda folder: edit(folder, change)


def swap_experts(block: int, a: int, b: int) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        first = f"model.layers.{block}.mlp.experts.{a}."
        for name in [name for name in tensors if name.startswith(first)]:
            other = name.replace(first, f"model.layers.{block}.mlp.experts.{b}.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return lambda folder: edit(folder, change)


def swap_tokens(a: int, b: int) -> Damage:
    """Exchanges two entries of the vocabulary."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        vocabulary = tokenizer["model"]["vocab"]
        texts = {token: text for text, token in vocabulary.items()}
        vocabulary[texts[a]], vocabulary[texts[b]] = b, a
        path.write_text(json.dumps(tokenizer))

    return change

"""Names of tensors: as files store them, as requant's blocks have them, and as a release has them.

Inside requant a tensor has the name of transformers' module, and every routed expert has Linears of its own:
`model.layers.3.mlp.experts.7.up_proj.weight`. Files differ from that in two ways. Mixtral's have the names of its first
code, `block_sparse_moe.experts.7.w3`. And transformers 5 can save a block's experts as it holds them, stacked:
`mlp.experts.gate_up_proj` [experts, 2 x intermediate, width], an expert's gate rows before its up rows, and
`mlp.experts.down_proj` [experts, width, intermediate] (transformers.conversion_mapping). A release has the names that
serving engines load: one tensor an expert and projection, Mixtral's under its own names.

Files may hold more than the model: buffers that its code computes from config.json, and tensors that no module of it
has. Engines refuse a checkpoint with them, and they are no parameters: they are left out, and named (`left_out`).
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from requant.architecture import BLOCK_TENSOR, EXPERT, FUSED
from requant.errors import RequantError, brief
from requant.records import TensorEntry
from requant.safetensors_io import DTYPE_BYTES

# What a model has outside of its blocks; what is stored behind these is multi-token prediction (`architecture`).
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
# Buffers of rotary embeddings that earlier code stored.
BUFFERS = re.compile(r"(?:.+\.)?rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)")
LEFT_OUT = {
    "buffer": "a buffer that the model computes from config.json",
    "no module": "no module of the model has it",
}

STACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERT_COUNTS = ("n_routed_experts", "num_local_experts", "num_experts")  # keys of config.json, by family

MOST_EXPERTS = 10_000  # of a block; many times those of any model there is

MIXTRAL_MOE = re.compile(r"(model\.layers\.\d+)\.block_sparse_moe\.(?:(experts\.\d+)\.(w[123])\b)?")
MIXTRAL_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
MIXTRAL_LETTERS = {projection: letter for letter, projection in MIXTRAL_PROJECTIONS.items()}
MLP = re.compile(r"(model\.layers\.\d+)\.mlp\.(?:(experts\.\d+)\.(gate_proj|up_proj|down_proj)\b)?")


class Place(NamedTuple):
    """Where a tensor is stored: a whole stored tensor, or some rows of one expert in a stacked one.

    part: which of `parts` equal parts of the expert's rows.
    """

    stored: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def module_name(stored: str, config: dict[str, Any]) -> str:
    """The name inside requant of a tensor or module that files of this model call `stored`."""
    if config.get("model_type") != "mixtral":
        return stored
    return MIXTRAL_MOE.sub(lambda match: _renamed(match, "mlp", MIXTRAL_PROJECTIONS), stored, count=1)


def released_name(name: str, config: dict[str, Any]) -> str:
    """The name in a release of the tensor or module that requant calls `name`."""
    if config.get("model_type") != "mixtral":
        return name
    return MLP.sub(lambda match: _renamed(match, "block_sparse_moe", MIXTRAL_LETTERS), name, count=1)


def engine_names(name: str, config: dict[str, Any]) -> set[str]:
    """What serving engines may ask for when they look whether the module that requant calls `name` is quantized.

    vLLM asks for the experts of a Mixtral by its own names of projections, under Mixtral's name of their module. sglang
    asks for a layer that it fuses by the name of that layer, of families of which it has no list of these (0.5.16:
    gate_up_proj of DeepSeek-V3); what of a fused layer stays in BF16 is all of it.
    """
    released = released_name(name, config)
    module, leaf = released.rpartition(".")[0], name.rpartition(".")[2]
    asked = {released, f"{module}.{leaf}"}
    if EXPERT.fullmatch(name):
        return asked
    return asked | {f"{module}.{fused}" for fused, members in FUSED.items() if leaf in members}


def _renamed(match: re.Match, parent: str, projections: dict[str, str]) -> str:
    expert = f"{match[2]}.{projections[match[3]]}" if match[2] else ""
    return f"{match[1]}.{parent}.{expert}"


def left_out(stored: Iterable[str]) -> dict[str, str]:
    """Of the names in a model's files those that are no part of it, each with the reason, sorted.

    Names are those of weights: `fp8.without_scales` comes first. What is in a block is part of it, known or not.
    """
    found = {}
    for name in stored:
        if "rotary_emb." in name and BUFFERS.fullmatch(name):
            found[name] = LEFT_OUT["buffer"]
        elif name not in OUTSIDE and BLOCK_TENSOR.fullmatch(name) is None:
            found[name] = LEFT_OUT["no module"]
    return dict(sorted(found.items()))


def places(stored: Iterable[str], config: dict[str, Any]) -> dict[str, Place]:
    """Where each tensor is, by its name inside requant, for the names in a model's files; `left_out` ones are nowhere.

    Raises RequantError if two stored tensors have one name, or experts are stacked and config.json does not count them.
    """
    stored = list(stored)
    without = left_out(stored)
    found: dict[str, Place] = {}
    for tensor in stored:
        if tensor in without:
            continue
        for name, place in _places_of(tensor, config):
            if name in found:
                raise RequantError(f"{tensor}: is {name}, and so is {found[name].stored}; expected one of them")
            found[name] = place
    return found


def _places_of(stored: str, config: dict[str, Any]) -> Iterable[tuple[str, Place]]:
    name = module_name(stored, config)
    match = STACKED.fullmatch(name)
    if match is None:
        return [(name, Place(stored))]
    leaves = PROJECTIONS[match[2]]
    return [
        (f"{match[1]}.{expert}.{leaf}.weight", Place(stored, expert, part, len(leaves)))
        for expert in range(_experts(config, stored))
        for part, leaf in enumerate(leaves)
    ]


def _experts(config: dict[str, Any], stored: str) -> int:
    count = next((config[key] for key in EXPERT_COUNTS if key in config), None)
    if type(count) is not int or not 1 <= count <= MOST_EXPERTS:
        raise RequantError(
            f"config.json: experts: {brief(count)} found; expected their number, {MOST_EXPERTS} or less, for {stored} "
            "holds them all"
        )
    return count


def entries(stored: dict[str, TensorEntry], config: dict[str, Any]) -> dict[str, TensorEntry]:
    """The tensors by their names inside requant, from those of the files: a slice of a stacked tensor has its own
    shape and offset.

    Raises RequantError if a stacked tensor has another layout than the one described above.
    """
    return {name: _entry(stored[place.stored], place, config) for name, place in places(stored, config).items()}


def _entry(entry: TensorEntry, place: Place, config: dict[str, Any]) -> TensorEntry:
    if place.expert is None:
        return entry
    width, experts = config.get("hidden_size"), _experts(config, place.stored)
    side = 2 if place.parts == 2 else 1  # where the model's width is
    shape = entry.shape
    if len(shape) != 3 or shape[0] != experts or shape[side] != width or shape[1] % place.parts:
        wanted = (
            f"[{experts}, 2 x intermediate, {width}]" if place.parts == 2 else f"[{experts}, {width}, intermediate]"
        )
        raise RequantError(f"{entry.shard}: {place.stored}: shape {shape} found; expected {wanted}")
    rows, columns = shape[1] // place.parts, shape[2]
    skipped = (place.expert * place.parts + place.part) * rows * columns * DTYPE_BYTES[entry.dtype]
    return TensorEntry(dtype=entry.dtype, shape=[rows, columns], shard=entry.shard, offset=entry.offset + skipped)

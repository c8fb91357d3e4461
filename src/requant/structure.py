"""What a model consists of, from its config.json: kinds of blocks, their tensors, and tensors outside of blocks.

One block of each kind is built on the meta device; no weight is read. A lock or headers, where there are any, say what
the checkpoint really stores: multi-token prediction, dtypes, and that the blocks are those of config.json.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from requant import fp8
from requant.architecture import block_of, drafting_layers, is_drafting
from requant.blocks import empty_block, empty_model
from requant.cut import cut_config
from requant.dtypes import CORRECTION_BIAS, main_dtype, released_dtype, released_dtypes
from requant.errors import RequantError
from requant.linears import choose
from requant.naming import entries, released_name
from requant.records import TensorEntry
from requant.schemes import Scheme
from requant.shapes import Counted
from requant.sizes import Shaped, file_bytes, released, tensor_bytes
from requant.view import pruned_config


@dataclass(frozen=True)
class Kind(Counted):
    """Blocks that are alike. blocks: their numbers; module: one of them on the meta device, experts split.

    main: the dtype of most of what they store; other: by name, dtypes that a release stores and that are not BF16.
    From a config alone nobody can tell, but that routers' correction biases are published in F32.
    """

    blocks: tuple[int, ...]
    module: nn.Module
    main: str = "BF16"
    other: dict[str, str] | None = None

    @cached_property
    def tensors(self) -> dict[str, Shaped]:
        """The block's tensors as a release stores those that it does not quantize, names without the block's prefix."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        other = self.other
        if other is None:
            other = {name: "F32" for name in shapes if name.endswith(CORRECTION_BIAS)}
        return {name: Shaped(other.get(name, "BF16"), shape) for name, shape in shapes.items()}

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of each Linear, experts included."""
        return {
            name: tuple(module.weight.shape)
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        }

    def linears(self, block: int, scheme: Scheme, keep: list[str]) -> tuple[list[str], dict[str, str]]:
        """What `linears.choose` says of block `block`: Linears to quantize, and those left with their reasons."""
        return choose(
            {f"model.layers.{block}.{name}": shape[1] for name, shape in self.linear_shapes.items()}, scheme, keep
        )

    def named(self, block: int) -> dict[str, Shaped]:
        """The tensors of block `block`, whole names."""
        return {f"model.layers.{block}.{name}": tensor for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Structure:
    """A model. outside: tensors of no block, as a release stores them.

    basis: what the figures come from: `lock`, `headers`, or `config` alone. stored: bytes of the checkpoint's shards,
    headers not counted if they follow from the config alone.
    """

    config: dict[str, Any]
    basis: str
    kinds: tuple[Kind, ...]
    outside: dict[str, Shaped]
    stored: int

    @property
    def blocks(self) -> int:
        return sum(len(kind.blocks) for kind in self.kinds)

    @property
    def parameters(self) -> int:
        return sum(len(kind.blocks) * kind.elements for kind in self.kinds) + elements(self.outside)

    @property
    def drafting(self) -> int:
        """Parameters of the multi-token prediction that the checkpoint stores."""
        return elements({name: entry for name, entry in self.outside.items() if is_drafting(name, self.blocks)})

    @property
    def experts_per_token(self) -> int:
        return self.config.get("num_experts_per_tok", 0) if any(kind.experts for kind in self.kinds) else 0

    @property
    def activated(self) -> int:
        """Parameters used for one token: all but experts that are not chosen, and multi-token prediction."""
        idle = sum(
            len(kind.blocks) * kind.expert_elements * (kind.experts - self.experts_per_token) // kind.experts
            for kind in self.kinds
            if kind.experts
        )
        return self.parameters - idle - self.drafting

    @property
    def source_blocks(self) -> list[int]:
        """Bytes of each block in the checkpoint, as `source_bytes` counts them; of a pruned model those it reads."""
        found = {block: source_bytes(kind, self.config) for kind in self.kinds for block in kind.blocks}
        return [found[block] for block in sorted(found)]

    def pruned(self, experts: int) -> "Structure":
        """The model with `experts` of its routed experts and no multi-token prediction, read from the same shards."""
        config = pruned_config(self.config, experts)
        kinds = tuple(part for kind in kinds_of(config)[0] for part in self._stored_alike(kind))
        outside = {name: entry for name, entry in self.outside.items() if not is_drafting(name, self.blocks)}
        return Structure(config, self.basis, kinds, outside, self.stored)

    def _stored_alike(self, kind: Kind) -> list[Kind]:
        """`kind` parted by how this model's blocks are stored; experts that it does not have are no matter."""
        parts = []
        for known in self.kinds:
            if blocks := tuple(block for block in kind.blocks if block in known.blocks):
                parts.append(replace(kind, blocks=blocks, main=known.main, other=known.other))
        return parts

    def first(self, blocks: int) -> "Structure":
        """The model's first `blocks` blocks with what is outside of blocks, without multi-token prediction."""
        kinds = [replace(kind, blocks=tuple(block for block in kind.blocks if block < blocks)) for kind in self.kinds]
        outside = {name: entry for name, entry in self.outside.items() if not is_drafting(name, self.blocks)}
        found = tuple(kind for kind in kinds if kind.blocks)
        return Structure(cut_config(self.config, blocks), self.basis, found, outside, self.stored)

    def release_size(self, scheme: Scheme, keep: list[str], drop_drafting: bool = False) -> "ReleaseSize":
        """What a release of `scheme` that keeps the Linears of `keep` has: a shard a block, and one for the rest.

        drop_drafting: leave out multi-token prediction. Blocks of a kind whose numbers have as many digits, and that
        keep the same Linears, have the same size.
        """
        wanted = {
            name: entry
            for name, entry in self.outside.items()
            if not (drop_drafting and is_drafting(name, self.blocks))
        }
        outside = released(wanted, [], scheme)
        size = ReleaseSize([], self.shard_bytes(outside), tensor_bytes(outside))
        known: dict[tuple, tuple[int, int, int, int]] = {}
        of_kind = {block: kind for kind in self.kinds for block in kind.blocks}
        for block, kind in sorted(of_kind.items()):
            linears, kept = kind.linears(block, scheme, keep)
            prefix = f"model.layers.{block}."
            key = (kind.blocks, len(prefix), tuple(name.removeprefix(prefix) for name in linears))
            if key not in known:
                source = kind.named(block)
                stored = released(source, linears, scheme)
                shapes = [kind.linear_shapes[name.removeprefix(prefix)] for name in linears]
                quantized = sum(rows * columns for rows, columns in shapes)
                packed = tensor_bytes({name: found for name, found in stored.items() if name not in source})
                known[key] = (self.shard_bytes(stored), tensor_bytes(stored), quantized, packed)
            files, values, quantized, packed = known[key]
            size.blocks.append(files)
            size.tensors += values
            size.quantized += quantized
            size.packed += packed
            size.kept |= kept
        return size

    def shard_bytes(self, tensors: dict[str, Shaped]) -> int:
        """Bytes of a shard of these tensors, under the names that they have in a release."""
        return file_bytes({released_name(name, self.config): tensor for name, tensor in tensors.items()})


@dataclass
class ReleaseSize:
    """Bytes of a release. blocks: of each block's shard; rest: of the last one; tensors: of all values, no headers.

    quantized: parameters of the quantized weights; packed: bytes of what stands for them; kept: Linears left in BF16,
    with the reason of each.
    """

    blocks: list[int]
    rest: int
    tensors: int
    quantized: int = 0
    packed: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(self.blocks) + self.rest


def elements(tensors: dict[str, Shaped]) -> int:
    """Number of all elements."""
    return sum(tensor.elements for tensor in tensors.values())


def kinds_of(config: dict[str, Any]) -> tuple[tuple[Kind, ...], dict[str, Shaped]]:
    """(the kinds of blocks, the tensors of no block) of the model with this config.json, weights in BF16.

    A head that is tied to the embedding is not among them. RequantError with transformers' reason if it builds none.
    """
    try:
        model = empty_model(config)
    except RequantError:
        raise
    except Exception as error:  # transformers checks a config in many places, by many exceptions
        raise RequantError(f"config.json: no model can be built of it: {' '.join(str(error).split())}") from error
    alike: dict[tuple, list[int]] = {}
    for number, layer in enumerate(model.model.layers):
        shape = tuple((name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items())
        alike.setdefault(shape, []).append(number)
    kinds = tuple(
        Kind(tuple(numbers), empty_block(type(model.model.layers[numbers[0]]), model.config, numbers[0]))
        for numbers in alike.values()
    )
    outside = {
        name: Shaped("BF16", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if not name.startswith("model.layers.")
    }
    if model.config.tie_word_embeddings:
        outside.pop("lm_head.weight", None)
    return kinds, outside


def from_config(config: dict[str, Any]) -> Structure:
    """The model as config.json alone describes it; multi-token prediction, which transformers has none of, left out."""
    kinds, outside = kinds_of(config)
    stored = sum(len(kind.blocks) * source_bytes(kind, config) for kind in kinds)
    return Structure(config, "config", kinds, outside, stored + sum(tensor.bytes for tensor in outside.values()))


def from_tensors(config: dict[str, Any], tensors: dict[str, TensorEntry], stored: int, basis: str) -> Structure:
    """The model whose checkpoint has these `tensors`, in shards of `stored` bytes in all.

    tensors: by the names in the files. Raises RequantError naming the first tensor of a block that config.json does not
    have, or gives another shape.
    """
    kinds, _ = kinds_of(config)
    blocks = sum(len(kind.blocks) for kind in kinds)
    expected = {name: tensor for kind in kinds for block in kind.blocks for name, tensor in kind.named(block).items()}
    held = entries(fp8.without_scales(tensors), config)
    found = {name: Shaped(entry.dtype, tuple(entry.shape)) for name, entry in held.items()}
    inside = {name: tensor for name, tensor in found.items() if block_of(name, blocks) is not None}
    main = main_dtype(inside.values())
    outside = {
        name: Shaped(released_dtype(name, tensor.dtype, main), tensor.shape)
        for name, tensor in found.items()
        if name not in inside
    }
    for name in sorted(expected.keys() | inside.keys()):
        wanted = list(expected[name].shape) if name in expected else "no such tensor"
        shape = list(inside[name].shape) if name in inside else "no such tensor"
        if wanted != shape:
            raise RequantError(f"{name}: {shape} in the {basis}; config.json gives {wanted}")
    kinds = tuple(part for kind in kinds for part in _stored_alike(kind, inside))
    return Structure(config, basis, kinds, outside, stored)


def _stored_alike(kind: Kind, stored: dict[str, Shaped]) -> list[Kind]:
    """`kind` parted by the dtypes that its blocks are stored in; `stored` has the tensors of all blocks."""
    alike: dict[tuple, list[int]] = {}
    for block in kind.blocks:
        tensors = {name: stored[f"model.layers.{block}.{name}"] for name in kind.tensors}
        main = main_dtype(tensors.values())
        dtypes = released_dtypes(tensors, main)
        other = tuple(sorted((name, dtype) for name, dtype in dtypes.items() if dtype != "BF16"))
        alike.setdefault((main, other), []).append(block)
    return [
        replace(kind, blocks=tuple(blocks), main=main, other=dict(other)) for (main, other), blocks in alike.items()
    ]


def source_bytes(kind: Kind, config: dict[str, Any]) -> int:
    """Bytes of a block of that kind in the checkpoint, FP8 with a float32 scale a tile if config.json says so.

    In FP8 checkpoints, routers and an indexer's `weights_proj` are BF16.
    """
    total = sum(tensor.bytes for tensor in kind.tensors.values())
    if kind.main == "F32":
        return 4 * kind.elements
    size = fp8.block_size(config)
    if size is None:
        return total
    for name, shape in kind.linear_shapes.items():
        if not name.endswith("indexer.weights_proj"):
            scales = Shaped(fp8.SCALE_DTYPES[0], tuple(fp8.scale_shape(list(shape), size)))
            total += scales.bytes - shape[0] * shape[1]
    return total


def drafting_if_stored(structure: Structure) -> int:
    """Elements of the multi-token prediction that config.json names and a config alone can't tell to be stored.

    A layer has a block like the last one, three norms, a projection of two widths to one, an embedding and a head
    (DeepSeek-V3, arXiv 2412.19437; GLM-4 MoE stores it alike).
    """
    layers = drafting_layers(structure.config)
    if structure.basis != "config" or not layers:
        return 0
    width, vocabulary = structure.config["hidden_size"], structure.config["vocab_size"]
    last = max(structure.kinds, key=lambda kind: kind.blocks[-1])
    return layers * (last.elements + 3 * width + 2 * width * width + 2 * vocabulary * width)

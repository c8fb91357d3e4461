"""A model by the shapes of its tensors alone: what `structure` tells of it, without torch and without building a block.

It runs whenever a build is planned. Memory and hours follow from it as they follow from a `structure.Structure`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from requant.architecture import BLOCK_TENSOR, EXPERT_TENSOR, head_width, is_drafting
from requant.sizes import Shaped
from requant.view import ROUTER_TENSOR, routed_experts

ROUTER = "mlp.gate.weight"


class Counted:
    """What follows from the `tensors` of the blocks of a kind, names without the block's prefix."""

    @cached_property
    def elements(self) -> int:
        return _elements(self.tensors.values())

    @cached_property
    def expert_elements(self) -> int:
        """Elements of all routed experts."""
        return _elements(tensor for name, tensor in self.tensors.items() if EXPERT_TENSOR.fullmatch(name))

    @cached_property
    def experts(self) -> int:
        return len({match[1] for name in self.tensors if (match := EXPERT_TENSOR.fullmatch(name))})


@dataclass(frozen=True)
class BlockShapes(Counted):
    """Blocks that are alike. blocks: their numbers; tensors: of one of them, names without the block's prefix."""

    blocks: tuple[int, ...]
    tensors: dict[str, Shaped]

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of each Linear, experts included; the router is none."""
        return {
            name.removesuffix(".weight"): tensor.shape
            for name, tensor in self.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2 and name != ROUTER
        }


@dataclass(frozen=True)
class ModelShapes:
    """A model. outside: tensors of no block, multi-token prediction among them."""

    config: dict[str, Any]
    kinds: tuple[BlockShapes, ...]
    outside: dict[str, Shaped]

    @cached_property
    def blocks(self) -> int:
        return sum(len(kind.blocks) for kind in self.kinds)

    @cached_property
    def parameters(self) -> int:
        return sum(len(kind.blocks) * kind.elements for kind in self.kinds) + _elements(self.outside.values())

    @cached_property
    def drafting(self) -> int:
        """Parameters of the multi-token prediction that the checkpoint stores."""
        return _elements(tensor for name, tensor in self.outside.items() if is_drafting(name, self.blocks))

    @cached_property
    def experts_per_token(self) -> int:
        return self.config.get("num_experts_per_tok", 0) if any(kind.experts for kind in self.kinds) else 0

    def kind_of(self, block: int) -> BlockShapes:
        """The kind that a block is of."""
        return next(kind for kind in self.kinds if block in kind.blocks)


def linear_widths(kinds: Iterable[Counted]) -> dict[str, int]:
    """Input width of each Linear of all blocks of these kinds, by its whole name."""
    return {
        f"model.layers.{block}.{name}": shape[1]
        for kind in kinds
        for block in kind.blocks
        for name, shape in kind.linear_shapes.items()
    }


def shapes_of(config: dict[str, Any], tensors: Mapping[str, Shaped], pruned: bool = False) -> ModelShapes:
    """The model with this config.json of a checkpoint's tensors, which have names as in transformers, no FP8 scales.

    pruned: whether `tensors` are those of the model that it is pruned from: experts that config.json does not count are
    left out, and multi-token prediction.
    """
    blocks, experts = config["num_hidden_layers"], routed_experts(config)
    inside: dict[int, dict[str, Shaped]] = {}
    outside: dict[str, Shaped] = {}
    for name, tensor in tensors.items():
        match = BLOCK_TENSOR.fullmatch(name)
        if match is None or int(match[1]) >= blocks:
            if not (pruned and match):
                outside[name] = tensor
            continue
        if pruned and (expert := EXPERT_TENSOR.fullmatch(match[2])) and int(expert[1]) >= experts:
            continue
        if pruned and ROUTER_TENSOR.fullmatch(match[2]):
            tensor = Shaped(tensor.dtype, (experts, *tensor.shape[1:]))
        inside.setdefault(int(match[1]), {})[match[2]] = tensor
    alike: dict[tuple, list[int]] = {}
    for block, found in sorted(inside.items()):
        alike.setdefault(tuple(sorted((name, tensor.shape) for name, tensor in found.items())), []).append(block)
    kinds = tuple(BlockShapes(tuple(numbers), inside[numbers[0]]) for numbers in alike.values())
    return ModelShapes(config, kinds, outside)


def pass_work(kind: BlockShapes, config: dict[str, Any], tokens: int, length: int) -> float:
    """Floating-point operations of one pass of a block over `tokens` tokens in samples of `length`, products alone."""
    experts_per_token = config.get("num_experts_per_tok", 0)
    active = sum(rows * columns for rows, columns in kind.linear_shapes.values())
    if kind.experts:
        active -= kind.expert_elements * (kind.experts - experts_per_token) // kind.experts
    heads = config["num_attention_heads"]
    nope, rope = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim", 0)
    per_head = nope + rope + config["v_head_dim"] if nope else 2 * head_width(config)
    return 2.0 * tokens * (active + heads * per_head * length / 2)


def _elements(tensors) -> int:
    return sum(tensor.elements for tensor in tensors)

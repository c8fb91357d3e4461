"""A pruned model as a view of the one it is made from: which stored tensors it has, under which names, with which rows.

Experts that are kept are numbered anew, in their order; the router loses the rows of the others, its correction bias
their entries. Layers for multi-token prediction are left out: their experts are never observed. Nothing is copied.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from requant.architecture import BLOCK_TENSOR, EXPERT_TENSOR, block_count, block_of, is_drafting, without_drafting
from requant.errors import RequantError
from requant.naming import EXPERT_COUNTS
from requant.records import KeepList

EXPERT_NUMBER = re.compile(r"(?<=\.mlp\.experts\.)\d+")
ROUTER_TENSOR = re.compile(r"mlp\.gate\.(weight|e_score_correction_bias)")


def routed_experts(config: dict[str, Any]) -> int:
    """Routed experts of a MoE block, as config.json counts them; 0 if it counts none."""
    return next((config[key] for key in EXPERT_COUNTS if config.get(key)), 0)


def group_count(config: dict[str, Any]) -> int:
    """Groups that the router limits its choice to; 1 for a router that knows none."""
    return config.get("n_group") or 1


def pruned_config(config: dict[str, Any], experts: int) -> dict[str, Any]:
    """The config.json of a model that keeps `experts` of its routed experts, and no multi-token prediction."""
    return without_drafting(config) | dict.fromkeys((key for key in EXPERT_COUNTS if config.get(key)), experts)


class View:
    """The tensors of the model that `keep` leaves of the source whose config.json is `config`.

    All names are those inside requant. A MoE block that `keep` does not decide on keeps the names of the source;
    `check_decided` refuses to read it. Raises RequantError if the list is not one of this source.
    """

    def __init__(self, keep: KeepList, config: dict[str, Any]):
        self.keep, self.blocks = keep, block_count(config)
        self.config = pruned_config(config, keep.experts)
        before = routed_experts(config)
        if keep.experts_before != before:
            raise RequantError(
                f"keep list of {keep.model}: {keep.experts_before} experts before; config.json counts {before}"
            )
        for block, experts in keep.blocks.items():
            if len(experts) != keep.experts or experts != sorted(set(experts) & set(range(before))):
                raise RequantError(
                    f"keep list of {keep.model}: block {block}: {experts}; expected {keep.experts} of {before} "
                    "experts, ascending"
                )

    @cached_property
    def numbers(self) -> dict[int, dict[int, int]]:
        """The new number of each kept expert, by block and old number."""
        return {block: {old: new for new, old in enumerate(experts)} for block, experts in self.keep.blocks.items()}

    def sources(self, names: Iterable[str]) -> dict[str, str]:
        """For each tensor of the pruned model its name in the source, whose tensors are `names`."""
        found = {}
        for name in names:
            if (new := self._renamed(name)) is not None:
                found[new] = name
        return found

    def _renamed(self, name: str) -> str | None:
        if is_drafting(name, self.blocks):
            return None
        numbers = self.numbers.get(block_of(name, self.blocks))
        match = EXPERT_TENSOR.fullmatch(name)
        if match is None or numbers is None:
            return name
        number = numbers.get(int(match[1]))
        return None if number is None else EXPERT_NUMBER.sub(str(number), name)

    def rows(self, name: str) -> list[int] | None:
        """The rows of a tensor that are kept; None if all are."""
        match = BLOCK_TENSOR.fullmatch(name)
        return self.keep.blocks.get(int(match[1])) if match and ROUTER_TENSOR.fullmatch(match[2]) else None

    def check_decided(self, names: Iterable[str]) -> None:
        """Raises RequantError naming a block of `names` that has experts on which the list does not decide."""
        for name in names:
            if EXPERT_TENSOR.fullmatch(name) and (block := block_of(name, self.blocks)) not in self.keep.blocks:
                raise RequantError(
                    f"keep list of {self.keep.model}: block {block}: not there; found: "
                    f"{', '.join(map(str, self.keep.blocks)) or 'none'}"
                )

"""How many routed experts a pruned model has: arithmetic on config.json and the config, without torch.

A router that limits its choice to groups (DeepSeek-V3: `n_group`, `topk_group`) numbers its experts group by group, so
every group loses as many; else experts that are numbered anew would land in groups that they were not trained in.
"""

from collections.abc import Iterable
from typing import Any

from requant.architecture import expert_counts
from requant.config import Prune
from requant.errors import RequantError
from requant.view import group_count, routed_experts


def kept_experts(model: str, prune: Prune, config: dict[str, Any]) -> int:
    """Experts that each MoE block of `model` keeps, of the source whose config.json is `config`.

    Raises RequantError naming the key of the config if nothing would be dropped, groups would differ, or the router
    could no longer choose as many experts as it does.
    """
    where, before, groups = f"models.{model}.prune", routed_experts(config), group_count(config)
    if not before:
        raise RequantError(f"{where}: the source has no routed experts (config.json); expected a mixture of experts")
    if before % groups:
        raise RequantError(f"{where}: {before} experts in {groups} groups (config.json); expected as many in each")
    key = "ratio" if prune.experts is None else "experts"
    found = f"{where}.{key}: {getattr(prune, key)}"
    kept = prune.experts or before - groups * int(prune.ratio * before / groups + 0.5)
    if kept >= before:
        raise RequantError(f"{found}: drops none of {before} experts; expected a number that drops some")
    if kept % groups:
        raise RequantError(f"{found}: the router has {groups} groups (n_group); expected as many experts in each")
    _check_choice(found, kept, groups, config)
    return kept


def _check_choice(found: str, kept: int, groups: int, config: dict[str, Any]) -> None:
    """Raises RequantError, beginning with what was `found`, unless the router can choose of `kept` experts."""
    chosen = config.get("num_experts_per_tok") or 1
    if kept < chosen:
        raise RequantError(
            f"{found}: experts kept: {kept}; the router chooses {chosen} a token; expected fewer dropped"
        )
    if groups == 1:
        return
    each, open_groups = kept // groups, config.get("topk_group") or groups
    if each < 2:
        raise RequantError(
            f"{found}: experts kept in each of {groups} groups: {each}; a group's score is the sum of its two best; "
            "expected 2 or more"
        )
    if open_groups * each < chosen:
        raise RequantError(
            f"{found}: experts kept in each of {groups} groups: {each}; the router chooses {chosen} a token of "
            f"{open_groups} groups (topk_group); expected fewer dropped"
        )


def check_counts(model: str, tensors: Iterable[str], config: dict[str, Any]) -> None:
    """Raises RequantError unless every MoE block of the source has as many experts as its config.json counts.

    tensors: names inside requant.
    """
    before = routed_experts(config)
    for block, count in expert_counts(list(tensors), config["num_hidden_layers"]).items():
        if count != before:
            raise RequantError(
                f"models.{model}.prune: block {block} has {count} experts; config.json counts {before}: expected as "
                "many in each MoE block"
            )

"""Which routed experts a pruned model keeps: as many in each MoE block, and in each group of the router."""

from pathlib import Path

import numpy as np
import pandas as pd

from requant.config import Prune
from requant.errors import RequantError
from requant.records import KeepList
from requant.saliency import read_table

RANKED_BY = {"reap": "saliency", "frequency": "tokens"}


def keep_list(
    model: str, source: str, prune: Prune, experts_before: int, experts: int, groups: int, tables: dict[int, Path]
) -> KeepList:
    """The experts that `model` keeps of its `source`, from tables of saliencies by block (no rows: dense).

    Raises RequantError naming the table that has another number of experts than `experts_before`.
    """
    found = {block: read_table(path) for block, path in tables.items()}
    for block, table in found.items():
        if len(table) not in (0, experts_before):
            raise RequantError(
                f"{tables[block]}: {len(table)} experts found; expected {experts_before}, or none if it is dense; "
                "delete it to rebuild"
            )
    sparse = {block: table for block, table in found.items() if len(table)}
    unreached = {block: table["expert"][table["tokens"] == 0].tolist() for block, table in sparse.items()}
    return KeepList(
        model=model,
        source=source,
        method=prune.method,
        observe=prune.observe,
        calibration=prune.calibration,
        seed=prune.seed,
        experts_before=experts_before,
        experts=experts,
        groups=groups,
        blocks={block: kept(ranks(table, prune, block), groups, experts) for block, table in sparse.items()},
        never_reached={block: experts for block, experts in unreached.items() if experts},
    )


def ranks(table: pd.DataFrame, prune: Prune, block: int) -> np.ndarray:
    """[experts]: the higher an expert's value, the longer it is kept. Random values follow from (seed, block)."""
    if prune.method == "random":
        return np.random.default_rng([prune.seed, block]).permutation(len(table))
    return table[RANKED_BY[prune.method]].to_numpy()


def kept(values: np.ndarray, groups: int, experts: int) -> list[int]:
    """The `experts` of highest value, as many in each of `groups` equal parts of the list, ascending; of equal values
    those of the lower index."""
    each = values.reshape(groups, -1)
    best = np.argsort(-each, axis=1, kind="stable")[:, : experts // groups]
    return sorted((best + np.arange(groups)[:, None] * each.shape[1]).flatten().tolist())

"""Which routed experts a pruned model keeps: as many in each MoE block, and in each group of the router."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from requant.errors import RequantError
from requant.records import KeepList
from requant.saliency import read_table

RANKED_BY = {"reap": "saliency", "frequency": "tokens"}


@dataclass(frozen=True)
class Pruning:
    """What a keep list depends on beside the tables of saliencies; the fields are those of `KeepList`."""

    model: str
    source: str
    method: str
    observe: str
    calibration: str
    seed: int
    experts_before: int
    experts: int
    groups: int


def keep_list(pruning: Pruning, tables: dict[int, Path]) -> KeepList:
    """The experts that are kept, from the tables of saliencies by block; that of a dense block has no rows.

    Raises RequantError naming the table that has another number of experts than `experts_before`.
    """
    before = pruning.experts_before
    found = {block: read_table(path) for block, path in tables.items()}
    for block, table in found.items():
        if len(table) not in (0, before):
            raise RequantError(
                f"{tables[block]}: {len(table)} experts found; expected {before}, or none if it is dense; "
                "delete it to rebuild"
            )
    sparse = {block: table for block, table in found.items() if len(table)}
    unreached = {block: table["expert"][table["tokens"] == 0].tolist() for block, table in sparse.items()}
    return KeepList(
        **asdict(pruning),
        blocks={block: kept(worth(table, pruning, block), pruning) for block, table in sparse.items()},
        never_reached={block: experts for block, experts in unreached.items() if experts},
    )


def worth(table: pd.DataFrame, pruning: Pruning, block: int) -> np.ndarray:
    """[experts]: those of the highest values are kept. Random ones follow from the seed and the block's number."""
    if pruning.method == "random":
        return np.random.default_rng([pruning.seed, block]).permutation(len(table))
    return table[RANKED_BY[pruning.method]].to_numpy()


def kept(values: np.ndarray, pruning: Pruning) -> list[int]:
    """The experts of the highest values, as many of each group, ascending; of equal values those of the lower index."""
    by_group = values.reshape(pruning.groups, -1)
    best = np.argsort(-by_group, axis=1, kind="stable")[:, : pruning.experts // pruning.groups]
    return sorted((best + np.arange(pruning.groups)[:, None] * by_group.shape[1]).flatten().tolist())

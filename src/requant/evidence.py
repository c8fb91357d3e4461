"""What a card says of a pruned model: which experts it lost, how much they did, and what that cost.

Numbers come from the keep list, the tables of saliencies it was made from, and what was measured of the models that
are held against each other: the original, the pruned one, and those pruned by other methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from requant import wording
from requant.errors import RequantError
from requant.records import (
    BenchmarkRecord,
    CalibrationRecord,
    KeepList,
    ModelQuality,
    PruneEvaluateRecord,
    RoutingRecord,
    Score,
    read_json,
)
from requant.saliency import read_table

METHOD_TEXT = {
    "reap": "by REAP saliency: the mean over an expert's tokens of its gate times the norm of its output",
    "frequency": "by how often the router chose them",
    "random": "at random",
}
OBSERVE_TEXT = {
    "oneshot": "all blocks of the original model in one pass",
    "sequential": "each block of the original model on the output of the pruned blocks before it",
}


@dataclass(frozen=True)
class EvidencePaths:
    """Where the records of a pruned model lie, relative to the directory of the build."""

    keep: str
    tables: list[str]
    calibration: str
    routing: list[str]
    evaluations: list[str]
    benchmarks: list[str]


@dataclass(frozen=True)
class Rival:
    """One of the models that are held against each other: how its experts were chosen, and what was measured."""

    model: str
    method: str
    quality: ModelQuality
    benchmark: BenchmarkRecord


@dataclass(frozen=True)
class Evidence:
    """All that was recorded of pruning a model. tables: of the MoE blocks; rivals: the original, this model, others."""

    keep: KeepList
    tables: dict[int, pd.DataFrame]
    calibration: CalibrationRecord
    routing: list[RoutingRecord]
    evaluations: list[PruneEvaluateRecord]
    rivals: list[Rival]
    paths: EvidencePaths


def table_paths(keep: KeepList, blocks: int) -> list[str]:
    """The tables of saliencies, by block, that `keep` was made from."""
    folder = f"results/reference/{keep.source}/{keep.calibration}"
    if keep.observe == "sequential":
        folder = f"results/{keep.model}/prune"
    return [f"{folder}/saliency_{block}.csv" for block in range(blocks)]


def load_evidence(root: Path, model: str, compare: Sequence[str], blocks: int, benchmark: str) -> Evidence:
    """Reads what was recorded of pruning `model`, which has `blocks` blocks, from the build in `root`.

    compare: models pruned by other methods. Raises RequantError naming the file if a record is absent, lacks a field
    or is of another model.
    """
    keep_path = f"results/{model}/prune/keep.json"
    keep = read_json(root / keep_path, KeepList)
    observed = f"results/reference/{keep.source}/{keep.calibration}"
    pruned = [model, *compare]
    paths = EvidencePaths(
        keep=keep_path,
        tables=table_paths(keep, blocks),
        calibration=f"results/calibration/{keep.source}/{keep.calibration}/calibration.json",
        routing=[f"{observed}/routing_{block}.json" for block in range(blocks)],
        evaluations=[f"results/{name}/prune/evaluate.json" for name in pruned],
        benchmarks=[f"results/reference/{name}/benchmark/{benchmark}.json" for name in (keep.source, *pruned)],
    )
    lists = [keep, *(read_json(root / f"results/{name}/prune/keep.json", KeepList) for name in compare)]
    evaluations = [read_json(root / path, PruneEvaluateRecord) for path in paths.evaluations]
    benchmarks = [read_json(root / path, BenchmarkRecord) for path in paths.benchmarks]
    for path, record, name in zip(paths.evaluations, evaluations, pruned, strict=True):
        if (record.model, record.source) != (name, keep.source):
            raise RequantError(
                f"{root / path}: {record.model} of {record.source}; expected {name} of {keep.source}; "
                "delete it to rebuild"
            )
    qualities = [evaluations[0].original, *(record.pruned for record in evaluations)]
    methods = ["original", *(found.method for found in lists)]
    names = [keep.source, *pruned]
    tables = {block: read_table(root / path) for block, path in enumerate(paths.tables)}
    return Evidence(
        keep=keep,
        tables={block: table for block, table in tables.items() if len(table)},
        calibration=read_json(root / paths.calibration, CalibrationRecord),
        routing=[read_json(root / path, RoutingRecord) for path in paths.routing],
        evaluations=evaluations,
        rivals=[Rival(*found) for found in zip(names, methods, qualities, benchmarks, strict=True)],
        paths=paths,
    )


class KeptShare(NamedTuple):
    """What is left of one block: part of the routed tokens and of the mass that its kept experts had."""

    block: int
    dropped: list[int]
    tokens: float
    mass: float


def kept_shares(evidence: Evidence) -> list[KeptShare]:
    """What is left of each MoE block, as observed on the calibration tokens before anything was dropped there."""
    found = []
    for block, table in evidence.tables.items():
        kept = table[table["expert"].isin(evidence.keep.blocks[block])]
        dropped = sorted(set(table["expert"]) - set(kept["expert"]))
        tokens, mass = (kept[column].sum() / table[column].sum() for column in ("tokens", "mass"))
        found.append(KeptShare(block, dropped, float(tokens), float(mass)))
    return found


def rival_table(evidence: Evidence) -> list[list[str]]:
    """The models side by side, the original first: a row for each measure, its name first."""
    rivals = evidence.rivals
    qualities = [rival.quality for rival in rivals]
    divergences = [wording.with_error(q.kl_divergence, q.kl_divergence_stderr) for q in qualities[1:]]
    rows = [
        ["KL divergence from the original, nats a token", "0", *divergences],
        ["Top-1 agreement with the original", *(wording.percent(q.top1_agreement) for q in qualities)],
        ["Perplexity", *(wording.figure(q.perplexity) for q in qualities)],
    ]
    scores = [{(score.task, score.metric): score for score in rival.benchmark.scores} for rival in rivals]
    for key, first in scores[0].items():
        rows.append([_score_name(first), *(wording.with_error(own[key].value, own[key].stderr) for own in scores)])
    return rows


def _score_name(score: Score) -> str:
    return f"{score.task}, {score.metric}{'' if score.higher_is_better else ' (lower is better)'}"

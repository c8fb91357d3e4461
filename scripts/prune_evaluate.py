"""Measures a pruned model against the original on held-out tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.evaluate import evaluate_pruned
from requant.jobs import job, progress
from requant.records import KeepList, read_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.device), source=snakemake.params.source):
    record = evaluate_pruned(
        Path(snakemake.params.source),
        read_json(snakemake.input.keep[0], KeepList),
        Path(snakemake.input.tokens),
        Path(snakemake.input.calibration),
        [Path(path) for path in snakemake.input.hidden],
        snakemake.threads,
        Path(snakemake.output.record),
        snakemake.params.device,
    )
    kl, perplexity = record.pruned.kl_divergence, record.pruned.perplexity
    progress(
        f"{record.model}: KL {kl:.4g} against {record.source}, perplexity {perplexity:.4g} "
        f"(original {record.original.perplexity:.4g})"
    )

"""Measures a release against its source model on held-out tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.evaluate import evaluate
from requant.jobs import job, progress
from requant.records import read_keep

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.device), source=snakemake.params.source):
    record = evaluate(
        Path(snakemake.params.source),
        Path(snakemake.input.packed[0]).parent / "model",
        Path(snakemake.input.tokens),
        Path(snakemake.input.calibration),
        [Path(path) for path in snakemake.input.hidden],
        snakemake.wildcards.release,
        snakemake.params.model,
        snakemake.threads,
        Path(snakemake.output.record),
        read_keep(snakemake.input.keep),
        Path(snakemake.input.original[0]) if snakemake.input.original else None,
        snakemake.params.device,
    )
    kl, perplexity = record.quantized.kl_divergence, record.quantized.perplexity
    rounded = f" (plain rounding {record.rounded.kl_divergence:.4g})" if record.rounded else ""
    progress(
        f"{record.release}: KL {kl:.4g}{rounded}, perplexity {perplexity:.4g} (source {record.source.perplexity:.4g})"
    )

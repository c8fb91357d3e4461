"""Holds every tensor of a release against the source."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.records import read_keep
from requant.verify import verify

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    record = verify(
        Path(snakemake.params.source),
        Path(snakemake.input.packed[0]).parent / "model",
        snakemake.wildcards.release,
        tuple(snakemake.params.limits),
        snakemake.params.samples,
        Path(snakemake.output.record),
        read_keep(snakemake.input.keep),
    )
    progress(
        f"{record.release}: {len(record.tensors)} quantized tensors verified, lowest cosine {record.lowest_cosine:.4f} "
        f"({record.lowest_cosine_tensor}), mean relative MAE {record.mean_relative_mae:.4f}"
    )

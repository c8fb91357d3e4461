"""Holds every tensor of a release against the source."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.records import read_keep
from requant.verify import verify

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, source=snakemake.params.source):
    record = verify(
        Path(snakemake.params.source),
        Path(snakemake.input.packed[0]).parent / "model",
        snakemake.wildcards.release,
        tuple(snakemake.params.limits) if snakemake.params.limits else None,
        snakemake.params.samples,
        Path(snakemake.output.record),
        read_keep(snakemake.input.keep),
    )
    if record.tensors:
        progress(
            f"{record.release}: {len(record.tensors)} quantized tensors verified, lowest cosine "
            f"{record.lowest_cosine:.4f} ({record.lowest_cosine_tensor}), "
            f"mean relative MAE {record.mean_relative_mae:.4f}"
        )
    progress(f"{record.release}: {record.unchanged} tensors are the source's, bit for bit")

"""Runs one block of the source over calibration and held-out tokens."""

from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.chain import run_reference_block
from requant.jobs import job, progress
from requant.records import read_keep

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.device), source=snakemake.params.source):
    record = run_reference_block(
        snakemake.params.source,
        snakemake.input.tokens,
        snakemake.input.hidden,
        int(snakemake.wildcards.block),
        snakemake.output.hidden,
        snakemake.output.routing,
        snakemake.output.saliency,
        snakemake.wildcards.model,
        snakemake.wildcards.calibration,
        read_keep(snakemake.input.keep),
        snakemake.params.device,
    )
    unreached = f", experts never reached: {record.never_reached}" if record.never_reached else ""
    progress(f"{record.model} reference block {record.block}: {record.kind}, {record.tokens} tokens{unreached}")

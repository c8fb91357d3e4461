"""Observes the experts of one block of the original model on what the pruned blocks before it give."""

from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.chain import observe_block
from requant.jobs import job, progress
from requant.saliency import write_table

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.device), source=snakemake.params.source):
    block = int(snakemake.wildcards.block)
    table = observe_block(
        snakemake.params.source, snakemake.input.tokens, snakemake.input.hidden, block, snakemake.params.device
    )
    write_table(snakemake.output.saliency, table)
    progress(f"{snakemake.wildcards.model} block {block}: {len(table)} experts observed after the pruned blocks before")

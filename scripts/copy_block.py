"""Copies one block of a model into a release in BF16."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.gate import check_open
from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, source=snakemake.params.source):
    check_open(Path(snakemake.output.block).parents[1])
    from requant.copying import copy_block
    from requant.records import read_keep

    copy_block(
        Path(snakemake.params.source),
        snakemake.wildcards.release,
        int(snakemake.wildcards.block),
        snakemake.params.scheme,
        Path(snakemake.output.block),
        Path(snakemake.output.record),
        read_keep(snakemake.input.keep),
    )

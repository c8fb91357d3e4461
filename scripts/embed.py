"""Embeds the tokens of a calibration: where the reference chain begins."""

from typing import TYPE_CHECKING

from requant.chain import embed
from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, source=snakemake.params.source):
    embed(snakemake.params.source, snakemake.input.tokens, snakemake.output.hidden)

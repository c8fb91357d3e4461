"""Heat map of the saliency of a pruned model's experts, for the card of a release of it."""

from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.plots import plot_saliency
    from requant.records import KeepList, read_json
    from requant.saliency import read_table

    tables = [read_table(path) for path in snakemake.input.tables]
    sparse = {block: table for block, table in enumerate(tables) if len(table)}
    plot_saliency(snakemake.output.saliency, read_json(snakemake.input.keep, KeepList), sparse)

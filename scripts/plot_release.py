"""Pictures of one release for its card."""

from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.plots import plot_hidden_states, plot_loss
    from requant.records import BlockRecord, EvaluateRecord, read_json

    release = snakemake.wildcards.release
    plot_loss(snakemake.output.loss, {release: [read_json(path, BlockRecord) for path in snakemake.input.blocks]})
    plot_hidden_states(snakemake.output.hidden_states, {release: read_json(snakemake.input.evaluate, EvaluateRecord)})

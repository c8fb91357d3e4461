"""Pictures of all releases of the build, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.card import load_release
    from requant.plots import plot_hidden_states, plot_loss

    releases = [load_release(Path(), **subject) for subject in snakemake.params.subjects]
    quantized = [facts for facts in releases if facts.quantized]
    plot_loss(snakemake.output.loss, {facts.name: facts.blocks for facts in quantized})
    plot_hidden_states(snakemake.output.hidden_states, {facts.name: facts.evaluate for facts in quantized})

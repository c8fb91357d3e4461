"""Heat map of calibration tokens by expert, for each model and token set of the build that has experts."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.card import load_release, routing_sets
    from requant.plots import plot_experts

    releases = [load_release(Path(), **subject) for subject in snakemake.params.subjects]
    plot_experts(snakemake.output.experts, routing_sets(releases))

"""Holds a release's served scores against the expected range and its source's."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.config import Served
from requant.jobs import job, progress
from requant.served_comparison import compare, told

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input):
    record = compare(
        snakemake.wildcards.release,
        Served.model_validate(snakemake.params.settings),
        Path(snakemake.input.measured),
        Path(snakemake.input.samples),
        Path(snakemake.output.record),
        snakemake.params.source_model,
        *map(Path, snakemake.input.source),
    )
    for line in told(record):
        progress(line)

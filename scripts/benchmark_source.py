"""Scores a source model."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.benchmark import run_benchmark
from requant.checkpoint import Checkpoint
from requant.config import Benchmark
from requant.jobs import job
from requant.records import read_keep

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.device), source=snakemake.params.source):
    run_benchmark(
        snakemake.wildcards.model,
        Checkpoint(snakemake.params.source, read_keep(snakemake.input.keep)),
        snakemake.wildcards.benchmark,
        Benchmark.model_validate(snakemake.params.settings),
        Path(snakemake.params.tasks) if snakemake.params.tasks else None,
        snakemake.threads,
        Path(snakemake.output.record),
        device=snakemake.params.device,
    )

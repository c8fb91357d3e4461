"""Scores a release, and what is left of its source's scores."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.benchmark import run_benchmark
from requant.config import Benchmark
from requant.jobs import job
from requant.packed import PackedCheckpoint

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.device)):
    run_benchmark(
        snakemake.wildcards.release,
        PackedCheckpoint(Path(snakemake.input.packed[0]).parent / "model"),
        snakemake.params.benchmark,
        Benchmark.model_validate(snakemake.params.settings),
        Path(snakemake.params.tasks) if snakemake.params.tasks else None,
        snakemake.threads,
        Path(snakemake.output.record),
        Path(snakemake.input.source_scores),
        snakemake.params.device,
    )

"""Quantizes one block of a release."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.assignment import gpus_of
from requant.config import Tuning
from requant.gate import check_open
from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, gpus_of(snakemake.params.tuning["device"]), source=snakemake.params.source):
    check_open(Path(snakemake.output.block).parents[1])
    from requant.quantize import BlockJob, quantize_block
    from requant.records import read_keep

    quantize_block(
        BlockJob(
            source=Path(snakemake.params.source),
            release=snakemake.wildcards.release,
            model=snakemake.params.model,
            block=int(snakemake.wildcards.block),
            scheme=snakemake.params.scheme,
            tuning=Tuning.model_validate(snakemake.params.tuning),
            keep=snakemake.params.keep,
            tokens=Path(snakemake.input.tokens),
            hidden=Path(snakemake.input.hidden),
            targets=Path(snakemake.input.targets),
            kept_experts=read_keep(snakemake.input.keep),
        ),
        Path(snakemake.output.block),
        Path(snakemake.output.record),
        Path(hidden) if (hidden := snakemake.output.get("hidden")) else None,
    )

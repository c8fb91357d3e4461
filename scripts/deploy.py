"""Serves a release and shows that what answers is this release."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.config import Deploy, Target
from requant.deploy import smoke_test
from requant.jobs import job, progress
from requant.records import read_keep

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log.job, snakemake.input, snakemake.resources.get("gpu", 0), source=snakemake.params.source):
    manifest, record_path = Path(snakemake.input.packed[0]), Path(snakemake.output.record)
    record = smoke_test(
        snakemake.wildcards.release,
        Path(snakemake.params.source),
        manifest.parent / "model",
        manifest,
        Path(snakemake.input.evaluated),
        Path(snakemake.input.tokens),
        Deploy.model_validate(snakemake.params.settings),
        Target.model_validate(snakemake.params.target),
        record_path.parent / "served",
        Path(snakemake.log.engine),
        snakemake.threads,
        record_path,
        Path(snakemake.output.throughput),
        read_keep(snakemake.input.keep),
    )
    progress(
        f"{record.release}: served; {record.agreement:.1%} of {record.tokens} tokens are this model's own "
        f"choice ({record.control_agreement:.1%} {record.control})"
    )

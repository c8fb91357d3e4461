"""Serves the first blocks of a release and shows that what answers is these blocks."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.config import Deploy, Target
from requant.jobs import job, progress
from requant.load_test import Cut, load_test
from requant.records import read_keep

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log.job, snakemake.input, snakemake.resources.get("gpu", 0), source=snakemake.params.source):
    record_path = Path(snakemake.output.record)
    record = load_test(
        Cut(
            snakemake.wildcards.release,
            Path(snakemake.params.source),
            snakemake.params.scheme,
            Path(snakemake.input.blocks[0]).parent,
            len(snakemake.input.blocks),
            read_keep(snakemake.input.keep),
        ),
        Path(snakemake.input.tokens),
        Deploy.model_validate(snakemake.params.settings),
        Target.model_validate(snakemake.params.target),
        record_path.with_suffix(""),
        Path(snakemake.log.engine),
        snakemake.threads,
        record_path,
    )
    progress(
        f"{record.release}: load test of {record.blocks} blocks passed; {record.agreement:.1%} of {record.tokens} "
        "tokens are their own choice"
    )

"""Tokenizes and packs the texts of a calibration."""

from typing import TYPE_CHECKING

from requant.calibration import make_token_sets
from requant.config import Calibration
from requant.jobs import job, progress

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, source=snakemake.params.source):
    record = make_token_sets(
        snakemake.wildcards.model,
        snakemake.params.source,
        snakemake.wildcards.calibration,
        Calibration.model_validate(snakemake.params.calibration),
        snakemake.output.tokens,
        snakemake.output.record,
    )
    for part, found in (("calibration", record.calibration_set), ("held-out", record.heldout_set)):
        progress(f"{record.calibration}: {found.samples} {part} samples of {record.seqlen}, {found.tokens} tokens")

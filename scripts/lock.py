"""Writes locks/{model}.json of a local checkpoint: `snakemake --cores 1 lock --config model=NAME`."""

from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.locks import write_lock

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    model, source = snakemake.params.model, snakemake.params.source
    path = f"locks/{model}.json"
    write_lock(model, source, path)
    progress(f"{path}: written from {source}; commit it")

"""Writes locks/{model}.json of a local checkpoint: `snakemake lock --config model=NAME`."""

from typing import TYPE_CHECKING

from requant.errors import RequantError
from requant.jobs import job, progress
from requant.locks import write_lock

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    model, paths = snakemake.params.model, snakemake.params.paths
    if model not in paths:
        raise RequantError(f"--config model={model}: not in `models`; expected one of {', '.join(sorted(paths))}")
    path = f"locks/{model}.json"
    write_lock(model, paths[model], path)
    progress(f"{path}: written from {paths[model]}; commit it")

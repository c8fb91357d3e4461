"""Writes locks/{model}.json of a directory or a hub commit: `snakemake --cores 1 lock --config model=NAME`."""

from typing import TYPE_CHECKING

from requant.hublock import make_hub_lock
from requant.jobs import job, progress
from requant.locks import make_lock
from requant.records import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    model, source = snakemake.params.model, snakemake.params.source
    path = f"locks/{model}.json"
    lock = make_hub_lock(model, **source) if "hub" in source else make_lock(model, source["path"])
    write_json(path, lock)
    progress(f"{path}: written from {source.get('hub') or source['path']} at {lock.revision}; commit it")

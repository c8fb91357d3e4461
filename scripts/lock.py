"""Writes locks/{model}.json of a directory, hub commit or bucket: `snakemake --cores 1 lock --config model=NAME`."""

from typing import TYPE_CHECKING

from requant.bucketlock import make_bucket_lock
from requant.hublock import make_hub_lock
from requant.jobs import job, progress
from requant.locks import make_lock
from requant.records import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    model, source = snakemake.params.model, snakemake.params.source
    path = f"locks/{model}.json"
    if "hub" in source:
        lock = make_hub_lock(model, **source)
    elif "bucket" in source:
        lock = make_bucket_lock(model, source["bucket"])
    else:
        lock = make_lock(model, source["path"])
    write_json(path, lock)
    progress(f"{path}: written from {next(iter(source.values()))} at {lock.revision}; commit it")

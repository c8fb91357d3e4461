"""Decides which experts of every block a pruned model keeps."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.keep_list import Pruning, keep_list
from requant.records import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    tables = {block: Path(path) for block, path in enumerate(snakemake.input.saliency)}
    found = keep_list(Pruning(**snakemake.params.pruning), tables)
    write_json(snakemake.output.keep, found)
    progress(
        f"{found.model}: {found.experts} of {found.experts_before} experts kept in each of {len(found.blocks)} blocks "
        f"of {found.source}, by {found.method}"
    )

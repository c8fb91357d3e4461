"""Decides which experts of one block a pruned model keeps."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.keep_list import Pruning, keep_list
from requant.records import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    block = int(snakemake.wildcards.block)
    found = keep_list(Pruning(**snakemake.params.pruning), {block: Path(snakemake.input.saliency)})
    write_json(snakemake.output.keep, found)
    progress(f"{found.model} block {block}: {found.blocks.get(block, 'dense')} kept")

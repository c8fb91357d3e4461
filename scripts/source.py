"""Describes a source whose files are all checked; parameters and experts are counted from its tensors."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.carried import name_of_record
from requant.jobs import job, progress
from requant.locks import load_lock, source_record
from requant.records import CheckedFile, read_json, write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, source=snakemake.params.path):
    lock = load_lock(snakemake.input.lock[0]) if snakemake.input.lock else None
    folder = Path(snakemake.output.record).parent / "files"
    files = {name_of_record(path, folder): read_json(path, CheckedFile) for path in snakemake.input.files}
    record = source_record(snakemake.wildcards.model, snakemake.params.path, lock, files)
    write_json(snakemake.output.record, record)
    progress(f"{record.model}: {record.parameters} parameters in {record.tensors} tensors, {record.blocks} blocks")
    if record.files_left_behind:
        progress(f"{record.model}: not carried along: {', '.join(record.files_left_behind)}")
    if record.tensors_left_out:
        some = next(iter(record.tensors_left_out))
        progress(
            f"{record.model}: {len(record.tensors_left_out)} tensors are no part of the model, the first is {some}"
        )

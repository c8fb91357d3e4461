"""Checks one file of a source against its lock."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.carried import folder_of
from requant.jobs import job, progress
from requant.locks import checked_file, load_lock
from requant.records import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    lock = load_lock(snakemake.input.lock[0]) if snakemake.input.lock else None
    path, name = Path(snakemake.input.file), snakemake.wildcards.file
    checked = checked_file(folder_of(path, name), name, lock)
    write_json(snakemake.output.record, checked)
    progress(
        f"{path}: {checked.size} bytes, sha256 {checked.sha256[:12]}… {'as locked' if lock else 'taken (no lock)'}"
    )

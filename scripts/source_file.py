"""Checks one file of a source against its lock."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.locks import check_file, load_lock
from requant.records import CheckedFile, write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    start = time.monotonic()
    lock = load_lock(snakemake.input.lock[0]) if snakemake.input.lock else None
    path = Path(snakemake.input.file)
    entry = check_file(path.parent, path.name, lock)
    checked = CheckedFile(**entry.model_dump(), seconds=time.monotonic() - start)
    write_json(snakemake.output.record, checked)
    progress(f"{path}: {entry.size} bytes, sha256 {entry.sha256[:12]}… {'as locked' if lock else 'taken (no lock)'}")

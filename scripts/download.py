"""Downloads one file of a remote model, or takes it from where it is already, and checks it against the lock."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.download import link, obtain, remote_model
from requant.jobs import job, progress
from requant.locks import load_lock
from requant.records import write_json

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    model, name = remote_model(snakemake.params.repository), snakemake.wildcards.file
    checked = obtain(model, name, load_lock(snakemake.input.lock[0]))
    link(model.place(name), Path(snakemake.output.file))
    write_json(snakemake.output.record, checked)
    progress(f"{model.place(name)}: {checked.size} bytes, sha256 {checked.sha256[:12]}… as locked")

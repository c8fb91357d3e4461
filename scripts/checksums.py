"""SHA256SUMS of one release."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.checksums import write_sums
    from requant.records import PackRecord, read_json

    folder = Path(snakemake.output.sums).parent
    others = [str(Path(path).relative_to(folder)) for path in snakemake.input.files]
    write_sums(folder, read_json(snakemake.input.pack, PackRecord).files, others)

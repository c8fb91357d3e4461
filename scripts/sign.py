"""model.sig of one release."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.signature import sign

    sign(Path(snakemake.output.signature).parent, snakemake.params.key)

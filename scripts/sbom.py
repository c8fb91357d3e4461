"""sbom.cdx.json of one release: what is installed where it was made."""

from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.records import write_text
    from requant.sbom import bill_of_materials

    write_text(snakemake.output.sbom, bill_of_materials())

"""Generates one text of the embedded model's world."""

import runpy
import sys
from typing import TYPE_CHECKING

from requant.jobs import job, progress

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    wanted = {
        "split": snakemake.wildcards.split,
        "kind": snakemake.wildcards.kind,
        "documents": snakemake.params.documents,
        "seed": 1,
        "out": snakemake.output.text,
    }
    sys.argv = ["generate.py", *(part for key, value in wanted.items() for part in (f"--{key}", str(value)))]
    runpy.run_path(snakemake.input.generator, run_name="__main__")
    progress(f"{wanted['out']}: {wanted['documents']} documents written")

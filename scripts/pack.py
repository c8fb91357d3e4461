"""Makes a release's checkpoint directory from its block files."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job, progress
from requant.packing import pack
from requant.records import read_keep

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0], snakemake.input, source=snakemake.params.source):
    record = pack(
        Path(snakemake.params.source),
        snakemake.wildcards.release,
        snakemake.params.model,
        snakemake.params.scheme,
        Path(snakemake.input.blocks[0]).parent,
        Path(snakemake.output.config).parent,
        Path(snakemake.output.record),
        snakemake.params.mtp,
        read_keep(snakemake.input.keep),
        snakemake.params.carried,
    )
    bits = record.bits_per_quantized_weight
    progress(
        f"{record.release}: {record.bytes / 1e6:.1f} MB in {record.blocks + 1} shards "
        f"(source {record.source_bytes / 1e6:.1f} MB)"
        + ("" if bits is None else f", {bits:.2f} bits a quantized weight")
    )

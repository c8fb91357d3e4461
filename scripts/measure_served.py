"""Serves a release and scores its answers to one benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.architecture import has_plain_experts
from requant.config import Sandbox, Served, Target
from requant.jobs import job
from requant.packed import PackedCheckpoint
from requant.records import PackRecord, read_json
from requant.served_benchmark import Subject, measure
from requant.served_copy import check_files, why_decoded

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log.job, snakemake.input, snakemake.resources.get("gpu", 0)):
    manifest, record = Path(snakemake.input.packed[0]), Path(snakemake.output.record)
    packed, made = manifest.parent / "model", read_json(manifest, PackRecord)
    target = Target.model_validate(snakemake.params.target)
    check_files(packed, made.files)
    checkpoint = PackedCheckpoint(packed)
    scheme = checkpoint.scheme
    plain_experts = has_plain_experts(checkpoint.places, made.blocks)
    reason = why_decoded(scheme.format, made.moe_blocks > 0, target, plain_experts)
    measure(
        Subject(snakemake.wildcards.release, packed, made.files, reason, scheme),
        snakemake.params.benchmark,
        snakemake.wildcards.task,
        Served.model_validate(snakemake.params.settings),
        snakemake.params.target_name,
        target,
        Path(snakemake.params.tasks) if snakemake.params.tasks else None,
        Path(snakemake.params.data) if snakemake.params.data else None,
        record.parent / f".{snakemake.wildcards.task}.served",
        Path(snakemake.log.engine),
        snakemake.threads,
        record,
        Path(snakemake.output.samples),
        Sandbox.model_validate(snakemake.params.sandbox),
    )

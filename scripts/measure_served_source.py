"""Serves a source model and scores its answers to one benchmark."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.config import Sandbox, Served, Target
from requant.jobs import job
from requant.records import SourceRecord, read_json
from requant.served_benchmark import Subject, measure

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log.job, snakemake.input, snakemake.resources.get("gpu", 0), source=snakemake.params.source):
    record = Path(snakemake.output.record)
    files = read_json(snakemake.input.record, SourceRecord).files
    measure(
        Subject(snakemake.wildcards.model, Path(snakemake.params.source), files),
        snakemake.wildcards.benchmark,
        snakemake.wildcards.task,
        Served.model_validate(snakemake.params.settings),
        snakemake.wildcards.target,
        Target.model_validate(snakemake.params.target),
        Path(snakemake.params.tasks) if snakemake.params.tasks else None,
        Path(snakemake.params.data) if snakemake.params.data else None,
        record.parent / f".{snakemake.wildcards.task}.served",
        Path(snakemake.log.engine),
        snakemake.threads,
        record,
        Path(snakemake.output.samples),
        Sandbox.model_validate(snakemake.params.sandbox),
    )

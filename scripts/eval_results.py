"""Scores of one release as the hub reads them."""

from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.config import HubTask
    from requant.eval_results import eval_results
    from requant.records import BenchmarkRecord, read_json, write_text

    tasks = {name: HubTask.model_validate(task) for name, task in snakemake.params.tasks.items()}
    write_text(snakemake.output.results, eval_results(read_json(snakemake.input.record, BenchmarkRecord), tasks))

"""Writes results/{release}/plan.json of every release of the build and shows them: `snakemake --cores 1 plan`."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.config import Calibration, Prune, Release, Target
from requant.jobs import job, progress
from requant.plan import Subject, plan_build

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    subjects = [
        Subject(
            found["release"],
            Release.model_validate(found["settings"]),
            Calibration.model_validate(found["calibration"]),
            Target.model_validate(found["target"]),
            found["source"],
            found["lock"],
            found["repository"],
            found["pruned_from"],
            found["prune"] and Prune.model_validate(found["prune"]),
            found["observed"] and Calibration.model_validate(found["observed"]),
            found["device"],
            tuple(found["publishing"]),
            found["served"],
            found["keep_hidden_states"],
        )
        for found in snakemake.params.subjects
    ]
    records, table = plan_build(subjects, snakemake.params.rates, Path("results"), snakemake.params.files)
    progress(f"releases planned: {len(records)}, nothing built: results/*/plan.json\n{table}")

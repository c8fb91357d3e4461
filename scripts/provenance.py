"""provenance.json of one release: what it was made from and by, as an in-toto Statement."""

from pathlib import Path
from typing import TYPE_CHECKING

from requant.jobs import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job(snakemake.log[0]):
    from requant.environment import installed, machine
    from requant.provenance import (
        code_digests,
        collect,
        dependencies,
        git_commit,
        published_digests,
        read_blocks,
        statement,
        task_digests,
        write_provenance,
    )
    from requant.records import CalibrationRecord, PackRecord, SourceRecord, read_json, read_keep

    given, asked, root = snakemake.input, snakemake.params, Path(snakemake.scriptdir).parent
    source, pack = read_json(given.source, SourceRecord), read_json(given.pack, PackRecord)
    calibration = read_json(given.calibration, CalibrationRecord)
    observed = [read_json(path, CalibrationRecord) for path in given.observed]
    blocks = read_blocks(given.blocks, pack.scheme)
    found = collect(
        source,
        calibration,
        blocks,
        pack,
        asked.base_model,
        git_commit(root),
        machine(),
        read_keep(given.keep),
        *observed,
    )
    tasks = task_digests(asked.benchmark, asked.task_folder, given.tasks)
    tasks |= published_digests(asked.benchmark, asked.published, given.published)
    resolved = dependencies(source, [calibration, *observed], asked.config, tasks | code_digests(root))
    write_provenance(snakemake.output.provenance, statement(found, asked.config, resolved, blocks, installed()))

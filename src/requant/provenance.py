"""What a release was made from and by: the facts that its bytes depend on, and the hashes to check them by.

Nothing that a clock measured stands here: a rebuild of the same release gives the same provenance.json.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from requant import __version__
from requant.records import BlockRecord, CalibrationRecord, FileEntry, KeepList, PackRecord, Record, SourceRecord


class SourceProvenance(Record):
    model: str
    base_model: str | None = Field(description="hub name of the model; null if the config gives none")
    revision: str
    files: dict[str, FileEntry]


class CalibrationProvenance(Record):
    name: str
    tokenizer_sha256: str
    seqlen: int
    pack: str
    seed: int
    calibration_sha256: str = Field(description="of the int32 token tensor that blocks were tuned on")
    heldout_sha256: str = Field(description="of the int32 token tensor that quality was measured on")
    calibration_texts: dict[str, str] = Field(description="sha256 of each text file, by the text's name")
    heldout_texts: dict[str, str]


class PruningProvenance(Record):
    keep: KeepList
    calibration_sha256: str = Field(description="of the int32 token tensor that experts were observed on")


class TuningRun(Record):
    """What made some of the blocks. A build that was resumed elsewhere or after an update has several."""

    blocks: list[int]
    engine: str
    engine_version: str
    settings: dict[str, Any] = Field(description="every tuning setting, defaults spelled out")
    libraries: dict[str, str]
    threads: int
    device: str


class Provenance(Record):
    """results/{release}/model/provenance.json"""

    release: str
    scheme: str
    requant_version: str
    requant_commit: str | None = Field(description="git commit of requant; null outside a git checkout")
    source: SourceProvenance
    calibration: CalibrationProvenance
    pruning: PruningProvenance | None = Field(None, description="null for a model that is not pruned")
    tuning: list[TuningRun]
    seeds: list[int] = Field(description="seed of each block")
    files: dict[str, FileEntry] = Field(description="of the packed checkpoint, without README.md and this file")


def tuning_runs(blocks: Sequence[BlockRecord]) -> list[TuningRun]:
    """The blocks grouped by what made them, in the order of each group's first block."""
    runs: list[TuningRun] = []
    for block in blocks:
        run = TuningRun(
            blocks=[],
            engine=block.engine,
            engine_version=block.engine_version,
            settings=block.settings,
            libraries=block.libraries,
            threads=block.threads,
            device=block.device,
        )
        known = next((other for other in runs if other.model_copy(update={"blocks": []}) == run), None)
        if known is None:
            runs.append(run)
            known = run
        known.blocks.append(block.block)
    return runs


def git_commit(directory: str | Path) -> str | None:
    """The git commit of the checkout `directory`, marked -dirty if files were changed since; None if it is none."""
    if not (Path(directory) / ".git").exists():  # else an outer repository would answer
        return None
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def collect(
    source: SourceRecord,
    calibration: CalibrationRecord,
    blocks: Sequence[BlockRecord],
    pack: PackRecord,
    base_model: str | None,
    commit: str | None,
    keep: KeepList | None = None,
    observed: CalibrationRecord | None = None,
) -> Provenance:
    """The provenance of the release that these records describe; of a pruned model with its `keep` list and the tokens
    that this was made from."""
    return Provenance(
        release=pack.release,
        scheme=pack.scheme,
        requant_version=__version__,
        requant_commit=commit,
        source=SourceProvenance(
            model=source.model, base_model=base_model, revision=source.revision, files=source.files
        ),
        calibration=CalibrationProvenance(
            name=calibration.calibration,
            tokenizer_sha256=calibration.tokenizer_sha256,
            seqlen=calibration.seqlen,
            pack=calibration.pack,
            seed=calibration.seed,
            calibration_sha256=calibration.calibration_set.sha256,
            heldout_sha256=calibration.heldout_set.sha256,
            calibration_texts={text.name: text.sha256 for text in calibration.calibration_set.sources},
            heldout_texts={text.name: text.sha256 for text in calibration.heldout_set.sources},
        ),
        pruning=keep and PruningProvenance(keep=keep, calibration_sha256=observed.calibration_set.sha256),
        tuning=tuning_runs(blocks),
        seeds=[block.seed for block in blocks],
        files=pack.files,
    )

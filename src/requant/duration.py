"""Hours of a build: measured where there are records of such jobs, else from a model of operations and bytes.

The model: an iteration of tuning takes a time of its own, one for each operation of its matrix products and one for
each weight that is rounded; a pass of a block takes its operations. The rates are fitted to measured blocks by
benchmarks/rates.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from requant.config import Calibration, Tuning
from requant.errors import RequantError
from requant.records import (
    BenchmarkRecord,
    BlockRecord,
    CopiedBlock,
    DeployRecord,
    EvaluateRecord,
    LoadTestRecord,
    PackRecord,
    Record,
    RoutingRecord,
    StagePlan,
    VerifyRecord,
    read_json,
)
from requant.schemes import Scheme
from requant.shapes import BlockShapes, ModelShapes, pass_work

if TYPE_CHECKING:
    from requant.structure import Kind, Structure

# Passes over all samples that a quantize job makes beside tuning: input ranges, and the output as shipped, which blocks
# that are tuned on the source's hidden states do without.
PASSES = {"quantized": 2, "reference": 1}
# A backward pass takes twice the products of a forward one.
WITH_BACKWARD = 3
STAGES = {
    "load_test": LoadTestRecord,
    "pack": PackRecord,
    "verify": VerifyRecord,
    "evaluate": EvaluateRecord,
    "deploy": DeployRecord,
    "benchmark": BenchmarkRecord,
}


@dataclass(frozen=True)
class Rates:
    """Times of one machine: seconds an iteration, an operation of its products, and a weight, fitted to `source`.

    pass_operation: seconds an operation of a pass takes on `pass_machine`. start: seconds of a job that are neither
    iterations nor passes. coordination: seconds of the graph for a job; job_start: of a process before its job begins.
    """

    machine: str
    source: str
    iteration: float
    operation: float
    weight: float
    pass_operation: float
    pass_machine: str
    start: float
    coordination: float
    job_start: float

    def tuning_seconds(self, work: float, weights: int, iterations: int) -> float:
        """Seconds of `iterations` whose forward pass takes `work` operations, over `weights` weights."""
        return iterations * (self.iteration + WITH_BACKWARD * work * self.operation + weights * self.weight)


def read_rates(path: str | Path, device: str) -> Rates:
    """The rates of jobs on `device`, from the file that benchmarks/rates.py writes."""
    try:
        return Rates(**json.loads(Path(path).read_text(encoding="utf-8"))["cpu" if device == "cpu" else "gpu"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequantError(f"{path}: no rates ({error}); expected what `python benchmarks/rates.py` writes") from None


@dataclass(frozen=True)
class BlockSeconds:
    """Seconds of a stage's job on each block, in order, and what they follow from; None if they are not known."""

    stage: str
    blocks: list[float] | None
    basis: str

    def plan(self, jobs: int) -> StagePlan:
        """The stage as a plan has it, of so many jobs one after another."""
        seconds = None if self.blocks is None else sum(self.blocks)
        return StagePlan(stage=self.stage, jobs=jobs, seconds=seconds, basis=self.basis)


def other_stages(release: str, results: Path, load_test: bool) -> list[StagePlan]:
    """The stages of a release beside its blocks, with the seconds of their last run.

    results: the build's directory of results. load_test: whether the release has one.
    """
    found = []
    for stage, kind in STAGES.items():
        if stage == "load_test" and not load_test:
            continue
        record = finished(results / release / f"{stage}.json", kind)
        basis = "measured: its last run" if record else "not known: no run of it was measured"
        found.append(StagePlan(stage=stage, jobs=1, seconds=record.seconds if record else None, basis=basis))
    return found


def finished(path: Path, kind: type[Record]) -> Record | None:
    """The record in `path`; None if there is none, or one of another version."""
    try:
        return read_json(path, kind)
    except RequantError:
        return None


def copy_seconds(structure: Structure, blocks: Path) -> BlockSeconds:
    """Of the jobs that copy a block: the records in `blocks` where all are there."""
    records = [finished(blocks / f"{block}.json", CopiedBlock) for block in range(structure.blocks)]
    if all(records):
        return BlockSeconds("copy_block", [record.seconds for record in records], "measured: their last run")
    basis = "not known: as long as the disk takes to read the source and to write the release"
    return BlockSeconds("copy_block", None, basis)


def quantize_seconds(
    structure: Structure,
    calibration: Calibration,
    scheme: Scheme,
    tuning: Tuning,
    keep: list[str],
    rates: Rates,
    results: Path,
) -> BlockSeconds:
    """Of quantize jobs.

    A kind of block that was tuned before with the same weights, settings, tokens and threads, whatever the release,
    takes the mean of those jobs. The model is of the engine `fused`.
    """
    traces = block_traces(results, scheme, tuning, calibration)
    seconds, passes, measured, jobs = [0.0] * structure.blocks, 0.0, 0, 0
    for kind in structure.kinds:
        linears, _ = kind.linears(kind.blocks[0], scheme, keep)
        key = shape_key({f"{linear}.weight": kind_shape(kind, linear) for linear in linears})
        blocks = len(kind.blocks)
        if key in traces:
            measured, jobs = measured + blocks, jobs + len(traces[key])
            each = mean(traces[key])
        elif tuning.iters and tuning.engine != "fused":
            return BlockSeconds("quantize", None, f"not known: no such job of engine {tuning.engine} was measured")
        else:
            tuned, passed = modelled_seconds(structure, kind, calibration, tuning, rates)
            passes += blocks * passed
            each = tuned + passed
        for block in kind.blocks:
            seconds[block] = each
    if measured == structure.blocks:
        return BlockSeconds("quantize", seconds, f"measured: {jobs} such jobs in results/")
    share = f"{measured} of {structure.blocks} blocks measured; " if measured else ""
    basis = (
        f"model: {share}tuning on {rates.machine} ({rates.source}); {100 * passes / sum(seconds):.0f} % of it passes "
        f"on {rates.pass_machine}; reading and writing files not counted"
    )
    return BlockSeconds("quantize", seconds, basis)


def kind_shape(kind: Kind, linear: str) -> tuple[int, int]:
    """Shape of the Linear of that whole name in blocks of that kind."""
    return kind.linear_shapes[linear.split(".", 3)[3]]


def shape_key(quantized: dict[str, list[int] | tuple[int, ...]]) -> tuple:
    """What blocks whose jobs take as long have in common: the names and shapes of quantized weights, less the block's
    number."""
    return tuple(sorted((name.split(".", 3)[3], tuple(shape)) for name, shape in quantized.items()))


def block_traces(results: Path, scheme: Scheme, tuning: Tuning, calibration: Calibration) -> dict[tuple, list[float]]:
    """Seconds of finished quantize jobs of any release with these settings, by `shape_key`.

    Samples that are padded have fewer tokens than they have room for, which only their making tells.
    """
    from requant.tuned import settings  # which imports torch

    wanted = settings(scheme, tuning) | {"seed": tuning.seed}
    most, padded = calibration.nsamples * calibration.seqlen, calibration.pack == "pad"
    found: dict[tuple, list[float]] = {}
    for path in sorted(results.glob("*/blocks/*.json")):
        record = finished(path, BlockRecord)
        if (
            record is None
            or record.scheme != scheme.name
            or not (record.tokens == most or padded and record.tokens < most)
        ):
            continue
        engine = tuning.engine if tuning.iters else "plain rounding"
        if (record.engine, record.threads, record.device) != (engine, tuning.threads, tuning.device):
            continue
        if {**record.settings, "seed": tuning.seed} == wanted:
            found.setdefault(shape_key(record.quantized), []).append(record.seconds)
    return found


def modelled_seconds(
    structure: Structure | ModelShapes, kind: Kind | BlockShapes, calibration: Calibration, tuning: Tuning, rates: Rates
) -> tuple[float, float]:
    """Seconds of a quantize job by the model: (its iterations and the choice among its results, its passes)."""
    length = calibration.seqlen
    weights = sum(rows * columns for rows, columns in kind.linear_shapes.values())
    batch = min(tuning.batch_size, calibration.nsamples)
    work = pass_work(kind, structure.config, batch * length, length)
    iterations = tuning.iters * tuning.gradient_accumulate_steps
    seconds = rates.tuning_seconds(work, weights, iterations)
    everything = pass_work(kind, structure.config, calibration.nsamples * length, length)
    if tuning.iters and tuning.judges_by_samples:
        batches = -(-calibration.nsamples // batch)
        seconds += 3 * (batches * (rates.iteration + weights * rates.weight) + everything * rates.operation)
    return rates.start + seconds, PASSES[tuning.inputs] * everything * rates.pass_operation


def reference_seconds(
    structure: Structure, calibration: Calibration, rates: Rates, chain: Path, stage: str = "reference"
) -> BlockSeconds:
    """Of the jobs of a reference chain: the records in its folder `chain` where all are there, else the model.

    stage: what the plan calls them; `observe` where experts are chosen by them.
    """
    records = [finished(chain / f"routing_{block}.json", RoutingRecord) for block in range(structure.blocks)]
    if all(records):
        return BlockSeconds(stage, [record.seconds for record in records], "measured: their last run")
    tokens = (calibration.nsamples + calibration.heldout.nsamples) * calibration.seqlen
    seconds = [0.0] * structure.blocks
    for kind in structure.kinds:
        work = pass_work(kind, structure.config, tokens, calibration.seqlen)
        for block in kind.blocks:
            seconds[block] = work * rates.pass_operation
    basis = f"model: on {rates.pass_machine}; reading and writing files not counted"
    return BlockSeconds(stage, seconds, basis)

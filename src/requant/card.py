"""The model card: the records of a build, put into words and tables.

Every number comes from a field of a record or is worked out from such fields by a function here; templates
hold words. A record or field that is absent, or two records that contradict each other, is an error.
"""

import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from requant import card_serving, wording
from requant.errors import RequantError
from requant.evidence import METHOD_TEXT, OBSERVE_TEXT, Evidence, kept_shares, load_evidence, rival_table
from requant.paired import Z95
from requant.provenance import Provenance
from requant.records import (
    BenchmarkRecord,
    BlockRecord,
    CalibrationRecord,
    CopiedBlock,
    DeployRecord,
    EvaluateRecord,
    KeepList,
    LoadTestRecord,
    ModelQuality,
    PackRecord,
    RoutingRecord,
    Score,
    ServedBenchmarkRecord,
    SourceRecord,
    ThroughputRecord,
    VerifyRecord,
    read_json,
)
from requant.schemes import SCHEMES

WORST_TENSORS = 5
FOLDED_ROWS = 16  # longer tables are folded, so that the card stays readable for a model of 61 blocks


@dataclass(frozen=True)
class RecordPaths:
    """Where the records of a release lie, relative to the directory of the build."""

    source: str
    calibration: str
    routing: list[str]
    blocks: list[str]
    pack: str
    verify: str
    evaluate: str
    deploy: str
    throughput: str
    load_test: str
    served: list[str]
    benchmark: str
    source_benchmark: str


@dataclass(frozen=True)
class ReleaseFacts:
    """All that was recorded of one release; its records agree with each other."""

    name: str
    base_model: str | None
    license: str | None
    configfiles: list[str]
    paths: RecordPaths
    source: SourceRecord
    calibration: CalibrationRecord
    routing: list[RoutingRecord]
    blocks: list[BlockRecord]
    copied: list[CopiedBlock]
    pack: PackRecord
    verify: VerifyRecord
    evaluate: EvaluateRecord
    deploy: DeployRecord
    throughput: ThroughputRecord
    load_test: LoadTestRecord | None
    served: list[ServedBenchmarkRecord]
    benchmark: BenchmarkRecord
    source_benchmark: BenchmarkRecord
    pruning: Evidence | None = None

    @property
    def quantized(self) -> bool:
        """Whether its scheme quantizes: then it has `blocks`, else `copied` ones."""
        return SCHEMES[self.pack.scheme].quantizes


@dataclass(frozen=True)
class Figures:
    """Pictures, as paths from the card's own directory. `experts` is absent where no model has experts, `loss` and
    `hidden_states` where no release is quantized; `saliency` has one for each release of a pruned model."""

    loss: str | None = None
    hidden_states: str | None = None
    experts: str | None = None
    saliency: dict[str, str] = field(default_factory=dict)


def record_paths(
    release: str, model: str, source: str, calibration: str, blocks: int, benchmark: str, served: Sequence[str]
) -> RecordPaths:
    """The records of a release of `blocks` blocks; `source` has the files of `model`, `served` are benchmarks."""
    reference, made = f"results/reference/{model}", f"results/{release}"
    return RecordPaths(
        source=f"results/source/{source}/source.json",
        calibration=f"results/calibration/{source}/{calibration}/calibration.json",
        routing=[f"{reference}/{calibration}/routing_{block}.json" for block in range(blocks)],
        blocks=[f"{made}/blocks/{block}.json" for block in range(blocks)],
        pack=f"{made}/pack.json",
        verify=f"{made}/verify.json",
        evaluate=f"{made}/evaluate.json",
        deploy=f"{made}/deploy.json",
        throughput=f"{made}/throughput.json",
        load_test=f"{made}/load_test.json",
        served=[f"{made}/served_benchmarks/{name}.json" for name in served],
        benchmark=f"{made}/benchmark.json",
        source_benchmark=f"{reference}/benchmark/{benchmark}.json",
    )


def load_release(
    root: Path,
    release: str,
    model: str,
    calibration: str,
    blocks: int,
    benchmark: str,
    base_model: str | None = None,
    license: str | None = None,
    configfiles: Sequence[str] = (),
    source: str | None = None,
    compare: Sequence[str] | None = None,
    served: Sequence[str] = (),
    load_test: bool = False,
) -> ReleaseFacts:
    """Reads the records of one release of `model` from the build in `root`.

    `source` is the model that `model` is pruned from, itself if it is not pruned; `compare` are the models that a
    pruned one is held against.
    `served` are the benchmarks of the served model; with `load_test` the first blocks were served by themselves.
    `blocks` counts decoder blocks; `base_model` is the model's hub name, `license` the hub's name of the
    licence of its weights; `configfiles` are those that --configfile gave to the build. Raises RequantError
    naming the file if a record is absent, lacks a field or contradicts another.
    """
    paths = record_paths(release, model, source or model, calibration, blocks, benchmark, served)
    packed = read_json(root / paths.pack, PackRecord)
    quantized = SCHEMES[packed.scheme].quantizes
    facts = ReleaseFacts(
        name=release,
        base_model=base_model,
        license=license,
        configfiles=list(configfiles),
        paths=paths,
        source=read_json(root / paths.source, SourceRecord),
        calibration=read_json(root / paths.calibration, CalibrationRecord),
        routing=[read_json(root / path, RoutingRecord) for path in paths.routing],
        blocks=[read_json(root / path, BlockRecord) for path in paths.blocks if quantized],
        copied=[read_json(root / path, CopiedBlock) for path in paths.blocks if not quantized],
        pack=packed,
        verify=read_json(root / paths.verify, VerifyRecord),
        evaluate=read_json(root / paths.evaluate, EvaluateRecord),
        deploy=read_json(root / paths.deploy, DeployRecord),
        throughput=read_json(root / paths.throughput, ThroughputRecord),
        load_test=read_json(root / paths.load_test, LoadTestRecord) if load_test else None,
        served=[read_json(root / path, ServedBenchmarkRecord) for path in paths.served],
        benchmark=read_json(root / paths.benchmark, BenchmarkRecord),
        source_benchmark=read_json(root / paths.source_benchmark, BenchmarkRecord),
        pruning=None if compare is None else load_evidence(root, model, compare, blocks, benchmark),
    )
    _check_names(root, facts, model, source or model, calibration, benchmark)
    _check_numbers(root, facts)
    return facts


def _expect(path: Path, key: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise RequantError(f"{path}: {key}: {found!r}; expected {expected!r}; delete it to rebuild")


def _check_names(root: Path, facts: ReleaseFacts, model: str, source: str, calibration: str, benchmark: str) -> None:
    """Each record speaks of this release, and each block record of its own block."""
    paths = facts.paths
    _expect(root / paths.source, "model", facts.source.model, source)
    _expect(root / paths.calibration, "calibration", facts.calibration.calibration, calibration)
    for number, (path, routing) in enumerate(zip(paths.routing, facts.routing, strict=True)):
        _expect(root / path, "block", routing.block, number)
    for number, (path, block) in enumerate(zip(paths.blocks, facts.blocks or facts.copied, strict=True)):
        _expect(root / path, "release", block.release, facts.name)
        _expect(root / path, "block", block.block, number)
        _expect(root / path, "scheme", block.scheme, facts.pack.scheme)
    for path, block in zip(paths.blocks if facts.quantized else [], facts.blocks, strict=True):
        experts = facts.pack.routed_experts if block.kind == "moe" else 0
        _expect(root / path, "tokens_per_expert: entries", len(block.tokens_per_expert), experts)
        if not block.libraries:
            raise RequantError(f"{root / path}: libraries: empty; expected versions; delete it to rebuild")
    for kind in ("pack", "verify", "evaluate", "deploy", "throughput", *(["load_test"] if facts.load_test else [])):
        _expect(root / getattr(paths, kind), "release", getattr(facts, kind).release, facts.name)
    for path, record in zip(paths.served, facts.served, strict=True):
        _expect(root / path, "release", record.release, facts.name)
        _expect(root / path, "measured.subject", record.measured.subject, facts.name)
    _expect(root / paths.verify, "scheme", facts.verify.scheme, facts.pack.scheme)
    _expect(root / paths.pack, "model", facts.pack.model, model)
    for path, record, subject in (
        (paths.benchmark, facts.benchmark, facts.name),
        (paths.source_benchmark, facts.source_benchmark, model),
    ):
        _expect(root / path, "subject", record.subject, subject)
        _expect(root / path, "benchmark", record.benchmark, benchmark)


def _check_numbers(root: Path, facts: ReleaseFacts) -> None:
    """Numbers that two records state are the same, and those that the card compares are all there."""
    paths = facts.paths
    _expect(root / paths.pack, "blocks", facts.pack.blocks, len(paths.blocks))
    heldout = facts.calibration.heldout_set.sha256
    _expect(root / paths.evaluate, "heldout_sha256", facts.evaluate.heldout_sha256, heldout)
    _expect(root / paths.evaluate, "block_mse: entries", len(facts.evaluate.block_mse), len(paths.blocks))
    measured = ("rounded", "quantized") if facts.quantized else ("quantized",)
    for number, errors in enumerate(facts.evaluate.block_mse):
        _need(root / paths.evaluate, f"block_mse.{number}", errors, measured)
    if facts.quantized:
        _need(root / paths.verify, "limits", facts.verify.limits, ("cosine", "relative_mae"))
        _need(root / paths.evaluate, "rounded", ["rounded"] if facts.evaluate.rounded else [], ["rounded"])
    elif facts.pack.multi_token_prediction != "dropped":
        _expect(root / paths.verify, "unchanged", facts.verify.unchanged, facts.verify.source_tensors)
    quantized = sum(len(block.quantized) for block in facts.blocks)
    _expect(root / paths.verify, "tensors: entries", len(facts.verify.tensors), quantized)
    scores = facts.source_benchmark.scores
    if facts.benchmark.source_scores != scores:
        raise RequantError(
            f"{root / paths.benchmark}: source_scores: not the scores in {root / paths.source_benchmark}; "
            "expected the same; delete it to rebuild"
        )
    keys = [score_key(score) for score in scores]
    _expect(root / paths.benchmark, "scores", sorted(map(score_key, facts.benchmark.scores)), sorted(keys))
    _need(root / paths.benchmark, "recovery", facts.benchmark.recovery or {}, keys)


def _need(path: Path, key: str, found: Iterable[str], needed: Iterable[str]) -> None:
    absent = [name for name in needed if name not in found]
    if absent:
        raise RequantError(f"{path}: {key}.{absent[0]}: not there; expected a value; delete it to rebuild")


# What the card says beyond single fields


def linear_pattern(name: str) -> str:
    """model.layers.3.mlp.experts.7.up_proj.weight -> model.layers.*.mlp.experts.*.up_proj"""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name.removesuffix(".weight"))


def linear_table(releases: Sequence[ReleaseFacts]) -> list[list[str]]:
    """What became of each kind of Linear, the same place in every block or expert, a row each.

    A row has the pattern of the names, then for each release how many of which shape [out, in] are quantized,
    and how many stay in BF16 and why.
    """
    treated = [_treated(facts) for facts in releases]
    patterns = dict.fromkeys(pattern for found in treated for pattern in found)
    return [
        [f"`{pattern}`", *("; ".join(found.get(pattern, ["not there"])) for found in treated)] for pattern in patterns
    ]


def _treated(facts: ReleaseFacts) -> dict[str, list[str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for block in facts.blocks:
        for name, shape in block.quantized.items():
            tuned = ": rounded, not tuned" if name in block.never_tuned else ""
            counts[linear_pattern(name), f"in {block.scheme}, {' × '.join(map(str, shape))}{tuned}"] += 1
        for name, reason in block.kept.items():
            counts[linear_pattern(name), f"in BF16: {reason}"] += 1
    treated: dict[str, list[str]] = {}
    for (pattern, fate), count in counts.items():
        treated.setdefault(pattern, []).append(f"{wording.number(count)} {fate}")
    return treated


def tuning_table(provenance: Sequence[Provenance]) -> list[list[str]]:
    """The settings of all tuning runs side by side: a head with their names, then a row for each setting."""
    columns = []
    for origin in provenance:
        for run in origin.tuning:
            part = f", blocks {wording.ranges(run.blocks)}" if len(origin.tuning) > 1 else ""
            made_by = {
                "engine": f"{run.engine} {run.engine_version}",
                "device": run.device,
                "threads": run.threads,
            }
            columns.append((f"`{origin.release}`{part}", made_by | wording.flat(run.settings)))
    keys = dict.fromkeys(key for _, values in columns for key in values)
    rows = [
        [
            f"`{key}`",
            *(wording.setting(values[key]) if key in values else "not set here" for _, values in columns),
        ]
        for key in keys
    ]
    return [["Setting", *(label for label, _ in columns)], *rows]


def lowered(block: BlockRecord) -> float | None:
    """The part of plain rounding's loss that tuning removed; None if there was no loss to lower."""
    rounded, kept = block.compared
    return 1 - kept / rounded if rounded > 0 else None


def tuned(facts: ReleaseFacts) -> bool:
    """Whether any block was tuned at all: `iters: 0` is plain rounding."""
    return any(block.iterations for block in facts.blocks)


class TuningEffect(NamedTuple):
    """Plain rounding against the release: KL divergence (nats a token) and what became of it.

    stderr: of the difference; None where one sample was measured. clear: whether 95 % of chance leave its sign.
    """

    rounded: float
    tuned: float
    change: float
    stderr: float | None
    clear: bool


def tuning_effect(facts: ReleaseFacts) -> TuningEffect:
    """What tuning did to the KL divergence.

    The two are measured on the same tokens. A record without the standard error of their difference has that of
    independent samples, an upper bound.
    """
    rounded, quantized = facts.evaluate.rounded, facts.evaluate.quantized
    difference = quantized.kl_divergence - rounded.kl_divergence
    change = difference / rounded.kl_divergence if rounded.kl_divergence > 0 else 0.0
    errors = [rounded.kl_divergence_stderr, quantized.kl_divergence_stderr]
    if facts.evaluate.kl_change is not None:
        error = facts.evaluate.kl_change.stderr
    else:
        error = None if None in errors else math.hypot(*errors)
    clear = error is not None and abs(difference) > Z95 * error
    return TuningEffect(rounded.kl_divergence, quantized.kl_divergence, change, error, clear)


class ExpertLoad(NamedTuple):
    """How the calibration tokens of one block spread over its routed experts."""

    block: int
    tokens: int
    experts: int
    least: int
    median: float
    most: int
    never_reached: list[int]


def expert_loads(facts: ReleaseFacts) -> list[ExpertLoad]:
    """The spread of tokens over experts, for each MoE block; in a release in BF16 it is the source model's."""
    return [
        ExpertLoad(
            block.block,
            block.tokens,
            len(block.tokens_per_expert),
            min(block.tokens_per_expert),
            statistics.median(block.tokens_per_expert),
            max(block.tokens_per_expert),
            block.never_reached,
        )
        for block in facts.blocks or facts.routing
        if block.kind == "moe"
    ]


def worst_tensors(facts: ReleaseFacts) -> list[tuple[str, Any]]:
    """(name, TensorCheck) of the tensors with the lowest cosine similarity, lowest first."""
    return sorted(facts.verify.tensors.items(), key=lambda item: (item[1].cosine, item[0]))[:WORST_TENSORS]


def score_key(score: Score) -> str:
    """The name of a score in BenchmarkRecord.recovery."""
    return f"{score.task}/{score.metric}"


def score_table(releases: Sequence[ReleaseFacts]) -> list[list[str]]:
    """Scores of releases of one model and benchmark, a row each: task, metric, samples, source, releases."""
    own = [{score_key(score): score for score in facts.benchmark.scores} for facts in releases]
    rows = []
    for score in releases[0].source_benchmark.scores:
        key = score_key(score)
        better = "higher" if score.higher_is_better else "lower"
        row = [score.task, f"{score.metric} ({better} is better)", wording.number(score.samples)]
        row.append(wording.with_error(score.value, score.stderr))
        for facts, scores in zip(releases, own, strict=True):
            recovery = facts.benchmark.recovery[key]
            kept = "the source scored 0: no recovery" if recovery is None else wording.percent(recovery)
            row.append(f"{wording.with_error(scores[key].value, scores[key].stderr)} ({kept})")
        rows.append(row)
    return rows


def benchmark_groups(releases: Sequence[ReleaseFacts]) -> list[list[ReleaseFacts]]:
    """The releases that were measured against the same scores of a source, together."""
    groups: dict[str, list[ReleaseFacts]] = {}
    for facts in releases:
        groups.setdefault(facts.paths.source_benchmark, []).append(facts)
    return list(groups.values())


def recoveries(facts: ReleaseFacts) -> list[float]:
    """The recoveries that are numbers, lowest first."""
    return sorted(value for value in facts.benchmark.recovery.values() if value is not None)


def trial_rows(facts: ReleaseFacts) -> int | None:
    """How many rows of each task were scored, if the benchmark was a trial on the first of them; else None."""
    return facts.source_benchmark.settings["limit"]


class Stage(NamedTuple):
    """The time of the jobs of one stage. `path` tells shared stages of several releases apart."""

    label: str
    jobs: int
    seconds: float
    path: str


def _serving_stages(facts: ReleaseFacts) -> list[Stage]:
    name, paths = facts.name, facts.paths
    stages = [Stage(f"Deploy `{name}`", 1, facts.deploy.seconds, paths.deploy)]
    if facts.load_test is not None:
        stages.insert(0, Stage(f"Load test of `{name}`", 1, facts.load_test.seconds, paths.load_test))
    if facts.served:
        seconds = math.fsum(record.measured.seconds for record in facts.served)
        stages.append(
            Stage(f"Benchmarks of `{name}` as served", len(facts.served), seconds, wording.files(paths.served))
        )
    return stages


def wall_time(releases: Sequence[ReleaseFacts]) -> list[Stage]:
    """The stages that made `releases`, those that they share counted once."""
    stages: list[Stage] = []
    for facts in releases:
        model, paths = facts.pack.model, facts.paths
        stages += [
            Stage(
                f"Check the files of `{facts.source.model}`",
                len(facts.source.files),
                facts.source.seconds,
                paths.source,
            ),
            Stage(
                f"Tokens of `{facts.source.model}` and `{facts.calibration.calibration}`",
                1,
                facts.calibration.seconds,
                paths.calibration,
            ),
            Stage(
                f"Reference chain of `{model}` over `{facts.calibration.calibration}`",
                len(facts.routing),
                math.fsum(record.seconds for record in facts.routing),
                wording.files(paths.routing),
            ),
            Stage(f"Benchmark `{model}`", 1, facts.source_benchmark.seconds, paths.source_benchmark),
            *_pruning_stages(facts.pruning),
        ]
    for facts in releases:
        name, paths = facts.name, facts.paths
        seconds = math.fsum(block.seconds for block in (*facts.blocks, *facts.copied))
        stages += [
            Stage(
                f"Quantize `{name}`" if facts.quantized else f"Copy the blocks of `{name}`",
                len(paths.blocks),
                seconds,
                wording.files(paths.blocks),
            ),
            Stage(f"Pack `{name}`", 1, facts.pack.seconds, paths.pack),
            Stage(f"Verify `{name}`", 1, facts.verify.seconds, paths.verify),
            Stage(f"Evaluate `{name}`", 1, facts.evaluate.seconds, paths.evaluate),
            *(
                [Stage(f"Load test of `{name}`", 1, facts.load_test.seconds, paths.load_test)]
                if facts.load_test
                else []
            ),
            *_serving_stages(facts),
            Stage(f"Benchmark `{name}`", 1, facts.benchmark.seconds, paths.benchmark),
        ]
    return list({stage.path: stage for stage in stages}.values())


def _pruning_stages(pruning: Evidence | None) -> list[Stage]:
    """What a pruned model took: the original's tokens, chain and scores, and what was measured of its rivals."""
    if pruning is None:
        return []
    source, tokens, paths = pruning.keep.source, pruning.keep.calibration, pruning.paths
    chain = math.fsum(record.seconds for record in pruning.routing)
    stages = [
        Stage(f"Tokens of `{source}` and `{tokens}`", 1, pruning.calibration.seconds, paths.calibration),
        Stage(
            f"Reference chain of `{source}` over `{tokens}`", len(pruning.routing), chain, wording.files(paths.routing)
        ),
    ]
    for path, record in zip(paths.evaluations, pruning.evaluations, strict=True):
        stages.append(Stage(f"Hold `{record.model}` against `{source}`", 1, record.seconds, path))
    for path, rival in zip(paths.benchmarks, pruning.rivals, strict=True):
        stages.append(Stage(f"Benchmark `{rival.model}`", 1, rival.benchmark.seconds, path))
    return stages


def peak_memory(releases: Sequence[ReleaseFacts]) -> int:
    """Bytes: the largest resident memory of any job that recorded its own."""
    return max(
        record.peak_memory_bytes
        for facts in releases
        for record in (
            *facts.routing,
            *facts.blocks,
            *facts.copied,
            facts.evaluate,
            facts.benchmark,
            facts.source_benchmark,
            *(facts.pruning.evaluations if facts.pruning else ()),
            *(facts.pruning.routing if facts.pruning else ()),
        )
    )


def calibrations(releases: Sequence[ReleaseFacts]) -> list[tuple[CalibrationRecord, str]]:
    """The token sets of `releases` and their files, each once."""
    found = {facts.paths.calibration: facts.calibration for facts in releases}
    found |= {facts.pruning.paths.calibration: facts.pruning.calibration for facts in releases if facts.pruning}
    return [(record, path) for path, record in found.items()]


def routing_sets(releases: Sequence[ReleaseFacts]) -> dict[str, list[RoutingRecord]]:
    """The routing of each quantized model with experts over each token set, by a name for a picture."""
    found = {facts.paths.routing[0]: facts for facts in releases if facts.source.moe_blocks}
    return {
        f"{facts.pack.model} over the tokens {facts.calibration.calibration}": facts.routing for facts in found.values()
    }


def sources(releases: Sequence[ReleaseFacts]) -> list[ReleaseFacts]:
    """One release of each source model."""
    return list({facts.paths.source: facts for facts in reversed(releases)}.values())[::-1]


def pruned_models(releases: Sequence[ReleaseFacts]) -> list[ReleaseFacts]:
    """One release of each pruned model."""
    return list({facts.pack.model: facts for facts in reversed(releases) if facts.pruning}.values())[::-1]


def variant_table(releases: Sequence[ReleaseFacts]) -> list[list[str]]:
    """Originals and releases, a row each after the head: what they are, and their quality against the original.

    Of each task the first score is given, if all releases were measured on one benchmark.
    """
    shared = len({facts.benchmark.benchmark for facts in releases}) == 1
    first_of_task = {score.task: score for score in reversed(releases[0].source_benchmark.scores)}
    keys = [score_key(first_of_task[task]) for task in reversed(first_of_task)] if shared else []
    head = ["Model", "Format", "Experts a block", "Parameters", "Size", "KL, nats a token", "Top-1", "Perplexity"]
    rows = [[*head, *map(wording.cell, keys)]]
    for first in sources(releases):
        siblings = [facts for facts in releases if facts.paths.source == first.paths.source]
        rows += [_original_row(first, keys), *(_release_row(facts, keys) for facts in siblings)]
    return rows


def _original_row(facts: ReleaseFacts, keys: list[str]) -> list[str]:
    source, scores = facts.source, facts.pruning.rivals[0].benchmark if facts.pruning else facts.source_benchmark
    counts = _counts(source.routed_experts, source.parameters, facts.pack.source_bytes)
    quality = facts.evaluate.original or facts.evaluate.source
    name, stored = f"`{source.model}`, the original", " and ".join(source.dtypes)
    return [name, stored, *counts, "0 (the reference)", *_agreement(quality), *_scores(scores, keys)]


def _release_row(facts: ReleaseFacts, keys: list[str]) -> list[str]:
    pack, quality = facts.pack, facts.evaluate.against_original or facts.evaluate.quantized
    counts = _counts(pack.routed_experts, pack.parameters, pack.bytes)
    divergence = wording.with_error(quality.kl_divergence, quality.kl_divergence_stderr)
    return [
        f"`{facts.name}`", pack.scheme, *counts, divergence, *_agreement(quality), *_scores(facts.benchmark, keys)
    ]  # fmt: skip


def _counts(experts: int, parameters: int, size: int) -> list[str]:
    return [wording.number(experts), wording.short(parameters), wording.size(size)]


def _agreement(quality: ModelQuality) -> list[str]:
    return [wording.percent(quality.top1_agreement), wording.figure(quality.perplexity)]


def _scores(record: BenchmarkRecord, keys: list[str]) -> list[str]:
    found = {score_key(score): score for score in record.scores}
    return [wording.with_error(found[key].value, found[key].stderr) for key in keys]


def method_text(keep: KeepList) -> str:
    """How the experts that go were chosen, in words."""
    return METHOD_TEXT[keep.method] + (f" (seed {keep.seed})" if keep.method == "random" else "")


def observe_text(keep: KeepList) -> str:
    """What the experts were observed on, in words."""
    return OBSERVE_TEXT[keep.observe]


def rebuild_command(facts: ReleaseFacts) -> str:
    """What makes the files of a release again; --configfile comes last, since it takes all words after it."""
    words = ["snakemake", "--cores", "all", facts.paths.pack]
    return shlex.join([*words, *(["--configfile", *facts.configfiles] if facts.configfiles else [])])


def scheme_text(name: str) -> str:
    """A number format in words, from its definition."""
    scheme = SCHEMES[name]
    bits, group = scheme.weight_bits, scheme.group_size
    if not scheme.quantizes:
        return f"weights as {bits}-bit floats, nothing is quantized"
    if scheme.is_nvfp4:
        return (
            f"weights as {bits}-bit floats (e2m1) in groups of {group}, an FP8 (e4m3) scale for each group "
            f"and an FP32 scale for each tensor; activations in {scheme.activation_bits} bits in the same way"
        )
    return (
        f"weights as {bits}-bit symmetric integers in groups of {group}, a 16-bit scale for each group; "
        "activations in BF16"
    )


def weight_bits(facts: ReleaseFacts) -> str:
    """Bits that a quantized weight takes; of a release that has none, those of its format."""
    bits = facts.pack.bits_per_quantized_weight
    return f"{SCHEMES[facts.pack.scheme].weight_bits} (not quantized)" if bits is None else wording.figure(bits)


def made(releases: Sequence[ReleaseFacts]) -> str:
    """How many releases of which sort: 2 quantized releases and 1 release in BF16."""
    quantized = sum(facts.quantized for facts in releases)
    counts = {"quantized release": quantized, "release": len(releases) - quantized}
    texts = [wording.plural(count, noun) for noun, count in counts.items() if count]
    return wording.listing(texts) + (" in BF16" if quantized < len(releases) else "")


def stored_as(dtypes: dict[str, int]) -> str:
    """Parameters by the type that they are stored in, most first: F8_E4M3 680,571,043,840; BF16 3,918,786,560."""
    most_first = sorted(dtypes.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{dtype} {wording.number(count)}" for dtype, count in most_first)


READ_OTHERWISE = {
    "F8_E4M3": ", in BF16 what the source has in FP8",
    "F16": ", rounded once to BF16 what the source has in F16",
    "F32": ", rounded once to BF16 what the source has in F32",
}


def main_dtype(source: SourceRecord) -> str:
    """The dtype that a source's weights are in, and a release is not: FP8 where there is any, else the most of it."""
    if "F8_E4M3" in source.dtypes:
        return "F8_E4M3"
    return max(source.dtypes, key=source.dtypes.__getitem__, default="BF16")


def stored_otherwise(source: SourceRecord) -> str:
    """What is said of the size of a source that is not in BF16."""
    dtype = main_dtype(source)
    return f", stored in {dtype.replace('F8_E4M3', 'FP8')}," if dtype in READ_OTHERWISE else ""


def read_otherwise(source: SourceRecord) -> str:
    """What became of tensors that a release has otherwise than the source's files."""
    return READ_OTHERWISE.get(main_dtype(source), "")


def left_out_texts(tensors: dict[str, str]) -> list[str]:
    """Stored tensors that are no part of the model, the same place in every block together: how many, and why."""
    counts = Counter((linear_pattern(name), reason) for name, reason in tensors.items())
    return [f"{wording.number(count)} `{wording.cell(name)}` ({reason})" for (name, reason), count in counts.items()]


_FILTERS = (
    wording.number, wording.short, wording.size, wording.figure, wording.decibels, wording.scientific,
    wording.with_error,
    wording.decimals, wording.percent, wording.duration, wording.setting, wording.flat, wording.ranges,
    wording.files, wording.origin, wording.listing, wording.cell, wording.fence, wording.plural,
    scheme_text, weight_bits, made, stored_as, rebuild_command, linear_table, tuning_table, lowered,
    tuned, tuning_effect, pruned_models, kept_shares, rival_table, variant_table, method_text, observe_text,
    expert_loads, worst_tensors, score_table, benchmark_groups, recoveries, trial_rows, wall_time, peak_memory,
    calibrations, sources, stored_otherwise, read_otherwise, left_out_texts, *card_serving.FILTERS,
)  # fmt: skip


# Metadata and text


def metadata(releases: Sequence[ReleaseFacts]) -> ModelCardData:
    """The metadata that the hub reads from the head of a card. Scores are given for a card of one release, unless
    they are of a trial: the hub would show them as the release's.

    Raises RequantError if the hub could not take the name of a base model.
    """
    bases = list(dict.fromkeys(facts.base_model for facts in releases if facts.base_model))
    for facts in releases:
        try:
            validate_repo_id(facts.base_model)
        except HFValidationError as error:
            raise RequantError(
                f"config: models.{facts.source.model}.base_model: {facts.base_model!r}; "
                f"expected org/name as on the hub: {error}"
            ) from None
    licenses = {facts.license for facts in releases}
    one = releases[0] if len(releases) == 1 else None
    quantized = [facts for facts in releases if facts.quantized]
    formats = dict.fromkeys(SCHEMES[facts.pack.scheme].format for facts in quantized)
    tags = ["requant", *(["quantized", *formats, "compressed-tensors"] if quantized else [])]
    tags += dict.fromkeys(facts.pack.scheme.lower() for facts in releases)
    engines = dict.fromkeys(block.engine for facts in releases for block in facts.blocks)
    tags += [re.sub(r"[ _]", "-", engine) for engine in engines]
    methods = [facts.pruning.keep.method for facts in releases if facts.pruning]
    tags += dict.fromkeys(["pruned", *methods]) if methods else []
    tags += ["moe"] if any(facts.pack.moe_blocks for facts in releases) else []
    return ModelCardData(
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        base_model_relation="quantized" if bases and quantized else None,
        license=licenses.pop() if len(licenses) == 1 else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=one and one.name,
        eval_results=_eval_results(one) if one and one.benchmark.scores and trial_rows(one) is None else None,
    )


def _eval_results(facts: ReleaseFacts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_name=score.metric,
            metric_value=score.value,
        )
        for score in facts.benchmark.scores
    ]


def render_release_card(facts: ReleaseFacts, provenance: Provenance, figures: Figures) -> str:
    """The README.md of one release, the same at every rebuild: without times. Raises RequantError if the template asks
    for what no record holds."""
    return _render("release_card.md.j2", [facts], [provenance], figures, timed=False)


def render_card(releases: Sequence[ReleaseFacts], provenance: Sequence[Provenance], figures: Figures) -> str:
    """The card of a build, its `releases` side by side. Raises RequantError as render_release_card does."""
    return _render("model_card.md.j2", releases, provenance, figures, timed=True)


def _render(
    template: str, releases: Sequence[ReleaseFacts], provenance: Sequence[Provenance], figures: Figures, timed: bool
) -> str:
    """A card; what a clock or a job's memory was read for stands there only if it is `timed`."""
    for facts, origin in zip(releases, provenance, strict=True):
        if origin.release != facts.name or origin.files != facts.pack.files:
            raise RequantError(
                f"results/{facts.name}/model/provenance.json: not of the files in {facts.paths.pack}; "
                "expected the same hashes; delete it to rebuild"
            )
    data = metadata(releases)
    page = _environment().get_template(template)
    try:
        body = page.render(
            releases=list(releases), provenance=list(provenance), figures=figures, folded_rows=FOLDED_ROWS, timed=timed
        )
    except jinja2.UndefinedError as error:
        raise RequantError(f"{template}: {error.message}; expected a field of a record; mend the template") from error
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    text = f"---\n{data.to_yaml()}\n---\n\n{body}\n"
    _check_metadata(text, data)
    return text


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {function.__name__: function for function in _FILTERS}
    return environment


def _check_metadata(text: str, data: ModelCardData) -> None:
    """The library reads from the card what was put into it; the rest of the hub's checks need the hub."""
    written, read = data.to_dict(), ModelCard(text).data.to_dict()
    keys = sorted(key for key in {*read, *written} if read.get(key) != written.get(key))
    if keys:
        raise RequantError(f"card metadata: {', '.join(keys)}: not read back as written; expected plain text")

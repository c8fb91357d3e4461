"""A plan: what a build of a release will take and give, predicted offline from a lock, headers or a bare config.json.

docs/plan.md says what each figure is and how exact.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from requant import fp8, structure
from requant.architecture import EXPERT
from requant.arithmetic import in_words, planned
from requant.checkpoint import INDEX, Checkpoint
from requant.config import Calibration, Prune, Release, Target, TextSource
from requant.cut import blocks_to_load
from requant.disk import chain_files, heldout_bytes, hidden_bytes, nearest_folder, reference_files
from requant.download import bytes_to_come, remote_model
from requant.duration import (
    BlockSeconds,
    Rates,
    copy_seconds,
    other_stages,
    quantize_seconds,
    read_rates,
    reference_seconds,
)
from requant.engine_command import is_pinned
from requant.engine_keeps import for_engine
from requant.errors import RequantError
from requant.linears import choose
from requant.locks import load_lock, tensors_of
from requant.memory import cpu_bytes, gpu_bytes
from requant.preflight import check_known, check_linears, check_model
from requant.pruning import kept_experts
from requant.records import DiskPlan, PlanRecord, SchemePlan, StagePlan, TargetPlan, TimelinePlan, write_json
from requant.schemes import SCHEMES, Scheme
from requant.served_copy import why_decoded
from requant.shapes import linear_widths
from requant.structure import ReleaseSize, Structure
from requant.targets import (
    cache_bytes_per_token,
    cached_tokens,
    family_problem,
    holds_packed,
    shortage,
    unsupported,
    wanted_context,
)
from requant.timeline import Machine, Work, jobs_of, segment_of, simulate
from requant.view import routed_experts
from requant.wording import duration, gb


@dataclass(frozen=True)
class Subject:
    """A release to be planned. source: directory of the model; lock: path of its lock, or None; repository: the fields
    of its `download.HubModel` if it is from the hub.

    pruned_from: the model that this directory is of, if the release's is pruned, by `prune`, as observed on `observed`.
    device: what models run on outside of tuning. publishing: rules that it goes through and others do not
    (eval_results, sign). served: its benchmarks of the served model, with whether the source is measured too.
    """

    release: str
    settings: Release
    calibration: Calibration
    target: Target
    source: str
    lock: str | None
    repository: dict[str, str | None] | None = None
    pruned_from: str | None = None
    prune: Prune | None = None
    observed: Calibration | None = None
    device: str = "cpu"
    publishing: tuple[str, ...] = ()
    served: dict[str, bool] = field(default_factory=dict)
    keep_hidden_states: bool = True

    @property
    def files_of(self) -> str:
        """The model whose files are read."""
        return self.pruned_from or self.settings.model

    def pruned(self, whole: Structure) -> Structure:
        """The release's model, of which `whole` has the files."""
        if self.prune is None:
            return whole
        return whole.pruned(kept_experts(self.settings.model, self.prune, whole.config))

    def chains(self) -> list[tuple[str, str, Calibration]]:
        """(model, name of the calibration, calibration) of each reference chain that the release rests on."""
        settings = self.settings
        found = [(settings.model, settings.calibration, self.calibration)]
        if self.prune is not None:  # to observe it, and to hold the release against it
            found.append((self.pruned_from, self.prune.calibration, self.observed))
            found.append((self.pruned_from, settings.calibration, self.calibration))
        return found

    def rivals(self) -> list[str]:
        """The release's pruned model, and those that it is held against; none if it is not pruned."""
        model = self.settings.model
        return [] if self.prune is None else [model, *(f"{model}.{method}" for method in self.prune.compare)]


@dataclass(frozen=True)
class Source:
    """A model as far as it is known. files: names of its files, None if only config.json is; missing: bytes to come.

    check: the rule that checks each file.
    """

    structure: Structure
    files: list[str] | None
    missing: int
    check: str = "source_file"


def source_of(directory: str, lock_path: str | None, repository: dict[str, str | None] | None = None) -> Source:
    """The model in `directory`: from its lock, else from the headers of its shards, else from config.json alone.

    Raises RequantError naming lock or directory if there is neither a lock nor a config.json, or if they don't fit
    each other, or if a build would refuse the model for what they say.
    """
    where = lock_path or directory
    try:
        return _locked(directory, lock_path, repository) if lock_path else _local(directory)
    except RequantError as error:
        raise RequantError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _locked(directory: str, lock_path: str, repository: dict[str, str | None] | None) -> Source:
    lock = load_lock(lock_path)
    check_model(lock_path, lock.config, lock.tensors)
    sizes = {name: entry.size for name, entry in lock.files.items()}
    stored = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    known = structure.from_tensors(lock.config, lock.tensors, stored, "lock")
    if repository is not None:
        return Source(known, sorted(sizes), bytes_to_come(remote_model(repository), lock), "download")
    missing = sum(size for name, size in sizes.items() if not (Path(directory) / name).exists())
    return Source(known, sorted(sizes), missing)


def _local(directory: str) -> Source:
    checkpoint = Checkpoint(directory)
    check_known(directory, checkpoint.config)
    if not has_shards(checkpoint):
        fp8.block_size(checkpoint.config)
        known = structure.from_config(checkpoint.config)
        return Source(known, None, known.stored)
    tensors = tensors_of(directory)
    check_model(directory, checkpoint.config, tensors)
    stored = sum((checkpoint.directory / shard).stat().st_size for shard in checkpoint.shards)
    return Source(structure.from_tensors(checkpoint.config, tensors, stored, "headers"), checkpoint.files, 0)


def has_shards(checkpoint: Checkpoint) -> bool:
    """Whether all shards of the checkpoint are there; RequantError if only some are."""
    if not (checkpoint.directory / INDEX).exists():
        return any(checkpoint.directory.glob("*.safetensors"))
    there = [(checkpoint.directory / shard).exists() for shard in checkpoint.shards]
    if any(there) and not all(there):
        missing = checkpoint.shards[there.index(False)]
        raise RequantError(f"{checkpoint.directory / missing}: not there; {INDEX} names it, and other shards are there")
    return all(there)


DEVICES, INPUTS = (1, 8, 64), ("quantized", "reference")


def plan(
    subject: Subject, source: Source, rates_path: str | Path, results: Path, files: dict[str, float] | None = None
) -> PlanRecord:
    """The plan of one release. rates_path: what benchmarks/rates.py wrote; results: where earlier jobs left records.

    files: bytes a second of `disk`, `shared` and `hub` (`requant.timeline.Machine`), as far as they count. Raises
    RequantError if nothing of the model would be quantized, or it can't be pruned so.
    """
    whole, calibration = source.structure, subject.calibration
    subject = replace(subject, settings=for_engine(subject.settings, whole.config["model_type"], subject.target))
    settings, model = subject.settings, subject.pruned(whole)
    scheme, tuning = SCHEMES[settings.scheme], settings.tuning
    sizes = {name: model.release_size(other, settings.keep, settings.mtp == "drop") for name, other in SCHEMES.items()}
    check_linears(subject.release, settings, linear_widths(model.kinds))
    moe = [kind for kind in model.kinds if kind.experts]
    rates = read_rates(rates_path, tuning.device)
    of_blocks = block_seconds(subject, whole, model, rates, read_rates(rates_path, subject.device), results)
    every_stage = [of_blocks[name].plan(model.blocks) for name in ("observe", "reference", "made") if name in of_blocks]
    every_stage += other_stages(subject.release, results, load_test_blocks(settings, model) > 0)
    return PlanRecord(
        release=subject.release,
        model=settings.model,
        scheme=scheme.name,
        basis=model.basis,
        parameters=model.parameters,
        activated_parameters=model.activated,
        drafting_parameters=model.drafting,
        drafting_if_stored=structure.drafting_if_stored(model),
        blocks=model.blocks,
        moe_blocks=sum(len(kind.blocks) for kind in moe),
        routed_experts=max((kind.experts for kind in moe), default=0),
        experts_per_token=model.experts_per_token,
        source_bytes=model.stored,
        download_bytes=source.missing,
        schemes={name: scheme_plan(size) for name, size in sizes.items()},
        disk=disk_plan(subject, model, sizes[scheme.name]),
        cpu_bytes=memory_of_jobs(subject, model, whole),
        gpu_bytes=gpu_bytes(model, calibration, scheme, tuning)
        if scheme.quantizes and tuning.device != "cpu"
        else None,
        jobs=jobs([subject], {subject.files_of: source}),
        source_files_known=source.files is not None,
        target=target_plan(subject, model, sizes[scheme.name].files, scheme),
        stages=every_stage,
        timelines=timelines(
            work_of(subject, source, model, of_blocks, every_stage), rates, files or {}, tuning.segment
        ),
        pruned_from=subject.pruned_from,
        experts_before=None if subject.prune is None else routed_experts(whole.config),
    )


def block_seconds(
    subject: Subject, whole: Structure, model: Structure, rates: Rates, chain_rates: Rates, results: Path
) -> dict[str, BlockSeconds]:
    """Seconds of each block's jobs: `reference`, `made`, and of a pruned model `observe` and `original`.

    rates: of the device that tunes, chain_rates: of that of the reference chains. original: of the model that it is
    pruned from, on the release's own tokens; not there if these are what its experts were observed on.
    """
    settings, calibration, chains = subject.settings, subject.calibration, results / "reference"
    scheme = SCHEMES[settings.scheme]
    own = chains / settings.model / settings.calibration
    found = {"reference": reference_seconds(model, calibration, chain_rates, own)}
    if scheme.quantizes:
        found["made"] = quantize_seconds(model, calibration, scheme, settings.tuning, settings.keep, rates, results)
    else:
        found["made"] = copy_seconds(model, results / subject.release / "blocks")
    if subject.prune is not None:
        at = subject.prune.calibration
        folder = chains / subject.pruned_from
        found["observe"] = reference_seconds(whole, subject.observed, chain_rates, folder / at, "observe")
        if at != settings.calibration:
            found["original"] = reference_seconds(whole, calibration, chain_rates, folder / settings.calibration)
    return found


def work_of(
    subject: Subject, source: Source, model: Structure, seconds: dict[str, BlockSeconds], stages: list[StagePlan]
) -> Work | None:
    """What the release's jobs take, for `timelines`; None if seconds are not known, or nothing is quantized."""
    settings, calibration, whole = subject.settings, subject.calibration, source.structure
    scheme = SCHEMES[settings.scheme]
    if not scheme.quantizes or any(found.blocks is None for found in seconds.values()):
        return None
    size = model.release_size(scheme, settings.keep, settings.mtp == "drop")
    width = model.config["hidden_size"]
    pruned = subject.prune is not None
    return Work(
        reference=seconds["reference"].blocks,
        quantize=seconds["made"].blocks,
        observe=seconds["observe"].blocks if pruned else (),
        sequential=pruned and subject.prune.observe == "sequential",
        original=seconds["original"].blocks if "original" in seconds else (),
        source=whole.source_blocks,
        kept=model.source_blocks if pruned else (),
        packed=size.blocks,
        outside=sum(tensor.bytes for tensor in whole.outside.values()),
        calibration=hidden_bytes(calibration, width),
        heldout=heldout_bytes(calibration, width),
        comes=source.missing > 0,
        first=load_test_blocks(settings, model),
        walks=0 if subject.device == "cpu" != settings.tuning.device else 1,
        gpu=settings.tuning.device != "cpu",
        stages={stage.stage: stage.seconds for stage in stages if stage.jobs == 1 and stage.seconds is not None},
    )


def timelines(
    work: Work | None, rates: Rates, files: dict[str, float], segment: int | None = None
) -> list[TimelinePlan]:
    """Simulated builds on some numbers of devices, tuned on either inputs; on one device these take as long.

    segment: the release's `tuning.segment`.
    """
    found = []
    for devices in DEVICES if work else ():
        machine = Machine(devices, start=rates.job_start, coordination=rates.coordination, **files)
        for inputs in INPUTS:
            timeline = simulate(jobs_of(work, segment_of(inputs, len(work.blocks), segment)), machine)
            seconds = timeline.end_of("quantize")
            taken = sum(
                min(run.end, seconds) - run.start for run in timeline.runs if run.devices and run.start < seconds
            )
            found.append(
                TimelinePlan(
                    devices=devices,
                    inputs=inputs,
                    seconds=seconds,
                    busy=taken / (devices * seconds),
                    states_bytes=timeline.peak,
                )
            )
    return found


def memory_of_jobs(subject: Subject, model: Structure, whole: Structure) -> dict[str, int]:
    """Peak of the jobs that hold a block or a model on the CPU: experts are observed in whole blocks."""
    settings = subject.settings
    scheme, tuning = SCHEMES[settings.scheme], settings.tuning
    found = cpu_bytes(model, subject.calibration, scheme, tuning)
    if subject.prune is not None:
        original = cpu_bytes(whole, subject.observed, scheme, tuning)
        found["reference"] = max(found["reference"], original["reference"])
        found["benchmark_source"] = original["benchmark"]
    return found


def scheme_plan(size: ReleaseSize) -> SchemePlan:
    """The record of a release's size; bits follow from the bytes that quantized weights and their scales take."""
    kept = Counter(re.sub(r"\bconfig: keep .*", "config: keep", reason) for reason in size.kept.values())
    return SchemePlan(
        tensor_bytes=size.tensors,
        file_bytes=size.files,
        quantized_parameters=size.quantized,
        bits_per_quantized_weight=8 * size.packed / size.quantized if size.quantized else None,
        kept=dict(sorted(kept.items())),
    )


def disk_plan(subject: Subject, model: Structure, size: ReleaseSize) -> DiskPlan:
    """Bytes on disk of a build of this release alone."""
    import shutil

    parts = {"tokens": 0, "reference": 0, "chain": 0}
    for path, bytes_of_file in states(subject, model).items():
        part = {"calibration": "tokens", "reference": "reference"}.get(path.split("/")[1], "chain")
        parts[part] += bytes_of_file
    decoded = serves_decoded(subject, model)
    parts |= {
        "source": model.stored,
        "shards": size.files,
        "served": 2 * model.parameters if decoded else 0,
        "load_test": load_test_bytes(subject, model, decoded),
    }
    peak = sum(parts.values()) - min(parts["served"], parts["load_test"])  # one after the other
    return DiskPlan(**parts, peak=peak, free=shutil.disk_usage(nearest_folder("results")).free)


def load_test_blocks(settings: Release, model: Structure) -> int:
    """Blocks of the release's load test; 0 if it has none."""
    moe = [block for kind in model.kinds if kind.experts for block in kind.blocks]
    return blocks_to_load(settings.deploy.load_test_blocks, model.blocks, moe)


def load_test_bytes(subject: Subject, model: Structure, decoded: bool) -> int:
    """Bytes that the load test writes: what is outside of blocks, for these are links, and a BF16 copy of the cut."""
    count = load_test_blocks(subject.settings, model)
    if not count:
        return 0
    cut = model.first(count)
    outside = cut.release_size(SCHEMES[subject.settings.scheme], subject.settings.keep).rest
    return outside + (2 * cut.parameters if decoded else 0)


def states(subject: Subject, model: Structure) -> dict[str, int]:
    """Size of each file of tokens and hidden states that the release rests on, or has of its own; where they go when
    they were read, of those that are there at a time with one job after another."""
    kept = subject.keep_hidden_states
    files = chain_files(subject.release, subject.calibration, model.config, subject.settings.chained, kept)
    for walked, name, calibration in subject.chains():
        files |= reference_files(walked, subject.files_of, name, calibration, model.config, kept=kept)
    if subject.prune is not None and subject.prune.observe == "sequential":
        for walked in subject.rivals():
            at = subject.prune.calibration
            files |= reference_files(walked, subject.files_of, at, subject.observed, model.config, False, kept)
    return files


def serves_decoded(subject: Subject, model: Structure) -> bool:
    """Whether the deploy stage makes a BF16 copy of the release to serve it."""
    scheme, moe = SCHEMES[subject.settings.scheme], any(kind.experts for kind in model.kinds)
    kept = choose(linear_widths(model.kinds), scheme, subject.settings.keep)[1]
    return why_decoded(scheme.format, moe, subject.target, any(map(EXPERT.fullmatch, kept))) is not None


def target_plan(subject: Subject, model: Structure, released: int, scheme: Scheme) -> TargetPlan:
    """How a release of `released` bytes fits its target. What can't hold packed weights has BF16 values of all."""
    target, packed = subject.target, holds_packed(subject.target)
    weights = released if packed else 2 * model.parameters
    each, per_token = (
        -(-weights // target.devices),
        cache_bytes_per_token(model.config, target.devices, target.kv_cache),
    )
    tokens = cached_tokens(target, each, per_token)
    family, experts = model.config["model_type"], routed_experts(model.config) > 0
    problem = unsupported(scheme, target, family, experts) or family_problem(family, target)
    limit = model.config.get("max_position_embeddings")
    context = None if tokens is None else max(0, min(tokens // target.concurrency, limit or tokens))
    wanted = wanted_context(target, model.config, subject.calibration.seqlen)
    short = shortage(target, weights, model.config, wanted)
    return TargetPlan(
        target=subject.settings.deploy.target,
        engine=target.engine,
        device=target.device,
        gpu=target.gpu,
        devices=target.devices,
        memory_bytes=None if target.memory_gb is None else round(target.memory_gb * 1e9),
        image=target.image,
        problem=problem,
        weights_bytes=each,
        weights="packed" if packed and scheme.quantizes else "BF16",
        arithmetic=None if problem is not None else in_words(planned(scheme, target, serves_decoded(subject, model))),
        cache_bytes_per_token=per_token,
        cached_tokens=None if tokens is None else max(0, tokens),
        concurrency=target.concurrency,
        context=context,
        context_wanted=wanted,
        fits=None if tokens is None else problem is None and short is None,
        shortage=short,
    )


def jobs(subjects: Iterable[Subject], sources: dict[str, Source]) -> dict[str, int]:
    """Jobs by rule of a build of these releases from nothing, as `snakemake -n` counts them.

    sources: by model. Files of a source that are not known are left out.
    """
    found: Counter[str] = Counter()
    once: set[tuple] = set()
    moe, any_quantized = False, False
    for subject in subjects:
        settings, files, source = subject.settings, subject.files_of, sources[subject.files_of]
        blocks, model = source.structure.blocks, settings.model
        quantizes = SCHEMES[settings.scheme].quantizes
        any_quantized = any_quantized or quantizes
        found.update({settings.made_by: blocks})
        found.update([*PER_RELEASE, *subject.publishing, *(["plot_release"] if quantizes else [])])
        found.update(["load_test"] if load_test_blocks(settings, source.structure) else [])
        once |= {(source.check, files, name) for name in source.files or ()}
        once |= {("source", files), ("benchmark_source", model, settings.benchmark)}
        found.update({rule: len(subject.served) for rule in ("measure_served", "served_benchmark") if subject.served})
        measured = [name for name, with_source in subject.served.items() if with_source]
        target = settings.deploy.target
        once |= {("measure_served_source", files, target, settings.benchmark, name) for name in measured}
        for walked, name, calibration in subject.chains():
            once |= {("calibrate", files, name), ("embed", walked, name)}
            once |= {("reference", walked, name, block) for block in range(blocks)}
            once |= {("demo_text", text.path) for text in texts(calibration) if made_text(text)}
        once |= pruning_jobs(subject, blocks)
        moe = moe or any(kind.experts for kind in source.structure.kinds)
    found.update(Counter(key[0] for key in once))
    found.update(["card", "all", *(["plot_build"] if any_quantized else []), *(["plot_experts"] if moe else [])])
    return dict(sorted(found.items()))


def pruning_jobs(subject: Subject, blocks: int) -> set[tuple]:
    """The jobs, by rule and wildcards, that make and measure a release's pruned model of `blocks` blocks."""
    prune, model, benchmark, names = subject.prune, subject.settings.model, subject.settings.benchmark, subject.rivals()
    if prune is None:
        return set()
    found = {(rule, name) for rule in ("keep", "prune_evaluate") for name in names}
    found |= {("benchmark_source", name, benchmark) for name in (subject.pruned_from, *names)}
    found.add(("plot_saliency", subject.release))
    if prune.observe == "sequential":  # the last block of a comparison is decided, and never run
        before = [(name, block) for name in names for block in range(blocks - 1)]
        found |= {("embed", name, prune.calibration) for name in names}
        found |= {("reference", name, prune.calibration, block) for name, block in before}
        found |= {("keep_block", *run) for run in (*before, (model, blocks - 1))}
        found |= {("observe", name, block) for name in names for block in range(blocks)}
    return found


PER_RELEASE = ("pack", "verify", "evaluate", "deploy", "benchmark", "provenance", "sbom", "release_card", "checksums")


def texts(calibration: Calibration) -> list[TextSource]:
    """The texts of a calibration, held-out ones included."""
    return [*calibration.sources, *(calibration.heldout.sources or [])]


def made_text(text: TextSource) -> bool:
    """Whether the graph makes that text."""
    return Path(text.path).parts[:2] == ("results", "demo")


def plan_build(
    subjects: list[Subject], rates_path: str | Path, results: Path, files: dict[str, float] | None = None
) -> tuple[list[PlanRecord], str]:
    """(the plans of a build's releases, each written to results/{release}/plan.json; all of them as one table)."""
    sources: dict[str, Source] = {}
    for subject in subjects:
        if subject.files_of not in sources:
            sources[subject.files_of] = source_of(subject.source, subject.lock, subject.repository)
    records = []
    for subject in subjects:
        records.append(plan(subject, sources[subject.files_of], rates_path, results, files))
        write_json(results / subject.release / "plan.json", records[-1])
    return records, table(records, jobs(subjects, sources), build_peak(subjects, records, sources))


def table(records: list[PlanRecord], found: dict[str, int], peak: int) -> str:
    """All plans side by side, a column a release. found: jobs of the whole build, by rule; peak: its bytes on disk."""
    import pandas

    columns = {record.release: {"model": model_row(record)} | rows(record) for record in records}
    frame = pandas.DataFrame(columns, index=list(max(columns.values(), key=len))).fillna("none")
    lines = frame.to_string(justify="left", formatters=left_aligned(frame)).splitlines()
    unknown = "" if all(record.source_files_known for record in records) else ", and one for each file of the source"
    total = f"jobs of the whole build: {sum(found.values())}{unknown}; disk at its peak: {gb(peak)}"
    notes = list(dict.fromkeys(note for record in records for note in remarks(record)))
    return "\n".join([*(line.rstrip() for line in lines), total, *notes])


def left_aligned(frame) -> dict:
    """Formatters that fill each column of `frame` up with blanks on the right."""
    widths = {column: max(len(column), *map(len, frame[column])) for column in frame}
    return {column: f"{{:<{width}}}".format for column, width in widths.items()}


def build_peak(subjects: list[Subject], records: list[PlanRecord], sources: dict[str, Source]) -> int:
    """Bytes on disk at the peak of the whole build: what releases share counts once."""
    files: dict[str, int] = {}
    for subject in subjects:
        files |= states(subject, sources[subject.files_of].structure)
    own = sum(record.disk.shards + max(record.disk.served, record.disk.load_test) for record in records)
    return sum(source.structure.stored for source in sources.values()) + sum(files.values()) + own


def model_row(record: PlanRecord) -> str:
    """What the table says of where a model comes from."""
    return record.model if record.pruned_from is None else f"{record.model}, from {record.pruned_from}"


def rows(record: PlanRecord) -> dict[str, str]:
    """What the table says of a release, by row."""
    disk, largest = record.disk, max(record.cpu_bytes, key=record.cpu_bytes.get)
    kept = f"{record.routed_experts} of {record.experts_before}" if record.experts_before else record.routed_experts
    routed = f"{kept}, {record.experts_per_token} a token, {record.moe_blocks} of {record.blocks} blocks"
    found = {
        "known from": "config.json alone" if record.basis == "config" else record.basis,
        "parameters": billions(record.parameters),
        "  active a token": billions(record.activated_parameters),
        "experts a layer": routed if record.routed_experts else f"none, {record.blocks} blocks",
        "source": gb(record.source_bytes),
        "  not here yet": gb(record.download_bytes),
    }
    for name, size in record.schemes.items():
        chosen = ", chosen" if name == record.scheme else ""
        bits = size.bits_per_quantized_weight
        bits = "nothing quantized" if bits is None else f"{bits:.2f} bits"
        found[f"size in {name}"] = f"{gb(size.file_bytes)}, {bits}{chosen}"
    found |= {
        "disk at the peak": gb(disk.peak),
        "  hidden states": gb(disk.reference + disk.chain),
        "  free here": gb(disk.free),
        "largest job, CPU": f"{gb(record.cpu_bytes[largest])}, {largest}",
        "  a block's job": gb(record.cpu_bytes["quantize" if "quantize" in record.cpu_bytes else "copy_block"]),
        "largest job, GPU": "none" if record.gpu_bytes is None else gb(record.gpu_bytes),
        "jobs": str(sum(record.jobs.values())),
    }
    found |= target_rows(record)
    for stage in record.stages:
        found[f"time: {stage.stage}"] = (
            "not known" if stage.seconds is None else f"{plain(stage.seconds)}, {stage.basis.split(':')[0]}"
        )
    known = [stage.seconds for stage in record.stages if stage.seconds is not None]
    found["time of what is known"] = plain(sum(known))
    for found_on in record.timelines:
        plural = "device" if found_on.devices == 1 else "devices"
        row = f"  to quantize, {found_on.devices} {plural}, {found_on.inputs}"
        found[row] = f"{plain(found_on.seconds)}, hidden states {gb(found_on.states_bytes)}"
    return found


def target_rows(record: PlanRecord) -> dict[str, str]:
    """What the table says of a release at its target."""
    target = record.target
    memory = "" if target.memory_bytes is None else f" of {gb(target.memory_bytes)}"
    fits = "not known" if target.fits is None else "yes" if target.fits else "no"
    return {
        "target": target.target,
        "  engine": f"{target.engine}, {target.devices} x {target.gpu or target.device}{memory}",
        "  weights a device": f"{gb(target.weights_bytes)}, {target.weights}",
        "  computes with": target.arithmetic or "nothing: refused",
        "  context": "not known" if target.context is None else f"{target.context:,} tokens x {target.concurrency}",
        "  fits": "no, refused" if target.problem is not None else fits,
    }


def remarks(record: PlanRecord) -> list[str]:
    """What a reader has to know beside the table."""
    found = [f"{stage.stage}: {stage.basis}" for stage in record.stages if stage.seconds is not None]
    kept, target = record.schemes[record.scheme].kept, record.target
    if target.image is not None and not is_pinned(target.image):
        found.append(
            f"{record.release}: {target.target}: {target.image} is a tag, which may come to name another image"
        )
    if target.problem is not None:
        found.append(f"{record.release}: {target.target}: {target.problem}")
    elif target.fits is None:
        found.append(f"{record.release}: {target.target}: what fits is not known: the target has no memory_gb")
    elif target.shortage is not None:
        found.append(f"{record.release}: {target.target}: {target.shortage}")
    if SCHEMES[record.scheme].quantizes:
        found += [f"{record.release}: {count} Linears stay in BF16: {reason}" for reason, count in kept.items()]
    if record.drafting_if_stored:
        found.append(
            f"{record.model}: config.json names a multi-token-prediction layer; if the checkpoint stores it, "
            f"{billions(record.drafting_if_stored)} parameters more, {gb(2 * record.drafting_if_stored)} in BF16"
        )
    if record.disk.peak > record.disk.free + record.source_bytes - record.download_bytes:
        found.append(f"{record.release}: the disk here has no room for this build")
    return found


def billions(count: int) -> str:
    return f"{count / 1e9:,.2f} billion" if count >= 1e8 else f"{count / 1e6:,.2f} million"


def plain(seconds: float) -> str:
    """A duration as cards have it, for a terminal."""
    return duration(seconds).replace("\u00a0", " ")

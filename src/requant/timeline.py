"""A build's timeline, simulated: which job runs when, and on which device, until a release is made.

Jobs start as Snakemake starts them: of those whose inputs are there, the one of the highest priority first, as many as
there are devices. What they read and write goes through disks that they share, and each is started by the one process
that runs the graph. No clock, no file and no torch: a simulation of 61 blocks takes milliseconds.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COMPUTES = False  # it tells how long a build takes, and nothing of what it makes

# Who goes first, as the rules have it. Tuners come before the chain, so that it does not run away from them.
LOAD_TEST, FIRST_BLOCKS, TUNERS, CHAIN = 3, 2, 1, 0


@dataclass(frozen=True)
class Job:
    """A job of the graph. seconds: of its process, but for the files that the next three count, in bytes.

    downloads: from the hub; reads, writes: on disk. after: names of the jobs whose outputs it needs. takes: devices.
    states: bytes of each file of hidden states that it makes, by name; uses: names of those that it reads.
    """

    name: str
    rule: str
    seconds: float
    after: tuple[str, ...] = ()
    priority: int = CHAIN
    takes: int = 1
    downloads: float = 0.0
    reads: float = 0.0
    writes: float = 0.0
    states: Mapping[str, int] = field(default_factory=dict)
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What jobs run on: equal devices, `per_node` of them to a node, and rates in bytes a second.

    disk: of a node, for all its jobs; shared: of the file system, for all nodes; hub: of the line to the hub, for
    `lines` downloads at a time. start: seconds that each process takes before it works; coordination: seconds that the
    graph takes for a job, one job after another. beside: how much longer a job computes while all devices of its node
    are taken than alone.
    """

    devices: int
    per_node: int = 8
    disk: float = math.inf
    shared: float = math.inf
    hub: float = math.inf
    lines: int = 2
    start: float = 0.0
    coordination: float = 0.0
    beside: float = 1.0

    def slowed(self, computing: int) -> float:
        """The factor by which each of `computing` devices in use of a node is slower than one alone."""
        most = min(self.per_node, self.devices)
        return 1.0 if most == 1 else 1.0 + (self.beside - 1.0) * max(0, computing - 1) / (most - 1)


@dataclass(frozen=True)
class Run:
    """A job that ran on `devices`, from `start` to `end` seconds after the build began."""

    job: str
    rule: str
    devices: tuple[int, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What came of a simulation. runs: in the order of their start; states: (seconds, bytes of hidden states from then
    on, before any is deleted)."""

    devices: int
    runs: list[Run]
    states: list[tuple[float, int]]

    @property
    def peak(self) -> int:
        """Bytes of hidden states at a time, at most."""
        return max((held for _, held in self.states), default=0)

    @property
    def seconds(self) -> float:
        return max((run.end for run in self.runs), default=0.0)

    @property
    def busy(self) -> list[float]:
        """Seconds that each device is taken."""
        taken = [0.0] * self.devices
        for run in self.runs:
            for device in run.devices:
                taken[device] += run.end - run.start
        return taken

    def end_of(self, rule: str) -> float:
        """When the last job of `rule` ended."""
        return max((run.end for run in self.runs if run.rule == rule), default=0.0)


@dataclass
class _Running:
    """A job under way: what is left of each of its phases, the present one first."""

    job: Job
    devices: tuple[int, ...]
    node: int
    start: float
    phases: list[list]


WAIT, LINE, DISK, COMPUTE = "wait", "line", "disk", "compute"


def simulate(jobs: Sequence[Job], machine: Machine) -> Timeline:
    """The timeline of `jobs`; those of equal priority start in their order.

    Disks and lines are shared in equal parts by who uses them at a time. Raises ValueError naming the jobs that never
    come, because they wait for each other or for one that is not there.
    """
    names = {job.name for job in jobs}
    waiting = {job.name: len(set(job.after)) for job in jobs}
    behind: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        for name in set(job.after):
            behind.setdefault(name, []).append(number)
    readers = Counter(name for job in jobs for name in set(job.uses))
    ready = [(-job.priority, number) for number, job in enumerate(jobs) if not job.after]
    heapq.heapify(ready)
    free, lines, now, coordinated = list(range(machine.devices)), machine.lines, 0.0, 0.0
    running: list[_Running] = []
    runs: list[Run] = []
    alive: dict[str, int] = {}
    held, states = 0, []
    while ready or running:
        later = []
        while ready:
            entry = heapq.heappop(ready)
            job = jobs[entry[1]]
            takes = min(job.takes, machine.devices)
            if takes > len(free) or (job.downloads and not lines):
                later.append(entry)
                if not free and not lines:
                    break
                continue
            taken = tuple(heapq.heappop(free) for _ in range(takes))
            lines -= bool(job.downloads)
            coordinated = max(now, coordinated) + machine.coordination
            phases = [[WAIT, coordinated - now + machine.start], [LINE, job.downloads], [DISK, job.reads]]
            phases += [[COMPUTE, job.seconds], [DISK, job.writes]]
            running.append(_Running(job, taken, taken[0] // machine.per_node if taken else 0, now, phases))
        for entry in later:
            heapq.heappush(ready, entry)
        speeds = _speeds(running, machine)
        left = [work.phases[0][1] / speed for work, speed in zip(running, speeds, strict=True)]
        step = min(left)
        now += step
        still = []
        for work, speed, seconds in zip(running, speeds, left, strict=True):
            if seconds > step:
                work.phases[0][1] -= step * speed
                still.append(work)
                continue
            work.phases.pop(0)
            if len(work.phases) == 1:  # what it makes is on disk from here on
                alive |= work.job.states
                held += sum(work.job.states.values())
                states.append((now, held))
            if work.phases:
                still.append(work)
                continue
            runs.append(Run(work.job.name, work.job.rule, work.devices, work.start, now))
            for device in work.devices:
                heapq.heappush(free, device)
            lines += bool(work.job.downloads)
            readers.subtract(set(work.job.uses))
            for name in {*work.job.uses, *work.job.states}:
                if not readers[name]:
                    held -= alive.pop(name, 0)  # one that no job made was there before
            states.append((now, held))
            for number in behind.get(work.job.name, ()):
                waiting[jobs[number].name] -= 1
                if not waiting[jobs[number].name]:
                    heapq.heappush(ready, (-jobs[number].priority, number))
        running = still
    if len(runs) < len(jobs):
        never = sorted(names - {run.job for run in runs})
        raise ValueError(f"{', '.join(never[:5])}: never come; they wait for each other, or for what no job makes")
    return Timeline(machine.devices, sorted(runs, key=lambda run: (run.start, run.devices)), states)


def _speeds(running: list[_Running], machine: Machine) -> list[float]:
    """How much of its phase each job gets done in a second: seconds, or bytes."""
    on_disk = Counter(work.node for work in running if work.phases[0][0] in (DISK, LINE))
    computing = Counter()
    for work in running:
        if work.phases[0][0] == COMPUTE:
            computing[work.node] += len(work.devices)
    on_line = sum(work.phases[0][0] == LINE for work in running)
    transfers = sum(on_disk.values())
    found = []
    for work in running:
        phase = work.phases[0][0]
        if phase == WAIT:
            found.append(1.0)
        elif phase == COMPUTE:
            found.append(1.0 / machine.slowed(computing[work.node]))
        else:
            rate = min(machine.disk / on_disk[work.node], machine.shared / transfers)
            found.append(min(rate, machine.hub / on_line) if phase == LINE else rate)
    return found


# The jobs of a release


@dataclass(frozen=True)
class Work:
    """What the jobs of a release take, block by block.

    reference, quantize: seconds. observe: of the blocks of the model that it is pruned from, none if it is not pruned;
    sequential: whether each is observed behind the pruned ones before it; original: of that model's blocks on the
    release's own tokens, if it was observed on others. source, kept, packed: bytes of a block in the source, of what is
    read of it once it is pruned, and in the release; outside: of embeddings, norm and head. calibration, heldout: bytes
    of hidden states of these tokens behind a block. comes: whether the source is downloaded. first: blocks of the load
    test. threads: devices that a tuner takes, walks: a job of a chain. gpu: whether devices are GPUs, which some jobs
    take none of. stages: seconds of other stages that are known, by name.
    """

    reference: Sequence[float]
    quantize: Sequence[float]
    observe: Sequence[float] = ()
    sequential: bool = False
    original: Sequence[float] = ()
    source: Sequence[int] = ()
    kept: Sequence[int] = ()
    packed: Sequence[int] = ()
    outside: int = 0
    calibration: int = 0
    heldout: int = 0
    comes: bool = False
    first: int = 0
    threads: int = 1
    walks: int = 1
    gpu: bool = False
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def blocks(self) -> range:
        return range(len(self.reference))

    @property
    def plain(self) -> int:
        """Devices that a job takes which computes nothing on a GPU."""
        return 0 if self.gpu else 1

    def arrived(self, block: int | str) -> tuple[str, ...]:
        """The job that brings the tensors of a block, or those `outside` of blocks; none where files do not count."""
        return (f"source {block}",) if self.source else ()


def size(sizes: Sequence[int], block: int) -> int:
    """Bytes of a block; 0 where files do not count."""
    return sizes[block] if sizes else 0


# What needs what, behind the blocks. `evaluate` is always there: it is the last to read held-out hidden states.
BEHIND = {
    "verify": ("pack",),
    "evaluate": ("pack",),
    "deploy": ("pack", "load_test", "evaluate"),
    "benchmark": ("pack",),
}
ON_CPU = ("pack", "verify")


def segment_of(inputs: str, blocks: int, segment: int | None = None) -> int:
    """Blocks of a chain of tuned blocks: `segment`, or all, with `inputs: quantized`, one with `reference`."""
    return (segment or blocks) if inputs == "quantized" else 1


def jobs_of(work: Work, segment: int) -> list[Job]:
    """The jobs of a release from its source to the last stage whose seconds are known.

    segment: a block is tuned on the output of the tuned block before it, but for the first of each so many blocks,
    which is tuned on the reference chain's.
    """
    last = work.blocks[-1]
    found = _source_jobs(work)
    if not work.observe:
        found += _chain(work, "reference", work.reference, work.source)
    else:
        found += _chain(work, "observe", work.observe, work.source)
        seconds = work.stages.get("prune_evaluate", 0.0)
        heldout = _heldout(work, "observe")  # of jobs alike Snakemake takes the one that frees most
        found.append(
            Job("prune_evaluate", "prune_evaluate", seconds, (f"observe {last}",), takes=work.walks, uses=heldout)
        )
        needs = [(f"decide {block}" if work.sequential else f"observe {last}",) for block in work.blocks]
        found += _chain(work, "reference", work.reference, work.kept, needs)
        if work.sequential:
            found += [_deciding(work, block) for block in work.blocks]
        if work.original:
            found += _chain(work, "original", work.original, work.source)
    found += [_tuner(work, block, block % segment == 0) for block in work.blocks]
    return found + _behind(work)


def _source_jobs(work: Work) -> list[Job]:
    """What brings the source here, or reads it to check it: a job a block, in their order."""
    if not work.source:
        return []
    sizes = {"outside": work.outside} | {str(block): size for block, size in enumerate(work.source)}
    if work.comes:
        return [
            Job(f"source {what}", "download", 0.0, takes=work.plain, downloads=size) for what, size in sizes.items()
        ]
    return [Job(f"source {what}", "source_file", 0.0, takes=work.plain, reads=size) for what, size in sizes.items()]


def _chain(
    work: Work, name: str, seconds: Sequence[float], shards: Sequence[int], needs: Sequence[tuple[str, ...]] = ()
) -> list[Job]:
    """The jobs of a reference chain. needs: what each block waits for beside the one before it and its tensors."""
    parts = {"calibration": work.calibration, "heldout": work.heldout}
    written = sum(parts.values())

    def states(block: int) -> dict[str, int]:
        return {f"{name} {block} {part}": size for part, size in parts.items()}

    found = [
        Job(
            f"{name} -1",
            "embed",
            0.0,
            work.arrived("outside"),
            takes=work.plain,
            reads=work.outside,
            writes=written,
            states=states(-1),
        )
    ]
    for block in work.blocks:
        waits = (f"{name} {block - 1}", *work.arrived(block), *(needs[block] if needs else ()))
        found.append(
            Job(
                f"{name} {block}",
                "observe" if name == "observe" else "reference",
                seconds[block],
                waits,
                takes=work.walks,
                reads=size(shards, block) + written,
                writes=written,
                states=states(block),
                uses=tuple(states(block - 1)),
            )
        )
    return found


def _heldout(work: Work, name: str) -> tuple[str, ...]:
    """The held-out hidden states of a chain."""
    return tuple(f"{name} {block} heldout" for block in (-1, *work.blocks))


def _deciding(work: Work, block: int) -> Job:
    """A block of the source, observed behind the pruned blocks before it."""
    return Job(
        f"decide {block}",
        "observe",
        work.observe[block],
        (f"reference {block - 1}", *work.arrived(block)),
        takes=work.walks,
        reads=size(work.source, block) + work.calibration,
        uses=(f"reference {block - 1} calibration",),
    )


def _tuner(work: Work, block: int, begins: bool) -> Job:
    """The quantize job of a block. begins: whether it is tuned on the reference chain's output."""
    before = f"reference {block - 1} calibration" if begins else f"chain {block - 1}"
    return Job(
        f"quantize {block}",
        "quantize",
        work.quantize[block],
        (f"reference {block}", *work.arrived(block), *(() if begins else (f"quantize {block - 1}",))),
        FIRST_BLOCKS if block < work.first else TUNERS,
        work.threads,
        reads=size(work.kept or work.source, block) + 2 * work.calibration,
        writes=size(work.packed, block) + work.calibration,
        states={f"chain {block}": work.calibration},
        uses=(before, f"reference {block} calibration"),
    )


def _behind(work: Work) -> list[Job]:
    """Load test and packing, and what comes after: of other stages those whose seconds are known."""
    made, known = [f"quantize {block}" for block in work.blocks], work.stages
    found = []
    if work.first and "load_test" in known:
        found.append(Job("load_test", "load_test", known["load_test"], tuple(made[: work.first]), LOAD_TEST))
    found.append(
        Job("pack", "pack", known.get("pack", 0.0), tuple(made), takes=work.plain, reads=float(sum(work.packed)))
    )
    there = {job.name for job in found}
    heldout = [*_heldout(work, "reference"), *(_heldout(work, "original") if work.original else ())]
    for stage, needs in BEHIND.items():
        if stage in known or stage == "evaluate":
            after = [name for name in needs if name in there]
            after += [f"original {work.blocks[-1]}"] if stage == "evaluate" and work.original else []
            takes = work.plain if stage in ON_CPU else work.walks if stage == "evaluate" else 1
            uses = tuple(heldout) if stage == "evaluate" else ()
            found.append(Job(stage, stage, known.get(stage, 0.0), tuple(after), takes=takes, uses=uses))
            there.add(stage)
    return found

"""Timelines of builds: the large release on 1, 8 and 64 devices, simulated; and a real build beside its simulation.

    python benchmarks/timeline.py large --model DIRECTORY [--disk 3] [--shared 12] [--hub 1] [--out DIRECTORY]
    python benchmarks/timeline.py check [--releases demo-w3a16] [--iters 200] [--out DIRECTORY]

`large` simulates the build of config/deepseek-v3.2-508b-nvfp4.yaml up to its last block, from the config.json in
DIRECTORY alone, by the model of `snakemake plan`: its jobs alone, and with files at the given rates (GB a second: of a
node's disk, of the file system of all nodes, of the line to the hub), which the picture shows. Blocks are tuned on the
output of the tuned ones before them (`quantized`), on the reference chain's (`reference`), or in chains of --segment.

`check` builds the blocks of releases of the embedded model with one core and with two, from files that are there
already up to the embeddings, and simulates the same. The simulation knows what jobs took on one core, one at a time;
what the graph took outside of them there; and how much slower two tuners are side by side, and how much faster one is
with two threads, which is measured apart from any build. `replayed` is simulated from what the jobs of the same build
took: what is left of a difference then is the order of jobs and the graph's own time, whatever else the machine does.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from requant.timeline import Machine, Timeline, Work, jobs_of, segment_of, simulate  # noqa: E402
from requant.wording import duration  # noqa: E402

PRESET = ROOT / "config" / "deepseek-v3.2-508b-nvfp4.yaml"
RATES = ROOT / "benchmarks" / "results" / "rates.json"
DEVICES = (1, 8, 64)
COLORS = {"observe": "#8da0cb", "reference": "#66c2a5", "quantize": "#e5894a"}
MODES = ("quantized", "reference")
PAIR = (2, 3)  # blocks of the embedded model that are tuned side by side: both with experts


# The large release


def work_of_preset(model: Path):
    """(what the jobs of the preset's release take, the rates of its device), from the config.json in `model`."""
    from requant.config import parse
    from requant.duration import read_rates
    from requant.plan import Subject, block_seconds, source_of, work_of
    from requant.target_files import FOLDER, with_targets

    data, preset = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / "config.yaml", PRESET))
    merged = data | {
        key: {**data[key], **value} if isinstance(data.get(key), dict) else value for key, value in preset.items()
    }
    config = parse(with_targets(merged, ROOT / FOLDER))
    (release,) = config.build
    settings = config.releases[release]
    pruned = config.models[settings.model]
    subject = Subject(
        release,
        settings,
        config.calibrations[settings.calibration],
        config.targets[settings.deploy.target],
        str(model),
        None,
        pruned_from=pruned.source_model,
        prune=pruned.prune,
        observed=config.calibrations[pruned.prune.calibration],
        device=config.device,
    )
    source = source_of(str(model), None)
    structure, rates = subject.pruned(source.structure), read_rates(RATES, settings.tuning.device)
    nothing = Path(tempfile.gettempdir()) / "no results"
    seconds = block_seconds(subject, source.structure, structure, rates, read_rates(RATES, config.device), nothing)
    return work_of(subject, source, structure, seconds, []), rates


def large(model: Path, disk: float, shared: float, hub: float, segment: int, out: Path) -> None:
    """Simulates the large release; writes timeline_large.json and timeline_large.png, and prints the table."""
    work, rates = work_of_preset(model)
    graph = {"start": rates.job_start, "coordination": rates.coordination}
    files = {"disk": disk * 1e9, "shared": shared * 1e9, "hub": hub * 1e9}
    ways = {"quantized": len(work.blocks), f"segments of {segment}": segment, "reference": 1}
    results, drawn = [], {}
    print("| devices | blocks are tuned on | jobs alone | with files | devices used | busy | hidden states, GB |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for devices in DEVICES:
        for way, blocks in ways.items():
            alone, whole = (simulate(jobs_of(work, blocks), Machine(devices, **graph, **rate)) for rate in ({}, files))
            drawn[devices, way] = whole
            row = {"devices": devices, "inputs": way, "jobs_alone_seconds": alone.end_of("quantize")}
            row |= {"seconds": whole.end_of("quantize"), "busy": busy(whole), "states_bytes": whole.peak}
            row["used"] = len({device for run in whole.runs for device in run.devices})
            results.append(row | {"runs": [vars(run) for run in whole.runs] if way in MODES else None})
            print(
                f"| {devices} | {way} | {clock(row['jobs_alone_seconds'])} | {clock(row['seconds'])} | "
                f"{row['used']} | {row['busy']:.0%} | {row['states_bytes'] / 1e9:.0f} |"
            )
    write(out / "timeline_large.json", results, rates=graph | files)
    draw(drawn, out / "timeline_large.png")


def busy(timeline: Timeline) -> float:
    """Share of the devices' time until the last block is made in which they are taken."""
    end = timeline.end_of("quantize")
    return sum(run.end - run.start for run in timeline.runs if run.devices and run.end <= end) / timeline.devices / end


def clock(seconds: float) -> str:
    return duration(seconds).replace("\u00a0", " ")


def draw(timelines: dict[tuple[int, str], Timeline], path: Path) -> None:
    """Rows of jobs on 1 and 8 devices, how many of 64 are taken, and hidden states on disk; a column an input."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        4, 2, figsize=(11, 8), layout="constrained", sharex=True, sharey="row", height_ratios=[1, 4, 3, 3]
    )
    for column, way in enumerate(MODES):
        for axes, devices in zip(grid[:2, column], DEVICES[:2], strict=True):
            draw_rows(axes, timelines[devices, way])
        draw_taken(grid[2, column], timelines[DEVICES[2], way])
        for devices, line in zip(DEVICES, ("k-", "r-", "b--"), strict=True):
            states = timelines[devices, way].states
            grid[3, column].step(
                [moment / 3600 for moment, _ in states],
                [held / 1e9 for _, held in states],
                line,
                where="post",
                linewidth=1.2,
                label=f"{devices} device{'s' * (devices > 1)}",
            )
        ends = ", ".join(f"{clock(timelines[devices, way].end_of('quantize'))} on {devices}" for devices in DEVICES)
        grid[0, column].set_title(f"inputs: {way}\n{ends}", fontsize=10)
        grid[3, column].set_xlabel("hours")
    for axes, label in zip(
        grid[:, 0], ("1 device", "8 devices", "of 64 devices,\ntaken", "hidden states\non disk, GB"), strict=True
    ):
        axes.set_ylabel(label)
    grid[0, 0].set_xlim(left=0)
    grid[3, 1].legend(fontsize=8)
    patches = [matplotlib.patches.Patch(color=color, label=rule) for rule, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def draw_rows(axes, timeline: Timeline) -> None:
    """A bar for each job, in the row of its device."""
    for rule, color in COLORS.items():
        runs = [run for run in timeline.runs if run.rule == rule and run.devices]
        axes.barh(
            [run.devices[0] + 1 for run in runs],
            [(run.end - run.start) / 3600 for run in runs],
            left=[run.start / 3600 for run in runs],
            height=0.86,
            color=color,
            linewidth=0.3 if timeline.devices > 1 else 0,
            edgecolor="white",
        )
    axes.set(ylim=(timeline.devices + 0.5, 0.5), yticks=range(1, timeline.devices + 1))


def draw_taken(axes, timeline: Timeline) -> None:
    """How many devices each rule takes, over time."""
    moments = sorted({moment for run in timeline.runs for moment in (run.start, run.end)})
    taken = [
        [sum(run.start <= moment < run.end for run in timeline.runs if run.rule == rule) for moment in moments]
        for rule in COLORS
    ]
    axes.stackplot([moment / 3600 for moment in moments], taken, colors=COLORS.values(), step="post")
    axes.set_ylim(0, max(axes.get_ylim()[1], max(map(sum, zip(*taken, strict=True))) + 0.5))
    axes.yaxis.get_major_locator().set_params(integer=True)


# A real build beside its simulation


def configure(folder: Path, release: str, **tuning) -> str:
    """The name of a file in `folder` that sets a release's tuning; there is nothing else to build."""
    path = folder / f"{'-'.join(map(str, tuning.values()))}.yaml"
    path.write_text(yaml.safe_dump({"releases": {release: {"tuning": tuning}}, "build": [release]}))
    return path.name


def build(folder: Path, config: str, cores: int, *targets: str) -> dict[str, float]:
    """Builds `targets` in `folder` and keeps all that is made on the way; when the command began and ended."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", config]
    began = time.time()
    done = subprocess.run(
        [*command, "--cores", str(cores), "--notemp", "--", *targets],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{targets}: the build failed\n{done.stderr[-3000:]}")
    return {"began": began, "ended": time.time()}


def jobs_since(folder: Path, moment: float) -> dict[str, dict[str, float]]:
    """Start, end and seconds of the process of each job that Snakemake started in `folder` after `moment`."""
    found = {}
    for path in (folder / ".snakemake" / "metadata").rglob("*"):
        if not path.is_file():
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["starttime"] and record["starttime"] > moment:
            log = Path(record["log"][0])
            lines = (folder / "results/benchmarks" / log.relative_to("logs")).with_suffix(".tsv").read_text()
            header, row = (line.split("\t") for line in lines.splitlines()[:2])
            found[str(log.relative_to("logs").with_suffix(""))] = {
                "rule": record["rule"],
                "start": record["starttime"],
                "end": record["endtime"],
                "seconds": float(row[header.index("s")]),
            }
    return found


def timed(base: Path, folder: Path, release: str, cores: int, **tuning) -> dict:
    """Builds all blocks of `release` and packs them, in a copy of `base`; what it took, as a whole and by job."""
    shutil.copytree(base, folder)
    config = configure(folder, release, **tuning)
    load = os.getloadavg()[0]
    command = build(folder, config, cores, f"results/{release}/pack.json")
    jobs = jobs_since(folder, command["began"])
    first, last = min(job["start"] for job in jobs.values()), max(job["end"] for job in jobs.values())
    return {
        "release": release,
        "cores": cores,
        **tuning,
        "load_before": load,
        "seconds": command["ended"] - command["began"],
        "outside": command["ended"] - last + first - command["began"],
        "jobs": {name: job["seconds"] for name, job in sorted(jobs.items())},
        "gaps": (last - first - sum(job["seconds"] for job in jobs.values())) / len(jobs) if cores == 1 else None,
        "job_start": before_work(folder, release, jobs),
    }


def before_work(folder: Path, release: str, jobs: dict[str, dict[str, float]]) -> float:
    """Mean seconds of the processes of blocks that their records do not count: Python, libraries, checks of inputs."""
    places = {"quantize": f"results/{release}/blocks/{{}}.json"}
    places["reference"] = "results/reference/demo-moe/demo/routing_{}.json"
    found = []
    for name, job in jobs.items():
        if job["rule"] in places:
            record = json.loads((folder / places[job["rule"]].format(number(name))).read_text(encoding="utf-8"))
            found.append(job["seconds"] - record["seconds"])
    return statistics.mean(found)


def tune(folder: Path, release: str, block: int, threads: int, iters: int, into: Path) -> list[str]:
    """The command of the quantize job of a block whose inputs are in `folder`, without the graph around it."""
    case = map(str, (folder, release, block, threads, iters, into))
    return [sys.executable, __file__, "tune", *case]


def tune_here(folder: Path, release: str, block: int, threads: int, iters: int, into: Path) -> None:
    """What the script of the rule does, with the settings of the config and nothing held against records."""
    os.chdir(folder)
    from requant.config import parse
    from requant.quantize import BlockJob, quantize_block

    config = parse(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    settings = config.releases[release]
    chain = Path("results/reference") / settings.model / settings.calibration
    into.mkdir(parents=True)
    quantize_block(
        BlockJob(
            source=ROOT / config.models[settings.model].path,
            release=release,
            model=settings.model,
            block=block,
            scheme=settings.scheme,
            tuning=settings.tuning.model_copy(update={"inputs": "reference", "threads": threads, "iters": iters}),
            keep=settings.keep,
            tokens=Path("results/calibration") / settings.model / settings.calibration / "tokens.safetensors",
            hidden=chain / f"hidden_{block - 1}.safetensors",
            targets=chain / f"hidden_{block}.safetensors",
        ),
        *(into / name for name in ("block.safetensors", "block.json", "chain.safetensors")),
    )


def seconds_of(commands: list[list[str]]) -> float:
    """Mean seconds of commands that start together."""
    start, took = time.perf_counter(), []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for command in commands]
    while running:
        pid, status = os.wait()
        if status:
            sys.exit(f"{commands}: exit status {os.waitstatus_to_exitcode(status)}")
        took.append(time.perf_counter() - start)
        ended = next(process for process in running if process.pid == pid)
        ended.returncode = 0
        running.remove(ended)
    return statistics.mean(took)


def side_by_side(folder: Path, release: str, scratch: Path, repeats: int, iters: int) -> dict[str, float]:
    """Seconds of tuners by themselves, two at a time, and with two threads: medians, each case in every round."""
    cases: dict[str, list[float]] = {"alone": [], "two at a time": [], "two threads": []}
    for turn in range(repeats):
        commands = {
            name: [tune(folder, release, block, threads, iters, scratch / f"{turn}-{name}-{block}") for block in PAIR]
            for name, threads in (("alone", 1), ("two at a time", 1), ("two threads", 2))
        }
        cases["two at a time"].append(seconds_of(commands.pop("two at a time")))
        for name, alone in commands.items():
            cases[name].append(statistics.mean(seconds_of([command]) for command in alone))
    return {name: statistics.median(took) for name, took in cases.items()}


def simulated(run: dict, jobs: dict[str, float], gaps: float, faster: float = 1.0, beside: float = 1.0) -> float:
    """Seconds of `run` from its first job to its last, by the seconds of each of the `jobs` of such a build.

    gaps: seconds of the graph between two jobs; faster: what a tuner takes with the run's threads, of what it took in
    `jobs`; beside: what a job takes with another beside it.
    """
    tuners = sorted((name for name in jobs if name.startswith("quantize/")), key=number)
    chain = sorted((name for name in jobs if name.startswith("reference/")), key=number)
    work = Work(
        reference=[jobs[name] for name in chain],
        quantize=[jobs[name] * faster for name in tuners],
        threads=run["threads"],
        stages={"pack": jobs[f"pack/{run['release']}"]},
    )
    # the embeddings are there, and nothing behind the packed release is asked for
    found = jobs_of(work, segment_of(run["inputs"], len(chain)))
    found = [job for job in found if job.rule not in ("embed", "evaluate")]
    found = [replace(job, after=tuple(name for name in job.after if name != "reference -1")) for job in found]
    machine = Machine(run["cores"], per_node=run["cores"], coordination=gaps, beside=beside)
    return simulate(found, machine).seconds


def number(name: str) -> int:
    """The block of a job."""
    return int(name.rsplit("/", 1)[1])


def check(releases: list[str], iters: int, repeats: int, out: Path) -> None:
    """Builds, simulates and compares; writes timeline_check.json."""
    results = []
    print("| release | cores | inputs | threads | measured, s | simulated, s | ratio | replayed, s | ratio |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="requant-timeline-") as name:
        scratch = Path(name)
        for release in releases:
            base = scratch / release
            base.mkdir()
            config = configure(base, release, inputs="reference", threads=1, iters=iters)
            embedded = "results/reference/demo-moe/demo/embedded.safetensors"
            build(base, config, 2, embedded, "results/source/demo-moe/source.json")
            warm = scratch / f"{release}-warm"  # the first tuner of a machine compiles its loops
            shutil.copytree(base, warm)
            build(warm, config, 2, *(f"results/{release}/blocks/{block}.json" for block in (0, *PAIR)))
            tuners = side_by_side(warm, release, scratch / f"{release}-apart", repeats, iters)
            cases = [(1, inputs, 1) for inputs in MODES] + [(2, inputs, 1) for inputs in MODES]
            cases += [(2, inputs, 2) for inputs in MODES]
            alone = {}
            for cores, inputs, threads in cases:
                folder = scratch / f"{release}-{cores}-{inputs}-{threads}"
                run = timed(base, folder, release, cores, inputs=inputs, threads=threads, iters=iters)
                shutil.rmtree(folder)
                one = alone.setdefault(inputs, run)
                predicted = simulated(
                    run,
                    one["jobs"],
                    one["gaps"],
                    faster=tuners["two threads"] / tuners["alone"] if threads == 2 else 1.0,
                    beside=tuners["two at a time"] / tuners["alone"] if cores == 2 else 1.0,
                )
                run["tuners"] = tuners
                run["simulated"] = one["outside"] + predicted
                run["replayed"] = run["outside"] + simulated(run, run["jobs"], one["gaps"])
                results.append(run)
                ratios = {key: run[key] / run["seconds"] for key in ("simulated", "replayed")}
                print(
                    f"| {release} | {cores} | {inputs} | {threads} | {run['seconds']:.1f} | {run['simulated']:.1f} | "
                    f"{ratios['simulated']:.3f} | {run['replayed']:.1f} | {ratios['replayed']:.3f} |",
                    flush=True,
                )
                write(out / "timeline_check.json", results)
            print(f"{release}, seconds of a tuner: {tuners}", flush=True)


def write(path: Path, results: list[dict], **given) -> None:
    """Results with what they rest on: the machine that they were measured on, unless rates are `given`."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (given or {"machine": {"cpu": model, "cores": os.cpu_count()}}) | {"results": results}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("check")
    one.add_argument("--releases", nargs="+", default=["demo-w3a16"])
    one.add_argument("--iters", type=int, default=200)
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    one = commands.add_parser("large")
    one.add_argument("--model", type=Path, required=True, help="a directory with the config.json of DeepSeek-V3.2")
    for name, rate in (("disk", 3.0), ("shared", 12.0), ("hub", 1.0)):
        one.add_argument(f"--{name}", type=float, default=rate, help="GB a second")
    one.add_argument("--segment", type=int, default=8)
    one.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    inner = commands.add_parser("tune")
    for name, kind in (
        ("folder", Path),
        ("release", str),
        ("block", int),
        ("threads", int),
        ("iters", int),
        ("into", Path),
    ):
        inner.add_argument(name, type=kind)
    options = vars(parser.parse_args())
    {"large": large, "check": check, "tune": tune_here}[options.pop("what")](**options)


if __name__ == "__main__":
    main()

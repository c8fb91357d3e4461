"""What the graph takes outside of its jobs: a build of 61 blocks and two releases whose jobs do nothing.

    python benchmarks/coordination.py [--blocks 61] [--experts 256] [--cores 1 2] [--schedulers ilp greedy] [--out FILE]

The graph is the real one, in a copy of the checkout in which each script makes empty outputs and ends; rules, planning,
input functions, records and the profile are as they are, but that nobody asks whether the disk has room. The model is
that of planning.py: a lock alone. A job's process is Python's start and Snakemake's preamble; what is left of the
wall's time is the graph's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from planning import lay_out  # noqa: E402

NOTHING = """from pathlib import Path

for path in map(Path, snakemake.output):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
raise SystemExit

"""
ROOM = {"disk.py": "check_room", "download.py": "check_download_room"}
CHECKOUT = ("Snakefile", "config.yaml", "config", "rules", "scripts", "src", "envs", "profiles", "report", "demo")
CHECKOUT += ("locks", "benchmarks", "flake.lock")


def copy_checkout(into: Path) -> Path:
    """A copy of the checkout whose scripts do nothing; what they import stands behind their end, for the rules."""
    for name in CHECKOUT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, into / name)
    for script in (into / "scripts").glob("*.py"):
        script.write_text(NOTHING + script.read_text(encoding="utf-8"), encoding="utf-8")
    for module, function in ROOM.items():
        with (into / "src" / "requant" / module).open("a", encoding="utf-8") as code:
            code.write(f"\n\ndef {function}(*_) -> None:\n    pass\n")
    return into


def build(checkout: Path, folder: Path, cores: int, scheduler: str) -> dict:
    """Builds everything in `folder` by the graph of `checkout`; seconds in all, before the first job, and of jobs.

    processor_seconds: of Snakemake's own process and of the jobs' together.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile")]
    log = folder / "log"
    load, began, clock = os.getloadavg()[0], time.time(), time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--configfile", "planning.yaml", "--cores", str(cores), "--scheduler", scheduler],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - clock
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(process.args)}: exit status {process.returncode}\n{log.read_text()[-3000:]}")
    records = {}
    for path in (folder / ".snakemake" / "metadata").rglob("*"):
        if path.is_file():
            record = json.loads(path.read_text(encoding="utf-8"))
            records[tuple(record["log"])] = record
    processes = [tsv_seconds(path) for path in (folder / "results/benchmarks").rglob("*.tsv")]
    return {
        "cores": cores,
        "scheduler": scheduler,
        "load_before": load,
        "jobs": len(records),
        "seconds": seconds,
        "before_the_first": min(record["starttime"] for record in records.values()) - began,
        "processes": len(processes),
        "process_seconds": sum(processes),
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def tsv_seconds(path: Path) -> float:
    """Seconds of a job's process."""
    header, row = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[:2])
    return float(row[header.index("s")])


def outside(run: dict) -> float:
    """Seconds a job of one core that neither the planning nor the job's process takes."""
    return (run["seconds"] - run["before_the_first"] - run["process_seconds"]) / run["jobs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--schedulers", nargs="+", default=["ilp", "greedy"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "coordination.json")
    options = parser.parse_args()
    print(
        "| scheduler | cores | jobs | seconds | before the first job | of processes | a job, outside of its process |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="requant-coordination-") as name:
        (Path(name) / "checkout").mkdir()
        checkout = copy_checkout(Path(name) / "checkout")
        for scheduler, cores in product(options.schedulers, options.cores):
            folder = Path(name) / f"{scheduler}-{cores}"
            folder.mkdir()
            lay_out(folder, options.blocks, options.experts)
            run = build(checkout, folder, cores, scheduler) | {"blocks": options.blocks, "releases": 2}
            run["outside_a_job"] = outside(run) if cores == 1 else None
            results.append(run)
            beside = "" if cores > 1 else f"{run['outside_a_job']:.3f}"
            print(
                f"| {scheduler} | {cores} | {run['jobs']} | {run['seconds']:.1f} | {run['before_the_first']:.1f} | "
                f"{run['process_seconds']:.1f} | {beside} |",
                flush=True,
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

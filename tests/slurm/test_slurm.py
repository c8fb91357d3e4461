"""A build through a real Slurm: several jobs at once, jobs lost, and the bytes of a build on one machine."""

import hashlib
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from building import ROOT, Build, environment, lay_out
from cluster import Cluster

pytestmark = pytest.mark.workflow

RELEASES = ("ll-nvfp4", "ll-w3a16")
PACKED = [f"results/{release}/pack.json" for release in RELEASES]
# Asked more often than on a cluster; a node of four CPUs takes no wider group.
QUICK = ["--slurm-init-seconds-before-status-checks", "5", "--seconds-between-status-checks", "5", "--cores", "2"]
# Block 0 of one release gets less than it takes, until it is tried again. Every block asks for one of two files that
# pass for GPUs.
STARVED = f"700 * 2 ** (attempt - 1) if (wildcards.release, wildcards.block) == ('{RELEASES[1]}', '0') else 1500"
BENT = ["--set-resources", f"quantize:mem_mb={STARVED}", "quantize:gpu=1"]
LOST, STARVED_JOB = (f"rule_quantize_wildcards_{release}_0" for release in RELEASES)
MINUTES = 8


@dataclass
class Watched:
    """What was seen of a build through Slurm. together: the most jobs that ran at a time; gpus: of each job."""

    directory: Path
    output: str = ""
    status: int | None = None
    together: int = 0
    lost: str = ""
    names: dict[str, str] = field(default_factory=dict)
    gpus: dict[str, str] = field(default_factory=dict)
    ended: list[dict[str, str]] = field(default_factory=list)

    def states(self, rule: str) -> list[str]:
        """How the jobs of a rule and its wildcards ended, in that order."""
        return [job["JobState"] for job in self.ended if self.names.get(job["JobId"]) == rule]


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Build:
    """Two releases of a tiny model, packed on this machine."""
    build = laid_out(tmp_path_factory.mktemp("local"))
    build.run(*PACKED)
    return build


def laid_out(directory: Path) -> Build:
    """A working directory with a model of two blocks, each of which is tuned by itself."""
    build = lay_out(directory, ())
    tiny.write_checkpoint(directory / "models/ll", "llama", seed=7, shard_size="1GB", num_hidden_layers=2)

    def configure(data):
        data["models"] = {"ll": {"path": "models/ll"}}
        data["releases"] = {
            name: {
                "model": "ll",
                "scheme": scheme,
                "calibration": "small",
                "tuning": {"iters": 2, "batch_size": 4, "inputs": "reference"},
            }
            for name, scheme in zip(RELEASES, ("NVFP4", "W3A16"), strict=True)
        }
        data["build"] = list(RELEASES)

    build.configure(configure)
    return build


def command(*arguments: str) -> list[str]:
    options = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml", "--workflow-profile", "slurm"]
    return [sys.executable, "-m", "snakemake", *options, *arguments]


@pytest.fixture(scope="module")
def through_slurm(cluster: Cluster, tmp_path_factory) -> Watched:
    """The same two releases through Slurm, while a job is cancelled and the node is drained and resumed."""
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("needs snakemake-executor-plugin-slurm, of this environment's lock")
    build = laid_out(tmp_path_factory.mktemp("cluster"))
    seen = Watched(build.directory)
    log = build.directory / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(*QUICK, *BENT, "--", *PACKED),
            cwd=build.directory,
            env=cluster.environment | environment() | {"PATH": cluster.environment["PATH"]},
            stdout=output,
            stderr=output,
        )
    end = time.monotonic() + 60 * MINUTES
    try:
        while process.poll() is None and time.monotonic() < end:
            running = cluster.jobs("RUNNING")
            seen.together, seen.names = max(seen.together, len(running)), seen.names | running
            seen.gpus |= {
                job: cluster.run("squeue", "--noheader", "--jobs", job, "--Format", "tres-per-job").strip()
                for job in running
                if job not in seen.gpus
            }
            if not seen.lost and (found := [job for job, name in running.items() if name == LOST]):
                lose(cluster, found[0])
                seen.lost = found[0]
            time.sleep(0.5)
        seen.status = process.poll()
    finally:
        process.kill()
        process.wait()
    seen.output, seen.ended = log.read_text(), cluster.ended()
    return seen


def lose(cluster: Cluster, job: str) -> None:
    """Ends a job while the node takes no others; then it does again."""
    cluster.run("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    cluster.run("scancel", job)
    cluster.run("scontrol", "update", "nodename=node1", "state=resume")


def digests(build: Path) -> dict[str, str]:
    """SHA-256 of all files of the releases and of the blocks behind them."""
    files = [path for release in RELEASES for path in sorted((build / "results" / release).glob("*/*.safetensors"))]
    files += [path for release in RELEASES for path in sorted((build / "results" / release / "model").iterdir())]
    return {str(path.relative_to(build)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_build_through_slurm_has_the_bytes_of_a_local_one(local, through_slurm):
    assert through_slurm.status == 0, through_slurm.output[-5000:]
    found = digests(local.directory)
    assert len(found) > 12 and digests(through_slurm.directory) == found
    assert through_slurm.together > 1, "jobs run side by side"


def test_a_cancelled_job_of_a_drained_node_is_done_again(through_slurm):
    assert through_slurm.states(LOST) == ["CANCELLED", "COMPLETED"]


def test_a_job_that_was_killed_for_its_memory_gets_more(through_slurm):
    states = through_slurm.states(STARVED_JOB)
    assert states[0] != "COMPLETED" and states[1:] == ["COMPLETED"], states
    asked = [job["Tres"] for job in through_slurm.ended if through_slurm.names.get(job["JobId"]) == STARVED_JOB]
    assert ["mem=700M" in asked[0], "mem=1400M" in asked[1]] == [True, True], asked


def test_short_jobs_share_a_submission(through_slurm):
    groups = [name for name in through_slurm.names.values() if name.startswith("rule_source")]
    records = list((through_slurm.directory / "results/source/ll/files").glob("*.json"))
    assert len(records) > 3 and len(groups) < len(records), groups


def test_a_job_gets_the_gpus_that_it_asks_for(through_slurm):
    of = {through_slurm.names[job]: gpus for job, gpus in through_slurm.gpus.items()}
    assert of[STARVED_JOB] == "gres:gpu:1" and of["rule_reference_wildcards_ll_small_0"] in ("", "N/A")


def test_nothing_is_left_to_do_on_one_machine(through_slurm):
    """What a cluster built is fresh for a build without it."""
    build = Build(through_slurm.directory)
    assert build.planned(*PACKED) == {}

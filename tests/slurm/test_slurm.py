"""A build through a real Slurm: several jobs at once, jobs lost, and the bytes of a build on one machine."""

import hashlib
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from building import ROOT, Build, environment, lay_out, with_plugins
from cluster import Cluster

pytestmark = pytest.mark.workflow

RELEASE, COPIED = "ll-nvfp4", "ll-bf16"
TARGETS = [f"results/{RELEASE}/pack.json", *(f"results/{COPIED}/blocks/{block}.safetensors" for block in (0, 1))]
# Asked more often than on a cluster.
QUICK = ["--slurm-init-seconds-before-status-checks", "5", "--seconds-between-status-checks", "5", "--cores", "2"]
# A block gets less memory than it takes, until it is tried again. Each asks for one of two files that pass for GPUs.
STARVED = "700 * 2 ** (attempt - 1) if wildcards.block == '1' else 1600"
BENT = ["--set-resources", f"quantize_apart:mem_mb={STARVED}", "quantize_apart:gpu=1"]
LOST_JOB, STARVED_JOB = (f"rule_quantize_apart_wildcards_{RELEASE}_{block}" for block in (0, 1))
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
    """A quantized release of a model of two blocks, packed on this machine, and the blocks of one in BF16."""
    directory = tmp_path_factory.mktemp("local")
    build = lay_out(directory, ())
    tiny.write_checkpoint(directory / "models/ll", "llama", seed=7, shard_size="1GB", num_hidden_layers=2)

    def configure(data):
        data["models"] = {"ll": {"path": "models/ll"}}
        tuning = {"iters": 2, "batch_size": 4, "inputs": "reference"}
        data["releases"] = {
            RELEASE: {"model": "ll", "scheme": "NVFP4", "calibration": "small", "tuning": tuning},
            COPIED: {"model": "ll", "scheme": "BF16", "calibration": "small"},
        }
        data["build"] = [RELEASE, COPIED]

    build.configure(configure)
    build.run(*TARGETS)
    return build


def command(*arguments: str) -> list[str]:
    options = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml", "--workflow-profile", "slurm"]
    return [sys.executable, "-m", "snakemake", *options, *arguments]


@pytest.fixture(scope="module")
def through_slurm(cluster: Cluster, local: Build, tmp_path_factory) -> Watched:
    """The same through Slurm, behind the reference chain; a job is cancelled, the node drained and resumed."""
    build = Build(tmp_path_factory.mktemp("cluster") / "build")
    shutil.copytree(local.directory, build.directory, symlinks=True)
    for release in (RELEASE, COPIED):
        shutil.rmtree(build.directory / "results" / release)
    seen = Watched(build.directory)
    log = build.directory / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(*QUICK, *BENT, "--", *TARGETS),
            cwd=build.directory,
            env=with_plugins(cluster.environment | environment() | {"PATH": cluster.environment["PATH"]}),
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
            if not seen.lost and (found := [job for job, name in running.items() if name == LOST_JOB]):
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
    """SHA-256 of the packed release, and of all blocks."""
    results = build / "results"
    files = sorted([*results.glob("ll-*/blocks/*.safetensors"), *(results / RELEASE / "model").iterdir()])
    return {str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_build_through_slurm_has_the_bytes_of_a_local_one(local, through_slurm):
    assert through_slurm.status == 0, through_slurm.output[-5000:]
    found = digests(local.directory)
    assert len(found) > 8 and digests(through_slurm.directory) == found
    assert through_slurm.together > 1, "jobs run side by side"


def test_a_cancelled_job_of_a_drained_node_is_done_again(through_slurm):
    assert through_slurm.states(LOST_JOB) == ["CANCELLED", "COMPLETED"]


def test_a_job_that_was_killed_for_its_memory_gets_more(through_slurm):
    states = through_slurm.states(STARVED_JOB)
    assert states[0] != "COMPLETED" and states[1:] == ["COMPLETED"], states
    asked = [job["Tres"] for job in through_slurm.ended if through_slurm.names.get(job["JobId"]) == STARVED_JOB]
    assert ["mem=700M" in asked[0], "mem=1400M" in asked[1]] == [True, True], asked


def test_short_jobs_share_a_submission(through_slurm):
    """Both copied blocks are of one job, which has the CPUs and the memory of two."""
    copies = [job for job in through_slurm.ended if through_slurm.names.get(job["JobId"], "").startswith("rule_copies")]
    assert [job["JobState"] for job in copies] == ["COMPLETED"]
    assert "cpu=2," in copies[0]["Tres"], copies


def test_a_job_gets_the_gpus_that_it_asks_for(through_slurm):
    of = {through_slurm.names[job]: gpus for job, gpus in through_slurm.gpus.items()}
    assert of[LOST_JOB] == of[STARVED_JOB] == "gres:gpu:1"
    assert {gpus for name, gpus in of.items() if "quantize" not in name} <= {"", "N/A"}


def test_nothing_is_left_to_do_on_one_machine(through_slurm):
    """What a cluster built is fresh for a build without it."""
    build = Build(through_slurm.directory)
    assert build.planned(*TARGETS) == {}
